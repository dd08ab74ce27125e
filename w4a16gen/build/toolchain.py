"""The search for the compiler, its parts, CMake and CUTLASS."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shlex
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w4a16gen.build.install import INSTALL_COMPILER, install_cuda, install_python_headers, pip_install, replace_nvcc
from w4a16gen.build.versions import gcc_major, newest_supported_gcc, nvcc_version, program_version
from w4a16gen.errors import MissingToolError

MIN_NVCC = (13, 0)
"""Oldest nvcc that the kernels have been compiled and proven with."""
MIN_CMAKE = (3, 25)
_HASHED_VARIABLES = ("COMPILER_PATH", "GCC_EXEC_PREFIX", "GCC_ROOT")
"""Variables that select parts of the host compiler. They are passed on, and they are part of every content hash."""


@dataclass(frozen=True)
class Compilers:
    """What compiling kernels needs, each an absolute path."""

    nvcc: Path
    cuda_include: Path
    cutlass_include: Path | None
    """CUTLASS's headers; only kernels that include them need them."""
    host_compiler: Path


@dataclass(frozen=True)
class Toolchain(Compilers):
    """The tools of a build: those of compiling, and those of linking."""

    cudart: Path
    cmake: Path
    ninja: Path


def _binary(name: str) -> Path | None:
    """Find a CUDA program: in the CUDA wheels, conda or CUDA_HOME, then on PATH."""
    finder = _pathfinder()
    found = (finder.find_nvidia_binary_utility(name) if finder else None) or shutil.which(name)
    return Path(found).absolute() if found else None


def _pathfinder() -> Any:
    """Return the package that finds CUDA's wheels, or None if it is not installed. Importing it takes 80 ms."""
    try:
        return importlib.import_module("cuda.pathfinder")
    except ModuleNotFoundError:
        return None


def find_packaged(name: str, folder_attribute: str) -> Path | None:
    """Find a program of a Python package: where the package says, beside the interpreter, or on PATH.

    Args:
        name: of the package and of the program.
        folder_attribute: of the package's attribute that names the folder of its programs.
    """
    folders = [Path(sys.executable).parent]
    if importlib.util.find_spec(name) is not None:
        package: Any = importlib.import_module(name)
        folders.insert(0, Path(getattr(package, folder_attribute, folders[0])))
    path = os.pathsep.join([*map(str, folders), os.environ.get("PATH", os.defpath)])
    found = shutil.which(name, path=path)
    return Path(found).absolute() if found else None


def _overridden(variable: str) -> Path | None:
    """Return the program that a variable names; None if it is unset or empty.

    Raises:
        MissingToolError: if it is not an executable file.
    """
    override = os.environ.get(variable)
    if not override:
        return None
    path = Path(override)
    if not path.is_file() or not os.access(path, os.X_OK):
        raise MissingToolError(f"{variable}={override} is not an executable file: unset it, or name a program")
    return path.absolute()


def find_cmake() -> Path | None:
    """Find CMake; W4A16GEN_CMAKE overrides the search.

    Raises:
        MissingToolError: if W4A16GEN_CMAKE is not an executable file.
    """
    return _overridden("W4A16GEN_CMAKE") or find_packaged("cmake", "CMAKE_BIN_DIR")


def find_ninja() -> Path | None:
    """Find Ninja."""
    return find_packaged("ninja", "BIN_DIR")


def find_python_header() -> Path | None:
    """Find Python.h of the running Python, which the module includes."""
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return header if header.is_file() else None


def require(name: str, found: Path | None, fix: str) -> Path:
    """Return the path, or raise the error that says how to get the tool.

    Raises:
        MissingToolError: if there is none.
    """
    if found is None:
        raise MissingToolError(f"{name} was not found. Fix: {fix} (`w4a16gen doctor` shows everything that is missing)")
    return found


def find_nvcc() -> Path | None:
    """Find nvcc; W4A16GEN_NVCC overrides the search.

    Raises:
        MissingToolError: if W4A16GEN_NVCC is not an executable file.
    """
    return _overridden("W4A16GEN_NVCC") or _binary("nvcc")


def find_cutlass() -> Path | None:
    """Find the CUTLASS headers inside the nvidia-cutlass package, without importing it.

    W4A16GEN_CUTLASS, the `include` folder of a CUTLASS source tree, overrides the search.
    """
    override = os.environ.get("W4A16GEN_CUTLASS")
    if override:
        folder = Path(override).absolute()
    else:
        spec = importlib.util.find_spec("cutlass_library")
        if spec is None or spec.origin is None:
            return None
        folder = Path(spec.origin).parent / "source" / "include"
    return folder if (folder / "cutlass" / "cutlass.h").is_file() else None


