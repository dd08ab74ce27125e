"""Feed-forward modules as two kernels: the same numbers as the layers apart, and which modules of models are fused."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import numpy as np
import pytest

import w4a16gen
from w4a16gen import InvalidValueError, QuantMode
from w4a16gen.weights.quantized import QuantizedWeight
from w4a16gen.weights.reference import random_weight

torch = pytest.importorskip("torch")
integration = pytest.importorskip("w4a16gen.integrations.torch")
interleaving = pytest.importorskip("w4a16gen.integrations.torch.interleave")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:bf16 and fp16 are mixed:UserWarning")
HIDDEN, INNER = 128, 192
CS, FGS, FGSZ = QuantMode
FUNCTIONS = {
    "swiglu": torch.nn.functional.silu,
    "geglu": torch.nn.functional.gelu,
    "geglu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}


def layer(rng: np.random.Generator, n: int = INNER, k: int = HIDDEN, mode: QuantMode = FGS, **more: Any) -> Any:
    group_size = more.pop("group_size", 64)
    weight = random_weight(rng, n, k, group_size if mode.is_grouped else k, mode)
    packed = w4a16gen.pack_weight(weight, target=more.pop("target", "native"))
    return integration.W4A16Linear.from_packed(packed, **more)


def half(rng: np.random.Generator, *shape: int) -> Any:
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float16))


SIZES = [(32, 256, 32), (64, 256, 128), (96, 384, 64), (160, 200, 200), (256, 512, 128)]


@pytest.mark.parametrize("mode", QuantMode, ids=str)
@pytest.mark.parametrize(("n", "k", "group"), SIZES)
@pytest.mark.parametrize("size", [1e-4, 0.01, 3.0])
def test_interleaved_bytes_are_those_of_the_whole_weight(
    mode: QuantMode, n: int, k: int, group: int, size: float, rng: np.random.Generator
) -> None:
    whole = random_weight(rng, 2 * n, k, group if mode.is_grouped else k, mode, size=size)
    parts = [integration.ops.on_torch(w4a16gen.pack_weight(whole.channels(np.arange(at, at + n)))) for at in (0, n)]
    got = interleaving.interleave(*parts)
    np.testing.assert_array_equal(got.numpy(), w4a16gen.pack_weight(whole, gated=True).data)
    assert torch.equal(interleaving.interleave(integration.ops.on_torch(w4a16gen.pack_weight(whole))), got)


def test_bytes_that_cannot_be_interleaved_are_left_to_the_host(rng: np.random.Generator) -> None:
    on_torch = integration.ops.on_torch
    odd = [on_torch(w4a16gen.pack_weight(random_weight(rng, 48, 128, 64, FGS))) for _ in range(2)]
    assert interleaving.interleave(*odd) is None
    assert interleaving.interleave(on_torch(w4a16gen.pack_weight(random_weight(rng, 96, 128, 64, FGS)))) is None
    cutlass = on_torch(w4a16gen.pack_weight(random_weight(rng, 64, 128, 64, FGS), target="cutlass"))
    assert interleaving.interleave(cutlass, cutlass) is None
    # A factor's scale whose last bit a lower channel holds, but an upper one does not.
    weight = random_weight(rng, 64, 128, 64, FGS)
    scales = weight.scales.copy()
    scales[0, :8], scales[1, :8] = 40000, np.float16(2.0**-11 * (1 + 1 / 1024))
    wide = on_torch(w4a16gen.pack_weight(QuantizedWeight(weight.q, scales, None, 64, FGS)))
    assert interleaving.interleave(wide, wide) is None


@pytest.mark.parametrize("activation", FUNCTIONS)
@pytest.mark.parametrize(
    ("n", "modes"),
    [(64, (FGS, FGS)), (48, (FGSZ, FGSZ)), (96, (CS, CS)), (64, (FGS, FGSZ)), (64, (CS, FGS))],
    ids=str,
)
def test_a_gated_layer_computes_what_two_layers_compute(
    activation: str, n: int, modes: tuple[QuantMode, QuantMode], rng: np.random.Generator
) -> None:
    group = HIDDEN if CS in modes else 64
    order = rng.permutation(HIDDEN)
    gate, up = (
        layer(rng, n, mode=mode, group_size=group, permutation=order, alpha=0.5, bias=bias)
        for mode, bias in zip(modes, (None, half(rng, n)), strict=True)
    )
    gate.overflow = "check"
    fused = integration.fuse_gated(gate, up, activation)
    assert (fused.out_features, fused.activation, fused.overflow) == (n, activation, "check")
    x = half(rng, 2, 3, HIDDEN)
    wanted = FUNCTIONS[activation](gate(x).double()) * up(x).double()
    assert torch.allclose(fused(x).double(), wanted, rtol=4e-3, atol=2e-3)


def change(made: Any, name: str, value: Any) -> Any:
    setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda rng: layer(rng, 128), "layers with n of 192 and 128 cannot be gate and factor"),
        (lambda rng: layer(rng, k=256), "layers with k of 128 and 256 cannot be fused"),
        (lambda rng: layer(rng, alpha=2.0), "layers with alpha of 1.0 and 2.0 cannot be fused"),
        (lambda rng: layer(rng, input_scale=np.ones(HIDDEN)), "layers with different input_scale cannot be fused"),
        (lambda rng: layer(rng, activation="silu"), "layers with activation of none and silu cannot be fused"),
        (lambda rng: change(layer(rng), "output_scale", 2.0), "output_scale of 2.0 divides what goes into"),
        (lambda _rng: torch.nn.Linear(8, 8), "gate and up must be W4A16Linear"),
    ],
)
def test_layers_that_cannot_be_gate_and_factor_are_refused(other: Any, message: str, rng: np.random.Generator) -> None:
    with pytest.raises(InvalidValueError, match=message):
        integration.fuse_gated(layer(rng), other(rng))


def test_gates_cannot_be_fused_again_and_other_layouts_not_at_all(rng: np.random.Generator) -> None:
    gated = integration.fuse_gated(layer(rng), layer(rng))
    with pytest.raises(InvalidValueError, match="layers whose gates are interleaved cannot be fused"):
        integration.fuse([gated, gated])
    with pytest.raises(InvalidValueError, match="activation silu does not fit"):
        integration.fuse_gated(layer(rng), layer(rng), "silu")
    with pytest.raises(InvalidValueError, match="target cutlass compute no activations"):
        integration.fuse_gated(layer(rng, target="cutlass"), layer(rng, target="cutlass"))
    with pytest.raises(InvalidValueError, match="layers with activation silu cannot be gate and factor"):
        integration.fuse_gated(layer(rng, activation="silu"), layer(rng, activation="silu"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_module_computes_what_three_layers_compute(dtype: str, rng: np.random.Generator) -> None:
    gate, up, down = layer(rng), layer(rng), layer(rng, HIDDEN, INNER)
    made = integration.W4A16MLP.from_linears(gate, up, down)
    x = half(rng, 2, 3, HIDDEN).to(getattr(torch, dtype))
    inner = integration.fuse_gated(gate, up)(x.half())
    assert torch.equal(made(x), down(inner).to(x.dtype))
    residual = half(rng, 2, 3, HIDDEN).to(x.dtype)
    wanted = down(inner, residual) if dtype == "float16" else down(inner).to(x.dtype) + residual
    assert torch.equal(made(x, residual), wanted)
    assert made(x).dtype == x.dtype
    assert sorted(made.state_dict()) == ["down._extra_state", "down.packed", "gate_up._extra_state", "gate_up.packed"]


def test_a_residual_follows_a_layer_whose_kernels_have_no_epilogues(rng: np.random.Generator) -> None:
    down, residual = layer(rng, HIDDEN, INNER, target="cutlass"), half(rng, 3, HIDDEN)
    made = integration.W4A16MLP.from_linears(layer(rng), layer(rng), down)
    x = half(rng, 3, HIDDEN)
    assert torch.equal(made(x, residual), made(x) + residual)
    with pytest.raises(InvalidValueError, match="target cutlass compute no activations and add no residual"):
        down(half(rng, 3, INNER), residual)


def test_a_module_is_one_graph(rng: np.random.Generator) -> None:
    made = integration.W4A16MLP.from_linears(layer(rng), layer(rng), layer(rng, HIDDEN, INNER))
    torch.compiler.reset()
    compiled = torch.compile(made, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (2, 3, 5):
        x, residual = half(rng, m, HIDDEN).bfloat16(), half(rng, m, HIDDEN).bfloat16()
        with torch.no_grad():
            assert torch.equal(compiled(x, residual), made(x, residual))


def test_layers_that_do_not_follow_one_another_are_refused(rng: np.random.Generator) -> None:
    gated = integration.fuse_gated(layer(rng), layer(rng))
    for first, second, message in (
        (gated, layer(rng), "down with k of 128 must take the 192 outputs of gate_up"),
        (layer(rng), layer(rng, HIDDEN, INNER), "gate_up with activation none must have a gated one"),
        (gated, torch.nn.Linear(8, 8), "gate_up and down must be W4A16Linear"),
    ):
        with pytest.raises(InvalidValueError, match=message):
            integration.W4A16MLP(first, second)


class Mlp(torch.nn.Module):  # type: ignore[misc, name-defined]
    """A feed-forward module as models have it."""

    def __init__(self, rng: np.random.Generator, act_fn: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = layer(rng), layer(rng), layer(rng, HIDDEN, INNER)
        self.act_fn = act_fn

    def forward(self, x: Any) -> Any:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Swapped(Mlp):
    """One that activates the other half."""

    def forward(self, x: Any) -> Any:
        return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))


class Failing(Mlp):
    """One that asks for more."""

    def forward(self, x: Any) -> Any:
        return super().forward(x) * self.config.scale


def modules(rng: np.random.Generator) -> Any:
    """Return modules that can be fused, and some that cannot."""
    made = {
        "silu": Mlp(rng, torch.nn.SiLU()),
        "gelu": Mlp(rng, torch.nn.GELU()),
        "tanh": Mlp(rng, torch.nn.GELU(approximate="tanh")),
        "function": Mlp(rng, torch.nn.functional.silu),
        "relu": Mlp(rng, torch.nn.ReLU()),
        "swapped": Swapped(rng, torch.nn.SiLU()),
        "failing": Failing(rng, torch.nn.SiLU()),
        "dense": Mlp(rng, torch.nn.SiLU()),
        "more": Mlp(rng, torch.nn.SiLU()),
        "hooked": Mlp(rng, torch.nn.SiLU()),
        "watched": Mlp(rng, torch.nn.SiLU()),
        "wrapped": Mlp(rng, torch.nn.SiLU()),
        "scaled": Mlp(rng, torch.nn.SiLU()),
    }
    made["dense"].up_proj = torch.nn.Linear(HIDDEN, INNER)
    made["more"].dropout = torch.nn.Dropout()
    made["hooked"].up_proj.register_forward_hook(lambda *_: None)
    made["watched"].act_fn.register_forward_hook(lambda *_: None)
    made["wrapped"].down_proj.forward = partial(integration.W4A16Linear.forward, made["wrapped"].down_proj)
    made["scaled"].up_proj.output_scale = 2.0
    model = torch.nn.ModuleDict(made)
    model["again"] = model["silu"]
    return model.eval()


def test_modules_of_a_model_are_fused_where_they_can_be(rng: np.random.Generator) -> None:
    model, x = modules(rng), half(rng, 3, HIDDEN)
    numbers = torch.random.get_rng_state()
    before = {name: model[name](x) for name in ("silu", "gelu", "tanh", "function")}
    report = integration.fuse_mlps(model)
    assert torch.equal(torch.random.get_rng_state(), numbers)
    assert report.fused == ("silu", "again", "gelu", "tanh", "function")
    assert str(report) == "w4a16gen fused 5 of 14 feed-forward modules"
    activations = {name: model[name].gate_up.activation for name in report.fused}
    assert activations == {
        "silu": "swiglu",
        "again": "swiglu",
        "function": "swiglu",
        "gelu": "geglu",
        "tanh": "geglu_tanh",
    }
    assert model["again"] is model["silu"]
    assert not model["silu"].training
    for name, wanted in before.items():
        assert torch.allclose(model[name](x), wanted, rtol=1e-2, atol=1e-2)
    reasons = {
        "relu": "its act_fn is none of SiLU and GELU",
        "swapped": r"or it computes something else than down\(act\(gate\(x\)\) \* up\(x\)\)",
        "failing": "computes something else",
        "dense": "its layers are not all W4A16Linear: call replace_linears before",
        "more": "it has more parts than gate_proj, up_proj, down_proj, act_fn",
        "hooked": "it has hooks, which would be lost",
        "watched": "it has hooks, which would be lost",
        "wrapped": "it has hooks, which would be lost",
        "scaled": "output_scale of 2.0 divides what goes into the activation",
    }
    assert set(report.kept) == set(reasons)
    for name, reason in reasons.items():
        assert re.search(reason, report.kept[name]), (name, report.kept[name])
    with pytest.raises(InvalidValueError, match="model of type int must be"):
        integration.fuse_mlps(3)


def test_calibrate_leaves_what_goes_into_an_activation(rng: np.random.Generator) -> None:
    made = integration.W4A16MLP.from_linears(layer(rng), layer(rng), layer(rng, HIDDEN, INNER))
    x = half(rng, 3, HIDDEN).float() * 1e5
    scales = integration.calibrate(made, lambda: made(x.bfloat16() * 1e-2))
    assert made.gate_up.output_scale == 1
    assert set(scales) <= {"gate_up", "down"}
    integration.calibrate(made, lambda: made(x))
    assert made.gate_up.activation_scale > 1
    assert made.gate_up.output_scale == 1


@pytest.mark.parametrize(("family", "activation"), [("llama", "swiglu"), ("qwen2", "swiglu"), ("gemma", "geglu_tanh")])
def test_modules_of_transformers_are_fused(family: str, activation: str, rng: np.random.Generator) -> None:
    transformers = pytest.importorskip("transformers")
    more = {} if family != "gemma" else {"hidden_activation": "gelu_pytorch_tanh", "hidden_act": "gelu_pytorch_tanh"}
    config = transformers.AutoConfig.for_model(
        family, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=64, vocab_size=32, **more,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for block in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            made = integration.W4A16Linear.from_linear(getattr(block.mlp, name), group_size=64)
            setattr(block.mlp, name, made)
    tokens = torch.from_numpy(rng.integers(0, 32, (1, 5)))
    with torch.no_grad():
        wanted = model(tokens).logits
        report = integration.fuse_mlps(model)
        assert report.fused == ("model.layers.0.mlp", "model.layers.1.mlp")
        assert {block.mlp.gate_up.activation for block in model.model.layers} == {activation}
        assert torch.allclose(model(tokens).logits, wanted, rtol=2e-2, atol=2e-2)
