"""Checks of this machine for builds and calls, each with the command that fixes a fault."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from w4a16gen.build import causes
from w4a16gen.build.environment import IGNORED_VARIABLES, child_environment
from w4a16gen.build.headers import CUDA_FOLDER
from w4a16gen.build.install import (
    INSTALL_COMPILER,
    UNSET_NVCC,
    install_compiler,
    install_cuda,
    install_python_headers,
    pip_install,
    replace_nvcc,
)
from w4a16gen.build.scratch import alias
from w4a16gen.build.toolchain import (
    MIN_CMAKE,
    MIN_NVCC,
    find_cmake,
    find_cuda_include,
    find_cudart,
    find_cuobjdump,
    find_cutlass,
    find_host_compiler,
    find_ninja,
    find_nvcc,
    find_python_header,
    find_toolchain,
)
from w4a16gen.build.units import FLAGS
from w4a16gen.build.versions import (
    cuda_version,
    cutlass_version,
    gcc_major,
    newest_supported_gcc,
    nvcc_version,
    program_version,
)
from w4a16gen.errors import MissingToolError
from w4a16gen.kernels.device import driver_fault, needed_driver

_CUDA_WHEELS = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-runtime")
_TRIAL = CUDA_FOLDER / "trial.cu"


@dataclass(frozen=True)
class Finding:
    """One line of `doctor`: what was looked for, what was found, and the command that fixes it."""

    subject: str
    ok: bool
    detail: str
    fix: str = ""

    def as_json(self) -> dict[str, object]:
        """Return the object that `doctor --json` prints."""
        return {"subject": self.subject, "ok": self.ok, "detail": self.detail, "fix": self.fix}


def diagnose() -> list[Finding]:
    """Look for everything that a build needs; never raise for a fault that it reports."""
    findings = [_nvcc(), *_toolkit(), _host_compiler(), *_linking_tools(), _cutlass(), _ignored_variables()]
    if all(finding.ok for finding in findings):
        findings.append(_trial_compilation())
    return findings


def driver_finding(driver: tuple[int, int] | None, runtime: tuple[int, int]) -> Finding:
    """Return whether the NVIDIA driver can run kernels with a CUDA runtime.

    Args:
        driver: the newest CUDA release that the driver supports; None if there is no driver.
        runtime: the release of the runtime in the build.
    """
    newer = f"install NVIDIA's {needed_driver(runtime)}"
    if driver is None:
        only = "only running kernels needs it; building and static proofs do not"
        return Finding("NVIDIA driver", ok=False, detail="not found", fix=f"{newer}: {only}")
    fault = driver_fault(driver, runtime)
    if fault:
        return Finding("NVIDIA driver", ok=False, detail=fault, fix=newer)
    return Finding("NVIDIA driver", ok=True, detail=f"supports CUDA {driver[0]}.{driver[1]}")


def toolkit_version() -> tuple[int, int]:
    """Return the release of the CUDA runtime that a build would contain; the oldest supported one if there is none."""
    include = _cuda_include()
    version = cuda_version(include) if include else (0, 0)
    return version if version > (0, 0) else MIN_NVCC


def _found(subject: str, path: Path | None, fix: str, suffix: str = "") -> Finding:
    return Finding(subject, path is not None, f"{path}{suffix}" if path else "not found", "" if path else fix)


def _attempt(find: Callable[[], Path | None]) -> tuple[Path | None, str]:
    """Run a search; return what it found, and what is wrong with the variable that overrides it."""
    try:
        return find(), ""
    except MissingToolError as error:
        return None, str(error)


def _nvcc() -> Finding:
    nvcc, wrong = _attempt(find_nvcc)
    if wrong:
        return Finding("nvcc", ok=False, detail=wrong, fix=UNSET_NVCC)
    if nvcc is None:
        return _found("nvcc", nvcc, install_cuda())
    version = nvcc_version(nvcc)
    release = f"{nvcc}, release {version[0]}.{version[1]}" if version else f"{nvcc} does not tell its release"
    if version is None or version < MIN_NVCC:
        detail = f"{release}; {MIN_NVCC[0]}.{MIN_NVCC[1]} or newer is needed"
        return Finding("nvcc", ok=False, detail=detail, fix=replace_nvcc())
    return Finding("nvcc", ok=True, detail=release)


def _cuda_include() -> Path | None:
    nvcc, _ = _attempt(find_nvcc)
    return find_cuda_include(nvcc) if nvcc else None


def _toolkit() -> list[Finding]:
    include = _cuda_include()
    cudart = find_cudart(include) if include else None
    fix = UNSET_NVCC if _attempt(find_nvcc)[1] else install_cuda()  # both lie beside nvcc
    return [
        _wheel_releases(),
        _found("CUDA runtime headers", include, fix),
        _found("static CUDA runtime", cudart, fix),
        _cuobjdump(),
    ]


def _cuobjdump() -> Finding:
    program, (nvcc, _) = find_cuobjdump(), _attempt(find_nvcc)
    if program is None or nvcc is None:
        return _found("cuobjdump", program, install_cuda())
    version, needed = nvcc_version(program), nvcc_version(nvcc)
    detail = f"{program}, release {version[0]}.{version[1]}" if version else str(program)
    if version and needed and version < needed:
        fix = f"{install_cuda()} --upgrade"
        return Finding(
            "cuobjdump", ok=False, detail=f"{detail} cannot read binaries of nvcc {needed[0]}.{needed[1]}", fix=fix
        )
    return Finding("cuobjdump", ok=True, detail=detail)


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
        "CUDA wheels of one release", not mixed, detail, f"{install_cuda()} --force-reinstall" if mixed else ""
    )


def _host_compiler() -> Finding:
    include = _cuda_include()
    compiler, wrong = _attempt(lambda: find_host_compiler(include))
    if wrong:
        return Finding("host compiler", ok=False, detail=wrong, fix="unset CXX")
    if compiler is None:
        return _found("host compiler", None, INSTALL_COMPILER)
    major, limit = gcc_major(compiler), newest_supported_gcc(include) if include else None
    version = f", g++ {major}" if major else ""
    if major and limit and major > limit:
        fix = f"{install_compiler(limit)}; or a newer nvcc: {install_cuda()} --upgrade"
        return Finding("host compiler", ok=False, detail=f"{compiler}{version}; nvcc supports {limit} at most", fix=fix)
    return Finding("host compiler", ok=True, detail=f"{compiler}{version}")


def _linking_tools() -> list[Finding]:
    cmake, wrong = _attempt(find_cmake)
    version = re.search(r"version (\d+)\.(\d+)", program_version(cmake)) if cmake else None
    is_old = version is not None and (int(version[1]), int(version[2])) < MIN_CMAKE
    found = [
        _found("cmake", cmake, pip_install("cmake"), f", version {version[1]}.{version[2]}" if version else ""),
        _found("ninja", find_ninja(), pip_install("ninja")),
        *_python_packages(),
        _found("Python.h", find_python_header(), install_python_headers()),
    ]
    if wrong:
        found[0] = Finding("cmake", ok=False, detail=wrong, fix="unset W4A16GEN_CMAKE")
    elif is_old:
        needed = f"{MIN_CMAKE[0]}.{MIN_CMAKE[1]} or newer is needed"
        found[0] = Finding("cmake", ok=False, detail=f"{found[0].detail}; {needed}", fix=pip_install("cmake"))
    return found


def _python_packages() -> list[Finding]:
    """Return pybind11, and what else of the extra `build` is missing."""
    found = []
    for name in ("pybind11", "jinja2", "psutil"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found.append(Finding(name, ok=False, detail="not found", fix=pip_install(name)))
        else:
            if name == "pybind11":
                found.append(Finding(name, ok=True, detail=f"version {version}"))
    return found


def _cutlass() -> Finding:
    folder = find_cutlass()
    if folder is None:
        detail = "not found; only kernels of target cutlass need them"
        return Finding("CUTLASS headers", ok=True, detail=detail, fix=pip_install("nvidia-cutlass"))
    return Finding("CUTLASS headers", ok=True, detail=f"{folder}, version {cutlass_version(folder)}")


def _ignored_variables() -> Finding:
    present = [name for name in IGNORED_VARIABLES if name in os.environ and name != "CXX"]
    detail = f"not passed on to compilers: {', '.join(present)}" if present else "none that a build ignores"
    return Finding("compiler variables", ok=True, detail=detail)


def _trial_compilation() -> Finding:
    """Compile a small kernel, which shows whether nvcc, g++ and the C library fit each other."""
    tools = find_toolchain()
    with tempfile.TemporaryDirectory(prefix="w4a16gen-") as name:
        folder = Path(name)
        shutil.copyfile(_TRIAL, folder / _TRIAL.name)
        nvcc = alias(folder, "toolkit", tools.nvcc.parent.parent) / tools.nvcc.parent.name / tools.nvcc.name
        done = subprocess.run(  # noqa: S603
            [nvcc, *FLAGS, f"-ccbin={tools.host_compiler}", "-c", _TRIAL.name, "-o", "trial.o"],
            cwd=folder,
            env=child_environment(TMPDIR=name),
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    text = done.stdout + done.stderr
    if done.returncode == 0:
        return Finding("trial compilation", ok=True, detail="nvcc, g++ and the C library fit each other")
    cause = causes.describe_environment(text, tools)
    sentence, _, fix = (cause or causes.summarise(text, done.returncode)).partition(" Fix: ")
    return Finding("trial compilation", ok=False, detail=sentence, fix=fix or install_cuda())
