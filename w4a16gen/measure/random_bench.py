"""A comparison with rivals on layers and token counts drawn at random, which can be interrupted and goes on."""

from __future__ import annotations

import gc
import hashlib
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from w4a16gen.choose.timing_table import TABLE
from w4a16gen.errors import MissingToolError, NotBuiltError
from w4a16gen.kernels.config import Epilogue, KernelConfig, QuantMode, Target
from w4a16gen.kernels.device import Device
from w4a16gen.kernels.problem import Problem
from w4a16gen.kernels.spaces import enumerate_space
from w4a16gen.measure.alone import alone
from w4a16gen.measure.bands import Band, bands_of, fastest_fp16_rival
from w4a16gen.measure.bench import nothing_measured
from w4a16gen.measure.cell import Attempts, CellOptions, time_cell
from w4a16gen.measure.cell_record import Cell, CellRecord
from w4a16gen.measure.compile_ahead import compile_ahead
from w4a16gen.measure.draw import draw_cells
from w4a16gen.measure.drawn_workload import DrawnWorkload
from w4a16gen.measure.probes import TensorPeak, tensor_peak
from w4a16gen.measure.record import Recorder, Row, Run, row_of, run_of
from w4a16gen.measure.results import Comparison, errors_beyond_bounds
from w4a16gen.measure.rivals import find_torch
from w4a16gen.progress import Progress
from w4a16gen.runtime.library import Library

_NAME_DIGITS = 16
"""Digits of a build's digest in the record."""
COMPILING_SHARE = 0.5
"""Share of a budget after which no more kernels of rivals are compiled. Later cells are left to the next run."""
Measure = Callable[[Problem, Attempts], Comparison]
"""Times one cell."""


@dataclass(frozen=True)
class RandomDraw:
    """What is drawn, and how long it may take."""

    count: int
    seed: int
    mode: QuantMode
    budget_seconds: float | None = None
    """Cells are begun only as long as the longest so far would end within this time; None sets no limit."""


@dataclass(frozen=True)
class RandomBench:
    """The results of a comparison on random cells."""

    gpu: Device
    run: Run
    peak: TensorPeak | None
    draw: RandomDraw
    cells: Sequence[Cell]
    rows: Sequence[Row]
    """One for each cell that some kernel can run."""
    seconds: float
    """The time that this run took, without cells that were known."""

    @property
    def comparisons(self) -> list[Comparison]:
        """The cells' times."""
        return [cell.comparison for cell in self.cells]

    @property
    def bands(self) -> list[Band]:
        """What the cells say together."""
        return bands_of(self.comparisons)

    @property
    def left_out(self) -> int:
        """Cells of the draw that were not timed, because the time was used up."""
        return self.draw.count - len(self.cells)

    @property
    def rivals_left_out(self) -> Mapping[tuple[str, str], int]:
        """How many cells a rival was not timed in, by its name and the reason."""
        return Counter(reason for found in self.comparisons for reason in found.rivals_left_out.items())

    @property
    def wrong(self) -> dict[str, float]:
        """Kernels whose error exceeds its bound in some cell, with that error over the bound."""
        return errors_beyond_bounds(self.comparisons)

    def as_json(self) -> dict[str, Any]:
        """Return the object that JSON output carries."""
        return nothing_measured(self.gpu) | {
            "peak_tflops": None if self.peak is None else vars(self.peak),
            "random": {
                "seed": self.draw.seed,
                "cells": self.draw.count,
                "timed": len(self.cells),
                "left_out": self.left_out,
                "seconds": round(self.seconds, 1),
                "bands": [band.as_json() for band in self.bands],
                "rivals_left_out": [
                    {"rival": rival, "reason": reason, "cells": cells}
                    for (rival, reason), cells in self.rivals_left_out.items()
                ],
            },
            "comparisons": [found.as_json() for found in self.comparisons],
            "wrong": self.wrong,
        }


def run_random_bench(
    library: Library,
    draw: RandomDraw,
    options: CellOptions,
    *,
    version: str,
    report: Path,
    tell: Callable[[str], None],
    show_progress: Callable[..., AbstractContextManager[Progress]],
    measure: Measure | None = None,
) -> RandomBench:
    """Time the cells of a draw, each at once into the record; cells that are in the record are not timed again.

    Args:
        library: the loaded build.
        draw: the draw.
        options: how to time.
        version: this package's version, for the record.
        report: folder of the record.
        tell: called with a sentence about each cell.
        show_progress: shows a bar with a title.
        measure: times one cell; None measures on the GPU.

    Raises:
        NoHopperGpuError: if there is no Hopper GPU.
        MissingToolError: if torch is not installed.
        NotBuiltError: if the build has no native kernel of the mode, or none of the space that calls choose from.
        InvalidValueError: if the folder has cells of other settings, or another run is at work in it.
        OSError: if the record cannot be written.
    """
    began = time.monotonic()
    gpu = library.hopper_device()
    kinds = {(config.target, config.mode, config.epilogue) for config in library.configs()}
    if (Target.NATIVE, draw.mode, Epilogue.NONE) not in kinds:
        raise NotBuiltError(f"the build holds no plain native kernel of mode {draw.mode}: run `w4a16gen build`")
    _compare_with_space(library, draw.mode, options.space, tell)
    timed = measure or _gpu_measure(library, gpu, draw.mode, options)
    cells = draw_cells(draw.count, draw.seed, draw.mode)
    peak = tensor_peak(library, gpu.index)
    run = run_of(gpu, datetime.now(tz=timezone.utc).strftime("%Y-%m-%d"), version, peak)
    with alone(report, "--report"):
        record = CellRecord(report, _head(library, gpu, draw, options, version))
        missing = [(layer, problem) for layer, problem in cells if problem not in record.cells]
        if len(missing) < len(cells):
            tell(f"{len(cells) - len(missing)} of {len(cells)} cells are in {report} already")
        if measure is None and options.rivals:
            ready = compile_ahead(
                [problem for _, problem in missing],
                draw.mode,
                options.rivals,
                gpu.index,
                tell=tell,
                show_progress=show_progress,
                until=None if draw.budget_seconds is None else began + COMPILING_SHARE * draw.budget_seconds,
            )
            missing = missing[:ready]
        with show_progress("Timing cells", len(missing)) as progress:
            try:
                _time_missing(missing, record, timed, draw.budget_seconds, began, tell, progress)
            except (KeyboardInterrupt, OSError):
                with suppress(OSError):  # the disk may be full
                    record.interrupted()
                raise
        found = [record.cells[problem] for _, problem in cells if problem in record.cells]
        rows = _write_rows(report, run, found, peak)
    return RandomBench(gpu, run, peak, draw, found, rows, time.monotonic() - began)


