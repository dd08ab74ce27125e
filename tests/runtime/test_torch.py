"""Torch's tensors, without torch."""

from __future__ import annotations

import gc
import sys
from dataclasses import dataclass, replace
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest

from w4a16gen import Library, QuantMode, use_kernels
from w4a16gen.errors import InvalidValueError
from w4a16gen.runtime.arrays import check, empty_like_library, is_on_gpu, stream_pointer, view
from w4a16gen.weights.packed import TARGET_LAYOUTS, PackedWeight


@dataclass(frozen=True)
class Tensor:
    """What the package reads of a tensor."""

    shape: tuple[int, ...]
    dtype: str = "torch.float16"
    device: int = 0
    address: int = 4096
    is_cuda: bool = True
    requires_grad: bool = False
    contiguous: bool = True

    def data_ptr(self) -> int:
        return self.address

    def get_device(self) -> int:
        return self.device

    def is_contiguous(self) -> bool:
        return self.contiguous

    def new_empty(self, shape: tuple[int, ...], *, dtype: str) -> Tensor:
        return Tensor(shape, dtype, self.device)

    @property
    def __cuda_array_interface__(self) -> dict[str, object]:
        raise AssertionError("slow, and refused by tensors that require gradients")


def fake_torch(*, grad_enabled: bool = True, stream: int = 77) -> ModuleType:
    """Give a module to put into `sys.modules` as torch."""
    torch = ModuleType("torch")
    torch.__dict__.update(
        Tensor=Tensor,
        float16="torch.float16",
        uint8="torch.uint8",
        is_grad_enabled=lambda: grad_enabled,
        cuda=SimpleNamespace(current_stream=lambda _device: SimpleNamespace(cuda_stream=stream)),
        _C=SimpleNamespace(),
    )
    return torch


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
        (Tensor((3, 8), device=2), "x is on GPU 2, but the packed weight is on GPU 0"),
        (Tensor((3, 8), is_cuda=False), "x is a Tensor in host memory"),
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


@pytest.mark.usefixtures("torch")
def test_a_call_launches_what_is_named_though_calls_alike_are_remembered(
    fake_library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[tuple[Any, ...]] = []

    def launch(*arguments: Any) -> tuple[int, str]:
        launched.append(arguments)
        return 0, ""

    monkeypatch.setattr(fake_library, "kernel_library", SimpleNamespace(gemm=launch))
    monkeypatch.setattr(fake_library, "_workspace_needed", lambda *_: 0)
    mode = QuantMode.FINEGRAINED_SCALE_ONLY
    first, second = [config for config in fake_library.configs() if config.mode is mode][:2]
    empty = PackedWeight(None, TARGET_LAYOUTS[first.target], 512, 1024, 128, mode)
    weight = replace(empty, data=Tensor((empty.nbytes,), "torch.uint8"))
    for named, m in ((first, 16), (second, 16), (first, 16), (first, 3)):
        with use_kernels(named):
            made = fake_library.gemm(Tensor((m, 1024)), weight)
        index, *numbers = launched[-1][:5]
        assert fake_library.kernels[index]["name"] == named.name
        assert numbers == [m, 512, 1024, 128]
        assert made.shape == (m, 512)
        assert launched[-1][-3:] == (77, False, 0), "stream, dependent launch, device"
    fake_library.gemm(Tensor((16, 1024)), weight, config=second)
    assert fake_library.kernels[launched[-1][0]]["name"] == second.name


class KnownCalls:
    """Stands in for the module's: makes any call whose number of tokens it has been told of."""

    made: ClassVar[list[tuple[Any, ...]]] = []

    def __init__(self, *_: Any) -> None:
        self.known: set[int] = set()

    def add(self, m: int, _kernel: int) -> None:
        self.known.add(m)

    def gemm(self, *arguments: Any) -> str | None:
        if arguments[0].shape[0] not in self.known:
            return None
        self.made.append(arguments)
        return "made again"


@pytest.mark.usefixtures("torch")
def test_a_usual_call_is_made_again_by_the_module_as_long_as_the_weight_lives(
    fake_library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[Any] = []

    def launch(*arguments: Any) -> tuple[int, str]:
        launched.append(arguments)
        return 0, ""

    monkeypatch.setattr(fake_library, "kernel_library", SimpleNamespace(gemm=launch))
    monkeypatch.setattr(fake_library, "module", SimpleNamespace(KnownCalls=KnownCalls, devices=list))
    needed = {"bytes": 0}
    monkeypatch.setattr(fake_library, "_workspace_needed", lambda *_: needed["bytes"])
    mode = QuantMode.FINEGRAINED_SCALE_ONLY
    config = next(config for config in fake_library.configs() if config.mode is mode)
    empty = PackedWeight(None, TARGET_LAYOUTS[config.target], 512, 1024, 128, mode)
    weight = replace(empty, data=Tensor((empty.nbytes,), "torch.uint8"))
    a, out = Tensor((16, 1024)), Tensor((16, 512))
    space = Tensor((1 << 20,), "torch.uint8")
    assert not fake_library.knows(weight)
    for unusual in ({"config": config}, {"stream": 5}, {"workspace": space}):
        fake_library.gemm(a, weight, out=out, **unusual)
        assert not fake_library.knows(weight)
    with use_kernels(config):
        fake_library.gemm(a, weight, out=out)
    assert not fake_library.knows(weight)
    assert fake_library.gemm(a, weight, out=out) is out
    assert fake_library.knows(weight)
    long_way = len(launched)
    assert fake_library.gemm(a, weight, out=out, alpha=0.5, dependent_launch=True) == "made again"
    assert KnownCalls.made == [(a, weight.data, None, out, 0.5, True)]
    assert len(launched) == long_way
    for given in ({"config": config}, {"stream": 5}, {"workspace": space}):
        assert fake_library.gemm(a, weight, out=out, **given) is out
    with use_kernels(config):
        assert fake_library.gemm(a, weight, out=out) is out
    assert fake_library.gemm(Tensor((3, 1024)), weight).shape == (3, 512)
    assert fake_library.gemm(Tensor((3, 1024)), weight) == "made again"
    assert fake_library.gemm(Tensor((0, 1024)), weight).shape == (0, 512)
    assert fake_library.gemm(Tensor((0, 1024)), weight).shape == (0, 512)
    key = weight.data
    del weight
    gc.collect()
    assert not fake_library.knows(replace(empty, data=key))
