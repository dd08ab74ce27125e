"""`w4a16gen.moe` on host arrays, and the module-level calls of experts on a GPU made of host memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fakes.devices import H200
from fakes.library import FakeLibrary

import w4a16gen
from w4a16gen import Epilogue, InvalidValueError, QuantMode
from w4a16gen.kernels.spaces import enumerate_space, with_epilogues
from w4a16gen.runtime import default
from w4a16gen.runtime.expert_calls import GATED_ACTIVATIONS
from w4a16gen.weights.experts import PackedExperts, pack_experts
from w4a16gen.weights.moe_reference import moe_reference, route_reference
from w4a16gen.weights.reference import random_weight

HIDDEN, INNER, EXPERTS = 96, 64, 5


class Layer:
    """A layer of experts in host memory."""

    def __init__(self, rng: np.random.Generator, mode: QuantMode = QuantMode.FINEGRAINED_SCALE_ONLY) -> None:
        self.gate, self.up, self.down = (
            [random_weight(rng, n, k, 32 if mode.is_grouped else k, mode, size=0.04) for _ in range(EXPERTS)]
            for n, k in ((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))
        )
        self.hidden = rng.standard_normal((7, HIDDEN)).astype(np.float16)
        self.ids = rng.integers(-1, EXPERTS + 1, (7, 3))
        self.factors = rng.random((7, 3)).astype(np.float32)
        self.w2 = pack_experts(self.down)

    def w13(self, *, gated: bool) -> PackedExperts:
        """Return gate and up."""
        return pack_experts(self.gate, self.up, gated=gated)

    def arguments(self, *, gated: bool = False, **changes: Any) -> dict[str, Any]:
        """Return the arguments of a call."""
        operands = {"hidden": self.hidden, "topk_ids": self.ids, "topk_weights": self.factors}
        return {**operands, "w13": self.w13(gated=gated), "w2": self.w2, **changes}

    def exact(self, **options: Any) -> Any:
        """Return the reference, rounded once."""
        exact = moe_reference(self.hidden, self.gate, self.up, self.down, self.ids, self.factors, **options)
        return exact.astype(np.float16)


@pytest.fixture
def layer(rng: np.random.Generator) -> Layer:
    return Layer(rng)


@pytest.mark.parametrize("mode", QuantMode, ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", GATED_ACTIVATIONS)
def test_the_reference_is_rounded_once(rng: np.random.Generator, mode: QuantMode, gated: bool, activation: str) -> None:
    layer = Layer(rng, mode)
    places = np.array([4, -1, 0, 2, 1, 3, -1], np.int32)
    for options in ({}, {"weight_on_input": True}, {"expert_map": places}):
        got = w4a16gen.moe(**layer.arguments(gated=gated, activation=activation, **options))
        assert got.dtype == np.float16
        assert np.array_equal(got, layer.exact(activation=activation, **options))


def test_experts_without_rows_are_not_unpacked(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = layer.arguments(topk_ids=np.where(layer.ids == 3, 3, -1))
    asked: list[int] = []
    right = PackedExperts.expert

    def expert(packed: PackedExperts, index: int) -> Any:
        asked.append(index)
        return right(packed, index)

    monkeypatch.setattr(PackedExperts, "expert", expert)
    w4a16gen.moe(**arguments)
    assert asked == [3, 3]
    assert not w4a16gen.moe(**arguments | {"topk_ids": np.full_like(layer.ids, -1)}).any()
    nothing = {"hidden": layer.hidden[:0], "topk_ids": layer.ids[:0], "topk_weights": layer.factors[:0]}
    assert w4a16gen.moe(**arguments | nothing).shape == (0, HIDDEN)


def test_the_output_is_written(layer: Layer) -> None:
    out = np.full_like(layer.hidden, np.nan)
    assert w4a16gen.moe(**layer.arguments(out=out, invariant=True, dependent_launch="auto")) is out
    assert np.array_equal(out, layer.exact())


def test_torch_tensors_come_back_as_tensors(layer: Layer) -> None:
    torch = pytest.importorskip("torch")
    names = ("hidden", "topk_ids", "topk_weights")
    arguments = layer.arguments()
    got = w4a16gen.moe(**arguments | {name: torch.from_numpy(arguments[name]) for name in names})
    assert isinstance(got, torch.Tensor)
    assert np.array_equal(got.numpy(), layer.exact())


@pytest.mark.parametrize("name", ["hidden", "topk_weights"])
def test_tensors_that_record_gradients_are_refused(layer: Layer, name: str) -> None:
    torch = pytest.importorskip("torch")
    given = torch.from_numpy(layer.arguments()[name]).requires_grad_()
    with pytest.raises(InvalidValueError, match=f"{name} requires gradients, which these kernels do not compute"):
        w4a16gen.moe(**layer.arguments(**{name: given}))
    with torch.no_grad():
        got = w4a16gen.moe(**layer.arguments(**{name: given}))
    assert np.array_equal(np.asarray(got), layer.exact())


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"w13": None}, "w13 of type NoneType must be PackedExperts: see pack_experts"),
    ({"w2": [1]}, "w2 of type list must be PackedExperts"),
    ({"activation": "relu"}, "activation 'relu' must be one of silu, gelu, gelu_tanh"),
    ({"hidden": np.zeros((7, 96))}, "hidden of dtype float64 must be float16"),
    ({"hidden": [[1.0]]}, "hidden of type list must be a numpy array or a torch tensor"),
    ({"hidden": np.zeros((7, 64), np.float16)}, r"hidden of shape \[7, 64\] must be \[tokens, 96\]$"),
    ({"hidden": np.zeros(96, np.float16)}, r"hidden of shape \[96\] must be \[tokens, 96\]: for one .*hidden\[None\]"),
    ({"hidden": np.zeros((96, 7), np.float16).T}, "hidden must be contiguous"),
    ({"topk_ids": np.zeros((7, 3))}, "topk_ids of dtype float64 and shape .* must be integers"),
    ({"topk_ids": [[0]]}, "topk_ids of type list must be a numpy array or a torch tensor"),
    (
        {"topk_weights": np.zeros((7, 3), np.float16)},
        r"topk_weights of dtype float16 and shape \[7, 3\] must be float32",
    ),
    ({"topk_weights": np.zeros((7, 2), np.float32)}, r"topk_weights of shape \[7, 2\] must be \[7, slots\]"),
    ({"expert_map": np.zeros(7)}, "expert_map of dtype float64"),
    ({"out": np.zeros((8, 96), np.float16)}, r"output of shape \[8, 96\] must be \[7, 96\]"),
    ({"weight_on_input": 1}, "weight_on_input of type int must be True or False"),
    ({"invariant": "no"}, "invariant of type str must be True or False"),
    ({"dependent_launch": "soon"}, "dependent_launch of 'soon' must be"),
]


@pytest.mark.parametrize(("change", "text"), WRONG, ids=str)
def test_a_wrong_call_is_refused(layer: Layer, change: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidValueError, match=text):
        w4a16gen.moe(**layer.arguments(**change))


@pytest.mark.parametrize("weight_on_input", [False, True])
def test_the_output_may_replace_the_hidden_states(layer: Layer, weight_on_input: bool) -> None:
    apart = w4a16gen.moe(**layer.arguments(weight_on_input=weight_on_input))
    assert w4a16gen.moe(**layer.arguments(weight_on_input=weight_on_input, out=layer.hidden)) is layer.hidden
    assert np.array_equal(layer.hidden, apart)


def test_arrays_on_a_gpu_go_to_the_default_build(layer: Layer, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = with_epilogues(enumerate_space("experts"), [Epilogue.NONE, Epilogue.GATED])
    library = FakeLibrary(kernels, devices=[H200])
    monkeypatch.setattr(default._InUse, "library", library)  # noqa: SLF001
    arguments: dict[str, Any] = {
        name: w4a16gen.to_device(value) if isinstance(value, np.ndarray | PackedExperts) else value
        for name, value in layer.arguments(gated=True).items()
    }
    assert isinstance(arguments["w13"], PackedExperts)
    assert np.array_equal(w4a16gen.moe(**arguments).to_host(), library.moe(**arguments).to_host())
    rows = w4a16gen.route_tokens(arguments["topk_ids"], EXPERTS, 8)
    offsets, _ = route_reference(layer.ids, EXPERTS)
    assert np.array_equal(rows.offsets.to_host(), offsets)
    a = w4a16gen.to_device(np.ones((21, INNER), np.float16))
    out = w4a16gen.to_device(np.zeros((21, HIDDEN), np.float16))
    assert w4a16gen.grouped_gemm(a, arguments["w2"], rows, out=out) is out
    wanted = out.to_host()
    listed = w4a16gen.list_rows(21, 8, offsets=rows.offsets)
    w4a16gen.grouped_gemm(a, arguments["w2"], listed, out=out)
    assert np.array_equal(out.to_host(), wanted)
    assert wanted[: offsets[-1]].any()
    with pytest.raises(InvalidValueError, match="the packed experts are on a GPU already"):
        w4a16gen.to_device(arguments["w2"])
    for name in ("hidden", "w13", "w2", "topk_ids", "topk_weights"):
        with pytest.raises(InvalidValueError, match=f"{name} of type .* must be on a GPU"):
            w4a16gen.moe(**arguments | {name: layer.arguments(gated=True)[name]})
