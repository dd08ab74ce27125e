"""`W4A16Linear` on the CPU: its numbers, its state, and where it goes."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.checkpoints.cases import CASES

import w4a16gen
from w4a16gen import InvalidValueError, QuantMode
from w4a16gen.weights.reference import Expectation, error_over_bound, random_weight

torch = pytest.importorskip("torch")
linear = pytest.importorskip("w4a16gen.integrations.torch.linear")
safetensors = pytest.importorskip("safetensors.torch")
N, K, GROUP = 64, 256, 64
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.fixture
def weight(rng: np.random.Generator) -> w4a16gen.QuantizedWeight:
    """Return a random weight."""
    return random_weight(rng, N, K, GROUP, QuantMode.FINEGRAINED_SCALE_AND_ZEROS)


@pytest.fixture
def layer(weight: w4a16gen.QuantizedWeight, rng: np.random.Generator) -> Any:
    """Return a layer with everything that a layer can have."""
    return linear.W4A16Linear.from_packed(
        w4a16gen.pack_weight(weight),
        rng.standard_normal(N).astype(np.float16),
        permutation=rng.permutation(K),
        input_scale=(2.0 ** rng.integers(-1, 2, K)).astype(np.float16),
        alpha=0.5,
    )


def inputs(rng: np.random.Generator, dtype: Any = torch.float32, *leading: int) -> Any:
    """Return activations that bf16 holds exactly."""
    values = rng.standard_normal((*(leading or (5,)), K)).astype(np.float32)
    return torch.from_numpy(values).bfloat16().to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_are_as_exact_as_the_kernels_and_have_the_dtype_of_the_inputs(
    dtype: Any, layer: Any, weight: w4a16gen.QuantizedWeight, rng: np.random.Generator
) -> None:
    x = inputs(rng, dtype)
    y = layer(x)
    assert y.dtype == dtype
    a = (x.double() * layer.input_scale).numpy()[:, layer.permutation.numpy()]
    expected = Expectation(a, weight)
    bias = layer.bias.numpy()
    exact = torch.from_numpy(expected.result(0.5, bias))
    bound = torch.from_numpy(expected.bound(0.5, bias)) + torch.finfo(dtype).eps * exact.abs()
    assert bool(((y.double() - exact).abs() <= bound).all())


def test_the_dequantized_weight_is_that_of_an_equivalent_layer(layer: Any, rng: np.random.Generator) -> None:
    dense = torch.nn.Linear(K, N, dtype=torch.float64)
    dense.weight.data, dense.bias.data = layer.dequantize(torch.float64), layer.bias.double()
    x = inputs(rng)
    torch.testing.assert_close(layer(x).double(), dense(x.double()), rtol=2**-9, atol=1e-2)
    assert layer.dequantize().dtype == torch.float32


@pytest.mark.parametrize("leading", [(1,), (2, 3), (0,), (2, 0)])
def test_leading_dimensions_are_kept(layer: Any, leading: tuple[int, ...], rng: np.random.Generator) -> None:
    assert layer(inputs(rng, torch.bfloat16, *leading)).shape == (*leading, N)


def test_casts_leave_every_bit(layer: Any, rng: np.random.Generator) -> None:
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    x = inputs(rng)
    expected = layer(x)
    for cast in (
        layer.half,
        layer.bfloat16,
        layer.float,
        layer.double,
        lambda: layer.to(torch.bfloat16),
        lambda: layer.to("cpu", torch.float32),
        lambda: layer.type(torch.float32),
        lambda: torch.nn.Sequential(layer).bfloat16(),
    ):
        cast()
        after = dict(layer.named_buffers())
        assert after.keys() == before.keys()
        for name, buffer in after.items():
            assert buffer.dtype == before[name].dtype
            assert torch.equal(buffer.view(torch.uint8), before[name].view(torch.uint8))
    assert torch.equal(layer(x), expected)


def test_a_layer_moves_to_the_meta_device_and_is_filled_there(layer: Any, rng: np.random.Generator) -> None:
    x = inputs(rng)
    expected, saved = layer(x), layer.state_dict()
    empty = copy.deepcopy(layer).to("meta")
    assert {buffer.device.type for buffer in empty.buffers()} == {"meta"}
    assert empty(x.to("meta")).shape == expected.shape
    empty.load_state_dict(saved, assign=True)
    assert torch.equal(empty(x), expected)
    again = copy.deepcopy(layer).to("meta").to_empty(device="cpu")
    again.load_state_dict(saved)
    assert torch.equal(again(x), expected)


@pytest.mark.parametrize("transport", ["deepcopy", "pickle", "state dict", "torch.save", "safetensors"])
def test_a_copy_computes_the_same(layer: Any, transport: str, tmp_path: Path, rng: np.random.Generator) -> None:
    layer.activation_scale, layer.output_scale, layer.overflow = 4.0, 2.0, "check"
    x = inputs(rng)
    expected = layer(x)
    if transport == "deepcopy":
        made = copy.deepcopy(layer)
    elif transport == "pickle":
        made = pickle.loads(pickle.dumps(layer))  # noqa: S301  (our own bytes)
    else:
        saved = layer.state_dict()
        assert set(saved) == {"packed", "bias", "permutation", "input_scale", "_extra_state"}
        if transport == "torch.save":
            torch.save(saved, tmp_path / "layer.pt")
            saved = torch.load(tmp_path / "layer.pt", weights_only=True)
        elif transport == "safetensors":
            safetensors.save_file(saved, tmp_path / "layer.safetensors")
            saved = safetensors.load_file(tmp_path / "layer.safetensors")
        made = copy.deepcopy(layer)
        made.alpha, made.activation_scale, made.output_scale = 1.0, 1.0, 1.0
        made.packed.zero_()
        made.load_state_dict(saved)
    assert (made.alpha, made.activation_scale, made.output_scale) == (0.5, 4.0, 2.0)
    assert torch.equal(made(x), expected)


def test_the_state_of_another_layer_is_refused_before_anything_is_copied(layer: Any, rng: np.random.Generator) -> None:
    other = linear.W4A16Linear.from_packed(
        w4a16gen.pack_weight(random_weight(rng, N, K, 32, QuantMode.FINEGRAINED_SCALE_AND_ZEROS))
    )
    before = layer.packed.clone()
    for state, message in (
        (other.state_dict(), "holds a weight with group_size = 32, but this layer has 64"),
        (layer.state_dict() | {"_extra_state": torch.zeros(4, dtype=torch.uint8)}, "its facts are damaged"),
        (layer.state_dict() | {"_extra_state": text('{"format": "else", "alpha": 1}')}, "is of format 'else'"),
    ):
        with pytest.raises(InvalidValueError, match=message):
            layer.load_state_dict(state)
    assert torch.equal(layer.packed, before)
    facts = layer.facts | {"format": "w4a16gen.linear/1", "alpha": 1, "activation_scale": 3, "output_scale": 1}
    with pytest.raises(InvalidValueError, match="activation_scale of 3 must be a power of two"):
        layer.set_extra_state(text(str(facts).replace("'", '"')))
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict({})


def text(content: str) -> Any:
    return torch.frombuffer(bytearray(content.encode()), dtype=torch.uint8)


def test_printing_a_layer_shows_its_facts(layer: Any) -> None:
    assert repr(layer) == (
        "W4A16Linear(in_features=256, out_features=64, bias=True, group_size=64, mode=fgsz, act_order=True, alpha=0.5)"
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_linear_layer_is_rounded_to_nearest(dtype: Any) -> None:
    dense = torch.nn.Linear(K, N, dtype=dtype)
    made = linear.W4A16Linear.from_linear(dense, group_size=GROUP, zero_points=True)
    weight = dense.weight.detach()
    expected = w4a16gen.quantize(weight, group_size=GROUP, zero_points=True)
    np.testing.assert_array_equal(made.dequantize(torch.float64).numpy(), expected.dequantize())
    assert torch.equal(made.bias, dense.bias.detach().half())
    assert linear.W4A16Linear.from_linear(torch.nn.Linear(K, N, bias=False), group_size=None).bias is None


@pytest.mark.parametrize("name", ["gptq-act-order", "awq-gemm", "modelopt", "gguf-q4_k", "compressed-tensors-bfloat16"])
def test_a_layer_of_a_checkpoint_computes_what_the_checkpoint_says(
    name: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    expected = CASES[name](tmp_path, rng)
    found = w4a16gen.open_checkpoint(expected.path)[expected.name]
    made = linear.W4A16Linear.from_checkpoint(found)
    a = rng.standard_normal((4, found.k)).astype(np.float16)
    y = made(torch.from_numpy(a)).numpy()
    if found.input_scale is not None:
        a = a * found.input_scale
    if found.permutation is not None:
        a = a[:, found.permutation]
    assert error_over_bound(y, Expectation(a, found.quantized()), found.alpha, found.bias) <= 1


def half(*shape: int) -> Any:
    return torch.zeros(shape, dtype=torch.float16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bias": half(63)}, r"bias of float16 \[63\] must be float16 \[64\]"),
        ({"bias": torch.full((64,), 1e6)}, "bias holds values that are not finite in fp16"),
        ({"permutation": half(8).long()}, r"permutation of int64 \[8\] must be int64 \[256\]"),
        ({"permutation": torch.zeros(256, dtype=torch.int32)}, "permutation must hold each of 0 to 255 once"),
        ({"permutation": torch.arange(256) + 1}, "permutation must hold each of 0 to 255 once"),
        ({"permutation": torch.arange(256) + 0.5}, "permutation of dtype float32 must be integers"),
        ({"bias": "zero"}, "bias of type str must be a tensor or an array of numbers"),
        ({"bias": np.zeros(64, complex)}, "bias of dtype complex128 must be real"),
        ({"alpha": float("inf")}, "alpha of inf must be finite"),
        ({"alpha": "1"}, "alpha of type str must be one finite"),
        ({"device": "warp"}, "device 'warp' must be a device of torch"),
        ({"input_scale": half(8)}, r"input_scale of float16 \[8\] must be float16 \[256\]"),
    ],
)
def test_parts_of_another_size_are_refused(
    weight: w4a16gen.QuantizedWeight, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidValueError, match=message):
        linear.W4A16Linear.from_packed(w4a16gen.pack_weight(weight), **arguments)


def test_wrong_inputs_are_refused(layer: Any) -> None:
    for x, message in (
        (torch.zeros(3, K, dtype=torch.int32), "x of dtype int32 must be a floating point tensor"),
        (None, "x of type NoneType must be a floating point tensor"),
        (np.zeros((3, K), np.float16), "x of type ndarray must be a floating point tensor"),
        (torch.zeros(3, N), r"x of shape \[3, 64\] must be \[..., 256\]"),
    ):
        plain = linear.W4A16Linear(layer.weight_of())
        with pytest.raises(InvalidValueError, match=message):
            plain(x)
    with pytest.raises(InvalidValueError, match="overflow of 'raise' must be one of ignore, check"):
        layer.overflow = "raise"
    with pytest.raises(InvalidValueError, match="packed of type ndarray must be a torch tensor"):
        linear.W4A16Linear(w4a16gen.pack_weight(w4a16gen.quantize(np.eye(N, K), group_size=GROUP)))
    with pytest.raises(InvalidValueError, match="is on the meta device and has no values"):
        linear.W4A16Linear.from_linear(torch.nn.Linear(K, N, device="meta"))
    with pytest.raises(InvalidValueError, match="n of 60 must be a positive multiple of 8: pad the layer"):
        linear.W4A16Linear.from_linear(torch.nn.Linear(K, 60))
    with pytest.raises(InvalidValueError, match="linear of type Conv1d must be a torch"):
        linear.W4A16Linear.from_linear(torch.nn.Conv1d(3, 4, 1))
    with pytest.raises(InvalidValueError, match="w of type NoneType must be a PackedWeight"):
        linear.W4A16Linear.from_packed(None)


def test_arrays_in_reverse_are_taken(weight: w4a16gen.QuantizedWeight) -> None:
    made = linear.W4A16Linear.from_packed(w4a16gen.pack_weight(weight), permutation=np.arange(K)[::-1])
    assert made.permutation.tolist() == list(range(K))[::-1]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_layer_without_values_refuses_activations_with_values(layer: Any, compiled: bool) -> None:
    empty = copy.deepcopy(layer).to("meta")
    empty.input_scale = empty.permutation = None
    call = torch.compile(empty, backend="eager", fullgraph=True) if compiled else empty
    with pytest.raises((InvalidValueError, RuntimeError), match="x is on cpu, but the weight on meta"):
        call(torch.zeros(3, K))


@pytest.mark.parametrize("name", ["packed", "bias", "permutation"])
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_that_was_cast_is_refused(layer: Any, name: str, assign: bool) -> None:
    state = layer.state_dict()
    state[name] = state[name].float()
    with pytest.raises(InvalidValueError, match=f"{name} of the state dict of float32"):
        copy.deepcopy(layer).load_state_dict(state, assign=assign)


@pytest.mark.parametrize("number", [-1, 0, K])
def test_a_state_whose_order_is_none_is_refused(layer: Any, number: int) -> None:
    state = layer.state_dict()
    order = state["permutation"].clone()
    order[3] = number if order[3] != number else 1
    with pytest.raises(InvalidValueError, match=f"permutation of the state dict must hold each of 0 to {K - 1} once"):
        copy.deepcopy(layer).load_state_dict({**state, "permutation": order})
