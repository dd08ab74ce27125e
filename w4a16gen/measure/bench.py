"""A bench run: problems compared one after the other, recorded, and condensed into rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from w4a16gen.kernels.config import KernelConfig, QuantMode, Target
from w4a16gen.kernels.device import Device
from w4a16gen.kernels.problem import Problem
from w4a16gen.measure.compare import compare
from w4a16gen.measure.probes import TensorPeak, tensor_peak
from w4a16gen.measure.record import Recorder, Row, Run, row_of, run_of
from w4a16gen.measure.results import Comparison, errors_beyond_bounds, smallest_set
from w4a16gen.measure.rivals import Rival
from w4a16gen.progress import Progress
from w4a16gen.runtime.library import Library


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
        return {
            "gpu": self.gpu.as_json(),
            "peak_tflops": None if self.peak is None else vars(self.peak),
            "random": None,
            "steps": [],
            "comparisons": [found.as_json() for found in self.comparisons],
            "smallest_set": list(self.smallest_set),
            "wrong": self.wrong,
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
    show_progress: Callable[[str], AbstractContextManager[Progress]],
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

    Raises:
        NoHopperGpuError: if there is no Hopper GPU.
        OSError: if the record cannot be written.
    """
    gpu = library.hopper_device()
    peak = tensor_peak(library, gpu.index)
    run = run_of(gpu, datetime.now(tz=timezone.utc).strftime("%Y-%m-%d"), version, peak)
    recorder = None if report is None else Recorder(report, run)
    comparisons: list[Comparison] = []
    rows: list[Row] = []
    for name, problem in named:
        with show_progress(str(problem)) as progress:
            found = compare(
                library,
                problem,
                mode,
                finalists=options.finalists,
                rounds=options.rounds,
                rivals=options.rivals,
                progress=progress,
            )
        comparisons.append(found)
        if not found.kernels:
            tell(f"{problem}: no built kernel of mode {mode} can run it")
            continue
        rows.append(row_of(name, found, peak))
        if recorder is not None:
            recorder.add(rows[-1], found)
        for sentence in sentences(name, rows[-1], found):
            tell(sentence)
    small = [] if options.slack is None else smallest_set(comparisons, options.slack)
    return Bench(gpu, run, peak, comparisons, rows, small)


def sentences(name: str, row: Row, found: Comparison) -> list[str]:
    """Return the sentences that a reader of one problem's results should see."""
    layer = f" ({name})" if name else ""
    left_out = f"; {found.left_out} kernels with tiles far from m not timed" if found.left_out else ""
    best = KernelConfig.parse(found.best.contender)
    lines = [f"{found.problem}{layer}: {found.best.median:.2f} us, {best.short_name}{left_out}"]
    lines += [
        f"  fastest {target} kernel: {times[1]:.2f} us, {times[0].short_name}"
        for target in Target
        if target is not best.target and (times := _fastest(found, target)) is not None
    ]
    for other, error in found.error_over_bound.items():
        if not error <= 1:
            lines.append(f"  {other} is wrong: its error is {error:.3g} times the bound; run `w4a16gen verify`")
    lines += [f"  {rival} was not timed: {reason}" for rival, reason in found.rivals_left_out.items()]
    if row.speedup_over_fp16 is not None and row.speedup_over_fp16 < 1:
        lines.append(f"  dense FP16 is faster here: {row.cublas_microseconds:.2f} us")
    return lines


def _fastest(found: Comparison, target: Target) -> tuple[KernelConfig, float] | None:
    """Return the fastest finalist of a target and its median, or None if none was timed."""
    for timing in found.kernels:
        config = KernelConfig.parse(timing.contender)
        if config.target is target:
            return config, timing.median
    return None
