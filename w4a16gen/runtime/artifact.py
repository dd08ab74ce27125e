"""The format of a finished build on disk. Reading it imports nothing of what makes it."""

from __future__ import annotations

import json
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from w4a16gen.errors import NotBuiltError
from w4a16gen.files import file_digest
from w4a16gen.kernels.config import KernelConfig

MANIFEST = "manifest.json"
"""File name of a manifest, in a folder of sources or of a build."""
SCHEMA = "w4a16gen.build/2"
"""What a build's manifest says of itself: its kind, and the version of its fields."""
LIBRARY = "libw4a16_kernels.so"
MODULE = "_w4a16" + str(sysconfig.get_config_var("EXT_SUFFIX"))
WHEEL_PACKAGE = "w4a16gen_kernels"
"""The package that a wheel of a build installs, with the build's folder in it."""
_REBUILD = "run `w4a16gen build`"


@dataclass(frozen=True)
class BuiltKernel:
    """One kernel of a build, and what compiling it cost."""

    config: KernelConfig
    content_hash: str
    """Hash of all that decides its machine code: source, headers, flags, compiler."""
    unit_kernels: int
    """Kernels that were compiled together with it, itself included."""
    compile_cpu_seconds: float
    """Its equal share of the CPU time of that compilation."""
    compile_peak_bytes: int
    """Peak memory of that compilation."""

    def as_json(self) -> dict[str, object]:
        """Return the object that manifests and reports carry."""
        costs = asdict(self)
        del costs["config"]
        return self.config.as_json() | costs

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> BuiltKernel:
        """Read what `as_json` returns."""
        return cls(
            KernelConfig.parse(value["name"]),
            str(value["content_hash"]),
            int(value["unit_kernels"]),
            float(value["compile_cpu_seconds"]),
            int(value["compile_peak_bytes"]),
        )


@dataclass(frozen=True)
class Manifest:
    """What a build says of itself. It is written last, so its presence means that the build is complete."""

    compiler: str
    """Versions of nvcc and the host compiler."""
    cutlass: str
    link_digest: str
    """Hash of all that was linked."""
    library_sha256: str
    asked: tuple[str, ...]
    """Names of the kernels that were asked for."""
    failed: tuple[str, ...]
    """Names of those that did not compile."""
    kernels: tuple[BuiltKernel, ...]
    """The kernels in the library."""

    def as_json(self) -> dict[str, object]:
        """Return the manifest as its file holds it."""
        return {
            "schema": SCHEMA,
            "compiler": self.compiler,
            "cutlass": self.cutlass,
            "link_digest": self.link_digest,
            "library_sha256": self.library_sha256,
            "asked": list(self.asked),
            "failed": list(self.failed),
            "kernels": [kernel.as_json() for kernel in self.kernels],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Manifest:
        """Read what `as_json` returns.

        Raises:
            KeyError, TypeError, ValueError: if it is anything else.
        """
        if value["schema"] != SCHEMA:
            raise ValueError(f"schema {value['schema']!r} must be {SCHEMA!r}")
        return cls(
            compiler=str(value["compiler"]),
            cutlass=str(value["cutlass"]),
            link_digest=str(value["link_digest"]),
            library_sha256=str(value["library_sha256"]),
            asked=tuple(map(str, value["asked"])),
            failed=tuple(map(str, value["failed"])),
            kernels=tuple(BuiltKernel.from_json(kernel) for kernel in value["kernels"]),
        )


@dataclass(frozen=True)
class Build:
    """A finished build: its folder and its manifest."""

    folder: Path
    manifest: Manifest

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
        return sorted(kernel.config for kernel in self.manifest.kernels)

    @property
    def content_hashes(self) -> dict[KernelConfig, str]:
        """The content hash of each kernel in the library."""
        return {kernel.config: kernel.content_hash for kernel in self.manifest.kernels}


def load_build(folder: Path) -> Build:
    """Read a finished build from its folder.

    Raises:
        NotBuiltError: if there is none, or its library is not the one the manifest describes, or the module is for
            another Python.
    """
    path = folder / MANIFEST
    try:
        manifest = Manifest.from_json(json.loads(path.read_text()))
    except FileNotFoundError:
        raise NotBuiltError(
            f"No build found in {folder}. Run `w4a16gen build`, or set --build-dir or W4A16GEN_BUILD_DIR."
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise NotBuiltError(f"{path} is not the manifest of a build ({error}): {_REBUILD}") from None
    build = Build(folder, manifest)
    for file in (build.library, build.module):
        if not file.is_file():
            version = ".".join(map(str, sys.version_info[:2]))
            raise NotBuiltError(f"{file} is missing (this is Python {version}): {_REBUILD}")
    if file_digest(build.library) != manifest.library_sha256:
        raise NotBuiltError(f"{build.library} is not the library that {path} describes: {_REBUILD}")
    return build
