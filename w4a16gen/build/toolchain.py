"""Where the compiler, its parts, CMake and CUTLASS are, or what to install."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cuda.pathfinder import (  # type: ignore[import-untyped]
    find_nvidia_binary_utility,
    find_nvidia_header_directory,
)

from w4a16gen.errors import MissingToolError

INSTALL_CUDA = "pip install 'w4a16gen[cuda]'"
MIN_NVCC = (13, 0)
"""Oldest nvcc that the kernels have been compiled and proven with."""
_CUDA_WHEELS = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-runtime")


@dataclass(frozen=True)
class Toolchain:
    """The tools of a build, each an absolute path."""

    nvcc: Path
    cuda_include: Path
    cudart: Path
    cutlass_include: Path
    host_compiler: Path
    cmake: Path
    ninja: Path


@dataclass(frozen=True)
class Finding:
    """One line of `doctor`: what was looked for, what was found, and the command that mends it."""

    subject: str
    ok: bool
    detail: str
    fix: str = ""

    def as_json(self) -> dict[str, object]:
        """Give the object that `doctor --json` prints."""
        return {"subject": self.subject, "ok": self.ok, "detail": self.detail, "fix": self.fix}


def _binary(name: str) -> Path | None:
    """Find a CUDA program: in the CUDA wheels, conda or CUDA_HOME, then on PATH."""
    found = find_nvidia_binary_utility(name) or shutil.which(name)
    return Path(found).absolute() if found else None


def _script(name: str) -> Path | None:
    """Find a program that a Python package installed beside this interpreter, or that PATH holds."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    return Path(found).absolute() if found else None


def require(name: str, found: Path | None, fix: str) -> Path:
    """Give the path, or raise the error that says how to get the tool.

    Raises:
        MissingToolError: if there is none.
    """
    if found is None:
        raise MissingToolError(f"{name} was not found: {fix} (`w4a16gen doctor` shows all that is missing)")
    return found


def find_nvcc() -> Path | None:
    """Find nvcc; W4A16GEN_NVCC overrides the search."""
    override = os.environ.get("W4A16GEN_NVCC")
    if override is not None:
        path = Path(override)
        if not path.is_file():
            raise MissingToolError(f"W4A16GEN_NVCC={override} is not a file: unset it or name an nvcc")
        return path.absolute()
    return _binary("nvcc")


def find_cutlass() -> Path | None:
    """Find the CUTLASS headers inside the nvidia-cutlass package, without importing it.

    W4A16GEN_CUTLASS, the `include` folder of a CUTLASS source tree, overrides the search.
    """
    override = os.environ.get("W4A16GEN_CUTLASS")
    if override is not None:
        folder = Path(override)
    else:
        spec = importlib.util.find_spec("cutlass_library")
        if spec is None or spec.origin is None:
            return None
        folder = Path(spec.origin).parent / "source" / "include"
    return folder if (folder / "cutlass" / "cutlass.h").is_file() else None


def find_host_compiler() -> Path | None:
    """Find the C++ compiler; CXX overrides the search."""
    found = shutil.which(os.environ.get("CXX") or "g++")
    return Path(found) if found else None


def find_cuda_include(nvcc: Path) -> Path | None:
    """Find the folder that holds cuda_runtime_api.h, in the toolkit that nvcc belongs to first."""
    for root in (nvcc.resolve().parent.parent, nvcc.parent.parent):
        if (root / "include" / "cuda_runtime_api.h").is_file():
            return root / "include"
    header = find_nvidia_header_directory("cudart")
    return Path(header) if header else None


def find_cudart(include: Path) -> Path | None:
    """Find the static CUDA runtime beside its headers (lib/ in the wheels, lib64/ in an installed toolkit)."""
    root = include.parent
    folders = [root / "lib", root / "lib64", *root.glob("targets/*/lib")]
    if include.parent.parent.name == "targets":
        folders.append(include.parent / "lib")
    return next((path for folder in folders if (path := folder / "libcudart_static.a").is_file()), None)


def find_cuobjdump() -> Path | None:
    """Find cuobjdump, which reads registers, stack and SASS out of built kernels without a GPU."""
    return _binary("cuobjdump")


@cache
def program_version(program: Path) -> str:
    """Give what a program prints for --version."""
    result = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)  # noqa: S603
    return result.stdout + result.stderr


def nvcc_version(nvcc: Path) -> tuple[int, int] | None:
    """Give nvcc's release as (major, minor), or None if it does not tell."""
    match = re.search(r"release (\d+)\.(\d+)", program_version(nvcc))
    return (int(match[1]), int(match[2])) if match else None


