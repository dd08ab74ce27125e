"""Running nvcc on compile units, here or on a node of a cluster."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from w4a16gen.build import causes
from w4a16gen.build.environment import child_environment
from w4a16gen.build.headers import CUDA_FOLDER
from w4a16gen.build.scratch import OWNER_VARIABLE, alias
from w4a16gen.build.toolchain import Compilers
from w4a16gen.build.units import FLAGS

UNIT = "unit.cu"
OBJECT = "unit.o"
"""File names of a compile unit and of its object."""


@dataclass(frozen=True)
class Compiled:
    """What one run of nvcc left: plain values, which may come from another machine."""

    returncode: int
    text: str
    """What it printed."""
    cpu_seconds: float
    peak_bytes: int
    """Of its largest process."""
    content: bytes
    """The object file; empty if it failed."""
    digest: str = ""
    """SHA-256 of the object file where it was compiled."""
    fault: str = ""
    """What is wrong with the machine, if that is why it failed."""
    full: bool = False
    """Whether the disk is full."""
    cancelled: bool = False

    @property
    def is_damaged(self) -> bool:
        """Whether the object file is no longer what the compiler wrote."""
        return bool(self.content) and hashlib.sha256(self.content).hexdigest() != self.digest


class Compiler:
    """Runs nvcc, several processes at once, and can stop them all.

    nvcc passes file names to a shell. It runs inside a folder with a safe path, and gets names relative to that. So the
    objects depend neither on the folder nor on the machine.
    """

    def __init__(self, tools: Compilers, scratch: Path, headers: Path = CUDA_FOLDER) -> None:
        """Take the tools, a scratch folder with a safe path, and the folder of this package's headers."""
        self._scratch = scratch
        toolkit = alias(scratch, "toolkit", tools.nvcc.parent.parent)
        self._tools = tools
        self._nvcc = toolkit / tools.nvcc.parent.name / tools.nvcc.name
        self._host_compiler = alias(scratch, "host_compiler", tools.host_compiler)
        self._includes = ["."]
        for name, folder in (("cuda", headers), ("cutlass", tools.cutlass_include)):
            if folder is not None:
                (scratch / name).symlink_to(folder)
                self._includes.append(f"../{name}")
        self._running: set[int] = set()
        self._lock = threading.Lock()
        self._cancelled = False

    def cancel(self) -> None:
        """Kill every running nvcc with its children, and start no other."""
        with self._lock:
            self._cancelled = True
            for pid in self._running:
                os.killpg(pid, signal.SIGKILL)

    def compile(self, sources: Mapping[str, str]) -> Compiled:
        """Compile one unit.

        Args:
            sources: the texts of its files, by name; `unit.cu` is compiled.

        Raises:
            OSError: if something cannot be written.
        """
        folder = Path(tempfile.mkdtemp(prefix="unit-", dir=self._scratch))
        try:
            for name, text in sources.items():
                (folder / name).write_text(text)
            done = self._run(folder)
            made = folder / OBJECT
            if done.returncode == 0 and made.is_file():
                content = made.read_bytes()
                return replace(done, content=content, digest=hashlib.sha256(content).hexdigest())
            full = causes.is_full(done.text, [self._scratch])
            fault = (
                causes.describe_full([self._scratch]) if full else causes.describe_environment(done.text, self._tools)
            )
            return replace(done, fault=fault or "", full=full)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _run(self, folder: Path) -> Compiled:
        """Run nvcc on a unit; return all but its object."""
        includes = [f"-I{include}" for include in self._includes]
        command = [str(self._nvcc), *FLAGS, f"-ccbin={self._host_compiler}", *includes]
        # nvcc names its temporary files by its process id, and the object keeps one of the names. With --keep they are
        # named by the unit, so that the same sources give the same bytes.
        command += ["--keep", "-c", UNIT, "-o", OBJECT]
        environment = child_environment(**{"TMPDIR": str(folder), OWNER_VARIABLE: str(self._scratch)})
        with self._lock:
            if self._cancelled:
                return Compiled(-signal.SIGKILL, "", 0.0, 0, b"", cancelled=True)
            process = subprocess.Popen(  # noqa: S603
                command,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self._running.add(process.pid)
        with process.stdout or open(os.devnull, "rb") as output:  # noqa: PTH123
            text = output.read().decode(errors="replace")
        _, status, usage = os.wait4(process.pid, 0)
        with self._lock:
            self._running.discard(process.pid)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds, peak = usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024
        return Compiled(process.returncode, text, seconds, peak, b"", cancelled=self._cancelled)


def compile_unit(compiler: Compiler, sources: Mapping[str, str]) -> Iterator[Compiled]:
    """Compile one unit: the task that executors run."""
    yield compiler.compile(sources)
