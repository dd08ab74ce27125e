"""Writing kernel sources into a folder."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from w4a16gen.errors import InvalidValueError, NotBuiltError
from w4a16gen.files import read_sealed, remove_abandoned, seal, write_if_changed, write_json
from w4a16gen.kernels.config import KernelConfig
from w4a16gen.kernels.render import render_kernel, source_name
from w4a16gen.runtime.artifact import MANIFEST, read_manifest

SOURCES_SCHEMA = "w4a16gen.sources/1"
"""Schema of the manifest of a folder of sources: its kind, and the version of its fields."""


def refuse_foreign_manifest(folder: Path) -> None:
    """Raise if a folder has the manifest.json of another program: it would be overwritten.

    Raises:
        InvalidValueError: naming the file.
    """
    path = folder / MANIFEST
    if is_foreign_manifest(path):
        raise InvalidValueError(f"{path} belongs to another program: choose another folder")


def is_foreign_manifest(path: Path) -> bool:
    """Return whether a manifest.json is another program's, such as a web app's.

    A file that is no JSON object may be a damaged one of this package.
    """
    try:
        value = json.loads(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return False
    return (
        isinstance(value, dict)
        and bool(value)
        and "sha256" not in value
        and "w4a16gen." not in str(value.get("schema"))
    )


@dataclass(frozen=True)
class Emission:
    """The result of an emission: paths of every kernel asked for, and which files were written or removed."""

    paths: tuple[Path, ...]
    written: tuple[Path, ...]
    stale: tuple[Path, ...]
    """Sources of earlier calls that this call did not ask for, and that were not removed."""
    removed: tuple[Path, ...]


def emit(configs: Iterable[KernelConfig], folder: Path, *, remove_stale: bool = False) -> Emission:
    """Write one source per configuration and a manifest into a folder.

    Files that have the right text already are not touched. Only files that an earlier call wrote, as the manifest
    lists them, are ever removed. A folder or a pipe that has a file's name is renamed: a number is added to its name.

    Args:
        configs: the kernels.
        folder: where to write.
        remove_stale: remove sources of earlier calls that this call does not ask for.

    Raises:
        InvalidValueError: if the folder contains a build, or another program's manifest.json.
        OSError: if the folder cannot be made or written.
    """
    wanted = sorted(set(configs))
    manifest = folder / MANIFEST
    refuse_foreign_manifest(folder)
    if _is_build(folder):
        raise InvalidValueError(f"{folder} contains a build, whose manifest must stay: choose another --output")
    paths = tuple(folder / source_name(config) for config in wanted)
    earlier = _listed(manifest)
    stale = tuple(sorted(path for name in earlier if (path := folder / name).is_file() and path not in paths))
    remove_abandoned(folder)
    for path in (*paths, manifest):
        _set_aside(path)
    written = [
        path for config, path in zip(wanted, paths, strict=True) if write_if_changed(path, render_kernel(config))
    ]
    removed: tuple[Path, ...] = ()
    if remove_stale:
        for path in stale:
            path.unlink(missing_ok=True)
        stale, removed = (), stale
    listed = {"kernels": [config.as_json() for config in wanted], "stale": [path.name for path in stale]}
    if write_json(manifest, seal({"schema": SOURCES_SCHEMA, **listed})):
        written.append(manifest)
    return Emission(paths, tuple(written), stale, removed)


def _set_aside(path: Path) -> None:
    """Rename a folder, a pipe or a device that has the name of a file to be written; remove a link to one."""
    if path.is_symlink() and not path.is_file():
        path.unlink()
    elif path.exists() and not path.is_file():
        number = next(number for number in itertools.count(1) if not path.with_name(f"{path.name}.{number}").exists())
        path.rename(path.with_name(f"{path.name}.{number}"))


def _is_build(folder: Path) -> bool:
    try:
        read_manifest(folder)
    except NotBuiltError:
        return False
    return True


def _listed(manifest: Path) -> set[str]:
    """Return the names of the files that earlier calls wrote; none if the manifest is missing or damaged."""
    try:
        value = read_sealed(manifest, SOURCES_SCHEMA)
        names = {source_name(KernelConfig.parse(kernel["name"])) for kernel in value["kernels"]}
        return names | {source_name(KernelConfig.parse(Path(name).stem)) for name in value["stale"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()
