"""One build at a time in a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from w4a16gen.errors import BuildLockedError
from w4a16gen.files import make_way

LOCK = ".lock"


@contextmanager
def locked(build: Path) -> Iterator[None]:
    """Hold the lock of a build's folder, which must exist. The operating system frees it when the process ends.

    Raises:
        BuildLockedError: if another process holds it.
        OSError: if the lock cannot be made.
    """
    path = build / LOCK
    make_way(path)
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise BuildLockedError(
            f"another process is building in {build}: wait for it, or choose another --build-dir"
        ) from None
    try:
        yield
    finally:
        lock.release()
