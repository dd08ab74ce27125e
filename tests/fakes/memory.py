"""Memory of GPUs that are made of host memory."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt


def memory_at(pointer: int, shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
    """See memory as an array; it is the buffer's own, not a copy."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if size == 0:
        return np.empty(shape, dtype)
    seen: npt.NDArray[Any] = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pointer))
    return seen.view(dtype).reshape(shape)
