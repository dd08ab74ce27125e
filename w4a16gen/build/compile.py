"""Compiles kernels: gives compile units to an executor, keeps what arrives, and reports failures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from w4a16gen.build.causes import is_killed
from w4a16gen.build.nvcc import Compiled, compile_unit
from w4a16gen.build.objects import Failure, keep, sources_of
from w4a16gen.build.units import COMPILE_COSTS, CompiledUnit, functions_of, plan_units
from w4a16gen.executors.executor import Executor
from w4a16gen.executors.place import Place, WorkerLostError
from w4a16gen.executors.waiting import wait_for_any
from w4a16gen.kernels.config import KernelConfig
from w4a16gen.wording import counted


@dataclass
class Compilation:
    """The objects that together hold every kernel asked for, and the kernels that failed."""

    units: list[CompiledUnit] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    compiled: int = 0
    """Kernels compiled in this call; the others were cached."""


def compile_kernels(
    configs: Sequence[KernelConfig],
    hashes: Mapping[KernelConfig, str],
    executor: Executor,
    build: Path,
    finished: Callable[[int, str], None] = lambda _done, _name: None,
) -> Compilation:
    """Compile kernels; one that fails does not stop the others.

    A unit that fails is compiled again kernel by kernel, so that the failing ones are known by name. After a compiler
    was killed, which happens when memory runs out, only one runs at a time. An interruption kills the compilers.

    Args:
        configs: the kernels to compile.
        hashes: the content hash of each.
        executor: runs `compile_unit`, here or elsewhere.
        build: the build's folder, which keeps each object as it arrives.
        finished: called after every unit with the number of kernels that are done, and the name of one of them.

    Raises:
        BuildError: if the machine, not the source, keeps kernels from compiling.
        ClusterError: if no worker is left.
        OSError: if something cannot be written.
    """
    result = Compilation()
    running: dict[Future[list[Any]], tuple[tuple[KernelConfig, ...], bool]] = {}
    """The units in work, and whether each runs alone."""

    def start(part: tuple[KernelConfig, ...]) -> None:
        memory = COMPILE_COSTS[part[0].target].peak_bytes(sum(map(functions_of, part)))
        future = executor.submit(compile_unit, sources_of(part), memory=memory, on_item=_elsewhere_if_spoiled())
        running[future] = part, executor.slots == 1

    with executor:
        for part in plan_units(configs, executor.planned_slots, executor.planned_memory):
            start(part)
        while running:
            for future in wait_for_any(running):
                part, alone = running.pop(future)
                if future.cancelled():  # another task's error, which comes too, dropped the queue
                    continue
                outcome = keep(build, part, hashes, future.result()[0])
                if isinstance(outcome, Failure) and (len(part) > 1 or (outcome.killed and not alone)):
                    if outcome.killed:
                        executor.run_one_at_a_time()
                    for config in part:
                        start((config,))
                    continue
                if isinstance(outcome, Failure):
                    result.failures.append(outcome)
                else:
                    result.units.append(outcome)
                    result.compiled += len(part)
                finished(result.compiled + len(result.failures), part[-1].name)
    return result


def _elsewhere_if_spoiled() -> Callable[[Place, Compiled], None]:
    """Return a check of one unit's results, which gives up on those that another node may do better.

    A compiler is killed where memory runs out, but also where a node goes down. So another node tries the whole unit
    once: the objects stay the same to the byte.
    """
    killed_at: list[Place] = []

    def check(place: Place, compiled: Compiled) -> None:
        if place.is_here:
            return
        if compiled.full:
            raise WorkerLostError("its disk for temporary files is full")
        if compiled.fault:
            raise WorkerLostError(compiled.fault)
        if compiled.is_damaged:
            raise WorkerLostError("an object was damaged on its way")
        if not compiled.content and not killed_at and is_killed(compiled.returncode, compiled.text):
            killed_at.append(place)
            raise WorkerLostError("a compiler was killed (out of memory?)")

    return check


def describe_failures(failures: Sequence[Failure]) -> str:
    """Name every kernel that failed, why, and one log; kernels that failed for one reason share a line."""
    by_reason: dict[str, list[Failure]] = {}
    for failure in failures:
        by_reason.setdefault(failure.summary.replace(failure.name, "KERNEL"), []).append(failure)
    lines = [f"{counted(len(failures), 'kernel')} failed to compile:"]
    for alike in by_reason.values():
        first = alike[0]
        lines += [f"  {first.name}: {first.summary}", f"    log: {first.log}"]
        if len(alike) > 1:
            lines.append(f"    {len(alike) - 1} others for the same reason: " + ", ".join(f.name for f in alike[1:]))
    return "\n".join(lines)
