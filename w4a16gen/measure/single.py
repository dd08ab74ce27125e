"""Running and timing one kernel on one problem: what `w4a16gen run` reports."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from w4a16gen.errors import UnsupportedProblemError
from w4a16gen.kernels.config import KernelConfig, QuantMode
from w4a16gen.kernels.device import Device
from w4a16gen.kernels.problem import Problem, runnable
from w4a16gen.measure.workload import COLD_BYTES
from w4a16gen.runtime.library import Library
from w4a16gen.weights.packed import PackedWeight, pack_weight
from w4a16gen.weights.reference import Expectation, random_weight

LAUNCHES = 20
REPLAYS = 11
CHECKED_ROWS = 64
"""Rows of the result compared with float64; the reference of all of a large problem would take minutes."""


@dataclass(frozen=True)
class Plan:
    """Which kernel runs a problem, and how many could."""

    problem: Problem
    mode: QuantMode
    config: KernelConfig
    candidates: Sequence[KernelConfig]
    built: int


@dataclass(frozen=True)
class Outcome:
    """What a run measured."""

    gpu: Device
    workspace_bytes: int
    checked_rows: int
    error_over_bound: float
    microseconds: Sequence[float]
    launches: int

    @property
    def ok(self) -> bool:
        """Whether every value compared lies within its bound."""
        return self.error_over_bound <= 1

    @property
    def median_microseconds(self) -> float:
        """Median over the replays of the mean time of a launch."""
        return statistics.median(self.microseconds)


def plan(library: Library, problem: Problem, mode: QuantMode, name: str | None) -> Plan:
    """Decide which kernel runs a problem.

    Args:
        library: the loaded build.
        problem: the problem.
        mode: the quantisation mode; a named kernel must be of it.
        name: the kernel's canonical name, or None to choose.

    Raises:
        UnsupportedProblemError: if the named kernel, or every built one, cannot run it.
        InvalidValueError: if the name is not a kernel name.
        NotBuiltError: if the named kernel is not built.
    """
    built = library.configs()
    candidates = runnable(built, mode, problem)
    if name is None:
        return Plan(problem, mode, library.choose(problem, mode).kernel, candidates, len(built))
    config = KernelConfig.parse(name)
    if config.mode is not mode:
        raise UnsupportedProblemError(f"{name} is of mode {config.mode}, not {mode}: pass --mode {config.mode}")
    reason = library.why_cannot_run(config, problem)
    if reason is not None:
        raise UnsupportedProblemError(f"{name} cannot run {problem}: {reason}")
    return Plan(problem, mode, config, candidates, len(built))


def run(library: Library, chosen: Plan, *, seed: int = 0) -> Outcome:
    """Check one kernel on random data and time it with cold L2: graphs of launches over rotating weights.

    Raises:
        NoHopperGpuError: if there is no Hopper GPU.
    """
    gpu = library.hopper_device()
    device, problem, config = gpu.index, chosen.problem, chosen.config
    rng = np.random.default_rng(seed)
    weight = random_weight(rng, problem.n, problem.k, problem.group_size, chosen.mode)
    a = rng.standard_normal((problem.m, problem.k), dtype=np.float32).astype(np.float16)
    packed = pack_weight(weight, target=config.target)
    copies: list[PackedWeight] = [
        library.to_device(packed, device) for _ in range(max(1, min(LAUNCHES, int(COLD_BYTES / packed.nbytes) + 1)))
    ]
    on_gpu = library.to_device(a, device)
    out = library.to_device(np.full((problem.m, problem.n), np.nan, np.float16), device)
    needed = library.workspace_bytes(config, problem, device=device)
    workspace = library.to_device(np.zeros(needed, np.uint8), device)
    stream = library.module.Stream(device)

    def launch(weight_copy: PackedWeight) -> None:
        library.gemm(on_gpu, weight_copy, config=config, out=out, workspace=workspace, stream=stream)

    launch(copies[0])
    stream.synchronize()
    rows = np.unique(np.linspace(0, problem.m - 1, min(problem.m, CHECKED_ROWS)).astype(int))
    error = 0.0
    if problem.m:
        expected = Expectation(a[rows], weight)
        difference = np.abs(out.to_host()[rows].astype(np.float64) - expected.result(1.0, None))
        ratio = difference / expected.bound(1.0, None)
        error = float("inf") if np.isnan(ratio).any() else float(ratio.max())
    stream.begin_capture()
    for turn in range(LAUNCHES):
        launch(copies[turn % len(copies)])
    stream.end_capture()
    stream.replay()
    times = []
    for _ in range(REPLAYS):
        stream.start_timer()
        stream.replay()
        times.append(stream.stop_timer() * 1000 / LAUNCHES)
    return Outcome(gpu, needed, len(rows), error, times, LAUNCHES)
