"""Which kernels of a space are worth building for some problems, by their estimates."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from w4a16gen.kernels.config import KernelConfig
from w4a16gen.kernels.problem import Problem
from w4a16gen.measure.compare import tiles_suit

NEAR_ESTIMATE = 1.2
"""Kernels whose estimate is within this factor of the best one are promising."""
MOST_FOR_PROBLEM = 24
"""Kernels built for one problem, at most: many of a space share an estimate with few tokens, and take the same time."""


def promising(estimates: Iterable[tuple[KernelConfig, float]], problem: Problem) -> list[KernelConfig]:
    """Return the kernels worth measuring on a problem, the best estimate first.

    Args:
        estimates: kernels with their estimated microseconds.
        problem: the problem; kernels whose token tiles are far from m are left out.
    """
    suitable = [(microseconds, config) for config, microseconds in estimates if tiles_suit(config, problem)]
    limit = NEAR_ESTIMATE * min(suitable)[0] if suitable else 0.0
    return [config for microseconds, config in sorted(suitable) if microseconds <= limit][:MOST_FOR_PROBLEM]


def to_build(
    wanted: Mapping[Any, Sequence[KernelConfig]], most: int | None = None, compiled: Collection[KernelConfig] = ()
) -> list[KernelConfig]:
    """Return the kernels to build for several problems: the best of each first, then the second, and so on.

    Args:
        wanted: for each problem its kernels, the best first.
        most: kernels at most that are still to be compiled, but the best of each problem is always among them; None
            takes all.
        compiled: kernels that cost no time, so that a later run builds more than the one before.
    """
    by_rank = itertools.zip_longest(*wanted.values())
    ranks = [[config for config in rank if config is not None] for rank in by_rank]
    every = list(dict.fromkeys(itertools.chain.from_iterable(ranks)))
    if most is None:
        return every
    new = [config for config in every if config not in compiled]
    least = sum(config not in compiled for config in set(ranks[0])) if ranks else 0
    left_out = set(new[max(most, least) :])
    return [config for config in every if config not in left_out]
