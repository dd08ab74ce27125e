"""Folders that the tool writes into. A manifest lists its files, and only these are ever overwritten or removed."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from w4a16gen.errors import InvalidValueError
from w4a16gen.files import write_if_changed, write_json
from w4a16gen.integrations.tensorrt_llm.folders import NotReadError, find_files, printable, read_file
from w4a16gen.runtime.artifact import MANIFEST

_MANIFEST_BYTES = 16 << 20


@dataclass(frozen=True)
class Written:
    """What a call of `write_owned` did."""

    written: list[Path]
    """Files that were new or changed, without the manifest."""
    removed: list[Path]
    """Files of an earlier call that were removed."""
    kept: list[Path]
    """Files of an earlier call that are still there."""


def write_owned(
    folder: Path,
    schema: str,
    contents: Mapping[str, bytes],
    *,
    details: Mapping[str, Any] | None = None,
    remove_stale: bool = False,
    is_exclusive: bool = False,
) -> Written:
    """Write files and the manifest that lists them. Every check comes before the first write.

    The manifest is written twice: it lists a file before the file is there, so that a call that was killed can be
    repeated.

    Args:
        folder: where to write.
        schema: what the manifest is: its kind and version.
        contents: the files, by their paths in the folder with `/` between folders.
        details: further members of the manifest.
        remove_stale: whether to remove files that an earlier call wrote and this one does not.
        is_exclusive: whether to refuse a folder with files that no earlier call wrote.

    Raises:
        InvalidValueError: if a file or the manifest there was not written by such a call, or was changed since.
        OSError: if the folder cannot be written.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise InvalidValueError(f"{folder} is not a folder: choose another output folder")
    earlier = _read_manifest(folder, schema)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    for name, digest in digests.items():
        _check_target(folder, name, {digest, *earlier.get(name, [])})
    if is_exclusive:
        _check_others(folder, digests.keys() | earlier.keys())
    stale = [name for name in earlier if name not in digests]
    both = {name: [*earlier.get(name, []), digest] for name, digest in digests.items()}
    write_json(folder / MANIFEST, _manifest(schema, earlier | both, details))
    written = [folder / name for name, content in contents.items() if write_if_changed(folder / name, content)]
    removed = [name for name in stale if remove_stale and _remove(folder, name, earlier[name])]
    kept = [name for name in stale if name not in removed and os.path.lexists(folder / name)]
    final = {name: [digest] for name, digest in digests.items()} | {name: earlier[name] for name in kept}
    write_json(folder / MANIFEST, _manifest(schema, final, details))
    return Written(written, [folder / name for name in removed], [folder / name for name in kept])


def _manifest(schema: str, files: Mapping[str, list[str]], details: Mapping[str, Any] | None) -> dict[str, Any]:
    listed = {name: sorted(set(digests)) for name, digests in sorted(files.items())}
    return {"schema": schema, **(details or {}), "files": listed}


def _read_manifest(folder: Path, schema: str) -> dict[str, list[str]]:
    """Return the files that an earlier call listed, with the digests that they may have."""
    path = folder / MANIFEST
    if not os.path.lexists(path):
        return {}
    wrong = f"{path} is not a manifest of {schema}: choose another output folder, or remove the file"
    try:
        if path.lstat().st_size > _MANIFEST_BYTES:
            raise InvalidValueError(wrong)
        value = json.loads(read_file(path))
        if value["schema"] != schema:
            raise InvalidValueError(wrong)
        return {_safe_name(name): [str(digest) for digest in digests] for name, digests in value["files"].items()}
    except (OSError, NotReadError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InvalidValueError(wrong) from None


def _safe_name(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or not path.parts or ".." in path.parts or str(path) != name or name == MANIFEST:
        raise ValueError(name)
    return name


def _check_target(folder: Path, name: str, digests: set[str]) -> None:
    """Refuse to write over what no earlier call wrote, or through a link."""
    path = folder / name
    for parent in list(path.parents)[: len(PurePosixPath(name).parts) - 1]:
        if os.path.lexists(parent) and not stat.S_ISDIR(parent.lstat().st_mode):
            raise InvalidValueError(f"{printable(str(parent))} is not a folder: choose another output folder")
    if os.path.lexists(path) and _digest(path) not in digests:
        shown = printable(str(path))
        raise InvalidValueError(
            f"{shown} was not written by an earlier call, or was changed since: remove it, or choose another folder"
        )


def _digest(path: Path) -> str:
    """Return the digest of a regular file, or nothing."""
    try:
        return hashlib.sha256(read_file(path)).hexdigest()
    except NotReadError:
        return ""


def _check_others(folder: Path, names: set[str]) -> None:
    allowed = {folder / MANIFEST, *(folder / name for name in names)}
    found, skipped = find_files(folder, lambda _: True) if folder.is_dir() else ([], [])
    for path in [*found, *(path for path, _ in skipped)]:
        if path not in allowed and not path.name.startswith("."):
            shown = printable(str(path))
            raise InvalidValueError(f"{shown} was not written by an earlier call: choose an empty output folder")


def _remove(folder: Path, name: str, digests: list[str]) -> bool:
    """Remove a file if it is as an earlier call wrote it; return whether it was removed."""
    path = folder / name
    try:
        _check_target(folder, name, set(digests))
        path.unlink()
    except (InvalidValueError, FileNotFoundError):
        return False
    return True
