"""Comparing kernels on one problem: all briefly, then the fastest in turns beside cuBLAS, rivals and the floor."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from w4a16gen.choose.cost_model import default_cost_model
from w4a16gen.kernels.config import Epilogue, KernelConfig, QuantMode, Target
from w4a16gen.kernels.legality import CTA_TOKENS
from w4a16gen.kernels.problem import Problem, runnable
from w4a16gen.measure.results import FLOOR, Comparison, Timing
from w4a16gen.measure.rivals import CUBLAS, Rival, find_torch
from w4a16gen.measure.stage import Stage
from w4a16gen.measure.timing import SCREENING_REPLAYS, WARM_UP_SECONDS, Contender, settled
from w4a16gen.measure.workload import Workload
from w4a16gen.progress import Progress, no_progress
from w4a16gen.runtime.library import Library

SCREENING_BLOCK_SECONDS = 0.06
"""Length of a screening block on a long problem: half of it to settle, half of it timed."""
SCREENING_PASSES = 3
"""Passes over the kernels that may be fastest on a long problem. A block this short reads 20 % too long, rarely 50 %,
if the clock dips in it (see `timing.BLOCK_SECONDS`)."""
SECOND_LOOK_WITHIN = 1.6
"""A kernel is screened again if its time is within this factor of the shortest."""
ROUNDS_PER_BLOCK = 3
"""A long problem gets one block for this many rounds: a block takes a second, a replay of a short problem some ms."""


class Entrant(NamedTuple):
    """A contender's name, and whether its launches are dependent."""

    name: str
    dependent: bool = False


def _time_briefly(stage: Stage, config: KernelConfig, *, dependent: bool) -> float:
    """Return microseconds per launch: the least of a few replays, or the median of a short block for a long problem."""
    contender = stage.record(config, dependent=dependent, brief=True)
    contender.replay()
    if default_cost_model().is_long(stage.problem):
        half = SCREENING_BLOCK_SECONDS / 2
        return settled(contender.timed_replay, half, half) * 1000 / contender.launches
    return min(contender.timed_replay() * 1000 / contender.launches for _ in range(SCREENING_REPLAYS))


def screen(
    stage: Stage, configs: Sequence[KernelConfig], *, dependent: bool = False
) -> Iterator[tuple[KernelConfig, float]]:
    """Time kernels briefly, one after the other.

    Yields:
        Each kernel with its microseconds, at once; and again if a later pass over a long problem took less.
    """
    long = default_cost_model().is_long(stage.problem)
    if configs and long:
        warm_up = stage.record(configs[-1], dependent=dependent, brief=True)
        settled(warm_up.timed_replay, WARM_UP_SECONDS, 0)
    least: dict[KernelConfig, float] = {}
    for config in configs:
        least[config] = _time_briefly(stage, config, dependent=dependent)
        yield config, least[config]
    order = list(configs)
    for _ in range(SCREENING_PASSES - 1 if long else 0):
        order.reverse()  # so that each kernel runs after another one
        limit = SECOND_LOOK_WITHIN * min(least.values(), default=0.0)
        for config in [config for config in order if least[config] <= limit]:
            microseconds = _time_briefly(stage, config, dependent=dependent)
            if microseconds < least[config]:
                least[config] = microseconds
                yield config, microseconds


def measure(
    library: Library,
    problem: Problem,
    mode: QuantMode,
    configs: Sequence[KernelConfig],
    *,
    device: int,
    dependent: bool = False,
    seed: int = 0,
) -> Iterator[tuple[KernelConfig, float]]:
    """Time kernels on one problem with a cold L2, as `screen` does; a kernel's last time counts."""
    yield from screen(Workload(library, device, problem, mode, seed), configs, dependent=dependent)


def tiles_suit(config: KernelConfig, problem: Problem) -> bool:
    """Whether a kernel's token tile is near m: at most its next power of two, and at least a quarter of min(m, 256).

    A smaller tile dequantises every weight more than four times as often; a larger one multiplies padding.
    """
    tokens = config.cta.tokens
    return tokens < 2 * max(problem.m, CTA_TOKENS[0]) and 4 * tokens >= min(problem.m, CTA_TOKENS[-1])


def with_one_of(configs: Iterable[KernelConfig], epilogues: Sequence[Epilogue]) -> list[KernelConfig]:
    """Return the kernels with one of some epilogues, in the order given."""
    return [config for config in configs if config.epilogue in epilogues]


