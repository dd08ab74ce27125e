"""Arrays of any library, on the host or on a GPU, seen through the interfaces that they share."""

from __future__ import annotations

import math
import sys
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from w4a16gen.errors import InvalidValueError

_DLPACK_CUDA = (2, 13)
"""DLPack device types for GPU memory: kDLCUDA and kDLCUDAManaged."""
_DLPACK_KINDS = {0: "i", 1: "u", 2: "f"}


class ArrayView(NamedTuple):
    """Where an array is and what it holds. `owner` keeps the memory alive."""

    pointer: int
    shape: tuple[int, ...]
    dtype: str
    device: int | None
    """The GPU that holds it; -1 for host memory, None for an empty array."""
    contiguous: bool
    owner: Any

    @property
    def nbytes(self) -> int:
        """Bytes from the first value to past the last, for a contiguous array."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class DeviceArray:
    """A contiguous array in GPU memory, for programs without torch or CuPy; freed with its last reference."""

    def __init__(self, module: Any, shape: tuple[int, ...], dtype: npt.DTypeLike, device: int = 0) -> None:
        """Allocate without initialising."""
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self.buffer = module.DeviceBuffer(math.prod(shape) * self.dtype.itemsize, device)

    @classmethod
    def from_host(cls, module: Any, array: npt.NDArray[Any], device: int = 0) -> DeviceArray:
        """Allocate and copy; returns when the copy is done."""
        result = cls(module, array.shape, array.dtype, device)
        result.buffer.upload(np.ascontiguousarray(array))
        return result

    def to_host(self) -> npt.NDArray[Any]:
        """Copy back, after the default stream's work; work on other streams must be synchronised first."""
        result = np.empty(self.shape, self.dtype)
        self.buffer.download(result)
        return result

    @property
    def device(self) -> int:
        """Index of the GPU that holds the array."""
        return int(self.buffer.device)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """The array as CuPy, numba and torch read it (version 3)."""
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.buffer.pointer, False),
            "strides": None,
            "version": 3,
        }


def is_on_gpu(array: Any) -> bool:
    """Whether an array is a torch tensor in GPU memory, or offers such memory through one of the two interfaces."""
    if isinstance(array, np.ndarray):
        return False
    if _is_tensor(array):
        return bool(array.is_cuda)
    if getattr(array, "__cuda_array_interface__", None) is not None:
        return True
    device = getattr(array, "__dlpack_device__", None)
    return device is not None and device()[0] in _DLPACK_CUDA


