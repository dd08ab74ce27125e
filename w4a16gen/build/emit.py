"""Writing kernel sources into a folder."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from w4a16gen.files import write_if_changed, write_json
from w4a16gen.kernels.config import KernelConfig
from w4a16gen.kernels.render import render_kernel, source_name
from w4a16gen.runtime.artifact import MANIFEST

SOURCES_SCHEMA = "w4a16gen.sources/1"
"""What the manifest of a folder of sources says of itself."""


@dataclass(frozen=True)
class Emission:
    """What an emission did: paths of every kernel asked for, and which files were written or removed."""

    paths: tuple[Path, ...]
    written: tuple[Path, ...]
    stale: tuple[Path, ...]
    removed: tuple[Path, ...]


def emit(configs: Iterable[KernelConfig], folder: Path, *, remove_stale: bool = False) -> Emission:
    """Write one source per configuration and a manifest into a folder.

    Files that hold the right text already are not touched. Kernel sources of other configurations stay, unless
    `remove_stale`; the manifest names this call's configurations only. Files that are not kernel sources are never
    removed.

    Raises:
        OSError: if the folder cannot be made or written.
    """
    wanted = sorted(set(configs))
    paths = tuple(folder / source_name(config) for config in wanted)
    written = [
        path for config, path in zip(wanted, paths, strict=True) if write_if_changed(path, render_kernel(config))
    ]
    manifest = folder / MANIFEST
    if write_json(manifest, {"schema": SOURCES_SCHEMA, "kernels": [config.as_json() for config in wanted]}):
        written.append(manifest)
    stale = tuple(sorted(set(folder.glob("w4a16_sm90_*.cu")) - set(paths)))
    removed: tuple[Path, ...] = ()
    if remove_stale:
        for path in stale:
            path.unlink()
        stale, removed = (), stale
    return Emission(paths, tuple(written), stale, removed)