def _compare_with_space(library: Library, mode: QuantMode, space: str | None, tell: Callable[[str], None]) -> None:
    """Refuse a space of which nothing is built, and say what is missing: calls would be those of a smaller build."""
    if space is None:
        return
    wanted = [config for config in enumerate_space(space) if config.target is Target.NATIVE and config.mode is mode]
    missing = set(wanted) - set(library.configs())
    if len(missing) == len(wanted):
        raise NotBuiltError(
            f"the build holds no native kernel of mode {mode} of space {space}: name another one with --choose-from"
        )
    if missing:
        tell(
            f"{len(missing)} of {len(wanted)} kernels of mode {mode} of space {space} are not in the build: calls "
            "choose among the others"
        )


def _gpu_measure(library: Library, gpu: Device, mode: QuantMode, options: CellOptions) -> Measure:
    torch = find_torch()
    if torch is None:
        raise MissingToolError("bench --random compares with cuBLAS and rivals through torch: pip install torch")

    def measure_one(problem: Problem, attempts: Attempts) -> Comparison:
        stage = DrawnWorkload(torch, library, gpu.index, problem, mode)
        return time_cell(stage, torch, library, gpu, options, attempts)

    def measure(problem: Problem, attempts: Attempts) -> Comparison:
        found = measure_one(problem, attempts)
        gc.collect()  # graphs and their copies of weights, before the next cell allocates
        torch.cuda.empty_cache()
        return found

    return measure


def _head(library: Library, gpu: Device, draw: RandomDraw, options: CellOptions, version: str) -> dict[str, Any]:
    """Return what all cells of a record share, among it a digest of the kernels and of the times that calls go by."""
    digest = hashlib.sha256("".join(sorted(library.build.content_hashes.values())).encode())
    table = library.build.folder / TABLE  # calls choose by it
    if table.exists():
        digest.update(table.read_bytes())
    return {
        "seed": draw.seed,
        "mode": draw.mode.value,
        "gpu": gpu.name,
        "sm_count": gpu.sm_count,
        "version": version,
        "build": digest.hexdigest()[:_NAME_DIGITS],
        "finalists": options.finalists,
        "rounds": options.rounds,
        "rivals": [rival.name for rival in options.rivals],
        "space": options.space,
    }


def _time_missing(
    missing: Sequence[tuple[str, Problem]],
    record: CellRecord,
    measure: Measure,
    budget: float | None,
    began: float,
    tell: Callable[[str], None],
    progress: Progress,
) -> None:
    """Time cells in the order of the draw, so that those within a budget are a draw themselves."""
    took: list[float] = []
    for place, (layer, problem) in enumerate(missing):
        start = time.monotonic()
        if budget is not None and start - began + max(took, default=0.0) > budget:
            return
        attempts = Attempts(record.excluded(problem), partial(record.begin, problem))
        found = measure(problem, attempts)
        took.append(time.monotonic() - start)
        record.add(Cell(layer, found, took[-1]))
        left = statistics.mean(took) * (len(missing) - place - 1)
        tell(f"{sentence(layer, found)}; {place + 1} of {len(missing)} cells, about {left:.0f} s left")
        progress(place + 1, len(missing), str(problem))


def sentence(layer: str, found: Comparison) -> str:
    """Return what a reader of one cell's results should see."""
    what = f"{found.problem} ({layer})"
    call = found.timing(found.chosen)
    if call is None:
        return f"{what}: no built kernel can run it"
    text = f"{what}: call {call.median:.2f} us"
    if found.best.contender != found.chosen:
        text += f", fastest built {found.best.median:.2f} us ({KernelConfig.parse(found.best.contender).short_name})"
    rival = fastest_fp16_rival(found)
    if rival is not None:
        text += f", {rival.contender} {rival.median:.2f} us ({rival.median / call.median:.2f})"
    return text


def _write_rows(folder: Path, run: Run, cells: Sequence[Cell], peak: TensorPeak | None) -> list[Row]:
    """Write the cells as a bench record, from which `w4a16gen report` makes pages."""
    recorder = Recorder(folder, run)
    rows = []
    for cell in cells:
        if cell.comparison.kernels:
            rows.append(row_of(cell.layer, cell.comparison, peak))
            recorder.add(rows[-1], cell.comparison)
    return rows
