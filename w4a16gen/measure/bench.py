"""A bench run: problems compared one after the other, recorded, and condensed into rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from w4a16gen.executors.waiting import as_done
from w4a16gen.kernels.config import Epilogue, KernelConfig, QuantMode, Target
from w4a16gen.kernels.device import Device
from w4a16gen.kernels.problem import Problem
from w4a16gen.measure.compare import compare, with_one_of
from w4a16gen.measure.compile_ahead import compile_ahead
from w4a16gen.measure.gpus import Cards, Gpu
from w4a16gen.measure.probes import TensorPeak, tensor_peak
from w4a16gen.measure.record import Recorder, Row, Run, row_of, run_of
from w4a16gen.measure.results import Comparison, errors_beyond_bounds, smallest_set
from w4a16gen.measure.rivals import RIVALS, Rival
from w4a16gen.progress import Progress
from w4a16gen.runtime.library import Library
from w4a16gen.wording import counted


@dataclass(frozen=True)
class BenchOptions:
    """Options of a bench run."""

    finalists: int = 4
    """Kernels timed in turns on each problem."""
    rounds: int = 9
    """Timed replays of each. A long problem gets a third of this number of one-second blocks."""
    rivals: Sequence[Rival] = ()
    slack: float | None = None
    """Also find the smallest set of kernels within this fraction of the fastest on every problem."""
    epilogues: Sequence[Epilogue] = (Epilogue.NONE,)
    """Those of the kernels to compare."""


@dataclass(frozen=True)
class Bench:
    """The results of a bench run."""

    gpu: Device
    run: Run
    peak: TensorPeak | None
    comparisons: Sequence[Comparison]
    rows: Sequence[Row]
    """One for each problem that some kernel can run."""
    smallest_set: Sequence[str]

    @property
    def wrong(self) -> dict[str, float]:
        """Kernels and rivals whose error exceeds its bound on some problem, with that error over the bound."""
        return errors_beyond_bounds(self.comparisons)

    @property
    def cublas_timed(self) -> bool:
        """Whether cuBLAS was timed beside the kernels."""
        return any(found.cublas for found in self.comparisons)

    def as_json(self) -> dict[str, Any]:
        """Return the object that JSON output carries."""
        return nothing_measured(self.gpu) | {
            "peak_tflops": None if self.peak is None else vars(self.peak),
            "comparisons": [found.as_json() for found in self.comparisons],
            "smallest_set": list(self.smallest_set),
            "wrong": self.wrong,
        }


def nothing_measured(gpu: Device) -> dict[str, Any]:
    """Return the object that JSON output carries, without a result: each kind of bench adds its own."""
    return {
        "gpu": gpu.as_json(),
        "peak_tflops": None,
        "random": None,
        "steps": [],
        "moe": [],
        "comparisons": [],
        "smallest_set": [],
        "wrong": {},
        "written": [],
        "nodes": [],
    }


def run_bench(
    library: Library,
    named: Sequence[tuple[str, Problem]],
    mode: QuantMode,
    options: BenchOptions,
    *,
    version: str,
    report: Path | None,
    tell: Callable[[str], None],
    show_progress: Callable[..., AbstractContextManager[Progress]],
    cards: Cards | None = None,
) -> Bench:
    """Compare the built kernels on problems.

    Args:
        library: the loaded build.
        named: the problems, each with its layer's name.
        mode: the quantisation mode.
        options: how to measure.
        version: this package's version, for the record.
        report: folder of the record, which is written problem by problem; None writes none.
        tell: called with a sentence about each finished problem.
        show_progress: shows a bar with a title.
        cards: GPUs of a cluster, which take the problems among them; None takes the first one of this machine.

    Raises:
        NoHopperGpuError: if there is no Hopper GPU.
        ClusterError: if the cluster has no worker left.
        OSError: if the record cannot be written.
    """
    gpu = library.hopper_device() if cards is None else cards.device
    peak = tensor_peak(library, gpu.index) if cards is None else _peak_of(cards)
    run = run_of(gpu, datetime.now(tz=timezone.utc).strftime("%Y-%m-%d"), version, peak)
    recorder = None if report is None else Recorder(report, run)
    done: dict[int, tuple[Comparison, Row | None]] = {}
    problems = [problem for _, problem in named]
    if cards is None:
        compile_ahead(problems, mode, options.rivals, gpu.index, tell=tell, show_progress=show_progress)
        source = _compared_here(library, problems, mode, options, show_progress)
    else:
        source = _compared_on(cards, problems, mode, options, show_progress)
    for place, found in source:
        name, problem = named[place]
        done[place] = found, None
        if not found.kernels:
            tell(f"{problem}: no built kernel of mode {mode} can run it")
            continue
        row = row_of(name, found, peak)
        done[place] = found, row
        if recorder is not None:
            recorder.add(row, found)
        for sentence in sentences(name, row, found):
            tell(sentence)
    comparisons = [done[place][0] for place in sorted(done)]
    rows = [of_place for _, of_place in (done[place] for place in sorted(done)) if of_place is not None]
    small = [] if options.slack is None else smallest_set(comparisons, options.slack)
    return Bench(gpu, run, peak, comparisons, rows, small)


def _compared_here(
    library: Library,
    problems: Sequence[Problem],
    mode: QuantMode,
    options: BenchOptions,
    show_progress: Callable[..., AbstractContextManager[Progress]],
) -> Iterator[tuple[int, Comparison]]:
    """Compare the kernels on one problem after the other, on the first GPU; yield each place in the list."""
    for place, problem in enumerate(problems):
        with show_progress(str(problem)) as progress:
            found = compare(
                library,
                problem,
                mode,
                configs=with_one_of(library.configs(), options.epilogues),
                finalists=options.finalists,
                rounds=options.rounds,
                rivals=options.rivals,
                progress=progress,
            )
        yield place, found


def _compared_on(
    cards: Cards,
    problems: Sequence[Problem],
    mode: QuantMode,
    options: BenchOptions,
    show_progress: Callable[..., AbstractContextManager[Progress]],
) -> Iterator[tuple[int, Comparison]]:
    """Compare the kernels on problems, each on one of the GPUs of a cluster, in the order in which they end."""
    rivals = [rival.name for rival in options.rivals]
    with cards.executor as executor, show_progress(f"Comparing on {executor.slots} GPUs", len(problems)) as progress:
        futures = {
            executor.submit(
                compare_problem, problem, mode, options.finalists, options.rounds, rivals, options.epilogues
            ): place
            for place, problem in enumerate(problems)
        }
        for done, future in enumerate(as_done(futures), 1):
            if not future.cancelled():  # another task's error, which comes too, dropped the queue
                place = futures[future]
                found: Comparison = future.result()[0]
                progress(done, len(problems), str(problems[place]))
                yield place, found


def compare_problem(
    gpu: Gpu,
    problem: Problem,
    mode: QuantMode,
    finalists: int,
    rounds: int,
    rivals: Sequence[str],
    epilogues: Sequence[Epilogue] = (Epilogue.NONE,),
) -> Iterator[Comparison]:
    """Compare the kernels on one problem, with rivals by name: the task that executors run."""
    chosen = [rival for rival in RIVALS if rival.name in rivals]
    configs = with_one_of(gpu.library.configs(), epilogues)
    yield compare(gpu.library, problem, mode, configs=configs, finalists=finalists, rounds=rounds, rivals=chosen)


def _peak_of(cards: Cards) -> TensorPeak | None:
    """Return the peak of one of the GPUs of a cluster."""
    peak: TensorPeak | None = next(as_done([cards.executor.submit(find_peak)])).result()[0]
    return peak


def find_peak(gpu: Gpu) -> Iterator[TensorPeak | None]:
    """Measure the peak of a GPU: the task that executors run."""
    yield tensor_peak(gpu.library, gpu.index)


def sentences(name: str, row: Row, found: Comparison) -> list[str]:
    """Return the sentences that a reader of one problem's results should see."""
    layer = f" ({name})" if name else ""
    left_out = f"; {counted(found.left_out, 'kernel')} with tiles far from m not timed" if found.left_out else ""
    best = KernelConfig.parse(found.best.contender)
    lines = [f"{found.problem}{layer}: {found.best.median:.2f} us, {best.short_name}{left_out}"]
    kinds = [(target, epilogue) for target in Target for epilogue in Epilogue]
    lines += [
        f"  fastest {target} kernel{_with(epilogue)}: {times[1]:.2f} us, {times[0].short_name}"
        for target, epilogue in kinds
        if (target, epilogue) != (best.target, best.epilogue)
        and (times := _fastest(found, target, epilogue)) is not None
    ]
    for other, error in found.error_over_bound.items():
        if not error <= 1:
            lines.append(f"  {other} is wrong: its error is {error:.3g} times the bound; run `w4a16gen verify`")
    lines += [f"  {rival} was not timed: {reason}" for rival, reason in found.rivals_left_out.items()]
    if row.speedup_over_fp16 is not None and row.speedup_over_fp16 < 1:
        lines.append(f"  dense FP16 is faster here: {row.cublas_microseconds:.2f} us")
    return lines


def _with(epilogue: Epilogue) -> str:
    return "" if epilogue is Epilogue.NONE else f" with epilogue {epilogue}"


def _fastest(found: Comparison, target: Target, epilogue: Epilogue) -> tuple[KernelConfig, float] | None:
    """Return the fastest finalist of a target with an epilogue and its median, or None if none was timed."""
    for timing in found.kernels:
        config = KernelConfig.parse(timing.contender)
        if (config.target, config.epilogue) == (target, epilogue):
            return config, timing.median
    return None
