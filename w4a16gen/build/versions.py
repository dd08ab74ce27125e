"""Versions of compilers and libraries, as they tell them."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

from w4a16gen.build.environment import child_environment


@cache
def program_version(program: Path) -> str:
    """Return what a program prints for --version; nothing if it cannot be run."""
    try:
        result = subprocess.run(  # noqa: S603
            [program, "--version"],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            env=child_environment(),
        )
    except OSError:
        return ""
    return result.stdout + result.stderr


def nvcc_version(nvcc: Path) -> tuple[int, int] | None:
    """Return nvcc's release as (major, minor), or None if it does not tell."""
    match = re.search(r"release (\d+)\.(\d+)", program_version(nvcc))
    return (int(match[1]), int(match[2])) if match else None


def cuda_version(include: Path) -> tuple[int, int]:
    """Return the release of the CUDA runtime as (major, minor), from its headers; (0, 0) if they do not tell."""
    text = (include / "cuda_runtime_api.h").read_text(errors="replace")
    match = re.search(r"#define CUDART_VERSION\s+(\d+)", text)
    return (int(match[1]) // 1000, int(match[1]) % 1000 // 10) if match else (0, 0)


def newest_supported_gcc(cuda_include: Path) -> int | None:
    """Return the newest major version of gcc that nvcc's headers accept, or None if they do not say."""
    header = cuda_include / "crt" / "host_config.h"
    match = re.search(r"#if __GNUC__ > (\d+)", header.read_text(errors="replace")) if header.is_file() else None
    return int(match[1]) if match else None


def gcc_major(compiler: Path) -> int | None:
    """Return a g++'s major version, or None if it is no g++."""
    lines = program_version(compiler).splitlines()
    match = re.search(r"(?:g\+\+|gcc|GCC)\S* .*?(\d+)\.\d+\.\d+", lines[0]) if lines else None
    return int(match[1]) if match else None


def cutlass_version(include: Path) -> str:
    """Return CUTLASS's version from its headers."""
    text = (include / "cutlass" / "version.h").read_text()
    parts = [re.search(rf"#define CUTLASS_{part} (\d+)", text) for part in ("MAJOR", "MINOR", "PATCH")]
    return ".".join(match[1] if match else "?" for match in parts)
