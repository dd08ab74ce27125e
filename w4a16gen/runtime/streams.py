"""CUDA streams of any library, and memory in the order of a stream."""

from __future__ import annotations

import sys
from typing import Any

from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.integers import integer
from w4a16gen.runtime.arrays import DeviceArray
from w4a16gen.weights.host import is_tensor


def stream_pointer(stream: Any, array: Any) -> int:
    """Return a CUDA stream's address.

    Args:
        stream: an int, an object with `cuda_stream` or `ptr` or `pointer` or `__cuda_stream__`, or None for the stream
            on which the array's library is working: torch's current stream, the one that the array's interface names
            (CuPy's current stream), or else the default stream.
        array: the activations.

    Raises:
        InvalidValueError: if it is none of these.
    """
    if stream is None and is_tensor(array):
        return torch_stream(array.get_device())
    if stream is None:
        stream = _stream_of_interface(array)
    try:
        address = integer("stream", _raw_stream(stream))
    except Exception:  # noqa: BLE001  (attributes of a foreign object may raise anything)
        address = -1
    if address < 0:
        raise InvalidValueError(f"stream of type {type(stream).__name__} must be a CUDA stream object or its address")
    return address


def _stream_of_interface(array: Any) -> Any:
    """Return the stream that writes an array, or 0: 1 and 2 are CUDA's own names of its two default streams."""
    interface = getattr(array, "__cuda_array_interface__", None)
    stream = interface.get("stream") if isinstance(interface, dict) else None
    return 0 if stream is None else stream


def _raw_stream(stream: Any) -> Any:
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        return (protocol() if callable(protocol) else protocol)[1]
    for attribute in ("cuda_stream", "ptr", "pointer"):
        if hasattr(stream, attribute):
            return getattr(stream, attribute)
    return stream


def torch_stream(device: int) -> int:
    """Return the address of torch's current stream on a GPU."""
    torch = sys.modules["torch"]
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # noqa: SLF001  (makes no stream object)
    return int(torch.cuda.current_stream(device).cuda_stream if raw is None else raw(device))


def is_torchs_stream(array: Any, stream: int) -> bool:
    """Return whether an array is a torch tensor and a stream is the one that torch works on."""
    return is_tensor(array) and stream == torch_stream(array.get_device())


def empty_like_library(
    array: Any, module: Any, shape: tuple[int, ...], dtype: str, device: int, *, stream: int | None = None
) -> Any:
    """Allocate beside an array: a torch tensor for a torch tensor, else a DeviceArray.

    Torch hands out memory in the order of one stream. The stream that will write it must be that one: memory that
    earlier kernels of another stream still read would be overwritten.

    Args:
        array: the array.
        module: the built pybind11 module.
        shape: shape to allocate.
        dtype: `<f2`, `<i4` or `|u1`.
        device: the GPU.
        stream: address of the stream that will write; None is torch's current one.
    """
    if not is_tensor(array):
        return DeviceArray(module, shape, dtype, device)
    torch = sys.modules["torch"]
    kind = {"<f2": torch.float16, "<i4": torch.int32, "|u1": torch.uint8}[dtype]
    if stream is None or is_torchs_stream(array, stream):
        return array.new_empty(shape, dtype=kind)
    with torch.cuda.stream(torch.cuda.ExternalStream(stream, device=array.device)):
        return array.new_empty(shape, dtype=kind)