def find_host_compiler(cuda_include: Path | None = None) -> Path | None:
    """Find the C++ compiler. CXX overrides the search.

    The system's g++ is taken, or if nvcc does not support a g++ as new, the newest one on PATH that it supports.

    Args:
        cuda_include: nvcc's headers, which state what it supports; None takes any g++.

    Raises:
        MissingToolError: if CXX does not name a program.
    """
    override = os.environ.get("CXX")
    if override:
        found = shutil.which(override)
        if found is None:
            words = "; it must be one program, without arguments" if len(shlex.split(override)) > 1 else ""
            raise MissingToolError(f"CXX={override} is not a program{words}: unset CXX, or set it to a g++")
        return Path(found).absolute()
    found = shutil.which("g++")
    limit = newest_supported_gcc(cuda_include) if cuda_include else None
    if limit is not None and (found is None or (gcc_major(Path(found)) or 0) > limit):
        older = (shutil.which(f"g++-{major}") for major in range(limit, 8, -1))
        found = next((path for path in older if path), found)
    return Path(found).absolute() if found else None


def find_cuda_include(nvcc: Path) -> Path | None:
    """Find the folder that holds cuda_runtime_api.h, in the toolkit that nvcc belongs to first."""
    for root in (nvcc.resolve().parent.parent, nvcc.parent.parent):
        if (root / "include" / "cuda_runtime_api.h").is_file():
            return root / "include"
    finder = _pathfinder()
    header = finder.find_nvidia_header_directory("cudart") if finder else None
    return Path(header) if header else None


def find_cudart(include: Path) -> Path | None:
    """Find the static CUDA runtime beside its headers (lib/ in the wheels, lib64/ in an installed toolkit)."""
    root = include.parent
    folders = [root / "lib", root / "lib64", *root.glob("targets/*/lib")]
    if include.parent.parent.name == "targets":
        folders.append(include.parent / "lib")
    return next((path for folder in folders if (path := folder / "libcudart_static.a").is_file()), None)


def find_cuobjdump() -> Path | None:
    """Find cuobjdump, which reads registers, stack and SASS out of built kernels without a GPU.

    The one beside nvcc comes first: an older one cannot read what nvcc compiles.
    """
    try:
        nvcc = find_nvcc()
    except MissingToolError:
        nvcc = None
    beside = nvcc.with_name("cuobjdump") if nvcc else None
    return beside if beside and beside.is_file() else _binary("cuobjdump")


def require_cuobjdump() -> Path:
    """Return cuobjdump.

    Raises:
        MissingToolError: if it is not installed.
    """
    return require("cuobjdump", find_cuobjdump(), install_cuda())


def compiler_versions(tools: Compilers) -> dict[str, str]:
    """Return what identifies the compilers, by name: their versions, and variables that select their parts."""
    nvcc = program_version(tools.nvcc).strip().splitlines()
    host = program_version(tools.host_compiler).strip().splitlines()
    variables = {name: os.environ[name] for name in _HASHED_VARIABLES if name in os.environ}
    return {"nvcc": nvcc[-1] if nvcc else "nvcc", "g++": host[0] if host else "host compiler", **variables}


def describe_compiler(tools: Compilers) -> str:
    """Return the versions of nvcc and the host compiler, for content hashes and reports."""
    versions = compiler_versions(tools)
    return f"{versions['nvcc']}; {versions['g++']}"


def compiler_identity(tools: Compilers) -> str:
    """Return what identifies the compilers in content hashes: versions, and variables that select their parts."""
    variables = (f"{name}={value}" for name, value in compiler_versions(tools).items() if name in _HASHED_VARIABLES)
    return "\n".join([describe_compiler(tools), *variables])


def find_compilers() -> Compilers:
    """Find what compiling needs. CUTLASS may be missing: see `Compilers.cutlass_include`.

    Raises:
        MissingToolError: naming the first tool that is missing and the command that installs it.
    """
    nvcc = require("nvcc", find_nvcc(), install_cuda())
    version = nvcc_version(nvcc)
    if version is None or version < MIN_NVCC:
        release = f"release {version[0]}.{version[1]}" if version else "no nvcc that tells its release"
        raise MissingToolError(
            f"{nvcc} is {release}; {MIN_NVCC[0]}.{MIN_NVCC[1]} or newer is needed. Fix: {replace_nvcc()}"
        )
    include = require("cuda_runtime_api.h", find_cuda_include(nvcc), install_cuda())
    return Compilers(
        nvcc=nvcc,
        cuda_include=include,
        cutlass_include=find_cutlass(),
        host_compiler=require("g++", find_host_compiler(include), INSTALL_COMPILER),
    )


def find_toolchain() -> Toolchain:
    """Find every tool of a build.

    Raises:
        MissingToolError: naming the first tool that is missing and the command that installs it.
    """
    found = find_compilers()
    require("Python.h", find_python_header(), install_python_headers())
    return Toolchain(
        **vars(found),
        cudart=require("libcudart_static.a", find_cudart(found.cuda_include), install_cuda()),
        cmake=require("cmake", find_cmake(), pip_install("cmake")),
        ninja=require("ninja", find_ninja(), pip_install("ninja")),
    )
