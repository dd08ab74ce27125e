"""Removing a build."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from w4a16gen.build.emit import is_foreign_manifest
from w4a16gen.build.lock import LOCK, locked
from w4a16gen.build.scratch import LOGS, OBJECTS, library_folders, remove_leftovers
from w4a16gen.files import remove
from w4a16gen.runtime.artifact import MANIFEST

_OWN_FILES = re.compile(r"[0-9a-f]{32}\.(?:o|so|json)|(?:w4a16_sm90_\w+|unit_[0-9a-f]{32}|link)\.log")
"""Names of the files that a build writes into the folders of objects and logs."""


def clean(build: Path) -> list[Path]:
    """Remove everything that `build` wrote into a folder, and the folder if nothing else is in it.

    Timing tables and files of others stay.

    Args:
        build: the folder. Nothing happens if no build was made in it.

    Returns:
        The files and folders that were removed.

    Raises:
        BuildLockedError: if a build runs in the folder.
        OSError: if something cannot be removed.
    """
    if not (build / LOCK).exists():
        return []
    removed: list[Path] = []
    with locked(build):
        remove_leftovers(build)
        manifest = build / MANIFEST
        if manifest.is_file() and not is_foreign_manifest(manifest):
            removed.append(manifest)
        removed += library_folders(build)
        for folder in (build / OBJECTS, build / LOGS):
            removed += sorted(path for path in folder.glob("*") if _OWN_FILES.fullmatch(path.name))
        for path in removed:
            remove(path)
        for folder in (build / OBJECTS, build / LOGS):
            with suppress(OSError):
                folder.rmdir()
                removed.append(folder)
    (build / LOCK).unlink(missing_ok=True)
    with suppress(OSError):
        build.rmdir()
        removed.append(build)
    return removed
