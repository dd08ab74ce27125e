"""Activations, gates and residuals: on the host, on a GPU of host memory, and what is refused."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.library import FakeLibrary

import w4a16gen
from w4a16gen import Epilogue, InvalidValueError, NotBuiltError, PackedWeight, QuantMode, Target, pack_weight
from w4a16gen.kernels.epilogue import Activation, CallEpilogue
from w4a16gen.kernels.spaces import enumerate_space, with_epilogues
from w4a16gen.weights.layouts.fragments import apart, interleaved
from w4a16gen.weights.packed import GATED_LAYOUT
from w4a16gen.weights.quantized import Half
from w4a16gen.weights.reference import Expectation, Extra, error_over_bound, random_weight

M, N, K, GROUP = 5, 96, 256, 64
PLAIN = [activation for activation in Activation if not activation.is_gated]
KERNELS = with_epilogues(enumerate_space("default"), list(Epilogue))
CALLS = list(itertools.product(Activation, (False, True), (False, True)))


class Layer:
    """A layer with what its epilogues need."""

    def __init__(self, rng: np.random.Generator, mode: QuantMode = QuantMode.FINEGRAINED_SCALE_ONLY) -> None:
        self.weight = random_weight(rng, N, K, GROUP if mode.is_grouped else K, mode)
        self.a: Half = rng.standard_normal((M, K)).astype(np.float16)
        self.bias: Half = rng.standard_normal(N).astype(np.float16)
        self.whole: Half = rng.standard_normal((M, N)).astype(np.float16)
        self.half: Half = rng.standard_normal((M, N // 2)).astype(np.float16)
        self.expected = Expectation(self.a, self.weight)
        self.packed = {gated: pack_weight(self.weight, gated=gated) for gated in (False, True)}

    def residual(self, activation: Activation) -> Half:
        return self.half if activation.is_gated else self.whole

    def error(self, got: Half, activation: Activation, bias: Half | None, residual: Half | None) -> float:
        return error_over_bound(got, self.expected, 0.75, bias, Extra(activation, residual))


@pytest.fixture
def layer(rng: np.random.Generator) -> Layer:
    return Layer(rng)


@pytest.mark.parametrize(("activation", "with_bias", "with_residual"), CALLS)
def test_a_call_on_the_host(layer: Layer, activation: Activation, with_bias: bool, with_residual: bool) -> None:
    bias = layer.bias if with_bias else None
    residual = layer.residual(activation) if with_residual else None
    options: dict[str, Any] = {"bias": bias, "alpha": 0.75, "activation": str(activation), "residual": residual}
    got = w4a16gen.gemm(layer.a, layer.packed[activation.is_gated], **options)
    assert got.shape == layer.residual(activation).shape
    assert layer.error(got, activation, bias, residual) <= 1
    others = [other for other in Activation if other.is_gated == activation.is_gated and other is not activation]
    # The two GELUs are as near as the error of fp16's sums.
    assert max(layer.error(got, other, bias, residual) for other in others) > 1


@pytest.mark.parametrize("mode", QuantMode, ids=str)
@pytest.mark.parametrize(("activation", "with_bias", "with_residual"), CALLS)
def test_a_call_on_a_gpu(
    rng: np.random.Generator, mode: QuantMode, activation: Activation, with_bias: bool, with_residual: bool
) -> None:
    layer = Layer(rng, mode)
    library = FakeLibrary(KERNELS)
    bias = layer.bias if with_bias else None
    residual = layer.residual(activation) if with_residual else None
    on_gpu: dict[str, Any] = {
        name: None if array is None else library.to_device(array)
        for name, array in (("a", layer.a), ("bias", bias), ("residual", residual))
    }
    packed = library.to_device(layer.packed[activation.is_gated])
    got = library.gemm(w=packed, alpha=0.75, activation=activation, **on_gpu).to_host()
    assert layer.error(got, activation, bias, residual) <= 1
    launched = library.module.launches[-1].config
    needed = CallEpilogue(activation, has_residual=with_residual).kernels
    assert (launched.target, launched.epilogue) == (Target.NATIVE, needed)
    plain = library.choose(library.module.launches[-1].problem, mode).kernel
    assert launched == replace(plain, epilogue=needed), "the same cost model chooses"


def test_a_residual_may_be_the_output(layer: Layer) -> None:
    wanted = w4a16gen.gemm(layer.a, layer.packed[False], activation="silu", residual=layer.whole)
    out = layer.whole.copy()
    assert w4a16gen.gemm(layer.a, layer.packed[False], activation="silu", residual=out, out=out) is out
    assert np.array_equal(out, wanted)
    library = FakeLibrary(KERNELS)
    on_gpu = library.to_device(layer.whole)
    packed, a = library.to_device(layer.packed[False]), library.to_device(layer.a)
    library.gemm(a, packed, activation="silu", residual=on_gpu, out=on_gpu)
    assert np.array_equal(on_gpu.to_host(), wanted)


def test_a_gate_of_large_numbers_is_open(rng: np.random.Generator) -> None:
    weight = random_weight(rng, 32, 64, 64, QuantMode.FINEGRAINED_SCALE_ONLY)
    a = rng.standard_normal((3, 64)).astype(np.float16)
    bias = np.concatenate([np.full(16, 100), np.zeros(16)]).astype(np.float16)
    got = w4a16gen.gemm(a, pack_weight(weight, gated=True), bias=bias, activation="swiglu")
    gate, factor = np.split(w4a16gen.gemm(a, pack_weight(weight), bias=bias).astype(float), 2, axis=1)
    assert got.astype(float) == pytest.approx(gate * factor, rel=3e-3)


NEEDED = {
    Epilogue.ELEMENTWISE: ({"activation": "relu2"}, {"residual": True}, {"activation": "silu", "residual": True}),
    Epilogue.GATED: ({"activation": "swiglu"}, {"activation": "geglu", "residual": True}),
}


def _call(library: FakeLibrary, layer: Layer, change: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call on a GPU."""
    activation = Activation.of(change.get("activation"))
    residual = library.to_device(layer.residual(activation)) if change.get("residual") else None
    packed = library.to_device(layer.packed[activation.is_gated])
    return {"a": library.to_device(layer.a), "w": packed, "activation": activation, "residual": residual}


