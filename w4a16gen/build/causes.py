"""Why a compiler failed, where the reason is not the source: one sentence with the command that fixes it."""

from __future__ import annotations

import re
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

from w4a16gen.build.install import INSTALL_COMPILER, install_compiler, install_cuda, install_python_headers
from w4a16gen.build.toolchain import Compilers
from w4a16gen.build.versions import newest_supported_gcc, nvcc_version

_KILLED = {-signal.SIGKILL, 128 + signal.SIGKILL, signal.SIGKILL}
"""Exit codes of a compiler that was killed, or one of its parts was: the kernel does so when memory runs out."""
_LEAST_FREE_BYTES = 4 << 20
_SUMMARY_CHARACTERS = 300


def is_killed(returncode: int, text: str) -> bool:
    """Return whether a compiler, or a part of it, was killed, which almost always means that memory ran out."""
    return returncode in _KILLED or bool(
        re.search(r"^Killed$|Killed signal|virtual memory exhausted", text, re.MULTILINE)
    )


def is_full(text: str, folders: Sequence[Path]) -> bool:
    """Return whether a disk is full: a program says so, or one of the folders it writes to has no room."""
    return "No space left on device" in text or any(
        folder.is_dir() and shutil.disk_usage(folder).free < _LEAST_FREE_BYTES for folder in folders
    )


def describe_full(folders: Sequence[Path]) -> str:
    """Return the sentence that says which disk is full."""
    room = min(folders, key=lambda folder: shutil.disk_usage(folder).free)
    free = shutil.disk_usage(room).free / 1e6
    return f"No space left on device: {room} has {free:.0f} MB free. Free some space, or choose another --build-dir."


def describe_environment(text: str, tools: Compilers) -> str | None:
    """Return what is wrong with the machine if a compiler's output shows it; None if it is about the source.

    Such a failure happens to every kernel, so it is reported once and ends the build.

    Args:
        text: what the compiler, the linker or CMake printed.
        tools: the tools that were used.
    """
    release = ".".join(map(str, nvcc_version(tools.nvcc) or ("?",)))
    limit = newest_supported_gcc(tools.cuda_include)
    gcc_is_new = (
        f"{tools.host_compiler} is newer than nvcc {release} supports (g++ {limit} at most). Fix: set CXX=g++-{limit} "
        f"({install_compiler(limit or 15)}), or install a newer nvcc: {install_cuda()} --upgrade"
    )
    libc_is_new = (
        f"The C library's headers are newer than nvcc {release} supports: glibc 2.42 and newer need nvcc 13.2 or "
        f"newer. Fix: {install_cuda()} --upgrade"
    )
    parts_differ = f"The parts of nvcc {release} are of different releases. Fix: {install_cuda()} --force-reinstall"
    rules = (
        ("unsupported GNU version", gcc_is_new),
        (r"mathcalls\.h.*exception specification is incompatible", libc_is_new),
        (r"Python\.h: No such|Python_INCLUDE_DIRS", f"Python.h was not found. Fix: {install_python_headers()}"),
        (r"cannot execute .*cc1plus|cannot find 'ld'", f"{tools.host_compiler} is incomplete. Fix: {INSTALL_COMPILER}"),
        (r"Unsupported \.version|unsupported PTX version", parts_differ),
    )
    return next((sentence for pattern, sentence in rules if re.search(pattern, text)), None)


def summarise(text: str, returncode: int) -> str:
    """Return the line of a compiler's output that says most."""
    if is_killed(returncode, text):
        return "the compiler was killed (out of memory?): try --jobs 1"
    errors = [line for line in text.splitlines() if re.search(r"\berror\b|\bfatal\b", line)]
    line = (errors or [f"nvcc exited with {returncode}"])[0].strip()
    return line if len(line) <= _SUMMARY_CHARACTERS else line[: _SUMMARY_CHARACTERS - 3] + "..."
