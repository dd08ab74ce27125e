"""Files of packed weights: the format of safetensors, with one tensor of bytes and its facts as text.

The file is 8 bytes with the header's length (little endian), the header as JSON, then the tensor's bytes. The header's
`__metadata__` carries the facts, the version of this format, and the SHA-256 of the bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from w4a16gen.errors import InvalidValueError
from w4a16gen.files import write_if_changed

FORMAT = "w4a16gen.packed_weight/1"
TENSOR = "packed"
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 1 << 20
_CHUNK_BYTES = 1 << 20


def write(path: str | os.PathLike[str], data: npt.NDArray[np.uint8], facts: dict[str, str]) -> None:
    """Write bytes and their facts; the file appears when it is complete.

    Raises:
        InvalidValueError: if the path is not one.
        OSError: if the file cannot be written.
    """
    content = np.ascontiguousarray(data).tobytes()
    header = {
        "__metadata__": {"format": FORMAT, "sha256": hashlib.sha256(content).hexdigest(), **facts},
        TENSOR: {"dtype": "U8", "shape": [len(content)], "data_offsets": [0, len(content)]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)  # the tensor's bytes start at a multiple of 8
    write_if_changed(as_path("path", path), len(text).to_bytes(_LENGTH_BYTES, "little") + text + content)


def read(
    path: str | os.PathLike[str], check: Callable[[dict[str, str], int], Any]
) -> tuple[npt.NDArray[np.uint8], dict[str, str]]:
    """Return the bytes and the facts of a file that `write` has written.

    Args:
        path: the file.
        check: is called with the facts and the number of bytes before any of them is read.

    Raises:
        InvalidValueError: if it is any other file, or damaged.
        OSError: if the file cannot be read.
    """
    file = as_path("path", path)
    if file.exists() and not file.is_file():
        raise InvalidValueError(f"{path} is not a file of a packed weight")
    with file.open("rb") as opened:
        size = file.stat().st_size
        length = int.from_bytes(opened.read(_LENGTH_BYTES), "little")
        start = _LENGTH_BYTES + length
        if length > _MAX_HEADER_BYTES or start > size:
            raise InvalidValueError(f"{path} is not a file of a packed weight")
        facts = _facts(path, opened.read(length), size - start)
        check(facts, size - start)
        digest = hashlib.sha256()
        while chunk := opened.read(_CHUNK_BYTES):
            digest.update(chunk)
        if digest.hexdigest() != facts.get("sha256"):
            raise InvalidValueError(f"{path} is damaged: its bytes do not have the digest that it carries")
        opened.seek(start)
        return np.fromfile(opened, np.uint8), facts


def _facts(path: str | os.PathLike[str], text: bytes, size: int) -> dict[str, str]:
    """Return the checked facts of a header."""
    try:
        header: Any = json.loads(text)
        facts = {str(name): str(value) for name, value in header.pop("__metadata__").items()}
        found = facts["format"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InvalidValueError(f"{path} is not a file of a packed weight") from None
    if found != FORMAT:
        raise InvalidValueError(f"{path} is of format {found!r}, but this version reads {FORMAT!r}")
    if header != {TENSOR: {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}:
        raise InvalidValueError(f"{path} is damaged: its header does not describe its {size} bytes")
    return facts


def as_path(name: str, path: Any) -> Path:
    """Return a path of text or a path object.

    Raises:
        InvalidValueError: if it is anything else, or holds a null character.
    """
    text = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(text, str):
        raise InvalidValueError(f"{name} of type {type(path).__name__} must be text or a path")
    if not text or "\0" in text:
        raise InvalidValueError(f"{name} {text!r} must name a file or folder")
    return Path(text)