@pytest.mark.parametrize(
    ("epilogue", "change"), [(epilogue, change) for epilogue, changes in NEEDED.items() for change in changes], ids=str
)
def test_a_call_without_a_kernel_names_the_build_command(
    layer: Layer, epilogue: Epilogue, change: dict[str, Any]
) -> None:
    library = FakeLibrary([config for config in KERNELS if config.epilogue is not epilogue])
    text = f"no kernel of mode fgs with epilogue {epilogue}: run `w4a16gen build --epilogue none --epilogue {epilogue}`"
    call = _call(library, layer, change)
    with pytest.raises(NotBuiltError, match=text):
        library.gemm(**call)
    with w4a16gen.use_kernels(enumerate_space("default")[60]), pytest.raises(NotBuiltError, match=text):
        library.gemm(**call)
    assert library.module.launches == []
    assert not library.has_epilogue("fgs", epilogue)


@pytest.mark.parametrize("epilogue", Epilogue, ids=str)
def test_a_kernel_that_is_named_must_have_the_epilogue(layer: Layer, epilogue: Epilogue) -> None:
    library = FakeLibrary(KERNELS)
    plain = library.choose(w4a16gen.Problem(M, N, K, GROUP), "fgs").kernel
    named = replace(plain, epilogue=epilogue)
    for needed, changes in {Epilogue.NONE: ({},), **NEEDED}.items():
        for change in changes:
            call = _call(library, layer, change) | {"config": named}
            if needed is epilogue or (needed, epilogue) == (Epilogue.NONE, Epilogue.ELEMENTWISE):
                library.gemm(**call)
                assert library.module.launches.pop().config == named
                continue
            with pytest.raises(InvalidValueError, match=f"with epilogue {epilogue} cannot: the call needs `w4a16gen"):
                library.gemm(**call)
            assert library.module.launches == []


