"""The plots of a bench report, as SVG; matplotlib is optional."""

from __future__ import annotations

import importlib
import importlib.util
import io
import math
from collections.abc import Callable, Sequence
from typing import Any

from w4a16gen.measure.record import Row, Run

WIDTH_INCHES = 8.0
HEIGHT_INCHES = 4.5
_STYLE = {
    "svg.hashsalt": "w4a16gen",  # without it every file has other ids
    "svg.fonttype": "none",  # text stays text: small files, and readers can search it
    "font.family": ["sans-serif"],
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
}
_GREY = "#666666"
_TOKEN_TICKS = 4
"""Tick labels are its powers: 1, 4, 16, 64 ... tokens."""
_MOST_NAMED = 16
"""Layers that a legend names, at most: more do not fit beside the axes."""
_ROOM = 1.4
"""Factor by which the token axis is longer than the data at each end."""


def has_plots() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_plots(run: Run, rows: Sequence[Row]) -> dict[str, str]:
    """Return SVG texts by file name: the speed-up first, if cuBLAS was timed, then the roofline.

    Empty without matplotlib or without rows.
    """
    if not has_plots() or not rows:
        return {}
    drawings: dict[str, Callable[[Any, Run, Sequence[Row]], None]] = {}
    if any(row.speedup_over_fp16 for row in rows):
        drawings["speedup.svg"] = _draw_speedup
    drawings["roofline.svg"] = _draw_roofline
    return {name: _as_svg(draw, run, rows) for name, draw in drawings.items()}


def _as_svg(draw: Callable[[Any, Run, Sequence[Row]], None], run: Run, rows: Sequence[Row]) -> str:
    matplotlib = importlib.import_module("matplotlib")
    figure_type = importlib.import_module("matplotlib.figure").Figure
    with matplotlib.rc_context(_STYLE):
        figure = figure_type(figsize=(WIDTH_INCHES, HEIGHT_INCHES), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(visible=True, alpha=0.25, linewidth=0.6)
        draw(axes, run, rows)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def _layers(rows: Sequence[Row]) -> list[tuple[str, Any, list[Row]]]:
    """Return the layer shapes from the smallest weight to the largest: name, colour, rows by tokens."""
    shapes = sorted({row.shape: row.n * row.k for row in rows}.items(), key=lambda item: item[1])
    colours = importlib.import_module("matplotlib").colormaps["viridis"]
    steps = max(len(shapes) - 1, 1)
    return [
        (shape, colours(0.85 * (1 - number / steps)), sorted((r for r in rows if r.shape == shape), key=lambda r: r.m))
        for number, (shape, _) in enumerate(shapes)
    ]


def _name_of_layers(axes: Any, rows: Sequence[Row]) -> Callable[[str], str | None]:
    """Return what names a layer in the legend: nothing does if there are too many, and one line stands for all."""
    layers = _layers(rows)
    if len(layers) <= _MOST_NAMED:
        return str
    axes.plot([], [], color=layers[-1][1], marker="o", markersize=4, label=f"{len(layers)} layers, larger ones darker")
    return lambda _: None


def _label_tokens(axes: Any, rows: Sequence[Row]) -> None:
    """Label the token axis with 1, 4, 16 ... as people write them."""
    axes.set_xscale("log", base=2)
    most = max(row.m for row in rows)
    ticks = [_TOKEN_TICKS**power for power in range(math.ceil(math.log(max(most, 2), _TOKEN_TICKS)) + 1)]
    axes.set_xticks([tick for tick in ticks if tick <= _ROOM * most], minor=False)
    axes.xaxis.set_major_formatter(lambda value, _position: f"{value:.0f}")
    axes.minorticks_off()
    axes.set_xlim(min(row.m for row in rows) / _ROOM, most * _ROOM)
    axes.set_xlabel("tokens (m)")


def _beside(axes: Any) -> None:
    """Put the legend beside the axes, where it covers no point."""
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=9, title_fontsize=9)


def _draw_speedup(axes: Any, run: Run, rows: Sequence[Row]) -> None:
    label = _name_of_layers(axes, rows)
    for shape, colour, of_shape in _layers(rows):
        line = [(row.m, row.speedup_over_fp16) for row in of_shape if row.speedup_over_fp16]
        if line:
            axes.plot(*zip(*line, strict=True), color=colour, marker="o", markersize=4, label=label(f"layer {shape}"))
        rival = [
            (row.m, row.cublas_microseconds / row.best_rival_microseconds)
            for row in of_shape
            if row.cublas_microseconds and row.best_rival_microseconds
        ]
        if rival:
            axes.plot(*zip(*rival, strict=True), color=colour, marker="x", markersize=4, linewidth=0.8, linestyle=":")
    axes.axhline(1.0, color=_GREY, linewidth=1, linestyle="--", label="cuBLAS FP16")
    if any(row.best_rival for row in rows):
        axes.plot([], [], color=_GREY, marker="x", markersize=4, linewidth=0.8, linestyle=":", label="best other 4-bit")
    _label_tokens(axes, rows)
    axes.set_ylim(bottom=0.5)
    axes.set_ylabel("speed-up over cuBLAS FP16")
    axes.set_title(f"Speed-up over cuBLAS FP16, {run.gpu}, {run.date}", fontsize=11)
    _beside(axes)


def _draw_roofline(axes: Any, run: Run, rows: Sequence[Row]) -> None:
    intensities = [row.flops / row.bytes_moved for row in rows]
    least, most = min(intensities), max(intensities)
    label = _name_of_layers(axes, rows)
    for shape, colour, of_shape in _layers(rows):
        points = [(row.flops / row.bytes_moved, row.tflops) for row in of_shape]
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=4, linewidth=0.6, label=label(shape))
    for row in _layers(rows)[-1][2]:
        if row.m & (row.m - 1) or row.m.bit_length() % 2 == 0:
            continue  # label 1, 4, 16 ... tokens only
        place = (row.flops / row.bytes_moved, row.tflops)
        axes.annotate(f"m={row.m}", place, (5, -11), textcoords="offset points", fontsize=7, color=_GREY)
    axes.set_xscale("log")
    axes.set_yscale("log")
    peaks = [
        (name, peak, style)
        for name, peak, style in (
            ("burst", run.peak_burst_tflops, "-"),
            ("sustained", run.peak_sustained_tflops, "--"),
        )
        if peak is not None
    ]
    for name, peak, style in peaks:
        axes.axhline(peak, color=_GREY, linewidth=1, linestyle=style, label=f"tensor cores, {name}: {peak:.0f} TFLOP/s")
    rates = [row.packed_bytes / row.floor_microseconds / 1e6 for row in rows if row.floor_microseconds]
    if rates:
        rate = max(rates)
        end = min(most, peaks[0][1] / rate) if peaks else most
        axes.plot([least, end], [least * rate, end * rate], color=_GREY, linewidth=1, label=f"reading: {rate:.2f} TB/s")
    axes.set_xlabel("operations per byte of weight, activations and output")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(f"Roofline, {run.gpu}, {run.date}", fontsize=11)
    _beside(axes)