def compare(
    library: Library,
    problem: Problem,
    mode: QuantMode,
    *,
    configs: Iterable[KernelConfig] | None = None,
    finalists: int = 4,
    rounds: int = 9,
    seed: int = 0,
    rivals: Sequence[Rival] = (),
    progress: Progress = no_progress,
) -> Comparison:
    """Time kernels on one problem with a cold L2: all of them briefly, then the fastest in turns with cuBLAS.

    The kernel that a call gets if it names none is always a finalist, and so is the fastest of each target with each
    epilogue.

    A graph holds 20 launches or more, which take copies of the weight in turn, over 200 MB. Finalists take turns in a
    new order each round. A short problem is timed by single replays after a rest. A long one (130 us and more) runs in
    blocks of a second without rest, as in prefill; the streaming floor draws less power and is timed before them.

    Args:
        library: the loaded build.
        problem: the problem.
        mode: the quantisation mode.
        configs: the kernels; None takes all built ones without an epilogue. Gated kernels compute SwiGLU, elementwise
            ones add a residual. Kernels that cannot run the problem, or whose token tiles do not suit it, are left out.
        finalists: how many kernels are timed in turns.
        rounds: timed replays of each; for a long problem a third as many blocks, rounded up.
        seed: of the random data and of the order.
        rivals: other 4-bit kernels to time with the finalists, where they are installed and can run the problem.
        progress: called after each screened kernel, and then after each turn.

    Raises:
        NoHopperGpuError: if there is no Hopper GPU.
    """
    workload = Workload(library, library.hopper_device().index, problem, mode, seed)
    given = with_one_of(library.configs(), [Epilogue.NONE]) if configs is None else list(configs)
    epilogues = sorted({config.epilogue for config in given})
    able = [config for epilogue in epilogues for config in runnable(given, mode, problem, epilogue)]
    candidates = [config for config in able if tiles_suit(config, problem)]
    screened: dict[str, float] = {}
    for config, microseconds in screen(workload, candidates):
        screened[config.name] = microseconds
        progress(len(screened), len(candidates), config.short_name)
    chosen = library.choose(problem, mode, epilogue=able[0].epilogue).kernel if able else None
    chosen = chosen if chosen in able else None
    finals = _finalists(candidates, screened, finalists, chosen)
    errors = {config.name: workload.check(config) for config in finals}
    contenders, floors = _record(workload, finals)
    left_out = record_others(workload, rivals, contenders, errors)
    order = random.Random(f"{problem} {seed}")  # noqa: S311  (nothing secret)
    if default_cost_model().is_long(problem):
        _take_turns(floors, rounds, order, progress, blocks=False)
        _take_turns(contenders, -(-rounds // ROUNDS_PER_BLOCK), order, progress, blocks=True)
    else:
        _take_turns(contenders | floors, rounds, order, progress, blocks=False)
    timings = _timings(contenders | floors)
    name = None if chosen is None else chosen.name
    return Comparison(problem, mode, screened, len(able) - len(candidates), timings, errors, name, left_out)


def _finalists(
    candidates: Sequence[KernelConfig], screened: Mapping[str, float], count: int, chosen: KernelConfig | None
) -> list[KernelConfig]:
    """Return the fastest kernels by screening, the fastest of each target and epilogue, and the chosen one."""
    ranked = sorted(candidates, key=lambda config: (screened[config.name], config))
    of_kinds = {(config.target, config.epilogue): config for config in reversed(ranked)}
    wanted = [*ranked[:count], *of_kinds.values(), *([] if chosen is None else [chosen])]
    return list(dict.fromkeys(wanted))


def _record(
    workload: Workload, finals: Sequence[KernelConfig]
) -> tuple[dict[Entrant, Contender], dict[Entrant, Contender]]:
    """Record finalists and streaming floor: dependent too on a short problem, the floor only with native kernels."""
    kinds = (False,) if default_cost_model().is_long(workload.problem) else (False, True)
    contenders = {
        Entrant(config.name, dependent): workload.record(config, dependent=dependent)
        for dependent in kinds
        for config in finals
    }
    if not any(config.target is Target.NATIVE for config in finals):
        return contenders, {}
    return contenders, {
        Entrant(FLOOR, dependent): workload.record_floor(dependent=dependent) for dependent in (False, True)
    }


def record_others(
    stage: Stage,
    rivals: Sequence[Rival],
    contenders: dict[Entrant, Contender],
    errors: dict[str, float],
) -> dict[str, str]:
    """Add cuBLAS, if torch is installed, and the rivals whose results are right; return why others are left out."""
    torch = find_torch()
    if torch is None:
        return {rival.name: "torch is not installed" for rival in rivals}
    contenders[Entrant(CUBLAS)] = stage.record_cublas(torch)
    left_out: dict[str, str] = {}
    for rival in rivals:
        recorded = attempt(partial(stage.record_rival, torch, rival), rival.package)
        if isinstance(recorded, str):
            left_out[rival.name] = recorded
        else:
            contenders[Entrant(rival.name)], errors[rival.name] = recorded
    return left_out


def attempt(record: Callable[[], tuple[Contender, float]], package: str) -> tuple[Contender, float] | str:
    """Record a rival, or return why it is left out: another library may raise anything.

    Args:
        record: returns the contender and its error as a share of the allowed one.
        package: the package to install if a module is missing.
    """
    try:
        contender, error = record()
    except ImportError as missing:
        return f"{missing}: pip install {package}"
    except Exception as failure:  # noqa: BLE001
        return " ".join(f"{type(failure).__name__}: {failure}".split())
    return (contender, error) if error <= 1 else f"its error is {error:.3g} times what rounding explains"


def _take_turns(
    contenders: Mapping[Entrant, Contender],
    rounds: int,
    order: random.Random,
    progress: Progress,
    *,
    blocks: bool,
) -> None:
    """Time contenders in turn, in a new order each round: by blocks, or by single replays."""
    entrants = list(contenders)
    for turn in range(rounds):
        order.shuffle(entrants)
        for place, entrant in enumerate(entrants, 1):
            if blocks:
                contenders[entrant].time_block()
            else:
                contenders[entrant].time()
            progress(turn * len(entrants) + place, rounds * len(entrants), f"in turn: {entrant.name}")


def _timings(contenders: Mapping[Entrant, Contender]) -> list[Timing]:
    """Return each contender's times, ordinary and dependent launches together, fastest first."""
    timings = []
    for entrant, contender in contenders.items():
        if not entrant.dependent:
            dependent = contenders.get(Entrant(entrant.name, dependent=True))
            timings.append(Timing(entrant.name, contender.microseconds, dependent.microseconds if dependent else ()))
    return sorted(timings, key=lambda timing: timing.median)
