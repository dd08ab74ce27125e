"""Compiles kernels: runs as many compilers as cores and memory allow, and reports failures."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from w4a16gen.build.limits import usable_cores, usable_memory
from w4a16gen.build.nvcc import Compiler, Failure
from w4a16gen.build.units import COMPILE_COSTS, CompiledUnit, plan_units
from w4a16gen.kernels.config import KernelConfig

_MEMORY_SHARE = 0.9
"""Part of the usable memory that compilers may take."""


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
    compiler: Compiler,
    jobs: int | None = None,
    finished: Callable[[int, str], None] = lambda _done, _name: None,
) -> Compilation:
    """Compile kernels; one that fails does not stop the others.

    A unit that fails is compiled again kernel by kernel, so that the failing ones are known by name. After a compiler
    was killed, which happens when memory runs out, only one runs at a time. An interruption kills the compilers.

    Args:
        configs: the kernels to compile.
        hashes: the content hash of each.
        compiler: runs nvcc.
        jobs: compilers at once; None takes the usable cores, and fewer if memory is short.
        finished: called after every unit with the number of kernels that are done, and the name of one of them.

    Raises:
        BuildError: if the machine, not the source, keeps kernels from compiling.
        OSError: if something cannot be written.
    """
    result = Compilation()
    at_once = jobs or usable_cores()
    memory = float("inf") if jobs else _MEMORY_SHARE * usable_memory()
    queue = deque(plan_units(configs, at_once, memory))
    running: dict[Future[CompiledUnit | Failure], tuple[tuple[KernelConfig, ...], bool]] = {}
    """The units in work, and whether each runs alone."""

    def fits(part: Sequence[KernelConfig]) -> bool:
        taken = sum(_peak_bytes(other) for other, _ in running.values())
        return not running or (len(running) < at_once and taken + _peak_bytes(part) <= memory)

    pool = ThreadPoolExecutor(max(1, min(at_once, len(configs))))
    try:
        while queue or running:
            while queue and fits(queue[0]):
                part = queue.popleft()
                running[pool.submit(compiler.compile, part, hashes)] = part, at_once == 1
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                (part, alone), outcome = running.pop(future), future.result()
                if isinstance(outcome, Failure) and (len(part) > 1 or (outcome.killed and not alone)):
                    at_once = 1 if outcome.killed else at_once
                    queue.extend((config,) for config in part)
                    continue
                if isinstance(outcome, Failure):
                    result.failures.append(outcome)
                else:
                    result.units.append(outcome)
                    result.compiled += len(part)
                finished(result.compiled + len(result.failures), part[-1].name)
    except BaseException:
        compiler.cancel()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return result


def _peak_bytes(part: Sequence[KernelConfig]) -> float:
    return COMPILE_COSTS[part[0].target].peak_bytes(len(part))


def describe_failures(failures: Sequence[Failure]) -> str:
    """Name every kernel that failed, why, and one log; kernels that failed for one reason share a line."""
    by_reason: dict[str, list[Failure]] = {}
    for failure in failures:
        by_reason.setdefault(failure.summary.replace(failure.name, "KERNEL"), []).append(failure)
    lines = [f"{len(failures)} kernels failed to compile:"]
    for alike in by_reason.values():
        first = alike[0]
        lines += [f"  {first.name}: {first.summary}", f"    log: {first.log}"]
        if len(alike) > 1:
            lines.append(f"    {len(alike) - 1} others for the same reason: " + ", ".join(f.name for f in alike[1:]))
    return "\n".join(lines)