def test_plain_calls_never_get_a_kernel_with_an_epilogue(layer: Layer) -> None:
    library = FakeLibrary([config for config in KERNELS if config.epilogue is not Epilogue.NONE])
    text = "the build holds no kernel of mode fgs without an epilogue: run `w4a16gen build`"
    with pytest.raises(NotBuiltError, match=text):
        library.gemm(**_call(library, layer, {}))
    for epilogue in (Epilogue.ELEMENTWISE, Epilogue.GATED):
        estimates = FakeLibrary(KERNELS).chooser.estimates(
            w4a16gen.Problem(M, N, K, GROUP), QuantMode.FINEGRAINED_SCALE_ONLY, epilogue=epilogue
        )
        assert {kernel.epilogue for kernel, _ in estimates} == {epilogue}


def _zeros(*shape: int) -> Half:
    return np.zeros(shape, np.float16)


OVERLAPPING = np.zeros(M * N + 64, np.float16)
ON_CUTLASS = "target cutlass compute no activations and add no residual: pack the weight for target native"
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("an activation that is none", {"activation": "mish"}, "'mish' is not one of none, silu"),
    ("a number", {"activation": 1}, "a value of type int is not one of none"),
    ("a gated activation of a plain weight", {"activation": "swiglu"}, "swiglu needs a weight .* gated=True"),
    ("a plain call of a gated weight", {"w": True}, "none does not fit a weight that was packed with gated=True"),
    ("silu of a gated weight", {"w": True, "activation": "silu"}, "silu does not fit .*: pass one of swiglu"),
    ("a residual of fp32", {"residual": np.zeros((M, N), np.float32)}, "residual of dtype float32 must be float16"),
    ("a residual of another n", {"residual": _zeros(M, N // 2)}, r"residual of shape \[5, 48\] must be \[5, 96\]"),
    ("a residual of one axis", {"residual": _zeros(N)}, r"residual of shape \[96\] must be \[5, 96\]"),
    ("a residual of columns", {"residual": _zeros(N, M).T}, "residual must be contiguous"),
    (
        "a gated residual of n columns",
        {"w": True, "activation": "swiglu", "residual": _zeros(M, N)},
        r"residual of shape \[5, 96\] must be \[5, 48\]",
    ),
    (
        "a gated output of n columns",
        {"w": True, "activation": "swiglu", "out": _zeros(M, N)},
        r"output of shape \[5, 96\] must be \[5, 48\]",
    ),
]
HOST_ONLY: list[tuple[str, dict[str, Any], str]] = [
    ("a list", {"residual": [[0.0] * N] * M}, "residual of type list must be a numpy array"),
    (
        "a residual beside the output",
        {"residual": OVERLAPPING[: M * N].reshape(M, N), "out": OVERLAPPING[64:].reshape(M, N)},
        "output overlaps the residual: pass another array",
    ),
]


def _arguments(layer: Layer, change: dict[str, Any]) -> dict[str, Any]:
    return {"a": layer.a} | change | {"w": layer.packed[bool(change.get("w"))]}


@pytest.mark.parametrize(
    ("change", "text"), [row[1:] for row in WRONG + HOST_ONLY], ids=[row[0] for row in WRONG + HOST_ONLY]
)
def test_a_wrong_epilogue_on_the_host_is_refused(layer: Layer, change: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidValueError, match=text):
        w4a16gen.gemm(**_arguments(layer, change))


class Seen:
    """A host array as an array of a GPU, with its strides."""

    def __init__(self, library: FakeLibrary, array: np.ndarray[Any, Any]) -> None:
        self.base = library.to_device(array)
        self.__cuda_array_interface__ = self.base.__cuda_array_interface__ | {
            "strides": None if array.flags.c_contiguous else array.strides
        }


@pytest.mark.parametrize(("change", "text"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_a_wrong_epilogue_on_a_gpu_is_refused(layer: Layer, change: dict[str, Any], text: str) -> None:
    library = FakeLibrary(KERNELS)
    arguments: dict[str, Any] = {
        name: Seen(library, value) if isinstance(value, np.ndarray) else value
        for name, value in _arguments(layer, change).items()
    }
    arguments["w"] = library.to_device(arguments["w"])
    with pytest.raises(InvalidValueError, match=text):
        library.gemm(**arguments)
    assert library.module.launches == []


@pytest.mark.parametrize("change", [{"activation": "silu"}, {"residual": _zeros(M, N)}], ids=str)
def test_cutlass_has_no_epilogues(layer: Layer, change: dict[str, Any]) -> None:
    packed = pack_weight(layer.weight, target="cutlass")
    with pytest.raises(InvalidValueError, match=ON_CUTLASS):
        w4a16gen.gemm(layer.a, packed, **change)
    library = FakeLibrary(enumerate_space("trtllm"))
    moved: dict[str, Any] = {
        name: library.to_device(value) if isinstance(value, np.ndarray) else value for name, value in change.items()
    }
    with pytest.raises(InvalidValueError, match=ON_CUTLASS):
        library.gemm(library.to_device(layer.a), library.to_device(packed), **moved)
    with pytest.raises(InvalidValueError, match=ON_CUTLASS):
        pack_weight(layer.weight, target="cutlass", gated=True)


@pytest.mark.parametrize("mode", QuantMode, ids=str)
def test_a_gated_weight_is_packed_unpacked_and_kept(rng: np.random.Generator, mode: QuantMode, tmp_path: Path) -> None:
    weight = random_weight(rng, 48, 256, 64 if mode.is_grouped else 256, mode)
    packed = pack_weight(weight, gated=True)
    assert (packed.gated, packed.layout, packed.n, packed.outputs) == (True, GATED_LAYOUT, 48, 24)
    packed.save(tmp_path / "w.safetensors")
    read = PackedWeight.load(tmp_path / "w.safetensors")
    assert read.gated
    assert np.array_equal(read.data, packed.data)
    for again in (packed.unpack(), read.unpack()):
        assert np.array_equal(again.q, weight.q)
        assert np.array_equal(again.scales, weight.scales)
        assert (again.zeros is None) == (weight.zeros is None)
    assert not np.array_equal(packed.data, pack_weight(weight).data)
    from_arrays = w4a16gen.pack(weight.q, weight.scales, weight.zeros, group_size=weight.group_size, gated=True)
    assert np.array_equal(from_arrays.data, packed.data)


def test_a_gated_weight_has_whole_runs_of_channels(rng: np.random.Generator) -> None:
    weight = random_weight(rng, 24, 64, 64, QuantMode.FINEGRAINED_SCALE_ONLY)
    text = "n of 24 must be a multiple of 16 for gated activations: pad both halves with zeros"
    with pytest.raises(InvalidValueError, match=text):
        pack_weight(weight, gated=True)
    with pytest.raises(InvalidValueError, match=text):
        replace(pack_weight(weight), layout=GATED_LAYOUT)
    with pytest.raises(InvalidValueError, match="gated of type str must be True or False"):
        pack_weight(weight, gated="yes")  # type: ignore[arg-type]


def test_packing_on_a_gpu_interleaves_too(layer: Layer) -> None:
    library = FakeLibrary(KERNELS)
    q, scales = library.to_device(layer.weight.q), library.to_device(layer.weight.scales)
    packed = library.pack(q, scales, gated=True)
    assert packed.layout == GATED_LAYOUT
    assert np.array_equal(packed.data.to_host(), layer.packed[True].data)
    with pytest.raises(InvalidValueError, match="gated of type int must be True or False"):
        library.pack(q, scales, gated=1)  # type: ignore[arg-type]


def test_runs_of_eight_alternate() -> None:
    order = interleaved(np.arange(32))
    assert order.tolist() == [*range(8), *range(16, 24), *range(8, 16), *range(24, 32)]
    assert apart(order).tolist() == list(range(32))
    rows = np.arange(64).reshape(2, 32)
    assert np.array_equal(apart(interleaved(rows)), rows)
