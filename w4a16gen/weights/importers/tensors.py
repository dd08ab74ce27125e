"""Tensors of a checkpoint: what their headers say, and their values on demand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from w4a16gen.errors import InvalidValueError
from w4a16gen.weights.importers.mapped import MappedFile, shown_name
from w4a16gen.weights.importers.words import bfloat16_to_float32

DTYPES = {
    "BOOL": "?",
    "U8": "u1",
    "I8": "i1",
    "U16": "<u2",
    "I16": "<i2",
    "U32": "<u4",
    "I32": "<i4",
    "U64": "<u8",
    "I64": "<i8",
    "F16": "<f2",
    "BF16": "<u2",
    "F32": "<f4",
    "F64": "<f8",
}
"""Numpy's dtype of each dtype that can be read; bfloat16 is read as its bits."""
BITS = {
    **{name: 8 * np.dtype(kind).itemsize for name, kind in DTYPES.items()},
    "C64": 64,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}
"""Bits of one value of each dtype of safetensors."""
FLOATS = ("F16", "BF16", "F32")
INTEGERS = ("I32", "U32")


@dataclass(frozen=True)
class TensorInfo:
    """What the header says of a tensor.

    Attributes:
        dtype: name of the dtype, as safetensors writes it; for GGUF the name of the block type.
        shape: sizes, the slowest dimension first.
        file: the file that holds it.
        start: its first byte in the file.
        size: its bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    file: MappedFile
    start: int
    size: int


class Tensors(Mapping[str, TensorInfo]):
    """The tensors of all files of a checkpoint, by name, with the metadata of the files."""

    def __init__(self, infos: dict[str, TensorInfo], metadata: Mapping[str, Any]) -> None:
        """Take the tensors that the headers describe."""
        self._infos = infos
        self.metadata = metadata

    def __getitem__(self, name: str) -> TensorInfo:
        return self._infos[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """Return the bytes of a tensor, in the memory map."""
        info = self._infos[name]
        return info.file.part(info.start, info.size)

    def array(self, name: str) -> npt.NDArray[Any]:
        """Return a tensor in the memory map, read-only. bfloat16 is copied to float32, exactly.

        Raises:
            InvalidValueError: if numpy has no such dtype.
        """
        info = self._infos[name]
        if info.dtype not in DTYPES:
            raise InvalidValueError(f"tensor {shown_name(name)} of dtype {info.dtype} cannot be read with numpy")
        array = self.raw(name).view(DTYPES[info.dtype]).reshape(info.shape)
        return bfloat16_to_float32(array) if info.dtype == "BF16" else array

    def double(self, name: str) -> npt.NDArray[np.float64]:
        """Return a tensor of floats as float64, exactly.

        Raises:
            InvalidValueError: if a value is not finite.
        """
        values = self.array(name).astype(np.float64)
        if not np.isfinite(values).all():
            raise InvalidValueError(f"tensor {shown_name(name)} must be finite")
        return values

    def need(self, name: str, dtypes: tuple[str, ...], shape: tuple[int | None, ...]) -> tuple[int, ...]:
        """Return the shape of a tensor that must exist.

        Args:
            name: the tensor.
            dtypes: the dtypes that it may have.
            shape: its sizes; None allows any positive size.

        Raises:
            InvalidValueError: if it is missing, or of another dtype or shape.
        """
        info = self._infos.get(name)
        if info is None:
            raise InvalidValueError(f"tensor {shown_name(name)} is missing from the checkpoint")
        if info.dtype not in dtypes:
            raise InvalidValueError(f"tensor {shown_name(name)} of dtype {info.dtype} must be {' or '.join(dtypes)}")
        fits = len(info.shape) == len(shape) and all(
            found > 0 if wanted is None else found == wanted for found, wanted in zip(info.shape, shape, strict=True)
        )
        if not fits:
            wanted = ", ".join("1 or more" if size is None else str(size) for size in shape)
            raise InvalidValueError(f"tensor {shown_name(name)} of shape {list(info.shape)} must be [{wanted}]")
        return info.shape


def byte_size(dtype: str, shape: tuple[int, ...]) -> int | None:
    """Return the bytes of a tensor in safetensors, or None if its last byte would be shared."""
    bits = BITS[dtype] * prod(shape)
    return bits // 8 if bits % 8 == 0 else None