def describe_compiler(toolchain: Toolchain) -> str:
    """Give the versions of nvcc and the host compiler, for content hashes and reports."""
    nvcc = program_version(toolchain.nvcc).strip().splitlines()
    host = program_version(toolchain.host_compiler).strip().splitlines()
    return f"{nvcc[-1] if nvcc else 'nvcc'}; {host[0] if host else 'host compiler'}"


def cutlass_version(include: Path) -> str:
    """Give CUTLASS's version from its headers."""
    text = (include / "cutlass" / "version.h").read_text()
    parts = [re.search(rf"#define CUTLASS_{part} (\d+)", text) for part in ("MAJOR", "MINOR", "PATCH")]
    return ".".join(match[1] if match else "?" for match in parts)


def find_toolchain() -> Toolchain:
    """Find every tool of a build.

    Raises:
        MissingToolError: naming the first tool that is not there and the command that installs it.
    """
    nvcc = require("nvcc", find_nvcc(), INSTALL_CUDA)
    version = nvcc_version(nvcc)
    if version is None or version < MIN_NVCC:
        raise MissingToolError(
            f"{nvcc} is release {version and '.'.join(map(str, version))}; {MIN_NVCC[0]}.{MIN_NVCC[1]} or newer is "
            f"needed: {INSTALL_CUDA}"
        )
    include = require("cuda_runtime_api.h", find_cuda_include(nvcc), INSTALL_CUDA)
    return Toolchain(
        nvcc=nvcc,
        cuda_include=include,
        cudart=require("libcudart_static.a", find_cudart(include), INSTALL_CUDA),
        cutlass_include=require("CUTLASS's headers", find_cutlass(), "pip install nvidia-cutlass==4.2.0.0"),
        host_compiler=require("g++", find_host_compiler(), "install g++ with the system's package manager"),
        cmake=require("cmake", _script("cmake"), "pip install cmake"),
        ninja=require("ninja", _script("ninja"), "pip install ninja"),
    )


def _wheel_releases() -> Finding:
    """Check that the CUDA wheels, where they are used, are of one release."""
    versions = {}
    for wheel in _CUDA_WHEELS:
        try:
            versions[wheel] = importlib.metadata.version(wheel)
        except importlib.metadata.PackageNotFoundError:
            continue
    releases = {".".join(version.split(".")[:2]) for version in versions.values()}
    detail = ", ".join(f"{wheel} {version}" for wheel, version in versions.items()) or "no CUDA wheels installed"
    mixed = len(releases) > 1
    return Finding(
        "CUDA wheels of one release", not mixed, detail, f"{INSTALL_CUDA} --force-reinstall" if mixed else ""
    )


def diagnose() -> list[Finding]:
    """Look for everything that a build needs; never raises."""
    findings = [_found("host compiler", find_host_compiler(), "install g++ with the system's package manager")]
    try:
        nvcc = find_nvcc()
    except MissingToolError as error:
        return [*findings, Finding("nvcc", ok=False, detail=str(error), fix="unset W4A16GEN_NVCC")]
    version = nvcc_version(nvcc) if nvcc else None
    if nvcc and (version is None or version < MIN_NVCC):
        findings.append(Finding("nvcc", ok=False, detail=f"{nvcc}, release {version}", fix=INSTALL_CUDA))
    else:
        release = f", release {version[0]}.{version[1]}" if version else ""
        findings.append(_found("nvcc", nvcc, INSTALL_CUDA, release))
    include = find_cuda_include(nvcc) if nvcc else None
    cutlass = find_cutlass()
    findings += [
        _wheel_releases(),
        _found("CUDA runtime headers", include, INSTALL_CUDA),
        _found("static CUDA runtime", find_cudart(include) if include else None, INSTALL_CUDA),
        _found(
            "CUTLASS headers",
            cutlass,
            "pip install nvidia-cutlass==4.2.0.0",
            f", version {cutlass_version(cutlass)}" if cutlass else "",
        ),
        _found("cmake", _script("cmake"), "pip install cmake"),
        _found("ninja", _script("ninja"), "pip install ninja"),
        _found("cuobjdump", find_cuobjdump(), INSTALL_CUDA),
    ]
    return findings


def _found(subject: str, path: Path | None, fix: str, suffix: str = "") -> Finding:
    return Finding(subject, path is not None, f"{path}{suffix}" if path else "not found", "" if path else fix)
