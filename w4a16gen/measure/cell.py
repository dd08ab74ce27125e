"""One cell of a random draw: the kernel of a call, the fastest built one, cuBLAS and rivals, timed in turns."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from w4a16gen.choose.chooser import Chooser
from w4a16gen.choose.cost_model import default_cost_model
from w4a16gen.choose.timing_table import TABLE
from w4a16gen.kernels.config import KernelConfig, Target
from w4a16gen.kernels.device import Device
from w4a16gen.kernels.problem import Problem, runnable
from w4a16gen.kernels.spaces import enumerate_space
from w4a16gen.measure.compare import attempt, screen, tiles_suit
from w4a16gen.measure.results import Comparison, Timing
from w4a16gen.measure.rivals import CUBLAS, Rival
from w4a16gen.measure.stage import Stage
from w4a16gen.measure.timing import Contender
from w4a16gen.measure.turns import take_turns
from w4a16gen.runtime.library import Library

NEAR_ESTIMATE = 1.3
"""Kernels whose estimate is within this factor of the best one are timed. Estimates are off by 13 % root mean square,
so that the fastest kernel is rarely estimated 30 % slower than another."""
MOST_NEAR = 40
"""Kernels near the best estimate that are timed, at most: a build of the whole space has hundreds."""
SURPRISES = 3
"""Kernels beside these that are drawn at random and timed, to see where the estimate is wrong."""


@dataclass(frozen=True)
class CellOptions:
    """How a cell is timed."""

    finalists: int = 2
    """Kernels timed in turns beside the one that a call gets."""
    rounds: int = 9
    """Timed replays of each contender; a long problem gets a block for every five of them."""
    rivals: Sequence[Rival] = ()
    space: str | None = None
    """The call's kernel is chosen among those of a space, as in a build of that space; None takes the whole build."""


@dataclass(frozen=True)
class Attempts:
    """What is known of rivals from earlier tries, and who is told before each new one."""

    excluded: Mapping[str, str] = field(default_factory=dict)
    """Rivals that are not tried again, each with the reason."""
    begin: Callable[[str], None] = lambda _name: None
    """Called with the name of each rival, and of cuBLAS, before its first launch."""


def time_cell(
    stage: Stage,
    torch: Any,
    library: Library,
    gpu: Device,
    options: CellOptions,
    attempts: Attempts | None = None,
) -> Comparison:
    """Time one cell with a cold L2.

    Args:
        stage: the problem's data, on the GPU.
        torch: the module.
        library: the loaded build.
        gpu: the GPU, for which kernels are estimated.
        options: how to time.
        attempts: what is known of rivals.

    Returns:
        The comparison. It has no timings if no built kernel can run the problem.
    """
    attempts = attempts or Attempts()
    problem, mode = stage.problem, stage.mode
    able = [config for config in runnable(library.configs(), mode, problem) if config.target is Target.NATIVE]
    if not able:
        return Comparison(problem, mode, {}, 0, [])
    chosen = _chooser(library, options.space).choose(problem, mode, device=gpu, target=Target.NATIVE).kernel
    order = random.Random(f"{problem}")  # noqa: S311  (nothing secret)
    candidates = promising(library.chooser.estimates(problem, mode, gpu), problem, chosen, order)
    screened = {config.name: microseconds for config, microseconds in screen(stage, candidates)}
    ranked = sorted(candidates, key=lambda config: (screened[config.name], config))
    finals = list(dict.fromkeys([*ranked[: options.finalists], chosen]))
    errors = {config.name: stage.check(config) for config in finals}
    contenders = {config.name: stage.record(config, dependent=False) for config in finals}
    left_out = _add_rivals(stage, torch, options.rivals, attempts, contenders, errors)
    own = frozenset(config.name for config in finals)
    is_long = default_cost_model().is_long(problem)
    left_out |= take_turns(contenders, own, chosen.name, options.rounds, order, is_long=is_long)
    timings = [Timing(name, contender.microseconds) for name, contender in contenders.items()]
    timings.sort(key=lambda timing: timing.median)
    return Comparison(
        problem, mode, screened, len(able) - len(candidates), timings, errors, chosen.name, dict(left_out)
    )


def _chooser(library: Library, space: str | None) -> Chooser:
    """Return what chooses the call's kernel."""
    if space is None:
        return library.chooser
    of_space = set(enumerate_space(space))
    hashes = {config: found for config, found in library.build.content_hashes.items() if config in of_space}
    return Chooser(hashes, library.build.folder / TABLE)


def promising(
    estimates: Sequence[tuple[KernelConfig, float]], problem: Problem, chosen: KernelConfig, source: random.Random
) -> list[KernelConfig]:
    """Return the kernels to time: those near the best estimate, a few others at random, and the one of a call.

    Args:
        estimates: kernels with their estimated microseconds.
        problem: the problem; kernels whose token tiles are far from m are left out.
        chosen: the kernel of a call.
        source: of the random choice.
    """
    suitable = [(config, microseconds) for config, microseconds in estimates if tiles_suit(config, problem)]
    limit = NEAR_ESTIMATE * min((microseconds for _, microseconds in suitable), default=0.0)
    ranked = sorted(suitable, key=lambda pair: (pair[1], pair[0]))
    near = [config for config, microseconds in ranked if microseconds <= limit][:MOST_NEAR]
    others = [config for config, _ in ranked[len(near) :]]
    surprises = source.sample(others, min(SURPRISES, len(others)))
    return list(dict.fromkeys([chosen, *near, *surprises]))


def _add_rivals(
    stage: Stage,
    torch: Any,
    rivals: Sequence[Rival],
    attempts: Attempts,
    contenders: dict[str, Contender],
    errors: dict[str, float],
) -> dict[str, str]:
    """Record cuBLAS and the rivals whose results are right; return why others are left out."""

    def cublas() -> tuple[Contender, float]:
        return stage.record_cublas(torch), 0.0

    left_out: dict[str, str] = {}
    records = {rival.name: (partial(stage.record_rival, torch, rival), rival.package) for rival in rivals}
    for name, (record, package) in ({CUBLAS: (cublas, "torch")} | records).items():
        if name in attempts.excluded:
            left_out[name] = attempts.excluded[name]
            continue
        attempts.begin(name)
        recorded = attempt(record, package)
        if isinstance(recorded, str):
            left_out[name] = recorded
            continue
        contenders[name], error = recorded
        if name != CUBLAS:
            errors[name] = error
    return left_out
