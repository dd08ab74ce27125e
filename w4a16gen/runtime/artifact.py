"""The format of a finished build on disk. Reading it imports nothing that makes it.

A build is a folder:

    manifest.json          what the build contains, with a digest of every file that is loaded
    lib-<digest>/          the kernel library and the pybind11 module, named by their contents
    objects/               compiled kernels, kept for the next build
    logs/                  what the compilers printed

The manifest is replaced last. Until then it names the libraries of the previous build, which stays in use if a
build fails or is killed.

A build is code: loading one runs it. `load_build` checks that the files are the ones that the manifest describes, which
finds damage. It cannot tell who wrote them: see `check_owner`.
"""

from __future__ import annotations

import grp
import os
import pwd
import re
import stat
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from w4a16gen.errors import NotBuiltError
from w4a16gen.files import file_digest, read_sealed, seal
from w4a16gen.kernels.config import KernelConfig

MANIFEST = "manifest.json"
"""File name of a manifest, in a folder of sources or of a build. Its schema says which."""
SCHEMA = "w4a16gen.manifest/2"
"""Schema of a build's manifest: its kind, and the version of its fields."""
LIBRARY = "libw4a16_kernels.so"
MODULE = "_w4a16" + str(sysconfig.get_config_var("EXT_SUFFIX"))
WHEEL_PACKAGE = "w4a16gen_kernels"
"""The package that a wheel of a build installs, with the build's folder in it."""
LIBRARIES_PREFIX = "lib-"
LIBRARIES = re.compile(rf"{LIBRARIES_PREFIX}[0-9a-f]{{16}}")
"""Names of the folders of libraries."""
_REBUILD = "run `w4a16gen build`"


