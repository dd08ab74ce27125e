"""What runs on the nodes of a cluster: functions of this package, found by name, on files that came by digest."""

from __future__ import annotations

import hashlib
import importlib
import os
import platform
import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w4a16gen import __version__
from w4a16gen.errors import CudaError, InvalidValueError, W4A16Error
from w4a16gen.executors.place import Context
from w4a16gen.files import remove

VERSION = "w4a16gen"
"""The part of every node's report that names this package's version."""
_JOIN_SECONDS = 0.2
_KEPT_SECONDS = 7 * 86400
"""How long a node keeps files that no task opens."""

Files = Mapping[str, bytes]
"""The files that tasks need, by path relative to their folder."""


@dataclass(frozen=True)
class Named:
    """A function by its name. Its code does not travel: it must be installed where it runs."""

    module: str
    name: str

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Named:
        """Return the name of a function.

        Raises:
            InvalidValueError: if it cannot be found by name: a lambda, an inner function, or one of a script.
        """
        named = cls(function.__module__, function.__qualname__)
        if named.module == "__main__" or not named.name.isidentifier():
            raise InvalidValueError(f"{named.module}.{named.name} must be a function of a module: only names travel")
        return named

    def find(self) -> Callable[..., Any]:
        """Return the function."""
        found: Callable[..., Any] = getattr(importlib.import_module(self.module), self.name)
        return found


@dataclass(frozen=True)
class Report:
    """What a node says about itself."""

    versions: Mapping[str, str]
    """Of everything that must be the same on all machines, by name."""
    fault: str = ""
    """Why it cannot be used."""


def describe_node(identify: Named) -> Report:
    """Return the versions that a function finds on this machine, and this package's."""
    try:
        return Report({VERSION: __version__, **identify.find()()})
    except W4A16Error as error:
        return Report({VERSION: __version__}, str(error))


def is_alive() -> bool:
    """Return true: the answer itself is the news."""
    return True


