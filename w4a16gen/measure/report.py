"""What `w4a16gen bench` measured, in files: JSON lines, CSV, plots, and a page that opens without a network."""

from __future__ import annotations

import base64
import csv
import importlib
import importlib.util
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from w4a16gen.errors import InvalidValueError
from w4a16gen.files import write_if_changed
from w4a16gen.kernels.device import Device
from w4a16gen.kernels.render import render_text
from w4a16gen.measure.probes import TensorPeak
from w4a16gen.measure.results import Comparison

SCHEMA_VERSION = 2
RECORD = "bench.jsonl"
"""The file that everything else can be written from again."""
PLOT_WIDTH_INCHES = 8.0
PLOT_HEIGHT_INCHES = 5.0


@dataclass(frozen=True)
class Run:
    """Where and when a run was, and what the GPU could do at most."""

    gpu: str
    sm_count: int
    date: str
    version: str
    peak_burst_tflops: float | None
    """Of the tensor cores, for 0.1 ms; None if the build brought no probe."""
    peak_sustained_tflops: float | None
    """Of the tensor cores, at the power limit."""


@dataclass(frozen=True)
class Row:
    """The fastest kernel on one problem. Times are medians in microseconds; what was not measured is None."""

    layer: str
    m: int
    n: int
    k: int
    group_size: int
    mode: str
    kernel: str
    microseconds: float
    least_microseconds: float
    most_microseconds: float
    dependent_microseconds: float | None
    floor_microseconds: float | None
    """Reading the packed weight once and nothing else."""
    dependent_floor_microseconds: float | None
    cublas_microseconds: float | None
    chosen_kernel: str | None
    """What a call gets that names no kernel."""
    chosen_microseconds: float | None
    best_rival: str | None
    """The fastest of other 4-bit kernels that were timed."""
    best_rival_microseconds: float | None
    tflops: float
    gigabytes_per_second: float
    """Of the packed weight, read once."""
    share_of_floor: float | None
    """The longer of reading the packed weight and multiplying at the tensor cores' burst peak, over the time."""
    speedup_over_fp16: float | None
    error_over_bound: float | None
    """The largest error of what was compared with float64, as a share of its bound."""

    @property
    def shape(self) -> str:
        """Channels x k of the layer."""
        return f"{self.n}x{self.k}"

    @property
    def bytes_moved(self) -> int:
        """Packed weight, activations and output, each once."""
        scales = 2 * self.k // self.group_size * self.n * (2 if self.mode == "fgsz" else 1)
        return self.n * self.k // 2 + scales + 2 * self.m * (self.k + self.n)


def run_of(gpu: Device, date: str, version: str, peak: TensorPeak | None) -> Run:
    """Describe a run on a GPU."""
    peaks = (None, None) if peak is None else (round(peak.burst, 1), round(peak.sustained, 1))
    return Run(gpu.name, gpu.sm_count, date, version, *peaks)


def row_of(layer: str, found: Comparison, peak: TensorPeak | None) -> Row:
    """Condense what was measured on one problem that some kernel can run."""
    problem, best = found.problem, found.best
    us = best.median
    floor = None if found.floor is None else found.floor.median
    dependent_floor = None if found.floor is None else found.floor.dependent_median
    cublas = None if found.cublas is None else found.cublas.median
    chosen, rival = found.timing(found.chosen), found.best_rival
    weight_bytes = problem.n * problem.k / 2 + 2 * problem.groups * problem.n * (2 if found.mode.has_zeros else 1)
    least = None if floor is None or peak is None else max(floor, problem.flops / peak.burst / 1e6)

    def rounded(value: float | None, digits: int = 3) -> float | None:
        return None if value is None else round(value, digits)

    return Row(
        layer=layer,
        **vars(problem),
        mode=found.mode.value,
        kernel=best.contender,
        microseconds=round(us, 3),
        least_microseconds=round(min(best.isolated), 3),
        most_microseconds=round(max(best.isolated), 3),
        dependent_microseconds=rounded(best.dependent_median),
        floor_microseconds=rounded(floor),
        dependent_floor_microseconds=rounded(dependent_floor),
        cublas_microseconds=rounded(cublas),
        chosen_kernel=found.chosen,
        chosen_microseconds=None if chosen is None else round(chosen.median, 3),
        best_rival=None if rival is None else rival.contender,
        best_rival_microseconds=None if rival is None else round(rival.median, 3),
        tflops=round(problem.flops / us / 1e6, 2),
        gigabytes_per_second=round(weight_bytes / us / 1e3, 1),
        share_of_floor=None if least is None else round(least / us, 4),
        speedup_over_fp16=None if cublas is None else round(cublas / us, 4),
        error_over_bound=rounded(found.error_over_bound.get(best.contender), 4),
    )


