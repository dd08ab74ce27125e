"""Read the header of a safetensors file, and check all of it before any tensor is touched.

The `safetensors` package offers numpy no bfloat16, so this reader maps the file and takes the bytes itself.
"""

from __future__ import annotations

from typing import Any

from w4a16gen.errors import InvalidValueError
from w4a16gen.weights.importers.mapped import MAX_JSON_BYTES, MappedFile, parse_json, shown_name
from w4a16gen.weights.importers.tensors import BITS, TensorInfo, byte_size

LENGTH_BYTES = 8
MAX_RANK = 8
_METADATA = "__metadata__"
_KEYS = {"dtype", "shape", "data_offsets"}


def read_header(file: MappedFile) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file.

    Args:
        file: the mapped file.

    Returns:
        The tensors by name, and the text of `__metadata__`.

    Raises:
        InvalidValueError: if the file is no safetensors file, is truncated, or its header contradicts itself or the
            file: an unknown dtype, a size that its offsets do not have, tensors that overlap or leave bytes out.
    """
    path = file.path
    if len(file.data) < LENGTH_BYTES:
        raise InvalidValueError(f"{path} of {len(file.data)} bytes is not a safetensors file")
    length = int.from_bytes(file.part(0, LENGTH_BYTES).tobytes(), "little")
    if length > MAX_JSON_BYTES:
        raise InvalidValueError(f"{path} is not a safetensors file: its header would have {length} bytes")
    header = parse_json(file.part(LENGTH_BYTES, length).tobytes(), f"the header of {path}")
    metadata = _metadata(header.pop(_METADATA, {}), file)
    start = LENGTH_BYTES + length
    tensors = {name: _tensor(name, entry, file, start) for name, entry in header.items()}
    _check_coverage(tensors, file, start)
    return tensors, metadata


def _metadata(value: Any, file: MappedFile) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise InvalidValueError(f"{file.path}: its metadata must be text")
    return value


def _tensor(name: str, entry: Any, file: MappedFile, start: int) -> TensorInfo:
    """Return the checked entry of a header."""
    where = f"{file.path}: tensor {shown_name(name)}"
    if not isinstance(entry, dict) or set(entry) != _KEYS:
        raise InvalidValueError(f"{where} must have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise InvalidValueError(f"{where} has the unknown dtype {shown_name(dtype)}")
    if not _are_sizes(shape) or len(shape) > MAX_RANK:
        raise InvalidValueError(f"{where} must have a shape of at most {MAX_RANK} sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:  # noqa: PLR2004
        raise InvalidValueError(f"{where} must have two offsets, the first not above the second")
    size = offsets[1] - offsets[0]
    if byte_size(dtype, tuple(shape)) != size:
        raise InvalidValueError(f"{where} of dtype {dtype} and its shape does not have the {size} bytes of its offsets")
    if start + offsets[1] > len(file.data):
        raise InvalidValueError(f"{where} ends after the file: the file is truncated, or its header is wrong")
    return TensorInfo(dtype, tuple(shape), file, start + offsets[0], size)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 62 for size in value)


def _check_coverage(tensors: dict[str, TensorInfo], file: MappedFile, start: int) -> None:
    """Raise unless the tensors cover the file, each byte once."""
    end = start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].size)):
        if info.start != end:
            what = "overlaps the tensor before it" if info.start < end else "leaves bytes before it unused"
            raise InvalidValueError(f"{file.path}: tensor {shown_name(name)} {what}")
        end += info.size
    if end != len(file.data):
        raise InvalidValueError(f"{file.path} has {len(file.data) - end} bytes after its last tensor")
