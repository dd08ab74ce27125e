"""Timing many kernels on one problem, side by side: what `w4a16gen bench` reports."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from w4a16gen.choose.cost_model import default_cost_model
from w4a16gen.kernels.config import KernelConfig, QuantMode, Target
from w4a16gen.kernels.legality import CTA_TOKENS
from w4a16gen.kernels.problem import Problem, runnable
from w4a16gen.measure.results import FLOOR, Comparison, Timing
from w4a16gen.measure.rivals import CUBLAS, Rival, find_torch
from w4a16gen.measure.timing import SCREENING_REPLAYS, WARM_UP_SECONDS, Contender, settled
from w4a16gen.measure.workload import Stage
from w4a16gen.runtime.library import Library

SCREENING_BLOCK_SECONDS = 0.06
"""On a long problem; half of it to settle. The GPU has no rest between them."""
LOOKS = 3
"""How often a kernel that may be among the fastest is timed on a long problem, after the others each time: blocks this
short are 20 % too long, and rarely 50 %, where they meet the GPU's slow moment of a second
(`contender.BLOCK_SECONDS`)."""
LOOK_AGAIN_WITHIN = 1.6
"""Times the least: kernels that took no longer may be among the fastest."""
ROUNDS_PER_BLOCK = 3
"""On long problems, where a block takes a second, a timed replay of a short one some milliseconds."""

Progress = Callable[[int, int, str], None]


def _time_briefly(stage: Stage, config: KernelConfig, *, dependent: bool) -> float:
    """Time one kernel, in microseconds: the least of a few replays, or a block of them for a long problem."""
    contender = stage.record(config, dependent=dependent, brief=True)
    contender.replay()
    if default_cost_model().is_long(stage.problem):
        half = SCREENING_BLOCK_SECONDS / 2
        return settled(contender.timed_replay, half, half) * 1000 / contender.launches
    return min(contender.timed_replay() * 1000 / contender.launches for _ in range(SCREENING_REPLAYS))


def screen(
    stage: Stage, configs: Sequence[KernelConfig], *, dependent: bool = False
) -> Iterator[tuple[KernelConfig, float]]:
    """Time kernels briefly, one after the other; give microseconds at once, and again where another look took less."""
    long = default_cost_model().is_long(stage.problem)
    if configs and long:
        warm_up = stage.record(configs[-1], dependent=dependent, brief=True)
        settled(warm_up.timed_replay, WARM_UP_SECONDS, 0)
    least: dict[KernelConfig, float] = {}
    for config in configs:
        least[config] = _time_briefly(stage, config, dependent=dependent)
        yield config, least[config]
    order = list(configs)
    for _ in range(LOOKS - 1 if long else 0):
        order.reverse()  # so that other kernels come before
        limit = LOOK_AGAIN_WITHIN * min(least.values(), default=0.0)
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
    """Time kernels on one problem with cold L2 on a GPU, as `screen` does: the last time of a kernel counts."""
    yield from screen(Stage(library, device, problem, mode, seed), configs, dependent=dependent)


def tiles_suit(config: KernelConfig, problem: Problem) -> bool:
    """Whether a kernel's token tile is near m: at most its next power of two, and not below a quarter of it or of 256.

    Smaller tiles dequantise every weight more than four times as often, larger ones multiply by padding.
    """
    tokens = config.cta.tokens
    return tokens < 2 * max(problem.m, CTA_TOKENS[0]) and 4 * tokens >= min(problem.m, CTA_TOKENS[-1])


def record_others(
    stage: Stage,
    rivals: Sequence[Rival],
    contenders: dict[tuple[str, bool], Contender],
    errors: dict[str, float],
) -> dict[str, str]:
    """Add cuBLAS, where torch is installed, and those rivals whose results are right; say why others are left out."""
    torch = find_torch()
    if torch is None:
        return {rival.name: "torch is not installed" for rival in rivals}
    contenders[CUBLAS, False] = stage.record_cublas(torch)
    left_out: dict[str, str] = {}
    for rival in rivals:
        try:
            contender, error = stage.record_rival(torch, rival)
        except ImportError as missing:
            left_out[rival.name] = f"{missing}: pip install {rival.package}"
        except Exception as failure:  # noqa: BLE001  (whatever someone else's library raises)
            left_out[rival.name] = " ".join(f"{type(failure).__name__}: {failure}".split())
        else:
            if error <= 1:
                contenders[rival.name, False], errors[rival.name] = contender, error
            else:
                left_out[rival.name] = f"its result is off by {error:.3g} times what rounding explains"
    return left_out


def _take_turns(
    contenders: Mapping[tuple[str, bool], Contender],
    rounds: int,
    order: random.Random,
    progress: Progress,
    *,
    short: bool,
) -> None:
    """Time contenders in turn, in a new order each round."""
    names = list(contenders)
    for turn in range(rounds):
        order.shuffle(names)
        for place, name in enumerate(names, 1):
            if short:
                contenders[name].time()
            else:
                contenders[name].time_block()
            progress(turn * len(names) + place, rounds * len(names), f"in turn: {name[0]}")


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
    progress: Progress = lambda _done, _total, _name: None,
) -> Comparison:
    """Time kernels on one problem with cold L2: all of them briefly, then the fastest against each other and cuBLAS.

    The kernel that a call gets which names none is one of the finalists.

    Graphs of 20 launches and more take copies of the weight in turn, more than 200 MB of them. The finalists take
    turns, in a new order each round: on short problems with single replays and a rest before each, on long ones, of
    130 us and more, with blocks of a second without rest, as in prefill. What only reads draws less power, so on these
    the streaming floor is timed before them, as on short ones.

    Args:
        library: the loaded build.
        problem: the problem.
        mode: the quantisation mode.
        configs: the kernels; None takes all that the build holds. Those that cannot run the problem, or whose tiles do
            not suit it, are left out.
        finalists: how many kernels are timed against each other.
        rounds: timed replays of each; of a long problem a third as many blocks, rounded up.
        seed: of the random data, and of the order.
        rivals: other 4-bit kernels to time with the finalists, where they are installed and can run the problem.
        progress: told after each screened kernel, and then after each turn.

    Raises:
        NoHopperGpuError: if there is no Hopper GPU.
    """
    device = library.hopper_device().index
    stage = Stage(library, device, problem, mode, seed)
    able = runnable(library.configs() if configs is None else configs, mode, problem)
    candidates = [config for config in able if tiles_suit(config, problem)]
    screened: dict[str, float] = {}
    for config, microseconds in screen(stage, candidates):
        screened[config.name] = microseconds
        progress(len(screened), len(candidates), config.name)
    fastest = sorted(candidates, key=lambda config: (screened[config.name], config))[:finalists]
    chosen = library.choose(problem, mode).kernel if candidates else None
    if chosen in candidates and chosen not in fastest:
        fastest.append(chosen)
    errors = {config.name: stage.check(config) for config in fastest}
    short = not default_cost_model().is_long(problem)
    contenders = {(config.name, False): stage.record(config, dependent=False) for config in fastest}
    if short:
        contenders |= {(config.name, True): stage.record(config, dependent=True) for config in fastest}
    left_out = record_others(stage, rivals, contenders, errors)
    floors = {}
    if any(config.target is Target.NATIVE for config in fastest):
        floors = {(FLOOR, dependent): stage.record_floor(dependent=dependent) for dependent in (False, True)}
    order = random.Random(f"{problem} {seed}")  # noqa: S311  (nothing secret)
    if short:
        _take_turns(contenders | floors, rounds, order, progress, short=True)
    else:
        _take_turns(floors, rounds, order, progress, short=True)
        _take_turns(contenders, -(-rounds // ROUNDS_PER_BLOCK), order, progress, short=False)
    contenders |= floors
    timings = [
        Timing(name, contender.microseconds, contenders[name, True].microseconds if (name, True) in contenders else ())
        for (name, dependent), contender in contenders.items()
        if not dependent
    ]
    timings.sort(key=lambda timing: timing.median)
    name = chosen.name if chosen in fastest else None
    return Comparison(problem, mode, screened, len(able) - len(candidates), timings, errors, name, left_out)
