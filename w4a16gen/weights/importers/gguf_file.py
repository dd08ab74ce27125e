"""Read the header of a GGUF file, and check all of it before any tensor is touched."""

from __future__ import annotations

import struct
from math import prod
from typing import Any

from w4a16gen.errors import InvalidValueError
from w4a16gen.weights.importers.mapped import MappedFile, shown_name
from w4a16gen.weights.importers.tensors import TensorInfo

MAGIC = b"GGUF"
VERSIONS = (2, 3)
TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}
"""Name, values of a block and bytes of a block of each type of tensor."""
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_KEYS, _MAX_TENSORS, _MAX_TEXTS = 1 << 14, 1 << 16, 1 << 22
"""Most keys, tensors, and texts in an array; the largest vocabularies have 2^18 texts."""
_MAX_NAME = 1 << 10
_MAX_TEXT = 1 << 8
"""Longest text that is kept; longer ones, such as templates, are skipped."""
_MAX_RANK = 4
_DEFAULT_ALIGNMENT = 32
_MAX_SIZE = 1 << 62


class _Cursor:
    """A place in the header, which moves on as values are read."""

    def __init__(self, file: MappedFile) -> None:
        self.file = file
        self.place = 0

    def take(self, size: int) -> bytes:
        self.skip(size)
        return self.file.data[self.place - size : self.place].tobytes()

    def skip(self, size: int) -> None:
        if size > len(self.file.data) - self.place:
            raise InvalidValueError(f"{self.file.path} is truncated: its header ends after the file")
        self.place += size

    def scalar(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0]

    def count(self, what: str, most: int) -> int:
        count = int(self.scalar("Q"))
        if count > most:
            raise InvalidValueError(f"{self.file.path}: {count} {what} are more than {most}")
        return count

    def name(self) -> str:
        length = int(self.scalar("Q"))
        if length > _MAX_NAME:
            raise InvalidValueError(f"{self.file.path}: a name of {length} bytes is longer than {_MAX_NAME}")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise InvalidValueError(f"{self.file.path}: a name is not UTF-8") from None

    def value(self) -> Any:
        """Return a scalar or a text; skip arrays and long texts, and return None."""
        kind = int(self.scalar("I"))
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._text()
        if kind == _ARRAY:
            self._skip_array()
            return None
        raise InvalidValueError(f"{self.file.path}: a value of the unknown type {kind}")

    def _text(self) -> str | None:
        length = int(self.scalar("Q"))
        if length > _MAX_TEXT:
            self.skip(length)
            return None
        return self.take(length).decode(errors="replace")

    def _skip_array(self) -> None:
        kind = int(self.scalar("I"))
        if kind in _SCALARS:
            self.skip(int(self.scalar("Q")) * struct.calcsize(f"<{_SCALARS[kind]}"))
            return
        if kind != _STRING:
            raise InvalidValueError(f"{self.file.path}: an array of the unknown type {kind}")
        for _ in range(self.count("texts", _MAX_TEXTS)):
            self.skip(int(self.scalar("Q")))


def read_header(file: MappedFile) -> tuple[dict[str, TensorInfo], dict[str, Any]]:
    """Return the tensors and the metadata of a GGUF file.

    Args:
        file: the mapped file.

    Returns:
        The tensors by name, with the slowest dimension first, and scalars and texts of the metadata.

    Raises:
        InvalidValueError: if the file is no GGUF file of version 2 or 3, is truncated, is one part of several, or its
            header contradicts itself or the file.
    """
    cursor = _Cursor(file)
    if cursor.take(len(MAGIC)) != MAGIC:
        raise InvalidValueError(f"{file.path} is not a GGUF file")
    version = int(cursor.scalar("I"))
    if version not in VERSIONS:
        raise InvalidValueError(f"{file.path}: GGUF version {version} must be 2 or 3, little endian")
    tensor_count, key_count = cursor.count("tensors", _MAX_TENSORS), cursor.count("keys", _MAX_KEYS)
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = cursor.name()
        if key in metadata:
            raise InvalidValueError(f"{file.path} repeats the key {shown_name(key)}")
        metadata[key] = cursor.value()
    entries = [_entry(cursor) for _ in range(tensor_count)]
    start = cursor.place + -cursor.place % _alignment(file, metadata)
    tensors: dict[str, TensorInfo] = {}
    for name, kind, shape, offset in entries:
        if name in tensors:
            raise InvalidValueError(f"{file.path} repeats the tensor {shown_name(name)}")
        tensors[name] = _tensor(file, name, kind, shape, start + offset)
    _check_overlaps(file, tensors)
    if metadata.get("split.count") not in (None, 0, 1):
        raise InvalidValueError(f"{file.path} is one part of several: join them with gguf-split --merge")
    return tensors, metadata


def _alignment(file: MappedFile, metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
        raise InvalidValueError(f"{file.path}: general.alignment of {shown_name(alignment)} must be a power of two")
    return alignment


def _entry(cursor: _Cursor) -> tuple[str, int, tuple[int, ...], int]:
    """Return name, type, shape and offset of the next tensor."""
    name = cursor.name()
    rank = int(cursor.scalar("I"))
    if not 0 < rank <= _MAX_RANK:
        raise InvalidValueError(
            f"{cursor.file.path}: tensor {shown_name(name)} has {rank} dimensions, not 1 to {_MAX_RANK}"
        )
    sizes = [int(cursor.scalar("Q")) for _ in range(rank)]
    return name, int(cursor.scalar("I")), tuple(reversed(sizes)), int(cursor.scalar("Q"))


def _tensor(file: MappedFile, name: str, kind: int, shape: tuple[int, ...], start: int) -> TensorInfo:
    """Return a checked tensor."""
    where = f"{file.path}: tensor {shown_name(name)}"
    if kind not in TYPES:
        raise InvalidValueError(f"{where} is of the unknown type {kind}: update this package")
    dtype, block_values, block_bytes = TYPES[kind]
    if not all(0 < size < _MAX_SIZE for size in shape) or shape[-1] % block_values != 0:
        raise InvalidValueError(f"{where} of type {dtype} must have rows of whole blocks of {block_values} values")
    size = prod(shape) // block_values * block_bytes
    if start + size > len(file.data):
        raise InvalidValueError(f"{where} ends after the file: the file is truncated, or its header is wrong")
    return TensorInfo(dtype, shape, file, start, size)


def _check_overlaps(file: MappedFile, tensors: dict[str, TensorInfo]) -> None:
    end = 0
    for name, info in sorted(tensors.items(), key=lambda item: item[1].start):
        if info.start < end:
            raise InvalidValueError(f"{file.path}: tensor {shown_name(name)} overlaps the tensor before it")
        end = info.start + info.size
