"""Writing files so that nothing half-written is left: a temporary file beside the target, then a rename."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

_TEMPORARY = re.compile(r"\..+\.(\d+)-[0-9a-f]{8}\.tmp")
"""Names of temporary files: the target's name, the writer's process id, and a random number."""
_SEAL = "sha256"
_CHUNK_BYTES = 1 << 20


def write_if_changed(path: Path, content: str | bytes, *, mode: int = 0o666) -> bool:
    """Write a file atomically, text in UTF-8, unless it already has this content.

    Args:
        path: the file. Missing folders above it are made.
        content: the whole content.
        mode: permission bits of a new file, before the process's umask.

    Returns:
        Whether the file was written.

    Raises:
        OSError: if the folder cannot be made or written, or the path is a device or anything else that a rename would
            replace by a file.
    """
    return bool(write_all_if_changed({path: content}, modes={path: mode}))


def write_all_if_changed(
    contents: Mapping[Path, str | bytes], *, modes: Mapping[Path, int] = MappingProxyType({})
) -> list[Path]:
    """Write several files, each as `write_if_changed` does. If one cannot be made or filled, none gets its name.

    Args:
        contents: by path, the whole content.
        modes: by path, permission bits of a new file, before the process's umask; 0o666 for others.

    Returns:
        The files that were written.

    Raises:
        OSError: as `write_if_changed`.
    """
    encoded = {path: text.encode() if isinstance(text, str) else text for path, text in contents.items()}
    for path in encoded:
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "Not a regular file", str(path))
    changed = {path: data for path, data in encoded.items() if not _has_content(path, data)}
    with ExitStack() as files:
        for path, data in changed.items():
            file = files.enter_context(written_whole(path, mode=modes.get(path, 0o666)))
            file.write(data)
            file.flush()  # a full disk is noticed before the first file gets its name
    return list(changed)


def _has_content(path: Path, data: bytes) -> bool:
    """Return whether a path is a regular file with this content."""
    return path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data


@contextmanager
def written_whole(path: Path, *, mode: int = 0o666) -> Iterator[BinaryIO]:
    """Open a file to write; it gets its name when the block ends, and leaves nothing if the block fails.

    Args:
        path: the file. Missing folders above it are made.
        mode: permission bits of a new file, before the process's umask.

    Raises:
        OSError: if the folder cannot be made or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:  # noqa: PTH123
            yield file
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:  # as a full disk is reported
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def read_regular(path: Path) -> str:
    """Return the text of a regular file. A pipe would be waited for, and a device may have no end.

    Raises:
        OSError: if the file cannot be read, or is anything else.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return path.read_text()


def write_json(path: Path, value: Any, *, mode: int = 0o666) -> bool:
    """Write a value as JSON, indented and with a final newline; see `write_if_changed`."""
    return write_if_changed(path, json.dumps(value, indent=2) + "\n", mode=mode)


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Lock a folder that exists against other callers of this function. The lock is no file, and ends with the process.

    Raises:
        BlockingIOError: if another process holds the lock.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # some network file systems lock no folders
            pass
        yield
    finally:
        os.close(descriptor)


def remove_abandoned(folder: Path) -> None:
    """Remove the temporary files in a folder whose writers have ended, for example because they were killed."""
    for path in folder.glob(".*.tmp"):
        match = _TEMPORARY.fullmatch(path.name)
        if match and not is_running(int(match[1])):
            path.unlink(missing_ok=True)


def is_running(process: int) -> bool:
    """Return whether there is a process of this number."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder; do nothing if there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def make_way(path: Path) -> None:
    """Remove anything but a regular file that has the name of a file to be written: a folder, a link or a pipe."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        remove(path)


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def has_digest(path: Path, digest: str) -> bool:
    """Return whether a path is a readable regular file with this SHA-256."""
    try:
        return path.is_file() and file_digest(path) == digest
    except OSError:
        return False


def seal(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object with a digest of its other members, so that later damage is noticed."""
    rest = {key: member for key, member in value.items() if key != _SEAL}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return {**rest, _SEAL: hashlib.sha256(text.encode()).hexdigest()}


def read_sealed(path: Path, schema: str) -> dict[str, Any]:
    """Read a JSON object that `seal` returned.

    Args:
        path: the file.
        schema: what its member `schema` must be.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is no such object, has another schema, or was changed after it was sealed.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is not a regular file")
    try:
        value = json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict) or "schema" not in value:
        raise ValueError("it has no schema")
    if value["schema"] != schema:
        raise ValueError(f"its schema is {str(value['schema'])[:40]!r}, not {schema!r}")
    if value.get(_SEAL) != seal(value)[_SEAL]:
        raise ValueError("its content does not match its digest")
    return value
