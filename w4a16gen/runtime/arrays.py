"""Arrays of any library, on the host or on a GPU, read through the interfaces that they share."""

from __future__ import annotations

import math
import operator
import sys
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from w4a16gen.errors import InvalidValueError, NoHopperGpuError
from w4a16gen.kernels.integers import integer
from w4a16gen.weights.host import host_array, is_tensor

_DLPACK_CUDA = (2, 13)
"""DLPack device types for GPU memory: kDLCUDA and kDLCUDAManaged."""
_DLPACK_KINDS = {0: "i", 1: "u", 2: "f"}
READ_ONLY = "is read-only: pass an array that can be written"


class ArrayView(NamedTuple):
    """An array's place, dtype and shape. `owner` keeps the memory alive."""

    pointer: int
    shape: tuple[int, ...]
    dtype: str
    device: int | None
    """The GPU that holds it; -1 for host memory, None for an empty array."""
    contiguous: bool
    owner: Any
    read_only: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes from the first value to past the last, for a contiguous array."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class DeviceArray:
    """A contiguous array in GPU memory, for programs without torch or CuPy; freed with its last reference.

    Torch, CuPy and numba read it through `__cuda_array_interface__`.
    """

    def __init__(self, module: Any, shape: tuple[int, ...], dtype: npt.DTypeLike, device: int = 0) -> None:
        """Allocate without initialising.

        Raises:
            CudaError: if the GPU has no memory left.
        """
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self.buffer = module.DeviceBuffer(math.prod(shape) * self.dtype.itemsize, device)

    @classmethod
    def from_host(cls, module: Any, array: npt.NDArray[Any], device: int = 0) -> DeviceArray:
        """Allocate and copy; return when the copy is done."""
        result = cls(module, array.shape, array.dtype, device)
        result.buffer.upload(np.ascontiguousarray(array))
        return result

    def to_host(self) -> npt.NDArray[Any]:
        """Copy back, after the default stream's work. Synchronise other streams first."""
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


def upload(module: Any, name: str, value: Any, device: Any, devices: set[int]) -> DeviceArray:
    """Copy an array of numbers from the host to a GPU; return when the copy is done.

    Raises:
        InvalidValueError: if it is no array in host memory, or the device is no integer.
        NoHopperGpuError: if there is no such GPU.
    """
    index = integer("device", device)
    if index not in devices:
        found = f"CUDA devices {sorted(devices)}" if devices else "no CUDA GPU, and calls take host arrays as they are"
        raise NoHopperGpuError(f"there is no CUDA device {index}: this machine has {found}")
    array = host_array(name, value, must_be="a dtype of numpy")
    if array.dtype.kind == "V":
        raise InvalidValueError(f"{name} of dtype {array.dtype} must be an array of plain numbers")
    return DeviceArray.from_host(module, array, index)


def is_on_gpu(array: Any) -> bool:
    """Return whether an array is a torch tensor in GPU memory, or offers such memory through an interface."""
    if isinstance(array, np.ndarray):
        return False
    if is_tensor(array):
        return bool(array.is_cuda)
    if getattr(array, "__cuda_array_interface__", None) is not None:
        return True
    try:
        return array.__dlpack_device__()[0] in _DLPACK_CUDA
    except Exception:  # noqa: BLE001  (not an array, or one of a library that may raise anything)
        return False


@cache
def _typestr(dtype: Any) -> str:
    """Return a torch dtype as `__cuda_array_interface__` writes it, or its name if that has none, such as bfloat16."""
    name = str(dtype).removeprefix("torch.")
    try:
        return np.dtype(name).str
    except TypeError:
        return name


def refuse_gradients(name: str, tensor: Any) -> None:
    """Raise if gradients would have to flow through a tensor.

    Raises:
        InvalidValueError: naming the ways out.
    """
    if tensor.requires_grad and sys.modules["torch"].is_grad_enabled():
        raise InvalidValueError(
            f"{name} requires gradients, which these kernels do not compute: call within torch.no_grad() or "
            "torch.inference_mode(), or pass a detached tensor"
        )


def _view_tensor(name: str, tensor: Any) -> ArrayView:
    """Read a torch tensor's attributes: `__cuda_array_interface__` is built at each access and takes longer.

    Raises:
        InvalidValueError: if gradients would have to flow through it.
    """
    refuse_gradients(name, tensor)
    return ArrayView(
        tensor.data_ptr(), tensor.shape, _typestr(tensor.dtype), tensor.get_device(), tensor.is_contiguous(), tensor
    )


def is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...] | None, step: int = 1) -> bool:
    """Return whether strides are those of a row-major array; `step` is the stride of neighbours in a row.

    Raises:
        ValueError: if there is not one stride per dimension.
    """
    if strides is None:
        return True
    expected = step
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def view(name: str, array: Any, module: Any) -> ArrayView:
    """Read where a GPU array is and what it holds.

    Args:
        name: what messages call the array.
        array: a torch tensor, or any array with `__cuda_array_interface__` or `__dlpack__`.
        module: the built pybind11 module.

    Raises:
        InvalidValueError: if it is not a GPU array.
    """
    if is_tensor(array) and array.is_cuda:
        return _view_tensor(name, array)
    if is_tensor(array) or not is_on_gpu(array):
        raise InvalidValueError(
            f"{name} of type {type(array).__name__} must be on a GPU like the other arrays: move it with "
            "w4a16gen.to_device. gemm, moe and pack also take arrays that are all on the host"
        )
    interface = getattr(array, "__cuda_array_interface__", None)
    try:
        seen = _view_dlpack(array, module) if interface is None else _view_interface(array, interface, module)
    except Exception as error:  # noqa: BLE001  (an interface of another library may hold or raise anything)
        raise InvalidValueError(f"{name} of type {type(array).__name__} cannot be read as an array: {error}") from None
    if seen.device == -1:
        raise InvalidValueError(f"{name} must be in GPU memory, but its pointer is to host memory: move it to the GPU")
    return seen


def _view_interface(array: Any, interface: dict[str, Any], module: Any) -> ArrayView:
    (pointer, read_only), shape = interface["data"], tuple(map(operator.index, interface["shape"]))
    if interface.get("mask") is not None:
        raise TypeError("it is masked, but every value counts")
    dtype: str = interface["typestr"]
    strides = interface.get("strides")  # in bytes
    contiguous = strides is None or is_contiguous(shape, strides, np.dtype(dtype).itemsize)
    device = module.pointer_device(pointer) if pointer else None  # an empty array is nowhere
    return ArrayView(pointer or 0, shape, dtype, device, contiguous, array, bool(read_only))


def _view_dlpack(array: Any, module: Any) -> ArrayView:
    owner = array.__dlpack__(stream=-1)
    pointer, shape, strides, (code, bits, lanes), device = module.dlpack_view(owner)
    kind = _DLPACK_KINDS.get(code)
    dtype = np.dtype(f"{kind}{bits // 8}" if kind is not None and lanes == 1 else "V1").str
    return ArrayView(pointer, shape, dtype, device, is_contiguous(shape, strides), (array, owner))


def dtype_name(typestr: str) -> str:
    """Return numpy's name of a dtype, for messages; a text that numpy does not know is its own name."""
    try:
        return str(np.dtype(typestr))
    except TypeError:
        return typestr


def check(
    name: str,
    seen: ArrayView,
    *,
    dtype: str,
    shape: tuple[int, ...],
    device: int | None = None,
    written: bool = False,
) -> None:
    """Raise unless an array has this dtype and shape, is contiguous, on the device, and writable if it is written.

    Raises:
        InvalidValueError: naming what is off and what it must be.
    """
    if seen.dtype != dtype and dtype_name(seen.dtype) != dtype_name(dtype):
        raise InvalidValueError(
            f"{name} of dtype {dtype_name(seen.dtype)} must be {dtype_name(dtype)}: convert it first"
        )
    if seen.shape != shape:
        raise InvalidValueError(f"{name} of shape {list(seen.shape)} must be {list(shape)}")
    if not seen.contiguous:
        raise InvalidValueError(why_not_contiguous(name))
    if None not in (device, seen.device) and seen.device != device:
        raise InvalidValueError(f"{name} on GPU {seen.device} must be on GPU {device}, like the packed weight")
    if written and seen.read_only:
        raise InvalidValueError(f"{name} {READ_ONLY}")


def why_not_contiguous(name: str) -> str:
    """Return the sentence about an array whose rows do not follow each other."""
    return f"{name} must be contiguous, row-major: make a contiguous copy"


def why_overlaps(name: str) -> str:
    """Return the sentence about an output that would be written over what a kernel reads; the library says the same."""
    return f"output overlaps the {name}: pass another array"


def check_activations_shape(shape: tuple[int, ...], k: int, *, hidden: bool = False) -> None:
    """Raise unless activations are [m, k].

    Args:
        shape: their shape.
        k: the columns that they must have.
        hidden: whether they are the hidden states of a layer of experts, [tokens, k].

    Raises:
        InvalidValueError: naming the shape and a way out.
    """
    if len(shape) != 2 or shape[1] != k:  # noqa: PLR2004
        argument, hint = "hidden" if hidden else "a", ""
        if len(shape) > 2 and shape[-1] == k:  # noqa: PLR2004
            hint = f": pass {argument}.reshape(-1, {k})"
        elif len(shape) == 1 and shape[0] == k:
            hint = f": for one token, pass {argument}[None]"
        elif len(shape) == 2 and shape[0] == k:  # noqa: PLR2004
            hint = ": they look transposed"
        if hidden:
            raise InvalidValueError(f"hidden of shape {list(shape)} must be [tokens, {k}]{hint}")
        raise InvalidValueError(f"activations of shape {list(shape)} must be [m, {k}]{hint}")
