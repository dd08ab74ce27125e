"""Compiling kernel sources into cached objects: content hashes, compile units, nvcc processes.

Several kernels share one compile unit, because most of the compile time is shared between them: with nvcc 13.0 a unit
of one CUTLASS kernel takes 31 to 46 CPU-seconds and 4 GB, a unit of six CTA shapes 100 CPU-seconds and 8.5 GB, and a
unit of eight kernels of two CTA shapes 63 CPU-seconds and 5.1 GB (2 cores, 2026-11).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from w4a16gen.build.toolchain import Toolchain, cutlass_version, describe_compiler
from w4a16gen.files import file_digest, write_if_changed, write_json
from w4a16gen.kernels.config import KernelConfig
from w4a16gen.kernels.render import render_kernel, render_unit, source_name

CUDA_FOLDER = Path(__file__).resolve().parents[1] / "cuda"
MAX_UNIT_KERNELS = 8
UNIT_BYTES = 4.0e9
"""Peak memory of a unit of one kernel (nvcc 13.0, target cutlass: 3.7 to 4.4 GB)."""
KERNEL_BYTES = 0.9e9
"""Peak memory that each further kernel of a unit adds."""
FLAGS = (
    "-std=c++17",
    "-O3",
    "-DNDEBUG",  # without it ptxas serialises the wgmma of CUTLASS's main loops (warning C7510)
    "--expt-relaxed-constexpr",
    "-gencode=arch=compute_90a,code=sm_90a",  # wgmma needs the a; sm_90 compiles to a kernel that traps
    "-Xcompiler=-fPIC,-fvisibility=hidden",
)
_INCLUDE = re.compile(r'^#include "(.+)"$', re.MULTILINE)
_SERIALISED = "wgmma.mma_async instructions are serialized"
"""What ptxas says (C7510, C7512, C7514 and others) where it gives up overlapping WGMMAs."""


@dataclass(frozen=True)
class CompiledUnit:
    """An object file, the kernels in it with their source hashes, and what compiling it cost."""

    path: Path
    hashes: Mapping[str, str]
    cpu_seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Failure:
    """A kernel that did not compile, and where nvcc's output is."""

    name: str
    log: Path
    summary: str


@dataclass
class Compilation:
    """The objects that together hold every kernel asked for, and the kernels that failed."""

    units: list[CompiledUnit] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    compiled: int = 0
    """Kernels compiled in this call; the others were there already."""


Progress = Callable[[int, int, str], None]
"""Called with kernels done, kernels to do, and the kernel or unit just finished."""


def included_headers(source: str) -> frozenset[Path]:
    """Return the package's own headers that a source includes, directly or through one another."""
    found: set[Path] = set()
    texts = [source]
    while texts:
        paths = {CUDA_FOLDER / name for name in _INCLUDE.findall(texts.pop())}
        added = {path for path in paths if path.is_file()} - found  # the others are CUTLASS's
        found |= added
        texts += [path.read_text() for path in added]
    return frozenset(found)


def kernel_hashes(configs: Iterable[KernelConfig], toolchain: Toolchain) -> dict[KernelConfig, str]:
    """Return each kernel's content hash: its source, the headers that it includes, the flags and the compiler."""
    cutlass = cutlass_version(toolchain.cutlass_include)
    compiler = f"{describe_compiler(toolchain)}\n{cutlass}\n{' '.join(FLAGS)}\n"
    headers: dict[tuple[str, ...], str] = {}
    hashes = {}
    for config in sorted(configs):
        source = render_kernel(config)
        includes = tuple(_INCLUDE.findall(source))
        if includes not in headers:
            paths = sorted(included_headers(source))
            headers[includes] = "".join(f"{path.relative_to(CUDA_FOLDER)} {file_digest(path)}\n" for path in paths)
        hashes[config] = hashlib.sha256(f"{headers[includes]}{compiler}{source}".encode()).hexdigest()
    return hashes


