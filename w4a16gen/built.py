"""A finished build on disk. Loading and calling it needs nothing of what built it, which is not imported for that."""

from __future__ import annotations

import json
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w4a16gen.config import KernelConfig
from w4a16gen.errors import NotBuiltError
from w4a16gen.files import file_digest

MANIFEST = "manifest.json"
"""What a folder of sources, or of a build, says of itself."""
SCHEMA_VERSION = 1
LIBRARY = "libw4a16_kernels.so"
MODULE = "_w4a16" + str(sysconfig.get_config_var("EXT_SUFFIX"))
WHEEL_PACKAGE = "w4a16gen_kernels"
"""The package that a wheel of a build installs, with the build's folder in it."""


@dataclass(frozen=True)
class Build:
    """A finished build: the library, the module for this Python, and the manifest's content."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def library(self) -> Path:
        """The shared library of kernels, C interface only."""
        return self.folder / "lib" / LIBRARY

    @property
    def module(self) -> Path:
        """The pybind11 module for the running Python."""
        return self.folder / "lib" / MODULE

    @property
    def configs(self) -> list[KernelConfig]:
        """The kernels in the library, sorted."""
        return sorted(KernelConfig.parse(kernel["name"]) for kernel in self.manifest["kernels"])


def load_build(folder: Path) -> Build:
    """Read a finished build from its folder.

    Raises:
        NotBuiltError: if there is none, or its library is not the one the manifest describes, or the module is for
            another Python.
    """
    again = "run `w4a16gen build`"
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        raise NotBuiltError(f"no build in {folder}: {again}, or name its folder") from None
    except ValueError as error:
        raise NotBuiltError(f"{path} is damaged ({error}): {again}") from None
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA_VERSION:
        raise NotBuiltError(f"{path} is not of schema {SCHEMA_VERSION}: {again}")
    build = Build(folder, manifest)
    for file in (build.library, build.module):
        if not file.is_file():
            version = ".".join(map(str, sys.version_info[:2]))
            raise NotBuiltError(f"{file} is missing (this is Python {version}): {again}")
    if file_digest(build.library) != manifest["library_sha256"]:
        raise NotBuiltError(f"{build.library} is not the library that {path} describes: {again}")
    return build
