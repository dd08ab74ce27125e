"""Protocols of arrays for type checkers. They describe torch tensors too, because torch need not be installed."""

from __future__ import annotations

from typing import Any, Literal, Protocol, TypeVar


class Tensor(Protocol):
    """The attributes that distinguish a torch tensor from other arrays."""

    @property
    def is_cuda(self) -> bool:
        """Whether it is in GPU memory."""

    @property
    def requires_grad(self) -> bool:
        """Whether gradients flow through it."""

    def data_ptr(self) -> int:
        """Return the address of the first value."""


class CudaArray(Protocol):
    """An array of CuPy, numba or this package in GPU memory."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """The array's address, dtype, shape and strides."""


class DlpackArray(Protocol):
    """An array of any library that offers DLPack."""

    def __dlpack__(self, *, stream: Any = None) -> Any:
        """Return the capsule."""

    def __dlpack_device__(self) -> tuple[Any, Any]:
        """Return the kind of memory and the device number."""


GpuArray = CudaArray | DlpackArray
DependentLaunch = bool | Literal["auto"]
"""How a launch follows earlier kernels of its stream; see `Library.gemm`."""
TensorT = TypeVar("TensorT", bound=Tensor)
OutT = TypeVar("OutT")