def digest_of(files: Files) -> str:
    """Return the digest of files: of their names and contents."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}\n{len(files[name])}\n".encode() + files[name])
    return digest.hexdigest()[:32]


def place_files(files: Files) -> Path:
    """Write files into this machine's cache, unless they are there; return their folder, which is named by digest.

    Raises:
        OSError: if they cannot be written.
    """
    digest = digest_of(files)
    root = node_folder() / "files"
    root.mkdir(mode=0o700, exist_ok=True)
    folder = root / digest
    if _is_whole(folder, digest):
        os.utime(folder)
        return folder
    _remove_old(root)
    fresh = Path(tempfile.mkdtemp(prefix=f".{digest}-", dir=root))
    try:
        for name, content in files.items():
            path = fresh / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return _moved(fresh, folder, digest)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def _moved(fresh: Path, folder: Path, digest: str) -> Path:
    """Move files to their folder, in place of damaged ones; return where they are."""
    with suppress(OSError):
        fresh.rename(folder)
        return folder
    if _is_whole(folder, digest):  # another process was faster
        shutil.rmtree(fresh)
        return folder
    damaged = fresh.with_name(f"{fresh.name}-damaged")
    with suppress(OSError):
        folder.rename(damaged)
        fresh.rename(folder)
    with suppress(OSError):
        remove(damaged)
    return folder if _is_whole(folder, digest) else fresh


def _is_whole(folder: Path, digest: str) -> bool:
    """Return whether a folder holds exactly the files of a digest."""
    try:
        return folder.is_dir() and digest_of(_read(folder)) == digest
    except OSError:
        return False


def _remove_old(root: Path) -> None:
    """Remove files that no task has opened for long."""
    for folder in root.iterdir():
        with suppress(OSError):
            if folder.stat().st_mtime < time.time() - _KEPT_SECONDS:
                shutil.rmtree(folder)


def _read(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def node_folder() -> Path:
    """Return the folder of this user for files of nodes, below the system's folder of temporary files.

    Raises:
        OSError: if it cannot be made.
    """
    folder = Path(tempfile.gettempdir()).resolve() / f"w4a16gen-{os.geteuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.geteuid():  # another user took the name
        return Path(tempfile.mkdtemp(prefix="w4a16gen-"))
    return folder


@dataclass(frozen=True)
class Setup:
    """How a worker prepares for tasks."""

    open: Named
    """Takes the folder of the files and the arguments; returns the `Context` of the tasks."""
    arguments: tuple[Any, ...] = ()


_contexts: dict[tuple[Setup, Path], Context] = {}
"""The context that this process opened last. Tasks of one build share it."""


def _context_of(setup: Setup, files: Files) -> Context:
    folder = place_files(files)  # for every task: a file may have been damaged or removed since the last one
    key = (setup, folder)
    if key not in _contexts:
        _contexts.clear()
        _contexts[key] = setup.open.find()(folder, *setup.arguments)
    return _contexts[key]


def run_task(setup: Setup, files: Files, function: Named, arguments: Sequence[Any]) -> list[Any]:
    """Run a task to its end and return its items. An interruption, which cancels it, ends its child processes too."""
    context = _context_of(setup, files)
    work = _Work(context, function, arguments)
    try:
        while work.thread.is_alive():
            work.thread.join(_JOIN_SECONDS)
    except BaseException:
        _contexts.clear()
        context.cancel()
        raise
    items, _, error = work.take(0)
    if error is not None:
        raise error
    return items


class _Work:
    """A task in a thread of its own, whose items are taken as they come."""

    def __init__(self, context: Context, function: Named, arguments: Sequence[Any]) -> None:
        self._items: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._stopped = False
        self._error: BaseException | None = None
        self._done = object()
        self.thread = threading.Thread(target=self._run, args=(context, function, arguments), daemon=True)
        self.thread.start()

    def _run(self, context: Context, function: Named, arguments: Sequence[Any]) -> None:
        try:
            for item in function.find()(context.value, *arguments):
                self._items.put(item)
                if self._stopped:
                    break
        except BaseException as error:  # noqa: BLE001  (the driver decides what it means)
            self._error = error
        self._items.put(self._done)

    def stop(self) -> None:
        """End at the next item."""
        self._stopped = True

    def take(self, seconds: float) -> tuple[list[Any], bool, BaseException | None]:
        """Return the items that came, whether there are no more, and the error that ended the task."""
        found: list[Any] = []
        try:
            found.append(self._items.get(timeout=seconds) if seconds else self._items.get_nowait())
            while True:
                found.append(self._items.get_nowait())
        except queue.Empty:
            pass
        is_done = self._done in found
        return [item for item in found if item is not self._done], is_done, self._error if is_done else None


class TaskActor:
    """A process on a node that runs tasks one after the other, such as one with a GPU to itself."""

    def __init__(self, setup: Setup, files: Files) -> None:
        """Open the context."""
        self._context: Context = setup.open.find()(place_files(files), *setup.arguments)
        self._work: _Work | None = None

    def describe(self, identify: Named) -> Report:
        """Return what a function says about the context."""
        return Report({VERSION: __version__, "host": platform.node(), **identify.find()(self._context.value)})

    def start(self, function: Named, arguments: Sequence[Any]) -> None:
        """Begin a task."""
        self._work = _Work(self._context, function, arguments)

    def take(self, seconds: float) -> tuple[list[Any], bool, W4A16Error | str | None]:
        """Return the task's items since the last call, whether it is done, and what ended it: an error, or a loss."""
        if self._work is None:
            return [], True, "the task is gone"
        items, is_done, error = self._work.take(seconds)
        if error is None or (isinstance(error, W4A16Error) and not isinstance(error, CudaError)):
            return items, is_done, error
        return items, is_done, one_line(error)

    def stop(self) -> None:
        """End the task at its next item."""
        if self._work is not None:
            self._work.stop()


def one_line(error: BaseException, most: int = 200) -> str:
    """Return an error in one line, shortened."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= most else f"{text[: most - 3]}..."


def differences(expected: Mapping[str, str], found: Mapping[str, str]) -> Iterable[str]:
    """Return a phrase for each version that differs between this machine and a node."""
    for name, version in expected.items():
        there = found.get(name, "missing")
        if there != version:
            yield f"{name} is {there!r} there and {version!r} here"
