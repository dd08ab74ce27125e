"""Cached objects: which kernels are compiled together, and which compiled objects can be used again.

Kernels share a compile unit because they share compile time. With nvcc 13.0 a unit of one CUTLASS kernel takes 31 to 46
CPU-seconds and 4 GB, a unit of six CTA shapes 100 CPU-seconds and 8.5 GB, and a unit of eight kernels of two CTA shapes
63 CPU-seconds and 5.1 GB (2 cores, 2026-11). A unit of native kernels takes 2 CPU-seconds for headers, and half of one
for each function of its kernels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from w4a16gen.build.headers import CUDA_FOLDER, Headers, headers_of
from w4a16gen.build.install import pip_install
from w4a16gen.build.toolchain import Toolchain, compiler_identity, require
from w4a16gen.build.versions import cutlass_version
from w4a16gen.files import file_digest, has_digest, read_sealed, seal
from w4a16gen.kernels.config import KernelConfig, QuantMode, Target
from w4a16gen.kernels.render import render_kernel

OBJECT_SCHEMA = "w4a16gen.object/1"
FLAGS = (
    "-std=c++17",
    "-O1",  # of the host's code; the device's is optimised in full anyway
    "-DNDEBUG",  # without it ptxas serialises the wgmma of CUTLASS's main loops (warning C7510)
    "--expt-relaxed-constexpr",
    "-gencode=arch=compute_90a,code=sm_90a",  # wgmma needs the a; sm_90 compiles to a kernel that traps
    "-Xcompiler=-fPIC,-fvisibility=hidden",
)


@dataclass(frozen=True)
class CompileCost:
    """Peak memory of compiling functions of one family, for planning; and how many of them a unit may have."""

    unit_bytes: float
    """Peak memory of a unit of one function."""
    function_bytes: float
    """Peak memory that each further function of the unit adds."""
    max_functions: int

    def peak_bytes(self, functions: int) -> float:
        """Return the peak memory of a unit."""
        return self.unit_bytes + self.function_bytes * (functions - 1)

    def fitting(self, memory: float) -> int:
        """Return how many functions a unit may have in this memory; 0 if not even one fits."""
        if memory < self.unit_bytes:
            return 0
        return int(min(self.max_functions, (memory - self.unit_bytes) // self.function_bytes + 1))


COMPILE_COSTS = {
    Target.NATIVE: CompileCost(unit_bytes=0.35e9, function_bytes=0.005e9, max_functions=48),
    Target.CUTLASS: CompileCost(unit_bytes=4.0e9, function_bytes=0.9e9, max_functions=8),
}
"""Measured with nvcc 13.0 and, for native, 13.5 (2 cores, 2026-11). Larger native units would save little more."""


def functions_of(config: KernelConfig) -> int:
    """Return how many functions a kernel has on the device; compiling takes about the same time for each.

    Native kernels with several scales per channel have a function for each number of scale rows that a block may have.
    """
    return 3 if config.target is Target.NATIVE and config.mode is not QuantMode.PER_COLUMN_SCALE_ONLY else 1


@dataclass(frozen=True)
class CompiledUnit:
    """An object file, the kernels in it with their source hashes, and what compiling it cost."""

    path: Path
    sha256: str
    """Digest of the object file."""
    hashes: Mapping[str, str]
    cpu_seconds: float
    peak_bytes: int

    def as_json(self) -> dict[str, Any]:
        """Return the object's record, which lies beside it."""
        return seal(
            {
                "schema": OBJECT_SCHEMA,
                "hashes": dict(self.hashes),
                "object_sha256": self.sha256,
                "cpu_seconds": round(self.cpu_seconds, 1),
                "peak_bytes": self.peak_bytes,
            }
        )


