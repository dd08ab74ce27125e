"""Times of the kernels near the fastest, precise enough to tell 1 %: in turns, after the brief look at all."""

from __future__ import annotations

import hashlib
import random
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from w4a16gen.choose.cost_model import default_cost_model
from w4a16gen.choose.timing_table import Measured
from w4a16gen.kernels.config import KernelConfig, QuantMode
from w4a16gen.kernels.problem import Problem
from w4a16gen.measure.turns import take_turns
from w4a16gen.measure.workload import Workload
from w4a16gen.runtime.library import Library

WITHIN = 1.05
"""Kernels are timed again if their time is within this factor of the shortest."""
MOST = 8
"""Kernels that are timed again, at most."""
ROUNDS = 9
REFINED = "refined.txt"
"""File in the build's folder that names the problems whose kernels were timed in turns."""
_DIGITS = 16


def nearest(times: Mapping[KernelConfig, float]) -> list[KernelConfig]:
    """Return the kernels that may be the fastest, the fastest first."""
    ranked = sorted(times, key=lambda config: (times[config], config))
    return [config for config in ranked[:MOST] if times[config] <= WITHIN * times[ranked[0]]]


def refine(
    library: Library,
    problem: Problem,
    mode: QuantMode,
    configs: Sequence[KernelConfig],
    *,
    device: int,
    dependent: bool = False,
    seed: int = 0,
) -> dict[KernelConfig, float]:
    """Time kernels on one problem in turns, with a cold L2.

    Args:
        library: the loaded build.
        problem: the problem.
        mode: the quantisation mode.
        configs: the kernels, one or more.
        device: the GPU.
        dependent: whether launches are dependent ones.
        seed: of the random data.

    Returns:
        The median microseconds of each kernel.
    """
    stage = Workload(library, device, problem, mode, seed)
    contenders = {config.name: stage.record(config, dependent=dependent) for config in configs}
    order = random.Random(f"{problem}")  # noqa: S311  (nothing secret)
    is_long = default_cost_model().is_long(problem)
    take_turns(contenders, frozenset(contenders), configs[0].name, ROUNDS, order, is_long=is_long)
    return {config: statistics.median(contenders[config.name].microseconds) for config in configs}


class Refined:
    """The problems whose kernels were timed in turns, in a file of one line each: a later run does not do it again.

    A line stands for kernels and the times that resulted. It no longer counts if the tuning table has other times, for
    example because the user removed it.
    """

    def __init__(self, path: Path) -> None:
        """Read the file, if there is one. What is damaged in it does not count."""
        self._path = path
        self._lines = set(path.read_text(errors="replace").splitlines()) if path.exists() else set()

    def has(self, mode: QuantMode, problem: Problem, measured: Mapping[KernelConfig, Measured]) -> bool:
        """Return whether kernels of this content were timed in turns on a problem, and have the times of then."""
        return self._line(mode, problem, measured) in self._lines

    def add(self, mode: QuantMode, problem: Problem, measured: Mapping[KernelConfig, Measured]) -> None:
        """Note that these kernels were timed on a problem."""
        line = self._line(mode, problem, measured)
        self._lines.add(line)
        with self._path.open("a") as file:
            file.write(f"{line}\n")

    @staticmethod
    def _line(mode: QuantMode, problem: Problem, measured: Mapping[KernelConfig, Measured]) -> str:
        content = "".join(
            f"{config.name} {measured[config].content_hash} {measured[config].microseconds!r}\n"
            for config in sorted(measured)
        )
        return f"{mode} {problem} {hashlib.sha256(content.encode()).hexdigest()[:_DIGITS]}"