def plan_jobs(kernels: int, cores: int, memory: float) -> tuple[int, int]:
    """Split kernels into compile units.

    Args:
        kernels: how many are to be compiled.
        cores: how many processes may run at once.
        memory: bytes that may be used.

    Returns:
        The number of units, as equal as possible, and how many of them to compile at once.
    """
    if kernels == 0:
        return 0, 0
    for jobs in range(min(cores, kernels), 0, -1):
        size = min(MAX_UNIT_KERNELS, -(-kernels // jobs))
        fitting = int(min(MAX_UNIT_KERNELS, (memory / jobs - UNIT_BYTES) // KERNEL_BYTES + 1))
        if fitting >= 1 or jobs == 1:
            size = max(1, min(size, fitting))
            rounds = -(-kernels // (size * jobs))
            return min(kernels, rounds * jobs), jobs
    raise AssertionError  # jobs == 1 always returns


def split_evenly(configs: Sequence[KernelConfig], parts: int) -> list[tuple[KernelConfig, ...]]:
    """Cut a list into contiguous parts whose sizes differ by at most one."""
    bounds = [len(configs) * part // parts for part in range(parts + 1)]
    return [tuple(configs[start:stop]) for start, stop in itertools.pairwise(bounds)]


def _load_unit(record: Path) -> CompiledUnit | None:
    """Read an object's record; None if it or the object is missing or damaged."""
    try:
        value = json.loads(record.read_text())
        unit = CompiledUnit(record.with_suffix(".o"), value["hashes"], value["cpu_seconds"], value["peak_bytes"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return unit if unit.path.is_file() else None


def find_units(folder: Path, hashes: Mapping[KernelConfig, str]) -> list[CompiledUnit]:
    """Choose cached objects that hold only kernels asked for, none of them twice; larger objects first."""
    wanted = {config.name: digest for config, digest in hashes.items()}
    units = [unit for record in sorted(folder.glob("*.json")) if (unit := _load_unit(record))]
    chosen: list[CompiledUnit] = []
    taken: set[str] = set()
    for unit in sorted(units, key=lambda unit: -len(unit.hashes)):
        fits = all(wanted.get(name) == digest for name, digest in unit.hashes.items())
        if fits and not taken & unit.hashes.keys():
            chosen.append(unit)
            taken |= unit.hashes.keys()
    return chosen


class _Compiler:
    """Runs nvcc, several processes at once, and can stop them all."""

    def __init__(self, toolchain: Toolchain, generated: Path, build: Path) -> None:
        self._toolchain = toolchain
        self._generated = generated
        self._objects = build / "objects"
        self._logs = build / "logs"
        self._running: set[int] = set()
        self._lock = threading.Lock()
        self._cancelled = False

    def cancel(self) -> None:
        """Kill every running nvcc with its children; whatever they were writing is removed by their own threads."""
        with self._lock:
            self._cancelled = True
            for pid in self._running:
                os.killpg(pid, signal.SIGKILL)

    def compile(self, configs: Sequence[KernelConfig], hashes: Mapping[KernelConfig, str]) -> CompiledUnit | Failure:
        """Compile one unit.

        Returns:
            The cached object, or the failure of the unit (named after its first kernel).
        """
        digest = hashlib.sha256("\n".join(hashes[config] for config in configs).encode()).hexdigest()[:32]
        stem = configs[0].name if len(configs) == 1 else f"unit_{digest}"
        log = self._logs / f"{stem}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        self._objects.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._objects, prefix=".compiling-") as scratch:
            source = Path(scratch) / "unit.cu"  # a kernel's own name would make it include itself
            write_if_changed(source, render_unit([source_name(config) for config in configs]))
            output = Path(scratch) / "unit.o"
            returncode, cpu_seconds, peak_bytes = self._run(source, output, log)
            text = log.read_text(errors="replace")
            serialised = [line for line in text.splitlines() if _SERIALISED in line]
            if returncode != 0 or serialised:
                return Failure(configs[0].name, log, _summary(text, serialised, returncode))
            unit = CompiledUnit(
                self._objects / f"{digest}.o",
                {config.name: hashes[config] for config in configs},
                cpu_seconds,
                peak_bytes,
            )
            output.replace(unit.path)
        record = {"hashes": dict(unit.hashes), "cpu_seconds": round(cpu_seconds, 1), "peak_bytes": peak_bytes}
        write_json(unit.path.with_suffix(".json"), record)
        return unit

    def _run(self, source: Path, output: Path, log: Path) -> tuple[int, float, int]:
        """Run nvcc; give its exit code, CPU-seconds and the peak bytes of its largest process."""
        tools = self._toolchain
        command = [
            *(str(tools.nvcc), *FLAGS, f"-ccbin={tools.host_compiler}"),
            *(f"-I{folder}" for folder in (self._generated.resolve(), CUDA_FOLDER, tools.cutlass_include)),
            *("-c", str(source), "-o", str(output)),
        ]
        environment = {**os.environ, "TMPDIR": str(source.parent)}
        with log.open("w") as file:
            with self._lock:
                if self._cancelled:
                    return -signal.SIGKILL, 0.0, 0
                process = subprocess.Popen(  # noqa: S603
                    command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
                )
                self._running.add(process.pid)
            _, status, usage = os.wait4(process.pid, 0)
            with self._lock:
                self._running.discard(process.pid)
            process.returncode = os.waitstatus_to_exitcode(status)
        return process.returncode, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def _summary(text: str, serialised: Sequence[str], returncode: int) -> str:
    """Give the one line of nvcc's output that tells most."""
    errors = [line for line in text.splitlines() if "error" in line or "fatal" in line]
    if returncode < 0:
        return f"nvcc was killed by signal {-returncode} (out of memory?)"
    return (list(serialised) + errors + [f"nvcc exited with {returncode}"])[0].strip()[:300]


def compile_kernels(
    configs: Iterable[KernelConfig],
    toolchain: Toolchain,
    generated: Path,
    build: Path,
    jobs: int | None = None,
    progress: Progress = lambda _done, _total, _name: None,
) -> Compilation:
    """Compile what is not compiled yet; a kernel that fails does not stop the others.

    A unit that fails is compiled again kernel by kernel, so that the failing ones are known by name. An interruption
    kills the compilers, leaves nothing half-written, and the next call goes on from the finished units.

    Args:
        configs: the kernels wanted; their sources lie in `generated`.
        toolchain: the tools.
        generated: folder of the emitted sources.
        build: folder of objects and logs.
        jobs: compilers at once; None takes the cores, and fewer where memory is short.
        progress: told after every finished unit.
    """
    hashes = kernel_hashes(configs, toolchain)
    result = Compilation(units=find_units(build / "objects", hashes))
    have = {name for unit in result.units for name in unit.hashes}
    missing = [config for config in hashes if config.name not in have]
    memory = float("inf") if jobs else 0.9 * psutil.virtual_memory().available
    units, workers = plan_jobs(len(missing), jobs or os.cpu_count() or 1, memory)
    if not missing:
        return result
    compiler = _Compiler(toolchain, generated, build)
    pool = ThreadPoolExecutor(workers)
    pending: dict[Future[CompiledUnit | Failure], tuple[KernelConfig, ...]] = {}

    def submit(part: tuple[KernelConfig, ...]) -> None:
        pending[pool.submit(compiler.compile, part, hashes)] = part

    try:
        for part in split_evenly(missing, units):
            submit(part)
        while pending:
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                part, outcome = pending.pop(future), future.result()
                if isinstance(outcome, Failure) and len(part) > 1:
                    for config in part:
                        submit((config,))
                    continue
                if isinstance(outcome, Failure):
                    result.failures.append(outcome)
                else:
                    result.units.append(outcome)
                    result.compiled += len(part)
                progress(result.compiled + len(result.failures), len(missing), part[-1].name)
    except BaseException:
        compiler.cancel()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return result
