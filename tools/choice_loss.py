"""How much longer the chosen kernels take than the fastest, where all were timed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

from w4a16gen.choose.cost_model import CostModel
from w4a16gen.choose.packaged_times import MEASURED_MODE, Neighbours, Reach
from w4a16gen.choose.timing_table import TuningTable
from w4a16gen.kernels.config import KernelConfig
from w4a16gen.kernels.problem import Problem

Times = Mapping[KernelConfig, float]
"""Microseconds of each kernel in one problem."""


def loss_of(neighbours: Neighbours, problem: Problem, times: Times) -> float:
    """Return the time of the kernel that would be chosen without any table, over the fastest: 1 or more."""
    chosen = neighbours.estimate(times, MEASURED_MODE, problem)[0][0]
    return times[chosen] / min(times.values())


def losses_by_layer(table: TuningTable, model: CostModel, reach: Reach) -> dict[Problem, float]:
    """Return the loss in each problem of a table if the table did not hold that problem's layer."""
    losses = {}
    for layer in sorted({(problem.n, problem.k) for _, problem in table.times}):
        others = {key: times for key, times in table.times.items() if (key[1].n, key[1].k) != layer}
        neighbours = Neighbours(replace(table, times=others), model, reach)
        for (_, problem), measured in table.times.items():
            if (problem.n, problem.k) == layer:
                times = {kernel: time.microseconds for kernel, time in measured.items()}
                losses[problem] = loss_of(neighbours, problem, times)
    return losses


def summary(losses: Iterable[float]) -> dict[str, float]:
    """Return geometric mean and worst of some losses, as shares: 0 is no loss."""
    values = list(losses)
    mean = math.exp(sum(map(math.log, values)) / len(values))
    return {"problems": len(values), "geometric_mean": round(mean - 1, 5), "worst": round(max(values) - 1, 5)}
