"""Torch's tensors, without torch."""

from __future__ import annotations

import gc
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from fakes.library import FakeLibrary, record
from fakes.torch import Tensor, fake_torch

from w4a16gen import KernelConfig, Problem, QuantMode, use_kernels
from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.spaces import enumerate_space
from w4a16gen.runtime.arrays import check, is_on_gpu, view
from w4a16gen.runtime.calls import GemmOptions
from w4a16gen.runtime.streams import empty_like_library, stream_pointer
from w4a16gen.weights.packed import TARGET_LAYOUTS, PackedWeight


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Put a stand-in for torch where an imported torch would be."""
    module = fake_torch()
    monkeypatch.setitem(sys.modules, "torch", module)
    return module


def test_a_tensor_is_seen_without_its_array_interface(torch: ModuleType) -> None:
    tensor = Tensor((3, 8), device=1)
    assert is_on_gpu(tensor)
    seen = view("activations", tensor, None)
    assert (seen.pointer, seen.shape, seen.dtype, seen.device, seen.contiguous) == (4096, (3, 8), "<f2", 1, True)
    assert seen.owner is tensor
    check("activations", seen, dtype="<f2", shape=(3, 8), device=1)
    made = empty_like_library(tensor, None, (2, 4), "<f2", 1)
    assert (made.shape, made.dtype, made.device) == ((2, 4), torch.float16, 1)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (Tensor((3, 8), "torch.bfloat16"), "x of dtype bfloat16 must be float16"),
        (Tensor((3, 8), "torch.float32"), "x of dtype float32 must be float16"),
        (Tensor((3, 8), "torch.float8_e4m3fn"), "x of dtype float8_e4m3fn must be float16"),
        (Tensor((3, 8), contiguous=False), "x must be contiguous"),
        (Tensor((3, 9)), r"x of shape \[3, 9\] must be \[3, 8\]"),
        (Tensor((3, 8), device=2), "x on GPU 2 must be on GPU 0, like the packed weight"),
        (Tensor((3, 8), is_cuda=False), "x of type Tensor must be on a GPU"),
        (Tensor((3, 8), requires_grad=True), "x requires gradients, which these kernels do not compute"),
    ],
)
@pytest.mark.usefixtures("torch")
def test_a_tensor_that_does_not_fit_is_refused(tensor: Tensor, message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        check("x", view("x", tensor, None), dtype="<f2", shape=(3, 8), device=0)


def test_parameters_may_go_in_where_no_gradients_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", fake_torch(grad_enabled=False))
    assert view("bias", Tensor((8,), requires_grad=True), None).shape == (8,)


def test_the_stream_is_torchs_current_one(torch: Any) -> None:
    assert stream_pointer(None, Tensor((3, 8))) == 77
    internals = SimpleNamespace(_cuda_getCurrentRawStream=lambda device: 100 + device)
    torch.__dict__["_C"] = internals
    assert stream_pointer(None, Tensor((3, 8), device=1)) == 101
    assert stream_pointer(5, Tensor((3, 8))) == 5
    assert stream_pointer(None, SimpleNamespace()) == 0
    for named, address in ((None, 0), (1, 1), (99, 99)):
        array = SimpleNamespace(__cuda_array_interface__={"stream": named})
        assert stream_pointer(None, array) == address
        assert stream_pointer(5, array) == 5
    for wrong in ("fast", -1, True):
        with pytest.raises(InvalidValueError, match="must be a CUDA stream"):
            stream_pointer(None, SimpleNamespace(__cuda_array_interface__={"stream": wrong}))


LAYER = Problem(16, 512, 1024, 128)
MODE = QuantMode.FINEGRAINED_SCALE_ONLY


@pytest.fixture
def library() -> FakeLibrary:
    """Return a library on a machine with an H100, whose launches are recorded only."""
    return FakeLibrary(enumerate_space("trtllm"), compute=record)


def weight_for(config: KernelConfig) -> PackedWeight:
    """Return a weight of the layer on GPU 0."""
    empty = PackedWeight(None, TARGET_LAYOUTS[config.target], LAYER.n, LAYER.k, LAYER.group_size, config.mode)
    return replace(empty, data=Tensor((empty.nbytes,), "torch.uint8"))


@pytest.mark.usefixtures("torch")
def test_a_call_launches_what_is_named_though_calls_alike_are_remembered(library: FakeLibrary) -> None:
    first, second = [config for config in library.configs() if config.mode is MODE][:2]
    weight = weight_for(first)
    for named, m in ((first, 16), (second, 16), (first, 16), (first, 3)):
        with use_kernels(named):
            made = library.gemm(Tensor((m, 1024)), weight)
        launched = library.module.launches[-1]
        assert (launched.config, launched.problem) == (named, replace(LAYER, m=m))
        assert made.shape == (m, 512)
        assert (launched.stream, launched.dependent, launched.device) == (77, False, 0)
    library.gemm(Tensor((16, 1024)), weight, config=second)
    assert library.module.launches[-1].config == second


@pytest.mark.usefixtures("torch")
def test_a_usual_call_is_repeated_by_the_module_as_long_as_the_weight_lives(
    library: FakeLibrary,
) -> None:
    config = next(config for config in library.configs() if config.mode is MODE)
    weight = weight_for(config)
    a, out = Tensor((16, 1024)), Tensor((16, 512))
    unusual: list[dict[str, Any]] = [
        {"config": config},
        {"stream": 5},
        {"workspace": Tensor((1 << 20,), "torch.uint8")},
    ]
    assert not library.calls.has(weight)
    for arguments in unusual:
        library.gemm(a, weight, out=out, **arguments)
        assert not library.calls.has(weight)
    with use_kernels(config):
        library.gemm(a, weight, out=out)
    assert not library.calls.has(weight)
    assert library.gemm(a, weight, out=out) is out
    assert library.calls.has(weight)
    long_way = len(library.module.launches)
    assert library.gemm(a, weight, out=out, alpha=0.5, dependent_launch=True) == "repeated"
    assert library.module.repeated == [(a, weight.data, None, out, 0.5, True, None, None)]
    assert len(library.module.launches) == long_way
    for arguments in unusual:
        assert library.gemm(a, weight, out=out, **arguments) is out
    with use_kernels(config):
        assert library.gemm(a, weight, out=out) is out
    assert library.gemm(Tensor((3, 1024)), weight).shape == (3, 512)
    assert library.gemm(Tensor((3, 1024)), weight) == "repeated"
    assert library.gemm(Tensor((0, 1024)), weight).shape == (0, 512)
    assert library.gemm(Tensor((0, 1024)), weight).shape == (0, 512)
    key = weight.data
    del weight
    gc.collect()
    assert not library.calls.has(replace(weight_for(config), data=key))


@pytest.mark.usefixtures("torch")
def test_calls_may_be_remembered_by_a_weight_without_data_for_all_weights_like_it(library: FakeLibrary) -> None:
    config = next(config for config in library.configs() if config.mode is MODE)
    weight, other = weight_for(config), weight_for(config)
    shape = replace(weight, data=None)
    a = Tensor((16, 1024))
    library.launcher.run(a, weight, GemmOptions(remembered=shape))
    assert library.calls.has(shape)
    assert not library.calls.has(weight)
    repeated = library.calls.try_fast_path(a, shape, None, None, 0.5, dependent_launch=False, data=other.data)
    assert repeated == "repeated"
    assert library.module.repeated == [(a, other.data, None, None, 0.5, False, None, None)]


@pytest.mark.usefixtures("torch")
def test_a_call_that_needs_a_workspace_gets_it_from_torch_and_is_not_repeated(library: FakeLibrary) -> None:
    library.module.workspace = 4096
    config = next(config for config in library.configs() if config.mode is MODE)
    weight = weight_for(config)
    for _ in range(2):
        library.gemm(Tensor((16, 1024)), weight, out=Tensor((16, 512)))
        assert not library.calls.has(weight)
    assert [(launch.workspace, launch.workspace_bytes) for launch in library.module.launches] == [(4096, 4096)] * 2
