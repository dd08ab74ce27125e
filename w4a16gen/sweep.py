"""Timing many kernels on one problem, side by side: what `w4a16gen bench` reports."""

from __future__ import annotations

import importlib
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from w4a16gen.bench import COLD_BYTES, hopper_gpu
from w4a16gen.config import KernelConfig, QuantMode, Target
from w4a16gen.dispatch import LONG_FLOPS, runnable
from w4a16gen.legality import CTA_TOKENS
from w4a16gen.module import Library
from w4a16gen.packing import PackedWeight, pack_weight
from w4a16gen.problem import Problem
from w4a16gen.quantize import QuantizedWeight
from w4a16gen.verify.bounds import Expectation
from w4a16gen.verify.numeric import random_weight

LAUNCHES = 20
"""Launches per graph, at least; enough that the graph's own start does not show."""
LONG_LAUNCHES = 6
"""The same for problems of more than `LONG_FLOPS`, 130 us and more."""
SCREENING_REPLAYS = 2
BLOCK_SECONDS = 0.15
SCREENING_BLOCK_SECONDS = 0.06
"""How long a contender runs by itself on a long problem before the next one's turn; its second half counts. An H100 at
its power limit takes some 50 ms to settle on a clock. Where contenders took turns replay by replay, all ran at the
clock that their mean power left them: weights of nothing but zeros took as long as any, though by themselves they are
20 % faster, and of two kernels the one that needs more power gained 2 to 7 % on the other (H100 80GB HBM3, 2026-11)."""
BLOCK_REPLAYS = 4
WARM_UP_SECONDS = 0.4
"""What comes before them: a GPU that has rested starts cold, and above the clock that it can keep."""
PAUSE_SECONDS = 0.01
"""Rest before each timed replay of a short problem. Without rest an H100 lowers its clock to stay in its power limit:
problems of 64 tokens and more then take up to 15 % longer (H100 80GB HBM3, 2026-11)."""
CUBLAS = "cublas_fp16"
"""Name of the dense contender: torch.matmul on the dequantised weight."""
FLOOR = "streaming_floor"
"""Name of the contender that only reads the packed weight."""
CHECKED_ROWS = 8
CHECKED_CHANNELS = 64
"""Rows and channels of the result of each finalist that are compared with float64 before it is timed."""
BURST_ROUNDS = 150
"""Of the probe of the tensor cores: 0.1 ms, in which power does not limit."""

