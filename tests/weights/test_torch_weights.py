"""Torch tensors in host memory as weights and activations, with a stand-in for torch."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import w4a16gen
from w4a16gen import InvalidValueError, pack, pack_weight, quantize

VALUES = np.linspace(-1, 1, 8 * 64).reshape(8, 64).astype(np.float32)


class Tensor:
    """What the package reads of a tensor in host memory."""

    def __init__(
        self, values: npt.NDArray[Any], dtype: str | None = None, *, is_cuda: bool = False, requires_grad: bool = False
    ) -> None:
        self.values = values
        self.dtype = f"torch.{values.dtype if dtype is None else dtype}"
        self.is_cuda = is_cuda
        self.requires_grad = requires_grad

    def detach(self) -> Tensor:
        return Tensor(self.values, self.dtype.removeprefix("torch."))

    def float(self) -> Tensor:
        return Tensor(self.values.astype(np.float32))

    def __array__(self, *_: object, **__: object) -> npt.NDArray[Any]:
        if self.requires_grad:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad")
        if self.dtype == "torch.bfloat16":
            raise TypeError("Got unsupported ScalarType BFloat16")
        return self.values


@pytest.fixture(autouse=True)
def torch(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Put a stand-in for torch where an imported torch would be."""
    module = ModuleType("torch")
    module.__dict__.update(
        Tensor=Tensor, is_grad_enabled=lambda: True, from_numpy=lambda values: Tensor(np.asarray(values))
    )
    monkeypatch.setitem(sys.modules, "torch", module)
    return module


@pytest.mark.parametrize(
    "weight",
    [Tensor(VALUES), Tensor(VALUES, requires_grad=True), Tensor(VALUES, "bfloat16", requires_grad=True)],
    ids=["a tensor", "a parameter", "a bfloat16 parameter"],
)
def test_tensors_and_parameters_are_quantised(weight: Tensor) -> None:
    assert np.array_equal(quantize(weight, group_size=32).q, quantize(VALUES, group_size=32).q)


def test_bfloat16_scales_are_refused_and_fp16_parameters_taken() -> None:
    q = Tensor(np.zeros((8, 64), np.uint8))
    scales = np.full((2, 8), 0.5, np.float16)
    with pytest.raises(InvalidValueError, match="scales of dtype bfloat16 must be float16: convert the tensor first"):
        pack(q, Tensor(scales, "bfloat16"))
    assert pack(q, Tensor(scales, requires_grad=True)).n == 8
    with pytest.raises(InvalidValueError, match=r"q is on a GPU: pass q.cpu\(\)"):
        w4a16gen.weights.packed.pack(Tensor(np.zeros((8, 64), np.uint8), is_cuda=True), scales)


def test_tensors_in_host_memory_come_back_as_tensors() -> None:
    packed = pack_weight(quantize(VALUES, group_size=32))
    a = np.ones((3, 64), np.float16)
    result: Any = w4a16gen.gemm(Tensor(a), packed)  # type: ignore[call-overload]
    assert isinstance(result, Tensor)
    assert np.array_equal(result.values, w4a16gen.gemm(a, packed))
    out = Tensor(np.zeros((3, 8), np.float16))
    assert w4a16gen.gemm(a, packed, out=out) is out
    assert np.array_equal(out.values, result.values)
    for wrong, text in (
        (Tensor(a, "bfloat16"), "activations of dtype bfloat16 must be float16"),
        (Tensor(a, requires_grad=True), "activations requires gradients"),
    ):
        with pytest.raises(InvalidValueError, match=text):
            w4a16gen.gemm(wrong, packed)  # type: ignore[call-overload]
