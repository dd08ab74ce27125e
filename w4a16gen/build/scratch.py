"""Temporary folders of a build, with names that no shell can misread, and what killed builds leave behind."""

from __future__ import annotations

import os
import re
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from w4a16gen.build.lock import LOCK
from w4a16gen.errors import BuildError, NotBuiltError
from w4a16gen.files import remove, remove_abandoned
from w4a16gen.runtime.artifact import LIBRARIES, LIBRARIES_PREFIX, read_manifest

OWNER_VARIABLE = "W4A16GEN_SCRATCH"
"""Set in the environment of every compiler, to the scratch folder of its build: orphans are found by it."""
OBJECTS = "objects"
LOGS = "logs"
_PREFIX = ".scratch-"
_OUTSIDE = "w4a16gen-"
_OWNER = ".build"
"""Link from a scratch folder elsewhere to the folder of its build."""
_RANDOM = r"[a-z0-9_]{8}"
_SCRATCH = re.compile(rf"{re.escape(_PREFIX)}(?:{_OUTSIDE})?{_RANDOM}(?:-libraries)?")
"""Names that builds give to scratch folders, to links to them, and to libraries that are copied from another disk."""
_SAFE = re.compile(r"[A-Za-z0-9_./+-]+")
"""Paths without anything that nvcc's shell, CMake's lists or Ninja's rules treat specially."""


def is_safe(path: Path) -> bool:
    """Return whether compilers and CMake can take a path as it is."""
    return _SAFE.fullmatch(str(path)) is not None


@contextmanager
def scratch_folder(build: Path) -> Iterator[Path]:
    """Make a temporary folder for one build, and remove it at the end.

    It lies in the build's folder if that path is safe, and otherwise in the system's folder of temporary files, with a
    link to it in the build's folder.

    Raises:
        BuildError: if there is no folder with a safe path.
        OSError: if it cannot be made.
    """
    if is_safe(build.resolve()):
        folder = link = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=build.resolve()))
    else:
        folder = Path(tempfile.mkdtemp(prefix=_OUTSIDE, dir=safe_temporary_folder()))
        link = build / f"{_PREFIX}{folder.name}"
        link.symlink_to(folder)
        (folder / _OWNER).symlink_to(build.resolve())
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            remove(link)


def _temporary_folders() -> list[Path]:
    return [Path(tempfile.gettempdir()).resolve(), Path("/tmp"), Path("/var/tmp")]  # noqa: S108 - mkdtemp is safe


def safe_temporary_folder() -> Path:
    """Return a folder of temporary files with a safe path.

    Raises:
        BuildError: if there is none.
    """
    for folder in _temporary_folders():
        if is_safe(folder) and os.access(folder, os.W_OK):
            return folder
    raise BuildError(
        "the build's folder has a name that compilers cannot take, and so has every folder of temporary files: choose "
        "a --build-dir of letters, digits and the signs . _ - +, or set TMPDIR to such a folder"
    )


def alias(scratch: Path, name: str, path: Path) -> Path:
    """Return a safe path of a file or folder: its own, or if that is not safe, a link to it in a scratch folder."""
    if is_safe(path):
        return path
    link = scratch / name
    if not link.is_symlink():
        link.symlink_to(path)
    return link


def libraries_beside(scratch: Path, build: Path) -> Path:
    """Return where a build puts libraries that it copies from a scratch folder on another disk."""
    return build / f"{_PREFIX}{scratch.name.removeprefix(_PREFIX)}-libraries"


def remove_leftovers(build: Path) -> None:
    """Remove what killed builds left in a folder, and libraries that the manifest no longer names.

    Their compilers, which may still run, are ended first. The caller holds the build's lock, so no other build uses
    any of it.
    """
    scratches = {path: _own_folder(path) for path in build.glob(f"{_PREFIX}*") if _SCRATCH.fullmatch(path.name)}
    folders = {folder for folder in scratches.values() if folder is not None}
    if folders:
        end_orphans(folders)
    for path, folder in scratches.items():
        if path.is_symlink() and folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        remove(path)
    for folder in (build, build / OBJECTS, build / LOGS):
        remove_abandoned(folder)
    try:
        current = read_manifest(build).libraries
    except NotBuiltError:
        current = ""
    for path in library_folders(build):
        if path.name != current:
            remove(path)


def _own_folder(path: Path) -> Path | None:
    """Return the scratch folder that a path in a build's folder stands for; None if it is a link to anything else."""
    if not path.is_symlink():
        return path.resolve()
    try:
        folder = path.readlink()
        owner = (folder / _OWNER).readlink()
        is_own = folder.lstat().st_uid == os.geteuid() and path.name == f"{_PREFIX}{folder.name}"
    except OSError:
        return None
    is_own = is_own and folder.parent in _temporary_folders()
    return folder if is_own and (owner == path.parent.resolve() or not owner.exists()) else None


def library_folders(build: Path) -> list[Path]:
    """Return the folders of libraries in a build's folder: the manifest's, and those of earlier builds."""
    return sorted(path for path in build.glob(f"{LIBRARIES_PREFIX}*") if LIBRARIES.fullmatch(path.name))


def end_orphans(scratches: set[Path]) -> None:
    """End the compilers whose environment names one of these scratch folders, perhaps by its path before a move.

    A folder that was copied while a build ran has scratch folders of the same names. That build goes on.
    """
    import psutil  # noqa: PLC0415 - `doctor` and `clean` work without the extra `build`

    names = {scratch.name for scratch in scratches}
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            owner = Path(process.environ().get(OWNER_VARIABLE, ""))
            if owner in scratches or (owner.name in names and not owner.exists()):
                process.send_signal(signal.SIGKILL)
                process.wait(timeout=5)


def make_folders(build: Path) -> None:
    """Make the folders of a build.

    Where a build was made before, files and links that took the place of its folders are removed.

    Raises:
        OSError: if a folder cannot be made, or a file has its name where no build was made before.
    """
    was_built = (build / LOCK).exists()
    for folder in (build, build / OBJECTS, build / LOGS):
        if was_built and folder != build and not folder.is_dir():
            remove(folder)
        folder.mkdir(0o755, parents=True, exist_ok=True)