@dataclass(frozen=True)
class BuiltKernel:
    """One kernel of a build, and what compiling it cost."""

    config: KernelConfig
    content_hash: str
    """Hash of everything that decides its machine code: source, headers, flags, compiler."""
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
    """The description of a build. It is written last, so its presence means that the build is complete."""

    compiler: str
    """Versions of nvcc and the host compiler."""
    cuda_version: tuple[int, int]
    """Release of the CUDA runtime in the library, as (major, minor); (0, 0) if it is not known."""
    cutlass: str
    """Version of the CUTLASS headers; empty if no kernel includes them."""
    link_digest: str
    """Hash of everything that was linked."""
    libraries: str
    """Name of the folder of the library and the module."""
    library_sha256: str
    module: str
    """File name of the module, which contains the Python version it is for."""
    module_sha256: str
    sources: str | None
    """Path of the emitted sources, relative to the build's folder; None if they are not beside it, as in a wheel."""
    asked: tuple[str, ...]
    """Names of the kernels that were asked for."""
    failed: tuple[str, ...]
    """Names of those that did not compile."""
    kernels: tuple[BuiltKernel, ...]
    """The kernels in the library."""

    def as_json(self) -> dict[str, object]:
        """Return the manifest as its file holds it."""
        return seal(
            {
                "schema": SCHEMA,
                "compiler": self.compiler,
                "cuda_version": list(self.cuda_version),
                "cutlass": self.cutlass,
                "link_digest": self.link_digest,
                "libraries": self.libraries,
                "library_sha256": self.library_sha256,
                "module": self.module,
                "module_sha256": self.module_sha256,
                "sources": self.sources,
                "asked": list(self.asked),
                "failed": list(self.failed),
                "kernels": [kernel.as_json() for kernel in self.kernels],
            }
        )

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Manifest:
        """Read what `as_json` returns.

        Raises:
            KeyError, TypeError, ValueError, OverflowError: if it is anything else.
        """
        major, minor = value["cuda_version"]
        if not LIBRARIES.fullmatch(value["libraries"]):
            raise ValueError(f"{value['libraries']!r} is not the name of a folder of libraries")
        if Path(value["module"]).name != value["module"]:
            raise ValueError(f"{value['module']!r} is not a file name")
        return cls(
            compiler=str(value["compiler"]),
            cuda_version=(int(major), int(minor)),
            cutlass=str(value["cutlass"]),
            link_digest=str(value["link_digest"]),
            libraries=str(value["libraries"]),
            library_sha256=str(value["library_sha256"]),
            module=str(value["module"]),
            module_sha256=str(value["module_sha256"]),
            sources=None if value["sources"] is None else str(value["sources"]),
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
        return self.folder / self.manifest.libraries / LIBRARY

    @property
    def module(self) -> Path:
        """The pybind11 module, for one version of Python."""
        return self.folder / self.manifest.libraries / self.manifest.module

    @property
    def sources(self) -> Path | None:
        """The folder of the emitted sources, or None if the build does not name one."""
        if self.manifest.sources is None:
            return None
        return Path(os.path.normpath(self.folder.absolute() / self.manifest.sources))

    @property
    def configs(self) -> list[KernelConfig]:
        """The kernels in the library, sorted."""
        return sorted(kernel.config for kernel in self.manifest.kernels)

    @property
    def content_hashes(self) -> dict[KernelConfig, str]:
        """The content hash of each kernel in the library."""
        return {kernel.config: kernel.content_hash for kernel in self.manifest.kernels}


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a build's folder, without looking at the libraries.

    Raises:
        NotBuiltError: if there is none, or it is damaged or of another kind.
    """
    path = folder / MANIFEST
    try:
        return Manifest.from_json(read_sealed(path, SCHEMA))
    except (FileNotFoundError, NotADirectoryError):
        raise NotBuiltError(
            f"No build found in {folder}. Run `w4a16gen build`, or set --build-dir or W4A16GEN_BUILD_DIR."
        ) from None
    except OSError as error:
        raise NotBuiltError(f"{path} cannot be read ({error.strerror}): {_REBUILD}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise NotBuiltError(f"{path} is not the manifest of a build ({error}): {_REBUILD}") from None


def load_build(folder: Path) -> Build:
    """Read a finished build from its folder, and check its library and its module against their digests.

    Raises:
        NotBuiltError: if there is no build, if the library or the module is missing or differs from the one that the
            manifest describes, or if the module is for another version of Python.
    """
    manifest = read_manifest(folder)
    build = Build(folder, manifest)
    if manifest.module != MODULE:
        version = ".".join(map(str, sys.version_info[:2]))
        raise NotBuiltError(f"{build.module} is not for this Python {version}, which needs {MODULE}: {_REBUILD}")
    for file, digest in ((build.library, manifest.library_sha256), (build.module, manifest.module_sha256)):
        if not file.is_file():
            raise NotBuiltError(f"{file} is missing: {_REBUILD}")
        try:
            actual = file_digest(file)
        except OSError as error:
            raise NotBuiltError(f"{file} cannot be read ({error.strerror}): {_REBUILD}") from None
        if actual != digest:
            raise NotBuiltError(f"{file} is damaged: it differs from what {folder / MANIFEST} describes; {_REBUILD}")
    return build


class ForeignBuildError(NotBuiltError):
    """Another user may have written a build that nobody named."""


def check_owner(build: Build) -> None:
    """Refuse a build that another user may have written. Loading a build runs its code.

    A build that is found in the current folder was named by nobody. It is loaded only if its folder, its manifest, its
    library and its module belong to the user or to root, and nobody else may write them. A build that is named by
    `load(folder)`, `--build-dir` or `W4A16GEN_BUILD_DIR` is not checked.

    Raises:
        ForeignBuildError: if a part belongs to another user, or others may write it.
    """
    check_folder_owner(build.folder)
    for path in (build.library.parent, build.library, build.module):
        _check_path_owner(path, build.folder)


def check_folder_owner(folder: Path) -> None:
    """Refuse the folder of a build, or its manifest, that another user may have written; see `check_owner`.

    Raises:
        ForeignBuildError: if one belongs to another user, or others may write it.
    """
    for path in (folder, folder / MANIFEST):
        _check_path_owner(path, folder)


def _check_path_owner(path: Path, folder: Path) -> None:
    name_it = f"name it with --build-dir or W4A16GEN_BUILD_DIR if you trust it: {folder}"
    try:
        found = (path.lstat(), path.stat())
    except OSError:
        return  # whether all of the build is there is checked elsewhere
    for status in found:
        if status.st_uid not in {os.geteuid(), 0}:
            raise ForeignBuildError(f"{path} belongs to user {status.st_uid}, and a build is code; {name_it}")
        if others_may_write(status):
            raise ForeignBuildError(
                f"{path} may be written by other users, and a build is code; run `chmod -R go-w {folder}`, or {name_it}"
            )


def others_may_write(status: os.stat_result) -> bool:
    """Return whether somebody besides the owner may write a file or folder.

    A group that has the user's name and no other member is the user alone: many systems make one for each user, and
    let it write by default.
    """
    if stat.S_ISLNK(status.st_mode):
        return False  # a link's own permission bits mean nothing
    if status.st_mode & stat.S_IWOTH:
        return True
    return bool(status.st_mode & stat.S_IWGRP) and not _is_private_group(status.st_gid)


def _is_private_group(group: int) -> bool:
    try:
        user, found = pwd.getpwuid(os.geteuid()), grp.getgrgid(group)
    except KeyError:
        return False
    return user.pw_uid != 0 and (user.pw_gid, user.pw_name) == (group, found.gr_name) and not found.gr_mem
