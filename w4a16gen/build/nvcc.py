"""Running nvcc on compile units, and telling apart why it failed."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from w4a16gen.build import causes
from w4a16gen.build.environment import child_environment
from w4a16gen.build.headers import CUDA_FOLDER
from w4a16gen.build.scratch import LOGS, OBJECTS, OWNER_VARIABLE, alias
from w4a16gen.build.toolchain import Toolchain
from w4a16gen.build.units import COMPILE_COSTS, FLAGS, CompiledUnit
from w4a16gen.errors import BuildError
from w4a16gen.files import file_digest, make_way, remove, write_if_changed, write_json
from w4a16gen.kernels.config import KernelConfig
from w4a16gen.kernels.render import render_kernel, render_unit, source_name

_SERIALISED = "wgmma.mma_async instructions are serialized"
"""Part of ptxas's warnings (C7510, C7512, C7514 and others) that it gives up overlapping WGMMAs."""


@dataclass(frozen=True)
class Failure:
    """A kernel that did not compile, and where nvcc's output is."""

    name: str
    log: Path
    summary: str
    killed: bool = False
    """Whether the compiler was killed, which another try with more memory may cure."""


class Compiler:
    """Runs nvcc, several processes at once, and can stop them all.

    nvcc passes file names to a shell. It runs inside a folder with a safe path, and gets names relative to that.
    """

    def __init__(self, toolchain: Toolchain, build: Path, scratch: Path) -> None:
        """Take the tools, the build's folder, and a scratch folder with a safe path."""
        self._build = build
        self._scratch = scratch
        toolkit = alias(scratch, "toolkit", toolchain.nvcc.parent.parent)
        self._tools = toolchain
        self._nvcc = toolkit / toolchain.nvcc.parent.name / toolchain.nvcc.name
        self._host_compiler = alias(scratch, "host_compiler", toolchain.host_compiler)
        self._includes = ["."]
        for name, folder in (("cuda", CUDA_FOLDER), ("cutlass", toolchain.cutlass_include)):
            if folder is not None:
                (scratch / name).symlink_to(folder)
                self._includes.append(f"../{name}")
        self._running: set[int] = set()
        self._lock = threading.Lock()
        self._cancelled = False

    def cancel(self) -> None:
        """Kill every running nvcc with its children."""
        with self._lock:
            self._cancelled = True
            for pid in self._running:
                os.killpg(pid, signal.SIGKILL)

    def compile(self, configs: Sequence[KernelConfig], hashes: Mapping[KernelConfig, str]) -> CompiledUnit | Failure:
        """Compile one unit.

        Returns:
            The cached object, or the failure of the unit (named after its first kernel).

        Raises:
            BuildError: if the reason is the machine, not the source.
            OSError: if something cannot be written.
        """
        digest = hashlib.sha256("\n".join(hashes[config] for config in configs).encode()).hexdigest()[:32]
        stem = configs[0].name if len(configs) == 1 else f"unit_{digest}"
        log = self._build / LOGS / f"{stem}.log"
        folder = Path(tempfile.mkdtemp(prefix="unit-", dir=self._scratch))
        try:
            for config in configs:
                (folder / source_name(config)).write_text(render_kernel(config))
            (folder / "unit.cu").write_text(render_unit([source_name(config) for config in configs]))
            returncode, text, cpu_seconds, peak_bytes = self._run(folder)
            if failure := self._failure(configs, log, returncode, text):
                return failure
            write_log(log, text)
            unit = CompiledUnit(
                self._build / OBJECTS / f"{digest}.o",
                file_digest(folder / "unit.o"),
                {config.name: hashes[config] for config in configs},
                cpu_seconds,
                peak_bytes,
            )
            put_in_place(folder / "unit.o", unit.path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        record = unit.path.with_suffix(".json")
        make_way(record)
        write_json(record, unit.as_json(), mode=0o644)
        return unit

    def _run(self, folder: Path) -> tuple[int, str, float, int]:
        """Run nvcc on a unit; return its exit code, output, CPU-seconds and the peak bytes of its largest process."""
        includes = [f"-I{include}" for include in self._includes]
        command = [str(self._nvcc), *FLAGS, f"-ccbin={self._host_compiler}", *includes]
        command += ["-c", "unit.cu", "-o", "unit.o"]
        environment = child_environment(**{"TMPDIR": str(folder), OWNER_VARIABLE: str(self._scratch)})
        with self._lock:
            if self._cancelled:
                return -signal.SIGKILL, "", 0.0, 0
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
        return process.returncode, text, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024

    def _failure(self, configs: Sequence[KernelConfig], log: Path, returncode: int, text: str) -> Failure | None:
        """Return why a unit failed; None if it did not.

        Raises:
            BuildError: if the reason is the machine, not the source.
        """
        serialised = [line.strip() for line in text.splitlines() if _SERIALISED in line]
        if returncode == 0 and not serialised:
            return None
        if self._cancelled:
            return Failure(configs[0].name, log, "the build was stopped")
        folders = (self._scratch, self._build)
        if causes.is_full(text, folders):
            raise BuildError(causes.describe_full(folders))
        write_log(log, text)
        if cause := causes.describe_environment(text, self._tools):
            raise BuildError(f"{cause}\nThe compiler's output: {log}")
        if causes.is_killed(returncode, text):
            memory = COMPILE_COSTS[configs[0].target].unit_bytes / 1e9
            summary = f"the compiler was killed (out of memory?): compiling it takes about {memory:.1f} GB"
            return Failure(configs[0].name, log, summary, killed=True)
        return Failure(configs[0].name, log, serialised[0] if serialised else causes.summarise(text, returncode))


def write_log(log: Path, text: str) -> None:
    """Write what a compiler printed, over anything that has the log's name."""
    make_way(log)
    write_if_changed(log, text)


def put_in_place(fresh: Path, path: Path) -> None:
    """Move a file to its place in the build's folder, which may be on another disk; until then nothing has its name."""
    if path.is_dir() and not path.is_symlink():
        remove(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    try:
        shutil.move(fresh, beside)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