Progress = Callable[[int, int, str], None]


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
    """Of each finalist: the largest error of what was compared with float64, as a share of its bound."""

    @property
    def best(self) -> Timing:
        """The fastest kernel."""
        return next(timing for timing in self.timings if timing.contender not in {CUBLAS, FLOOR})

    @property
    def floor(self) -> Timing | None:
        """Reading the packed weight and nothing else."""
        return next((timing for timing in self.timings if timing.contender == FLOOR), None)

    @property
    def cublas(self) -> Timing | None:
        """The dense product, where torch is installed."""
        return next((timing for timing in self.timings if timing.contender == CUBLAS), None)

    def as_json(self) -> dict[str, Any]:
        """Give the object that `--json` carries."""
        return {
            "problem": vars(self.problem),
            "mode": self.mode.value,
            "screened": {name: round(value, 3) for name, value in self.screened.items()},
            "left_out": self.left_out,
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


@dataclass
class _Contender:
    """A recorded graph that can be replayed and timed."""

    replay: Callable[[], None]
    timed_replay: Callable[[], float]
    """Returns milliseconds."""
    launches: int
    workspace: Any = None
    """Kept as long as the graph, which holds its address only."""
    microseconds: list[float] = field(default_factory=list)

    def time(self, pause: float) -> None:
        """Time one replay: after a rest, a replay that is not timed brings the clocks back."""
        time.sleep(pause)
        self.replay()
        self.microseconds.append(self.timed_replay() * 1000 / self.launches)

    def time_block(self, seconds: float) -> None:
        """Replay for some time, and keep the median of the second half."""
        self.microseconds.append(settled(self.timed_replay, seconds) * 1000 / self.launches)


def settled(timed_replay: Callable[[], float], seconds: float) -> float:
    """Give the median of what was timed in the second half of some time."""
    begin = time.monotonic()
    milliseconds: list[float] = []
    while len(milliseconds) < BLOCK_REPLAYS or time.monotonic() - begin < seconds:
        milliseconds.append(timed_replay())
    return statistics.median(milliseconds[len(milliseconds) // 2 :])


@lru_cache(maxsize=1)
def _weight(n: int, k: int, group_size: int, mode: QuantMode, seed: int) -> QuantizedWeight:
    """Draw a weight; the last one is kept, because problems of one layer tend to follow each other."""
    return random_weight(np.random.default_rng(seed), n, k, group_size, mode)


@lru_cache(maxsize=len(Target))
def _packed(n: int, k: int, group_size: int, mode: QuantMode, seed: int, target: Target) -> PackedWeight:
    return pack_weight(_weight(n, k, group_size, mode, seed), target=target)


class _Stage:
    """One problem's data on a GPU: activations, an output, and copies of the weight for each target."""

    def __init__(self, library: Library, device: int, problem: Problem, mode: QuantMode, seed: int) -> None:
        self.library, self.device, self.problem = library, device, problem
        self._drawn = (problem.n, problem.k, problem.group_size, mode, seed)
        rng = np.random.default_rng(seed)
        a = rng.standard_normal((problem.m, problem.k), dtype=np.float32).astype(np.float16)
        self.a = library.to_device(a, device)
        self.out = library.to_device(np.zeros((problem.m, problem.n), np.float16), device)
        self.host_a = a
        self._copies: dict[Target, list[PackedWeight]] = {}

    def launches(self, copies: int) -> int:
        return LONG_LAUNCHES if self.problem.flops > LONG_FLOPS else max(LAUNCHES, copies)

    def copies(self, target: Target) -> list[PackedWeight]:
        """Give the weight often enough that launches in turn find L2 cold."""
        if target not in self._copies:
            packed = _packed(*self._drawn, target)
            wanted = int(COLD_BYTES / packed.nbytes) + 1
            count = min(wanted, self.launches(wanted))
            self._copies[target] = [self.library.to_device(packed, self.device) for _ in range(count)]
        return self._copies[target]

    def record(self, config: KernelConfig, *, dependent: bool) -> _Contender:
        """Record a graph of a kernel's launches."""
        needed = self.library.workspace_bytes(config, self.problem, device=self.device)
        workspace = self.library.to_device(np.zeros(needed, np.uint8), self.device)

        def launch(weight: PackedWeight, stream: Any) -> None:
            self.library.gemm(
                self.a,
                weight,
                config=config,
                out=self.out,
                workspace=workspace,
                stream=stream,
                dependent_launch=dependent,
            )

        return self._record(launch, config.target, workspace)

    def record_floor(self, *, dependent: bool) -> _Contender:
        """Record a graph of launches that only read the packed weight."""

        def launch(weight: PackedWeight, stream: Any) -> None:
            self.library.probe_read(weight, stream=stream, dependent_launch=dependent)

        return self._record(launch, Target.NATIVE, None)

    def check(self, config: KernelConfig) -> float:
        """Run a kernel and give its largest error as a share of the bound, over some rows and channels."""
        weight = _weight(*self._drawn)
        m, n = self.problem.m, self.problem.n
        rows = np.unique(np.linspace(0, m - 1, min(m, CHECKED_ROWS)).astype(int))
        channels = np.unique(np.linspace(0, n - 1, min(n, CHECKED_CHANNELS)).astype(int))
        contender = self.record(config, dependent=False)
        got = np.full((len(rows), n), np.nan, np.float16)
        places = [(got[place], int(row) * n * got.itemsize) for place, row in enumerate(rows)]
        for values, offset in places:
            self.out.buffer.upload(values, offset)
        contender.timed_replay()  # which waits
        for values, offset in places:
            self.out.buffer.download(values, offset)
        expected = Expectation(self.host_a[rows], weight.channels(channels))
        error = np.abs(got[:, channels].astype(np.float64) - expected.result(1.0, None))
        ratio = error / expected.bound(1.0, None)
        return float("inf") if np.isnan(ratio).any() else float(ratio.max())

    def _record(self, launch_on: Callable[[PackedWeight, Any], None], target: Target, workspace: Any) -> _Contender:
        """Record a graph of launches that take the copies in turn."""
        copies = self.copies(target)
        stream = self.library.module.Stream(self.device)
        launches = self.launches(len(copies))

        def launch(turn: int) -> None:
            launch_on(copies[turn % len(copies)], stream)

        launch(0)
        stream.begin_capture()
        for turn in range(launches):
            launch(turn)
        stream.end_capture()

        def timed_replay() -> float:
            stream.start_timer()
            stream.replay()
            return float(stream.stop_timer())

        return _Contender(stream.replay, timed_replay, launches, workspace)

    def record_cublas(self, torch: Any) -> _Contender:
        """Record the dense product of the dequantised weight (less its zeros), through torch."""
        device = torch.device("cuda", self.device)
        a = torch.from_numpy(self.host_a).to(device)
        weight = _weight(*self._drawn)
        groups = torch.from_numpy(weight.scales.reshape(-1, weight.n)).to(device).float()
        spread = groups.repeat_interleave(weight.k // len(groups), 0).T
        dense = ((torch.from_numpy(weight.q).to(device).float() - 8) * spread).half().contiguous()
        wanted = int(COLD_BYTES / (2 * dense.numel())) + 1
        launches = self.launches(wanted)
        copies = [dense.clone() for _ in range(max(2, min(wanted, launches)))]
        out = torch.empty((self.problem.m, self.problem.n), dtype=torch.float16, device=device)
        graph = torch.cuda.CUDAGraph()
        torch.matmul(a, dense.T, out=out)
        torch.cuda.synchronize(device)
        with torch.cuda.device(device), torch.cuda.graph(graph):
            for turn in range(launches):
                torch.matmul(a, copies[turn % len(copies)].T, out=out)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def timed_replay() -> float:
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end))

        return _Contender(graph.replay, timed_replay, launches)


def screen(stage: _Stage, config: KernelConfig) -> float:
    """Time one kernel briefly, in microseconds: the least of a few replays, or a block of them for a long problem."""
    contender = stage.record(config, dependent=False)
    contender.replay()
    if stage.problem.flops > LONG_FLOPS:
        return settled(contender.timed_replay, SCREENING_BLOCK_SECONDS) * 1000 / contender.launches
    return min(contender.timed_replay() * 1000 / contender.launches for _ in range(SCREENING_REPLAYS))


def _warm_up(stage: _Stage, config: KernelConfig) -> None:
    """Bring the GPU to the clock that a long problem leaves it."""
    if stage.problem.flops > LONG_FLOPS:
        settled(stage.record(config, dependent=False).timed_replay, WARM_UP_SECONDS)


def measure(
    library: Library,
    problem: Problem,
    mode: QuantMode,
    configs: Sequence[KernelConfig],
    *,
    device: int,
    seed: int = 0,
) -> Iterator[tuple[KernelConfig, float]]:
    """Time kernels on one problem with cold L2 on a GPU, one after the other; give each one's microseconds at once."""
    stage = _Stage(library, device, problem, mode, seed)
    if configs:
        _warm_up(stage, configs[-1])
    for config in configs:
        yield config, screen(stage, config)


def tiles_suit(config: KernelConfig, problem: Problem) -> bool:
    """Whether a kernel's token tile is near m: at most its next power of two, and not below a quarter of it or of 256.

    Smaller tiles dequantise every weight more than four times as often, larger ones multiply by padding.
    """
    tokens = config.cta.tokens
    return tokens < 2 * max(problem.m, CTA_TOKENS[0]) and 4 * tokens >= min(problem.m, CTA_TOKENS[-1])


def compare(
    library: Library,
    problem: Problem,
    mode: QuantMode,
    *,
    configs: Iterable[KernelConfig] | None = None,
    finalists: int = 4,
    rounds: int = 9,
    seed: int = 0,
    progress: Progress = lambda _done, _total, _name: None,
) -> Comparison:
    """Time kernels on one problem with cold L2: all of them briefly, then the fastest against each other and cuBLAS.

    Graphs of 20 launches and more take copies of the weight in turn, more than 200 MB of them. The finalists take
    turns, in a new order each round: on short problems with single replays and a rest before each, on long ones, of
    130 us and more, with blocks of replays without rest, as in prefill.

    Args:
        library: the loaded build.
        problem: the problem.
        mode: the quantisation mode.
        configs: the kernels; None takes all that the build holds. Those that cannot run the problem, or whose tiles do
            not suit it, are left out.
        finalists: how many kernels are timed against each other.
        rounds: timed replays, or blocks, of each.
        seed: of the random data, and of the order.
        progress: told after each screened kernel.

    Raises:
        NoHopperGpuError: if there is no Hopper GPU.
    """
    device = hopper_gpu(library)["index"]
    stage = _Stage(library, device, problem, mode, seed)
    able = runnable(library.configs() if configs is None else configs, mode, problem)
    candidates = [config for config in able if tiles_suit(config, problem)]
    if candidates:
        _warm_up(stage, candidates[-1])
    screened: dict[str, float] = {}
    for done, config in enumerate(candidates, 1):
        screened[config.name] = screen(stage, config)
        progress(done, len(candidates), config.name)
    fastest = sorted(candidates, key=lambda config: (screened[config.name], config))[:finalists]
    errors = {config.name: stage.check(config) for config in fastest}
    short = problem.flops <= LONG_FLOPS
    contenders = {(config.name, False): stage.record(config, dependent=False) for config in fastest}
    if short:
        contenders |= {(config.name, True): stage.record(config, dependent=True) for config in fastest}
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        torch = None
    if torch is not None:
        contenders[CUBLAS, False] = stage.record_cublas(torch)
    if any(config.target is Target.NATIVE for config in fastest):
        contenders[FLOOR, False] = stage.record_floor(dependent=False)
        contenders[FLOOR, True] = stage.record_floor(dependent=True)
    turns = list(contenders.values())
    order = random.Random(seed)  # noqa: S311  (nothing secret)
    for _ in range(rounds):
        order.shuffle(turns)
        for contender in turns:
            if short:
                contender.time(PAUSE_SECONDS)
            else:
                contender.time_block(BLOCK_SECONDS)
    timings = [
        Timing(name, contender.microseconds, contenders[name, True].microseconds if (name, True) in contenders else ())
        for (name, dependent), contender in contenders.items()
        if not dependent
    ]
    timings.sort(key=lambda timing: timing.median)
    return Comparison(problem, mode, screened, len(able) - len(candidates), timings, errors)


@dataclass(frozen=True)
class TensorPeak:
    """What the tensor cores reach with operands that are there already, TFLOP/s of fp16."""

    burst: float
    """In 0.1 ms after a rest."""
    sustained: float
    """At the clock that the power limit leaves."""


def tensor_peak(library: Library, device: int) -> TensorPeak | None:
    """Measure it; None if the build holds no native kernel, with which the probe comes."""
    if not any(config.target is Target.NATIVE for config in library.configs()):
        return None
    stream = library.module.Stream(device)
    flops = library.probe_multiply(BURST_ROUNDS, stream=stream, device=device)

    def timed() -> float:
        stream.start_timer()
        library.probe_multiply(BURST_ROUNDS, stream=stream, device=device)
        return float(stream.stop_timer())

    bursts = []
    for _ in range(SCREENING_REPLAYS * BLOCK_REPLAYS):
        time.sleep(PAUSE_SECONDS)
        library.probe_multiply(BURST_ROUNDS, stream=stream, device=device)
        bursts.append(timed())
    settled(timed, WARM_UP_SECONDS)
    return TensorPeak(flops / statistics.median(bursts) / 1e9, flops / settled(timed, BLOCK_SECONDS) / 1e9)


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
