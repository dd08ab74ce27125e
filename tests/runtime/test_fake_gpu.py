"""Calls of `gemm` from end to end, on a GPU made of host memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fakes.library import FakeLibrary
from fakes.module import Launched

from w4a16gen import PackedWeight, QuantMode, pack_weight
from w4a16gen.errors import CudaError, InvalidValueError, UnsupportedProblemError
from w4a16gen.kernels.spaces import enumerate_space
from w4a16gen.weights.quantized import Half
from w4a16gen.weights.reference import Expectation, error_over_bound, random_weight

M, N, K, GROUP = 5, 64, 256, 64


@pytest.fixture(params=list(QuantMode), ids=str)
def layer(request: pytest.FixtureRequest, rng: np.random.Generator) -> Layer:
    return Layer(rng, request.param)


class Layer:
    """A layer on a fake GPU."""

    def __init__(self, rng: np.random.Generator, mode: QuantMode) -> None:
        self.library = FakeLibrary(enumerate_space("default"))
        self.weight = random_weight(rng, N, K, GROUP if mode.is_grouped else K, mode)
        self.a: Half = rng.standard_normal((M, K)).astype(np.float16)
        self.bias: Half = rng.standard_normal(N).astype(np.float16)
        self.on_gpu = self.library.to_device(self.a)
        self.packed: PackedWeight = self.library.to_device(pack_weight(self.weight))

    def gemm(self, **options: Any) -> Any:
        return self.library.gemm(self.on_gpu, self.packed, **options)


def test_a_call_gives_the_product(layer: Layer) -> None:
    got = layer.gemm(bias=layer.library.to_device(layer.bias), alpha=0.5).to_host()
    assert error_over_bound(got, Expectation(layer.a, layer.weight), 0.5, layer.bias) <= 1


def test_a_workspace_is_as_long_as_the_kernel_needs(layer: Layer) -> None:
    layer.library.module.workspace = 512
    layer.gemm()
    assert layer.library.module.launches[-1].workspace_bytes == 512
    exact, short = (layer.library.to_device(np.zeros(size, np.uint8)) for size in (512, 511))
    layer.gemm(workspace=exact)
    with pytest.raises(InvalidValueError, match="workspace of 511 bytes must be at least 512 bytes"):
        layer.gemm(workspace=short)
    assert len(layer.library.module.launches) == 2


class HostMemory:
    """A numpy array that claims to be on a GPU."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array
        self.__cuda_array_interface__ = {
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (array.ctypes.data, False),
            "strides": None,
            "version": 3,
        }


@pytest.mark.parametrize("argument", ["a", "w", "bias", "out", "workspace"])
def test_host_memory_is_never_taken_for_memory_of_a_gpu(layer: Layer, argument: str) -> None:
    layer.library.module.workspace = 512
    host: dict[str, Any] = {
        "a": HostMemory(layer.a),
        "w": replace(layer.packed, data=HostMemory(layer.packed.data.to_host())),
        "bias": HostMemory(layer.bias),
        "out": HostMemory(np.zeros((M, N), np.float16)),
        "workspace": HostMemory(np.zeros(512, np.uint8)),
    }
    arguments: dict[str, Any] = {"a": layer.on_gpu, "w": layer.packed} | {argument: host[argument]}
    with pytest.raises(InvalidValueError, match="host memory"):
        layer.library.gemm(**arguments)
    assert layer.library.module.launches == []


@pytest.mark.parametrize(("status", "error"), [(2, UnsupportedProblemError), (4, CudaError)])
def test_what_the_library_refuses_is_raised_with_its_sentence(
    layer: Layer, status: int, error: type[Exception]
) -> None:
    layer.library.module.refusal = (status, "what is wrong")
    with pytest.raises(error, match=r"^what is wrong$"):
        layer.gemm()


def test_a_stream_runs_what_was_launched_on_it(layer: Layer) -> None:
    stream = layer.library.module.Stream(0)
    out = layer.library.to_device(np.full((M, N), np.nan, np.float16))
    stream.begin_capture()
    layer.gemm(out=out, stream=stream)
    stream.end_capture()
    assert np.isnan(out.to_host()).all(), "a capture runs nothing"
    stream.replay()
    assert error_over_bound(out.to_host(), Expectation(layer.a, layer.weight), 1.0, None) <= 1


def test_a_kernel_that_errs_is_seen(rng: np.random.Generator) -> None:
    def err(launched: Launched) -> None:
        launched.out[...] = launched.reference() + np.float16(1)

    layer = Layer(rng, QuantMode.FINEGRAINED_SCALE_ONLY)
    layer.library.module.compute = err
    assert error_over_bound(layer.gemm().to_host(), Expectation(layer.a, layer.weight), 1.0, None) > 1
