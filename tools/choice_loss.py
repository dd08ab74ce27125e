"""Compare the time of the chosen kernels with that of the fastest, by the packaged times.

python tools/choice_loss.py        # prints the loss of each way to choose
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

from w4a16gen.choose.cost_model import CostModel, default_cost_model
from w4a16gen.choose.packaged_times import MEASURED_MODE, Neighbours, Reach, default_reach
from w4a16gen.choose.packaged_times import table as packaged_table
from w4a16gen.choose.timing_table import TuningTable
from w4a16gen.kernels.config import KernelConfig
from w4a16gen.kernels.problem import Problem

NOTABLE = 0.1
Times = Mapping[KernelConfig, float]
"""Microseconds of each kernel in one problem."""


def loss_of(neighbours: Neighbours, problem: Problem, times: Times) -> float:
    """Return the time of the kernel that would be chosen without any table, over the fastest: 1 or more."""
    chosen = neighbours.estimate(times, MEASURED_MODE, problem)[0][0]
    return times[chosen] / min(times.values())


def losses_of_estimate(table: TuningTable, model: CostModel, reach: Reach) -> dict[Problem, float]:
    """Return the loss in each problem of a table if estimates were not corrected at all."""
    alone = Neighbours(replace(table, times={}), model, reach)
    return {
        problem: loss_of(alone, problem, {kernel: time.microseconds for kernel, time in times.items()})
        for (_, problem), times in table.times.items()
    }


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


def losses_by_tokens(table: TuningTable, model: CostModel, reach: Reach) -> dict[str, dict[Problem, float]]:
    """Return the loss in each problem if the table did not hold it, for two ways to choose.

    Only problems are counted whose layer has a time at more tokens, but fewer than twice the tokens.

    Returns:
        By way: `estimate`, the corrected estimate; `next_tokens`, the kernel that was fastest at the next more tokens.
    """
    losses: dict[str, dict[Problem, float]] = {"estimate": {}, "next_tokens": {}}
    for key, measured in table.times.items():
        mode, problem = key
        others = replace(table, times={other: times for other, times in table.times.items() if other != key})
        following = others.fastest_at_more_tokens(mode, problem, dict.fromkeys(measured, ""))
        if following is not None:
            times = {kernel: time.microseconds for kernel, time in measured.items()}
            losses["estimate"][problem] = loss_of(Neighbours(others, model, reach), problem, times)
            losses["next_tokens"][problem] = times[following[0]] / min(times.values())
    return losses


def summary(losses: Iterable[float]) -> dict[str, float]:
    """Return geometric mean and worst of some losses, as shares: 0 is no loss."""
    values = list(losses)
    mean = math.exp(sum(map(math.log, values)) / len(values))
    above = sum(value > 1 + NOTABLE for value in values)
    return {
        "problems": len(values),
        "geometric_mean": round(mean - 1, 5),
        "worst": round(max(values) - 1, 5),
        "above_10_percent": above,
    }


def main() -> None:
    """Print the losses of the packaged times, model and reach."""
    table, model, reach = packaged_table(), default_cost_model(), default_reach()
    by_tokens = losses_by_tokens(table, model, reach)
    losses = {"estimate_alone": losses_of_estimate(table, model, reach)}
    losses["leave_one_layer_out"] = losses_by_layer(table, model, reach)
    losses |= {f"leave_one_problem_out_{way}": of_way for way, of_way in by_tokens.items()}
    print(json.dumps({name: summary(of_way.values()) for name, of_way in losses.items()}, indent=2))


if __name__ == "__main__":
    main()
