"""What a type checker tells users of the public names. Mypy reads this file; nothing runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import assert_type

import w4a16gen
from w4a16gen import KernelConfig, Library, PackedWeight, QuantizedWeight
from w4a16gen.runtime.arrays import DeviceArray


class Tensor:
    """A torch tensor, as far as the overloads tell it apart: torch need not be installed."""

    @property
    def is_cuda(self) -> bool:
        raise NotImplementedError

    @property
    def requires_grad(self) -> bool:
        raise NotImplementedError

    def data_ptr(self) -> int:
        raise NotImplementedError


class Cupy:
    """An array in GPU memory that is not torch's."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        raise NotImplementedError


def arrays_come_back_as_they_went_in(
    host: npt.NDArray[np.float16], tensor: Tensor, other: Cupy, w: PackedWeight
) -> None:
    assert_type(w4a16gen.gemm(host, w), npt.NDArray[np.float16])
    assert_type(w4a16gen.gemm(host, w, bias=host, alpha=2, out=host), npt.NDArray[np.float16])
    assert_type(w4a16gen.gemm(tensor, w), Tensor)
    assert_type(w4a16gen.gemm(tensor, w, bias=tensor, out=tensor, stream=7), Tensor)
    assert_type(w4a16gen.gemm(other, w), DeviceArray)
    assert_type(w4a16gen.gemm(other, w, out=other), Cupy)
    assert_type(w4a16gen.gemm(w4a16gen.to_device(host), w), DeviceArray)


def weights_and_builds(weight: npt.NDArray[np.float32], path: Path) -> None:
    quantized = w4a16gen.quantize(weight, group_size=128)
    assert_type(quantized, QuantizedWeight)
    assert_type(w4a16gen.pack_weight(quantized, target="cutlass"), PackedWeight)
    assert_type(w4a16gen.pack(quantized.q, quantized.scales), PackedWeight)
    assert_type(w4a16gen.to_device(PackedWeight.load(path)), PackedWeight)
    assert_type(w4a16gen.to_device(weight), DeviceArray)
    assert_type(w4a16gen.load(path), Library)
    assert_type(w4a16gen.load(path).to_device(PackedWeight.load(path)), PackedWeight)
    assert_type(w4a16gen.configs(), list[KernelConfig])
    assert_type(w4a16gen.InvalidValueError.exit_code, int)


def slips(host: npt.NDArray[np.float16], w: PackedWeight, quantized: QuantizedWeight) -> None:
    w4a16gen.gemm(host, quantized)  # type: ignore[call-overload]
    w4a16gen.gemm(host, w, alpha="1")  # type: ignore[call-overload]
    w4a16gen.gemm(host, w, config=3)  # type: ignore[call-overload]
    w4a16gen.quantise(host)  # type: ignore[attr-defined]
    w4a16gen.quantize(host, group_size="128")  # type: ignore[arg-type]
