"""Files in memory maps, and the limits that protect against files that lie about themselves."""

from __future__ import annotations

import json
import mmap
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from w4a16gen.errors import InvalidValueError

MAX_JSON_BYTES = 24 << 20
"""Longest header or index that is read. The index of a model of 10^12 weights has 21 MiB."""
MAX_JSON_VALUES = 1 << 20
"""Most values in it. Python needs up to 100 bytes for a value of two bytes, so the length alone limits no memory."""
MAX_WIDE_BYTES = 4 << 20
"""Longest text with letters beyond ASCII, also escaped ones, which take four bytes each in memory."""


def shown_name(name: object) -> str:
    """Return a name out of a file for a message: quoted, without control characters, at most 80 characters."""
    text = repr(str(name))
    return text if len(text) <= 80 else f"{text[:76]}...'"  # noqa: PLR2004


@dataclass(frozen=True, eq=False)
class MappedFile:
    """A regular file in a read-only memory map.

    Attributes:
        path: the file.
        data: uint8 [size of the file], in the map.
    """

    path: Path
    data: npt.NDArray[np.uint8]

    def part(self, start: int, size: int) -> npt.NDArray[np.uint8]:
        """Return some bytes, without copying them.

        Raises:
            InvalidValueError: if the file does not have them, or has become shorter since it was opened.
        """
        end = start + size
        if not 0 <= start <= end <= len(self.data):
            raise InvalidValueError(
                f"{self.path} is truncated: it has {len(self.data)} bytes, and its header needs {end}"
            )
        if self.path.stat().st_size < len(self.data):  # touching the map past the end would end the process
            raise InvalidValueError(f"{self.path} has become shorter since it was opened: open it again")
        return self.data[start:end]


def map_file(path: Path) -> MappedFile:
    """Map a file into memory.

    Raises:
        InvalidValueError: if it does not exist, cannot be read, or is a folder, a device or a pipe.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe without a writer must not block
    except OSError as error:
        raise InvalidValueError(f"{path} cannot be read: {error.strerror}") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise InvalidValueError(f"{path} must be a regular file")
        if status.st_size == 0:
            raise InvalidValueError(f"{path} is empty: copy or download it again")
        content = mmap.mmap(descriptor, status.st_size, access=mmap.ACCESS_READ)
    except OSError as error:
        raise InvalidValueError(f"{path} cannot be mapped: {error.strerror}") from None
    finally:
        os.close(descriptor)
    return MappedFile(path, np.frombuffer(content, np.uint8))


def parse_json(text: bytes, origin: str) -> dict[str, Any]:
    """Return a JSON object, whose keys are all different at every depth.

    Args:
        text: the JSON, in UTF-8.
        origin: what messages call it.

    Raises:
        InvalidValueError: if it is too long, no JSON object, or repeats a key.
    """
    longest = MAX_JSON_BYTES if text.isascii() and rb"\u" not in text else MAX_WIDE_BYTES
    if len(text) > longest:
        raise InvalidValueError(f"{origin} of {len(text)} bytes is longer than {longest}")
    if sum(text.count(mark) for mark in (b",", b":", b"[", b"{")) > MAX_JSON_VALUES:
        raise InvalidValueError(f"{origin} has more than {MAX_JSON_VALUES} values")
    try:
        value = json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, origin))
    except InvalidValueError:
        raise
    except (ValueError, RecursionError):
        raise InvalidValueError(f"{origin} is not JSON in UTF-8, or has too many levels or digits") from None
    if not isinstance(value, dict):
        raise InvalidValueError(f"{origin} must be a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]], origin: str) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise InvalidValueError(f"{origin} repeats the key {shown_name(_first_repeated(names))}")
    return result


def _first_repeated(names: list[str]) -> str:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return names[0]
