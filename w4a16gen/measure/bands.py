"""What random cells say together, by bands of token counts: the lead over rivals, and the loss of the choice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import geometric_mean
from typing import Any

from w4a16gen.measure.results import Comparison, Timing
from w4a16gen.measure.rivals import BF16_NAMES, CUBLAS, RIVAL_NAMES

BANDS = ((1, 64), (65, 256), (257, 8192))
"""First and last token counts."""
CLEARLY = 1.05
"""A cell is lost clearly if a rival is faster by more than this factor."""


@dataclass(frozen=True)
class Standing:
    """A kernel beside another one over several cells. Ratios are the other's time over the kernel's: 1 is level."""

    cells: int
    mean: float
    """Geometric mean."""
    worst: float
    worst_cell: str
    lost: int
    """Cells in which the other is faster."""
    lost_clearly: int
    """Cells in which it is faster by more than 5 %."""

    def as_json(self) -> dict[str, Any]:
        """Return the object that JSON output carries."""
        return vars(self) | {"mean": round(self.mean, 4), "worst": round(self.worst, 4)}


@dataclass(frozen=True)
class Band:
    """The cells of a band of token counts."""

    first: int
    last: int
    cells: int
    call: Standing | None
    """The call beside the fastest rival that multiplies in fp16, cuBLAS included; None if none was timed."""
    best: Standing | None
    """The fastest built kernel beside the same."""
    choice: Standing | None
    """The call beside the fastest built kernel: a mean of 0.98 is a loss of 2 %."""
    rivals: dict[str, Standing]
    """The call beside each rival, those of bf16 too."""

    @property
    def tokens(self) -> str:
        """The band in words."""
        return f"{self.first} to {self.last}"

    def as_json(self) -> dict[str, Any]:
        """Return the object that JSON output carries."""

        def shown(standing: Standing | None) -> dict[str, Any] | None:
            return None if standing is None else standing.as_json()

        return {
            "tokens": [self.first, self.last],
            "cells": self.cells,
            "call_beside_fastest_fp16_rival": shown(self.call),
            "best_built_beside_fastest_fp16_rival": shown(self.best),
            "call_beside_best_built": shown(self.choice),
            "call_beside_rivals": {name: standing.as_json() for name, standing in self.rivals.items()},
        }


def bands_of(comparisons: Sequence[Comparison]) -> list[Band]:
    """Return the bands, without empty ones, and then a band of all cells if there are several.

    Args:
        comparisons: the cells; those that no built kernel can run are ignored.
    """
    timed = [found for found in comparisons if found.kernels and found.timing(found.chosen)]
    limits = [(first, last) for first, last in BANDS if any(first <= found.problem.m <= last for found in timed)]
    if len(limits) > 1:
        limits.append((BANDS[0][0], BANDS[-1][1]))
    return [_band(first, last, timed) for first, last in limits]


def _band(first: int, last: int, timed: Iterable[Comparison]) -> Band:
    cells = [found for found in timed if first <= found.problem.m <= last]
    names = [CUBLAS, *sorted(RIVAL_NAMES - BF16_NAMES), *sorted(BF16_NAMES)]
    beside = {name: _standing(cells, _call, partial(Comparison.timing, contender=name)) for name in names}
    return Band(
        first,
        last,
        len(cells),
        _standing(cells, _call, fastest_fp16_rival),
        _standing(cells, lambda found: found.best, fastest_fp16_rival),
        _standing(cells, _call, lambda found: found.best),
        {name: standing for name, standing in beside.items() if standing is not None},
    )


def fastest_fp16_rival(found: Comparison) -> Timing | None:
    """Return the fastest contender that multiplies in fp16 and is not this package's, or None."""
    names = {CUBLAS} | RIVAL_NAMES - BF16_NAMES
    return next((timing for timing in found.timings if timing.contender in names), None)


def _call(found: Comparison) -> Timing | None:
    return found.timing(found.chosen)


def _standing(
    cells: Iterable[Comparison],
    ours: Callable[[Comparison], Timing | None],
    theirs: Callable[[Comparison], Timing | None],
) -> Standing | None:
    ratios = {
        str(found.problem): other.median / own.median
        for found in cells
        if (own := ours(found)) is not None and (other := theirs(found)) is not None
    }
    if not ratios:
        return None
    worst = min(ratios, key=lambda cell: ratios[cell])
    return Standing(
        cells=len(ratios),
        mean=geometric_mean(ratios.values()),
        worst=ratios[worst],
        worst_cell=worst.partition(",")[0],
        lost=sum(ratio < 1 for ratio in ratios.values()),
        lost_clearly=sum(ratio < 1 / CLEARLY for ratio in ratios.values()),
    )
