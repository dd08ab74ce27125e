"""The times that come with the package: what `gemm` chooses by on an H100 for layers that nobody has tuned."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from w4a16gen.choose import cost_model
from w4a16gen.choose.timing_table import TuningTable
from w4a16gen.kernels.config import KernelConfig, QuantMode, Target
from w4a16gen.kernels.device import Device
from w4a16gen.kernels.problem import Problem

TABLE_PATH = Path(__file__).resolve().parent / "data" / "h100.json"
"""Space `default` on an NVIDIA H100 80GB HBM3 (2026-11), timed as `tune` and `bench` do; of problems that power limits,
the geometric mean of several runs; of schedule warps8, scaled by kernels of the same tiles that were timed beside them.
Content hashes are left out."""
MEASURED_MODE = QuantMode.FINEGRAINED_SCALE_ONLY
MEASURED_GROUP_SIZE = 128


@cache
def table() -> TuningTable:
    """Read the table."""
    return TuningTable.read(TABLE_PATH)


def is_for(device: Device | None) -> bool:
    """Whether the times are of this kind of GPU; True on a machine without one."""
    return device is None or (device.name.startswith("NVIDIA H100") and device.sm_count == table().sm_count)


def fastest(
    configs: Iterable[KernelConfig], mode: QuantMode, problem: Problem, device: Device | None
) -> tuple[KernelConfig, float] | None:
    """Give the kernel that was fastest, and its microseconds, for as many tokens or the next more; or None.

    Measured were mode fgs and groups of 128. That decides for all modes and groups: they take 4 % more or less time in
    geometric mean (docs/native.md), and that this does not change which kernel is first is supposed, not measured.
    Kernels are known by name only, so that a change which leaves machine code alone leaves the table of use.

    Args:
        configs: the kernels to choose among.
        mode: the mode.
        problem: the problem.
        device: the GPU, or None on a machine without one.
    """
    if not is_for(device):
        return None
    as_measured = {
        replace(config, mode=MEASURED_MODE): config
        for config in configs
        if config.target is Target.NATIVE and config.mode is mode
    }
    asked = Problem(problem.m, problem.n, problem.k, MEASURED_GROUP_SIZE)
    found = table().best(MEASURED_MODE, asked, dict.fromkeys(as_measured, ""))
    return None if found is None else (as_measured[found[0]], found[1])


NEIGHBOUR_LAYER = 0.7
"""How far the times of another layer reach, in octaves of n and of k (of a normal distribution)."""
NEIGHBOUR_TOKENS = 0.15
"""The same in octaves of m."""
PRIOR_WEIGHT = 1.0
"""What the estimate by itself counts for, beside neighbours of which each counts for 1 at most."""
LEAST_WEIGHT = 1e-4
"""Neighbours of less count for nothing."""


class Neighbours:
    """Estimates that are corrected by how far they are off nearby."""

    def __init__(self, measured: TuningTable) -> None:
        """Take a table of times, of which those of `MEASURED_MODE` count."""
        of_mode = {problem: times for (mode, problem), times in measured.times.items() if mode is MEASURED_MODE}
        problems = sorted(of_mode, key=lambda problem: (problem.n, problem.k, problem.m))
        self._places = np.array([_place(problem) for problem in problems])
        self._residuals: dict[KernelConfig, npt.NDArray[np.float64]] = {}
        """Logarithm of measured over estimated time, by kernel, for each problem; NaN where not measured."""
        for number, problem in enumerate(problems):
            times = of_mode[problem]
            for config, microseconds in cost_model.estimate(times, MEASURED_MODE, problem):
                residual = self._residuals.setdefault(config, np.full(len(problems), np.nan))
                residual[number] = np.log(times[config].microseconds / microseconds)

    def estimate(
        self, configs: Iterable[KernelConfig], mode: QuantMode, problem: Problem
    ) -> list[tuple[KernelConfig, float]]:
        """Give the native kernels that can run a problem with their estimated microseconds, by preference.

        What `cost_model.estimate` gives, corrected by how far it is off for the same kernel in problems like this: by
        the weighted mean of the logarithms. How far "like" reaches is what it takes to choose well in a layer that is
        left out of the table: of 57, one after the other, the loss is 0.4 % in geometric mean, above 10 % in three of
        601 problems, and 11 % at most. In ten layers that are not in the table, and had no part in any constant, it is
        0.3 % and at most 6 % (100 problems).
        """
        estimated = cost_model.estimate(configs, mode, problem)
        if problem.m == 0:
            return estimated
        near = np.exp(-0.5 * ((self._places - _place(problem)) ** 2).sum(axis=1))
        near[near < LEAST_WEIGHT] = 0.0

        def correction(config: KernelConfig) -> float:
            residual = self._residuals.get(replace(config, mode=MEASURED_MODE))
            if residual is None:
                return 1.0
            known = near * ~np.isnan(residual)
            return float(np.exp((known * np.nan_to_num(residual)).sum() / (known.sum() + PRIOR_WEIGHT)))

        corrected = [(config, microseconds * correction(config)) for config, microseconds in estimated]
        return sorted(corrected, key=lambda pair: (pair[1], pair[0]))


def _place(problem: Problem) -> npt.NDArray[np.float64]:
    """Give where a problem is among others, in units of how far times reach."""
    octaves = np.log2([problem.m, problem.n, problem.k])
    return octaves / (NEIGHBOUR_TOKENS, NEIGHBOUR_LAYER, NEIGHBOUR_LAYER)


@cache
def neighbours() -> Neighbours:
    """Give the corrections that follow from the table."""
    return Neighbours(table())
