"""Checking and timing one kernel on one problem: `w4a16gen run`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from w4a16gen.choose.overrides import of_gemm
from w4a16gen.errors import UnsupportedProblemError
from w4a16gen.kernels.config import KernelConfig, QuantMode
from w4a16gen.kernels.device import Device
from w4a16gen.kernels.problem import Problem, runnable
from w4a16gen.measure.workload import Workload
from w4a16gen.runtime.library import Library

REPLAYS = 11
CHECKED_ROWS = 64
"""Rows of the result that are compared with float64; all rows of a large problem would take minutes."""


@dataclass(frozen=True)
class Plan:
    """The kernel that runs a problem, and the number of kernels that could."""

    problem: Problem
    mode: QuantMode
    config: KernelConfig
    candidates: Sequence[KernelConfig]
    built: int


@dataclass(frozen=True)
class Outcome:
    """The result of a run."""

    gpu: Device
    workspace_bytes: int
    checked_rows: int
    error_over_bound: float
    microseconds: Sequence[float]
    """Mean time of a launch, one value per replay."""
    launches: int
    """Launches per replay."""

    @property
    def ok(self) -> bool:
        """Whether every value compared lies within its bound."""
        return self.error_over_bound <= 1

    @property
    def median_microseconds(self) -> float:
        """Median over the replays."""
        return statistics.median(self.microseconds)


def plan(library: Library, problem: Problem, mode: QuantMode, name: str | None) -> Plan:
    """Decide which kernel runs a problem: the one named, or the one that a call of `gemm` gets.

    Args:
        library: the loaded build.
        problem: the problem.
        mode: the quantisation mode; a named kernel must be of it.
        name: the kernel's canonical name, or None to choose.

    Raises:
        UnsupportedProblemError: if the named kernel, or every built one, cannot run it.
        InvalidValueError: if the name is not a kernel name, or that of a grouped kernel.
        NotBuiltError: if the named kernel is not built.
    """
    built = library.configs()
    candidates = runnable(built, mode, problem)
    if name is None:
        return Plan(problem, mode, library.choose(problem, mode).kernel, candidates, len(built))
    config = of_gemm(KernelConfig.parse(name))
    if config.mode is not mode:
        raise UnsupportedProblemError(f"{name} is of mode {config.mode}, not {mode}: pass --mode {config.mode}")
    reason = library.why_cannot_run(config, problem)
    if reason is not None:
        raise UnsupportedProblemError(f"{name} cannot run {problem}: {reason}")
    return Plan(problem, mode, config, candidates, len(built))


def run(library: Library, chosen: Plan, *, seed: int = 0) -> Outcome:
    """Check one kernel on random data and time it with a cold L2.

    Raises:
        NoHopperGpuError: if there is no Hopper GPU.
    """
    gpu = library.hopper_device()
    problem, config = chosen.problem, chosen.config
    workload = Workload(library, gpu.index, problem, chosen.mode, seed)
    error = workload.check(config, rows=CHECKED_ROWS, channels=problem.n)
    contender = workload.record(config, dependent=False)
    contender.replay()
    times = [contender.timed_replay() * 1000 / contender.launches for _ in range(REPLAYS)]
    needed = library.workspace_bytes(config, problem, device=gpu.index)
    return Outcome(gpu, needed, min(problem.m, CHECKED_ROWS), error, times, contender.launches)