class Recorder:
    """Writes a run's JSON lines, each as soon as it is known."""

    def __init__(self, folder: Path, run: Run) -> None:
        """Begin a record in a folder, which is made; one that is there is replaced."""
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / RECORD
        write_if_changed(self._path, json.dumps({"schema": SCHEMA_VERSION, **asdict(run)}) + "\n")

    def add(self, row: Row, found: Comparison) -> None:
        """Add a problem: the row, and every time that was measured."""
        with self._path.open("a") as file:
            file.write(json.dumps({**asdict(row), "measured": found.as_json()}) + "\n")


def read_record(folder: Path) -> tuple[Run, list[Row]]:
    """Read the JSON lines of a run.

    Raises:
        OSError: if there is no record in the folder.
        InvalidValueError: if it holds anything else.
    """
    path = folder / RECORD
    try:
        head, *lines = map(json.loads, path.read_text().splitlines())
        if head.pop("schema") != SCHEMA_VERSION:
            raise InvalidValueError(f"its schema is not {SCHEMA_VERSION}")
        names = {field.name for field in fields(Row)}
        return Run(**head), [Row(**{name: line[name] for name in names}) for line in lines]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidValueError(f"{path} is no record of `w4a16gen bench --report`: {error}") from None


def write_report(folder: Path, run: Run, rows: Sequence[Row]) -> list[Path]:
    """Write a table, the plots if matplotlib is installed, and a page that holds both, and give their paths."""
    table = io.StringIO()
    writer = csv.DictWriter(table, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(asdict, rows))
    plots = _plots(run, rows) if rows else {}
    page = render_text(
        "report/bench.html.jinja",
        run=run,
        rows=rows,
        plots={name: base64.b64encode(image).decode() for name, image in plots.items()},
    )
    texts = {"bench.csv": table.getvalue(), "report.html": page}
    for name, text in texts.items():
        write_if_changed(folder / name, text)
    for name, image in plots.items():
        write_if_changed(folder / name, image)
    return [folder / name for name in (*texts, *plots)]


def has_plots() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def _plots(run: Run, rows: Sequence[Row]) -> dict[str, bytes]:
    """Draw PNG images by file name; none without matplotlib."""
    if not has_plots():
        return {}
    figures = {"roofline.png": _roofline(run, rows)}
    if any(row.speedup_over_fp16 is not None for row in rows):
        figures["speedup.png"] = _speedup(run, rows)
    images = {}
    for name, figure in sorted(figures.items()):
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=110, metadata={"Software": None})
        images[name] = image.getvalue()
    return images


def _axes(title: str, x: str, y: str) -> tuple[Any, Any]:
    figure = importlib.import_module("matplotlib.figure").Figure(
        figsize=(PLOT_WIDTH_INCHES, PLOT_HEIGHT_INCHES), layout="constrained"
    )
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(visible=True, which="major", alpha=0.3)
    return figure, axes


def _speedup(run: Run, rows: Sequence[Row]) -> Any:
    """Draw the speed-up over dense FP16 by tokens, a line a layer shape."""
    figure, axes = _axes(f"Over cuBLAS FP16 on {run.gpu}, {run.date}", "tokens", "times as fast as dense FP16")
    for shape in dict.fromkeys(row.shape for row in rows):
        line = sorted((row.m, row.speedup_over_fp16) for row in rows if row.shape == shape and row.speedup_over_fp16)
        axes.plot(*zip(*line, strict=True), marker="o", markersize=4, label=f"n x k = {shape}")
    axes.axhline(1.0, color="black", linewidth=1, linestyle="--")
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def _roofline(run: Run, rows: Sequence[Row]) -> Any:
    """Draw TFLOP/s by arithmetic intensity under what the GPU read and multiplied at most."""
    figure, axes = _axes(f"Roofline, {run.gpu}, {run.date}", "operations per byte moved", "TFLOP/s")
    intensity = [2 * row.m * row.n * row.k / row.bytes_moved for row in rows]
    for shape in dict.fromkeys(row.shape for row in rows):
        points = [(x, row.tflops) for x, row in zip(intensity, rows, strict=True) if row.shape == shape]
        axes.scatter(*zip(*points, strict=True), s=16, label=f"n x k = {shape}")
    ends = [min(intensity), max(intensity)]
    for label, peak in (("burst", run.peak_burst_tflops), ("sustained", run.peak_sustained_tflops)):
        if peak is None:
            continue
        axes.axhline(peak, color="black", linewidth=1, linestyle="-" if label == "burst" else "--")
        side = "bottom" if label == "burst" else "top"
        axes.annotate(f"tensor cores, {label}: {peak:.0f}", (ends[0], peak), fontsize=8, va=side)
    reading = [
        row.gigabytes_per_second * row.microseconds / row.floor_microseconds / 1e3
        for row in rows
        if row.floor_microseconds
    ]
    if reading:
        axes.plot(ends, [x * max(reading) for x in ends], color="black", linewidth=1)
        axes.annotate(f"reading: {max(reading):.2f} TB/s", (ends[0], ends[0] * max(reading)), fontsize=8, va="bottom")
    axes.set_xscale("log")
    axes.set_yscale("log")
    if run.peak_burst_tflops is not None:
        axes.set_ylim(top=2 * run.peak_burst_tflops)
    axes.legend(loc="lower right")
    return figure