def _is_tensor(array: Any) -> bool:
    """Whether an array is torch's; without importing torch, which then cannot have made it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


@cache
def _typestr(dtype: Any) -> str:
    """Give a torch dtype as `__cuda_array_interface__` writes it, or its name if that has none, such as bfloat16."""
    name = str(dtype).removeprefix("torch.")
    try:
        return np.dtype(name).str
    except TypeError:
        return name


def _view_tensor(name: str, tensor: Any) -> ArrayView:
    """See a torch tensor, in a fraction of the time that its `__cuda_array_interface__` takes, built at each access.

    Raises:
        InvalidValueError: if gradients would have to flow through it.
    """
    if tensor.requires_grad and sys.modules["torch"].is_grad_enabled():
        raise InvalidValueError(
            f"{name} requires gradients, which these kernels do not compute: call within torch.no_grad() or "
            "torch.inference_mode(), or pass a detached tensor"
        )
    return ArrayView(
        tensor.data_ptr(), tensor.shape, _typestr(tensor.dtype), tensor.get_device(), tensor.is_contiguous(), tensor
    )


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...] | None) -> bool:
    """Whether strides, counted in values, are those of a row-major array."""
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides or ()), strict=False):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def view(name: str, array: Any, module: Any) -> ArrayView:
    """See a torch tensor, or any GPU array through `__cuda_array_interface__` or `__dlpack__`.

    Args:
        name: what messages call the array.
        array: the array.
        module: the built pybind11 module.

    Raises:
        InvalidValueError: if it is not a GPU array.
    """
    if _is_tensor(array) and array.is_cuda:
        return _view_tensor(name, array)
    interface = None if _is_tensor(array) else getattr(array, "__cuda_array_interface__", None)
    if interface is not None:
        pointer, shape = interface["data"][0] or 0, tuple(interface["shape"])
        dtype: str = interface["typestr"]
        strides = interface.get("strides")
        counted = None if strides is None else tuple(stride // np.dtype(dtype).itemsize for stride in strides)
        device = module.pointer_device(pointer) if pointer else None  # an empty array is nowhere
        owner = array
    elif is_on_gpu(array):
        owner = array.__dlpack__(stream=-1)
        pointer, shape, counted, (code, bits, lanes), device = module.dlpack_view(owner)
        kind = _DLPACK_KINDS.get(code)
        dtype = np.dtype(f"{kind}{bits // 8}" if kind is not None and lanes == 1 else "V1").str
    else:
        raise InvalidValueError(
            f"{name} is a {type(array).__name__} in host memory, but the other arrays are on a GPU: move it with "
            "w4a16gen.to_device, or keep all on the host to run the numpy reference"
        )
    contiguous = counted is None or _is_contiguous(shape, counted)
    return ArrayView(pointer, shape, dtype, device, contiguous, (array, owner))


def _dtype_name(typestr: str) -> str:
    try:
        return str(np.dtype(typestr))
    except TypeError:
        return typestr


def check(name: str, seen: ArrayView, *, dtype: str, shape: tuple[int, ...], device: int | None = None) -> None:
    """Raise unless an array has this dtype and shape, is contiguous and on the device.

    Raises:
        InvalidValueError: naming what is off and what it must be.
    """
    if seen.dtype != dtype and _dtype_name(seen.dtype) != _dtype_name(dtype):
        raise InvalidValueError(f"{name} of dtype {_dtype_name(seen.dtype)} must be {_dtype_name(dtype)}")
    if seen.shape != shape:
        raise InvalidValueError(f"{name} of shape {list(seen.shape)} must be {list(shape)}")
    if not seen.contiguous:
        raise InvalidValueError(f"{name} must be contiguous, row-major: make a contiguous copy")
    if seen.device == -1:
        raise InvalidValueError(f"{name} offers a pointer to host memory as GPU memory: move it to the GPU")
    if None not in (device, seen.device) and seen.device != device:
        raise InvalidValueError(f"{name} is on GPU {seen.device}, but the packed weight is on GPU {device}")


def stream_pointer(stream: Any, array: Any) -> int:
    """Give a CUDA stream's address.

    Args:
        stream: an int, an object with `cuda_stream` or `ptr` or `pointer` or `__cuda_stream__`, or None for the stream
            on which the array's library is working: torch's current stream, or else the default stream.
        array: the activations.

    Raises:
        InvalidValueError: if it is none of these.
    """
    if stream is None:
        return _torch_stream(array.get_device()) if _is_tensor(array) else 0
    if isinstance(stream, int):
        return stream
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        return int((protocol() if callable(protocol) else protocol)[1])
    for attribute in ("cuda_stream", "ptr", "pointer"):
        if hasattr(stream, attribute):
            return int(getattr(stream, attribute))
    raise InvalidValueError(f"stream of type {type(stream).__name__} must be an int or a CUDA stream object")


def _torch_stream(device: int) -> int:
    """Give the address of torch's current stream on a GPU."""
    torch = sys.modules["torch"]
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # noqa: SLF001  (makes no stream object)
    return int(torch.cuda.current_stream(device).cuda_stream if raw is None else raw(device))


def record_stream(tensor: Any, stream: int) -> None:
    """Tell torch's allocator that a stream other than its current one uses a tensor."""
    torch = sys.modules["torch"]
    tensor.record_stream(torch.cuda.ExternalStream(stream, device=tensor.device))


def empty_like_library(array: Any, module: Any, shape: tuple[int, ...], dtype: str, device: int) -> Any:
    """Allocate beside an array: a torch tensor for a torch tensor, else a DeviceArray, or None without a module."""
    if _is_tensor(array):
        torch = sys.modules["torch"]
        return array.new_empty(shape, dtype=torch.float16 if dtype == "<f2" else torch.uint8)
    return None if module is None else DeviceArray(module, shape, dtype, device)