def kernel_hashes(configs: Iterable[KernelConfig], toolchain: Toolchain) -> dict[KernelConfig, str]:
    """Return each kernel's content hash: its source, the headers it includes, the flags, the compilers.

    Raises:
        MissingToolError: if a kernel includes CUTLASS's headers and they are missing.
    """
    identity = f"{compiler_identity(toolchain)}\n{' '.join(FLAGS)}"
    digests: dict[Headers, str] = {}
    hashes = {}
    for config in sorted(configs):
        source = render_kernel(config)
        headers = headers_of(source)
        if headers not in digests:
            digests[headers] = _headers_digest(headers, toolchain)
        hashes[config] = hashlib.sha256(f"{identity}\n{digests[headers]}\n{source}".encode()).hexdigest()
    return hashes


def _headers_digest(headers: Headers, toolchain: Toolchain) -> str:
    lines = [f"{path.relative_to(CUDA_FOLDER)} {file_digest(path)}" for path in headers.own]
    if headers.needs_cutlass:
        fix = pip_install("nvidia-cutlass")
        lines.append(f"CUTLASS {cutlass_version(require('CUTLASS', toolchain.cutlass_include, fix))}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def plan_jobs(functions: int, cores: int, memory: float, cost: CompileCost) -> tuple[int, int]:
    """Split the functions of one family into compile units.

    Args:
        functions: how many are to be compiled.
        cores: how many processes may run at once.
        memory: bytes that may be used.
        cost: of the family.

    Returns:
        The number of units, as equal as possible, and how many of them to compile at once.
    """
    if functions == 0:
        return 0, 0
    for jobs in range(min(cores, functions), 0, -1):
        size = min(cost.max_functions, -(-functions // jobs))
        fitting = cost.fitting(memory / jobs)
        if fitting >= 1 or jobs == 1:
            size = max(1, min(size, fitting))
            rounds = -(-functions // (size * jobs))
            return min(functions, rounds * jobs), jobs
    raise AssertionError  # jobs == 1 always returns


def split_evenly(configs: Sequence[KernelConfig], parts: int) -> list[tuple[KernelConfig, ...]]:
    """Cut a list into contiguous parts with about as many functions each; none of them is empty."""
    total = sum(map(functions_of, configs))
    split: dict[int, list[KernelConfig]] = {}
    before = 0
    for config in configs:
        functions = functions_of(config)
        split.setdefault((2 * before + functions) * parts // (2 * total), []).append(config)
        before += functions
    return [tuple(part) for part in split.values()]


def plan_units(configs: Iterable[KernelConfig], cores: int, memory: float) -> list[tuple[KernelConfig, ...]]:
    """Split kernels into compile units of one family each; the families that take longest come first."""
    units = []
    for target in sorted(COMPILE_COSTS, key=lambda target: -COMPILE_COSTS[target].unit_bytes):
        members = [config for config in configs if config.target is target]
        count, _ = plan_jobs(sum(map(functions_of, members)), cores, memory, COMPILE_COSTS[target])
        units += split_evenly(members, count)
    return units


def _load_unit(record: Path) -> CompiledUnit | None:
    """Read an object's record; None if it is missing or damaged. The object itself is not read."""
    try:
        value = read_sealed(record, OBJECT_SCHEMA)
        return CompiledUnit(
            record.with_suffix(".o"),
            str(value["object_sha256"]),
            dict(value["hashes"]),
            float(value["cpu_seconds"]),
            int(value["peak_bytes"]),
        )
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None


def find_units(folder: Path, hashes: Mapping[KernelConfig, str]) -> list[CompiledUnit]:
    """Choose undamaged cached objects that hold only kernels asked for, none of them twice; larger objects first.

    Args:
        folder: the folder of objects.
        hashes: content hashes of the kernels asked for.
    """
    wanted = {config.name: digest for config, digest in hashes.items()}
    units = [unit for record in sorted(folder.glob("*.json")) if (unit := _load_unit(record))]
    chosen: list[CompiledUnit] = []
    taken: set[str] = set()
    for unit in sorted(units, key=lambda unit: -len(unit.hashes)):
        fits = unit.hashes and all(wanted.get(name) == digest for name, digest in unit.hashes.items())
        if fits and not taken & unit.hashes.keys() and has_digest(unit.path, unit.sha256):
            chosen.append(unit)
            taken |= unit.hashes.keys()
    return chosen
