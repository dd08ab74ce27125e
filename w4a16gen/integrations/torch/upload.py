"""Copies of memory-mapped bytes to a device, through pinned memory that is used again."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from w4a16gen.errors import InvalidValueError
from w4a16gen.integrations.torch.nibbles import Tensor
from w4a16gen.weights.importers.mapped import shown_name
from w4a16gen.weights.importers.tensors import Tensors

_CHUNK_BYTES = 32 << 20
_READERS = 4
"""Threads that read one chunk: one alone waits for each page of a file that is not in memory."""
_DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    **dict.fromkeys(("I64", "U64"), torch.int64),
    **dict.fromkeys(("I32", "U32"), torch.int32),
    **dict.fromkeys(("I16", "U16"), torch.int16),
    **dict.fromkeys(("I8", "U8"), torch.uint8),
}
"""Torch's dtype of each dtype of a file; of integers only the width counts."""


def device_of(device: Any) -> Any:
    """Return a device of torch.

    Raises:
        InvalidValueError: if torch knows no such device, or finds no GPU.
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise InvalidValueError(f"device {device!r} must be a device of torch, such as cuda:0 or cpu") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise InvalidValueError(
            f"device {found} is not there: torch finds no GPU. device='cpu' computes the reference, slowly"
        )
    return found


class Uploader:
    """Copies arrays of the host to one device. Use it in one thread."""

    def __init__(self, device: Any) -> None:
        """Copy to this device.

        Raises:
            InvalidValueError: if torch knows or finds no such device, or it is `meta`.
        """
        self.device = device_of(device)
        if self.device.type not in {"cpu", "cuda"}:
            raise InvalidValueError(f"device {self.device} must be a GPU of CUDA or the CPU")
        self._buffers: cycle[tuple[Tensor, Any]] | None = None
        self._readers: ThreadPoolExecutor | None = None

    def tensor(self, tensors: Tensors, name: str) -> Tensor:
        """Return a tensor of a checkpoint as its file stores it, on the device; of integers only the width is kept.

        Raises:
            InvalidValueError: if torch has no such dtype.
        """
        info = tensors[name]
        if info.dtype not in _DTYPES:
            raise InvalidValueError(f"tensor {shown_name(name)} of dtype {info.dtype} cannot be read with torch")
        return self.bytes(tensors.raw(name)).view(_DTYPES[info.dtype]).view(info.shape)

    def array(self, array: npt.NDArray[Any]) -> Tensor:
        """Return a copy of an array of the host on the device."""
        whole = np.ascontiguousarray(array)
        dtype = torch.from_numpy(np.empty(0, whole.dtype)).dtype
        return self.bytes(whole.reshape(-1).view(np.uint8)).view(dtype).view(array.shape)

    def bytes(self, raw: npt.NDArray[np.uint8]) -> Tensor:
        """Return a copy of bytes on the device, uint8 [bytes]; on a GPU in the order of its current stream."""
        if self.device.type == "cpu":
            return torch.from_numpy(raw.copy())
        if self._buffers is None:
            pinned = [torch.empty(_CHUNK_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
            self._buffers = cycle([(buffer, torch.cuda.Event()) for buffer in pinned])
            self._readers = ThreadPoolExecutor(_READERS)
        result = torch.empty(raw.size, dtype=torch.uint8, device=self.device)
        with torch.cuda.device(self.device):
            for start in range(0, raw.size, _CHUNK_BYTES):
                part = raw[start : start + _CHUNK_BYTES]
                buffer, event = next(self._buffers)
                event.synchronize()  # the copy that last read the buffer
                self._read(part, buffer[: part.size].numpy())
                result[start : start + part.size].copy_(buffer[: part.size], non_blocking=True)
                event.record()
        return result

    def _read(self, source: npt.NDArray[np.uint8], target: npt.NDArray[np.uint8]) -> None:
        """Copy bytes of a file that may not be in memory yet."""
        readers = self._readers
        if readers is None or source.size < _CHUNK_BYTES // _READERS:
            np.copyto(target, source)
            return
        step = -(-source.size // _READERS)
        starts = range(0, source.size, step)
        list(readers.map(lambda start: np.copyto(target[start : start + step], source[start : start + step]), starts))
