"""The results of comparing kernels, and the smallest set of kernels that is near the fastest everywhere."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from w4a16gen.kernels.config import KernelConfig, QuantMode
from w4a16gen.kernels.problem import Problem
from w4a16gen.measure.rivals import CUBLAS, RIVAL_NAMES

FLOOR = "streaming_floor"
"""Name of the contender that only reads the packed weight."""


@dataclass(frozen=True)
class Timing:
    """One contender on one problem: microseconds per launch, one value per timed replay."""

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
    """The measurements of one problem."""

    problem: Problem
    mode: QuantMode
    screened: Mapping[str, float]
    """Microseconds of every screened kernel, by name: the least of a few replays."""
    left_out: int
    """Number of kernels that can run it but were not timed, because their token tiles are far from m."""
    timings: Sequence[Timing]
    """The fastest of them, cuBLAS and the streaming floor, interleaved; fastest first."""
    error_over_bound: Mapping[str, float] = field(default_factory=dict)
    """Largest error against float64 of each finalist and rival, as a share of its bound."""
    chosen: str | None = None
    """The kernel that a call gets if it names none; one of the timings."""
    rivals_left_out: Mapping[str, str] = field(default_factory=dict)
    """Other 4-bit kernels that were requested but not timed, each with the reason."""

    @property
    def kernels(self) -> list[Timing]:
        """The times of this package's kernels, fastest first; empty if no built kernel can run the problem."""
        others = {CUBLAS, FLOOR} | RIVAL_NAMES
        return [timing for timing in self.timings if timing.contender not in others]

    @property
    def best(self) -> Timing:
        """The fastest kernel; there must be one."""
        return self.kernels[0]

    def timing(self, contender: str | None) -> Timing | None:
        """Return a contender's times, or None if it was not timed."""
        return next((timing for timing in self.timings if timing.contender == contender), None)

    @property
    def floor(self) -> Timing | None:
        """The kernel that only reads the packed weight."""
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
        """Return the object that JSON output carries."""
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


def comparison_of(value: Mapping[str, Any]) -> Comparison:
    """Return the comparison of which `as_json` returned an object.

    Raises:
        ValueError, KeyError, TypeError: if the object is anything else.
    """
    timings = [
        Timing(str(row["contender"]), _microseconds(row["isolated"], least=1), _microseconds(row["dependent"]))
        for row in value["timings"]
    ]
    return Comparison(
        Problem(**value["problem"]),
        QuantMode(value["mode"]),
        {str(name): float(microseconds) for name, microseconds in value["screened"].items()},
        int(value["left_out"]),
        timings,
        {str(name): float(error) for name, error in value["error_over_bound"].items()},
        None if value["chosen"] is None else str(value["chosen"]),
        {str(name): str(reason) for name, reason in value["rivals_left_out"].items()},
    )


def _microseconds(values: Iterable[Any], least: int = 0) -> tuple[float, ...]:
    """Return times; an object that was damaged may have others, or none."""
    times = tuple(map(float, values))
    if len(times) < least or not all(0 < time < float("inf") for time in times):
        raise ValueError(f"{times} must be {least} or more positive numbers")
    return times


def smallest_set(comparisons: Iterable[Comparison], slack: float) -> list[str]:
    """Return a small set of kernels with one within `slack` (0.03: 3 %) of the fastest in every comparison.

    Args:
        comparisons: the comparisons; those without screened kernels are ignored.
        slack: allowed excess over the fastest, as a fraction.

    Returns:
        Kernel names, sorted.
    """
    return smallest_cover({(found.problem, found.mode): found.screened for found in comparisons}, slack)


Kernel = TypeVar("Kernel", str, KernelConfig)


def smallest_cover(times: Mapping[Any, Mapping[Kernel, float]], slack: float) -> list[Kernel]:
    """Return a small set of kernels with one within `slack` (0.01: 1 %) of the fastest in every problem.

    Greedy: take the kernel that serves most of the problems not served yet, the faster one of equals. Then drop the
    kernels that the others make superfluous.

    Args:
        times: for each problem the kernels' times; problems without any are ignored.
        slack: allowed excess over the fastest, as a fraction.

    Returns:
        The kernels, sorted.
    """
    served = {
        problem: {
            kernel: value for kernel, value in of_problem.items() if value <= min(of_problem.values()) * (1 + slack)
        }
        for problem, of_problem in times.items()
        if of_problem
    }
    chosen: list[Kernel] = []
    left = dict(served)
    while left:
        scores: dict[Kernel, tuple[int, float]] = {}
        for values in left.values():
            for kernel, value in values.items():
                count, excess = scores.get(kernel, (0, 0.0))
                scores[kernel] = count + 1, excess + value / min(values.values())
        best = max(sorted(scores), key=lambda kernel: (scores[kernel][0], -scores[kernel][1]))
        chosen.append(best)
        left = {problem: values for problem, values in left.items() if best not in values}
    for kernel in list(chosen):
        others = set(chosen) - {kernel}
        if all(others & values.keys() for values in served.values()):
            chosen.remove(kernel)
    return sorted(chosen)


def errors_beyond_bounds(comparisons: Iterable[Comparison]) -> dict[str, float]:
    """Return the kernels and rivals whose error exceeds its bound on some problem, with that error over the bound."""
    return {name: error for found in comparisons for name, error in found.error_over_bound.items() if not error <= 1}
