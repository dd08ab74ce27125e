"""Folders of sources: regular files are read, everything else is reported and never opened."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

LARGEST_FILE = 64 << 20
"""Bytes; a larger file is reported and not read."""


class NotReadError(Exception):
    """A file that is not read, and why."""


def find_files(folder: Path, is_wanted: Callable[[str], bool]) -> tuple[list[Path], list[tuple[Path, str]]]:
    """Find files under a folder by name, in the order of their paths. Symbolic links are not followed.

    Args:
        folder: the folder, itself a link or not.
        is_wanted: whether a file name is looked for.

    Returns:
        The regular files, and what could not be searched or read, each with the reason.
    """
    found: list[str] = []
    skipped: list[tuple[str, str]] = []
    pending = [os.fspath(folder)]
    while pending:
        here = pending.pop()
        try:
            with os.scandir(here) as entries:
                for entry in entries:
                    if entry.is_symlink():
                        if is_wanted(entry.name) or _may_be_folder(entry):
                            skipped.append((entry.path, "a symbolic link, which is not followed"))
                    elif entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                    elif is_wanted(entry.name):
                        if entry.is_file(follow_symlinks=False):
                            found.append(entry.path)
                        else:
                            skipped.append((entry.path, "not a regular file"))
        except OSError as error:
            skipped.append((here, _reason(error)))
    return [Path(path) for path in sorted(found)], [(Path(path), reason) for path, reason in sorted(skipped)]


def _may_be_folder(link: os.DirEntry[str]) -> bool:
    try:
        return link.is_dir()
    except OSError:
        return True


def _reason(error: OSError) -> str:
    return f"cannot be read: {error.strerror or error}"


def read_file(path: Path) -> bytes:
    """Return the bytes of a regular file, without ever waiting for anything else.

    Raises:
        NotReadError: if it cannot be read, is no regular file, or is larger than `LARGEST_FILE`.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise NotReadError(_reason(error)) from None
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise NotReadError("not a regular file")
        if status.st_size > LARGEST_FILE:
            raise NotReadError(f"not read: it has {status.st_size} bytes, more than {LARGEST_FILE}")
        parts = []
        while part := os.read(handle, 1 << 20):
            parts.append(part)
        return b"".join(parts)
    except OSError as error:
        raise NotReadError(_reason(error)) from None
    finally:
        os.close(handle)


def printable(path: str) -> str:
    """Return a path as text that can be printed: with control characters, and bytes that are no UTF-8, as escapes."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )
