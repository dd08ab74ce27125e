"""What comparing kernels on a problem gives, and which few kernels would do."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from w4a16gen.kernels.config import QuantMode
from w4a16gen.kernels.problem import Problem
from w4a16gen.measure.rivals import CUBLAS, RIVAL_NAMES

FLOOR = "streaming_floor"
"""Name of the contender that only reads the packed weight."""


@dataclass(frozen=True)
class Timing:
    """One contender on one problem: microseconds a launch, one value per timed replay."""

    contender: str
    isolated: Sequence[float]
    dependent: Sequence[float] = ()
    """The same with programmatic dependent launch; empty where it was not timed."""

    @property
    def median(self) -> float:
        """Median of the isolated launches."""
        return statistics.median(self.isolated)

    @property
    def dependent_median(self) -> float | None:
        """Median of the dependent launches, or None."""
        return statistics.median(self.dependent) if self.dependent else None


@dataclass(frozen=True)
class Comparison:
    """What was measured on one problem."""

    problem: Problem
    mode: QuantMode
    screened: Mapping[str, float]
    """Microseconds of every kernel that can run it: the least of a few replays."""
    left_out: int
    """Kernels that can run it and were not timed, because their token tiles are far from m."""
    timings: Sequence[Timing]
    """The fastest of them, cuBLAS and the streaming floor, interleaved; fastest first."""
    error_over_bound: Mapping[str, float] = field(default_factory=dict)
    """Of each finalist and rival: the largest error of what was compared with float64, as a share of its bound."""
    chosen: str | None = None
    """The kernel that a call gets which names none; one of the timings."""
    rivals_left_out: Mapping[str, str] = field(default_factory=dict)
    """Other 4-bit kernels that were asked for and not timed, and why."""

    @property
    def best(self) -> Timing:
        """The fastest kernel."""
        others = {CUBLAS, FLOOR} | RIVAL_NAMES
        return next(timing for timing in self.timings if timing.contender not in others)

    def timing(self, contender: str | None) -> Timing | None:
        """Give what a contender took, or None if it was not timed."""
        return next((timing for timing in self.timings if timing.contender == contender), None)

    @property
    def floor(self) -> Timing | None:
        """Reading the packed weight and nothing else."""
        return self.timing(FLOOR)

    @property
    def cublas(self) -> Timing | None:
        """The dense product, where torch is installed."""
        return self.timing(CUBLAS)

    @property
    def best_rival(self) -> Timing | None:
        """The fastest of the other 4-bit kernels that were timed."""
        return next((timing for timing in self.timings if timing.contender in RIVAL_NAMES), None)

    def as_json(self) -> dict[str, Any]:
        """Give the object that `--json` carries."""
        return {
            "problem": vars(self.problem),
            "mode": self.mode.value,
            "screened": {name: round(value, 3) for name, value in self.screened.items()},
            "left_out": self.left_out,
            "chosen": self.chosen,
            "rivals_left_out": dict(self.rivals_left_out),
            "error_over_bound": {name: round(value, 4) for name, value in self.error_over_bound.items()},
            "timings": [
                {
                    "contender": timing.contender,
                    "isolated": [round(value, 3) for value in timing.isolated],
                    "dependent": [round(value, 3) for value in timing.dependent],
                }
                for timing in self.timings
            ],
        }


def smallest_set(comparisons: Iterable[Comparison], slack: float) -> list[str]:
    """Give a small set of kernels of which one is within `slack` (0.03: 3 %) of the fastest in every comparison.

    Greedy: the kernel that serves most comparisons not served yet, the faster one where two serve as many; then those
    are dropped that the others make superfluous.
    """
    served = {
        (comparison.problem, comparison.mode): {
            name: value
            for name, value in comparison.screened.items()
            if value <= min(comparison.screened.values()) * (1 + slack)
        }
        for comparison in comparisons
        if comparison.screened
    }
    chosen: list[str] = []
    left = dict(served)
    while left:
        scores: dict[str, tuple[int, float]] = {}
        for values in left.values():
            for name, value in values.items():
                count, excess = scores.get(name, (0, 0.0))
                scores[name] = count + 1, excess + value / min(values.values())
        best = max(sorted(scores), key=lambda name: (scores[name][0], -scores[name][1]))
        chosen.append(best)
        left = {key: values for key, values in left.items() if best not in values}
    for name in list(chosen):
        others = set(chosen) - {name}
        if all(others & values.keys() for values in served.values()):
            chosen.remove(name)
    return sorted(chosen)
