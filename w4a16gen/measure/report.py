"""The files of a bench report: a table, plots, and a page that opens without a network."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import geometric_mean

from w4a16gen.choose.cost_model import default_cost_model
from w4a16gen.files import write_if_changed
from w4a16gen.kernels.render import render_text
from w4a16gen.measure.plots import draw_plots
from w4a16gen.measure.record import DERIVED, Row, Run
from w4a16gen.measure.stage import COLD_BYTES
from w4a16gen.measure.timing import BLOCK_SECONDS, LAUNCHES, PAUSE_SECONDS, SETTLING_SECONDS
from w4a16gen.wording import counted

_LEVEL = 1.05
"""A speed-up below this is called level with FP16."""


@dataclass(frozen=True)
class Layer:
    """The rows of one layer shape, by tokens."""

    name: str
    shape: str
    rows: Sequence[Row]


def write_report(folder: Path, run: Run, rows: Sequence[Row]) -> list[Path]:
    """Write bench.csv, the plots if matplotlib is installed, and report.html, and return their paths.

    Raises:
        OSError: if the folder cannot be written.
    """
    plots = draw_plots(run, rows)
    page = render_text(
        "report/bench.html.jinja",
        run=run,
        headline=headline(run, rows),
        layers=layers(rows),
        common=common_settings(rows),
        rivals=sorted({row.best_rival for row in rows if row.best_rival}),
        plots=plots,
        method={
            "launches": LAUNCHES,
            "cold_megabytes": round(COLD_BYTES / 1e6),
            "pause_milliseconds": round(PAUSE_SECONDS * 1000),
            "long_flops": f"{default_cost_model().constants.long_flops:.0e}".replace("e+", " x 10^"),
            "settling_seconds": SETTLING_SECONDS,
            "block_seconds": BLOCK_SECONDS,
        },
    )
    texts = {"bench.csv": _table(rows), "report.html": page, **plots}
    for name, text in texts.items():
        write_if_changed(folder / name, text)
    return [folder / name for name in texts]


def headline(run: Run, rows: Sequence[Row]) -> str:
    """Say in one sentence how much faster than FP16 the kernels are, by tokens."""
    known = [(row.m, row.speedup_over_fp16) for row in rows if row.speedup_over_fp16]
    if not known:
        return f"{counted(len(rows), 'problem')} on {run.gpu}; cuBLAS FP16 was not timed beside them."
    by_tokens = {m: [ratio for tokens, ratio in known if tokens == m] for m in sorted({m for m, _ in known})}
    first = next(iter(by_tokens))
    level = next((m for m, ratios in by_tokens.items() if geometric_mean(ratios) < _LEVEL), None)
    low, high = min(by_tokens[first]), max(by_tokens[first])
    span = f"{low:.1f}" if f"{low:.1f}" == f"{high:.1f}" else f"{low:.1f} to {high:.1f}"
    tokens = "1 token" if first == 1 else f"{first} tokens"
    text = f"On {run.gpu} the fastest kernel is {span} times as fast as cuBLAS FP16 with {tokens}"
    if level is not None and level != first:
        return f"{text}, and level with it from {level} tokens on."
    return f"{text}."


def layers(rows: Sequence[Row]) -> list[Layer]:
    """Group rows by layer shape, smallest weight first."""
    shapes = dict(sorted({row.shape: row.n * row.k for row in rows}.items(), key=lambda item: item[1]))
    groups = []
    for shape in shapes:
        of_shape = sorted(
            (row for row in rows if row.shape == shape), key=lambda row: (row.m, row.mode, row.group_size)
        )
        names = ", ".join(dict.fromkeys(row.layer for row in of_shape if row.layer))
        groups.append(Layer(names, shape, of_shape))
    return groups


def common_settings(rows: Sequence[Row]) -> str | None:
    """Return mode and group size if all rows share them, else None."""
    settings = {(row.mode, row.group_size) for row in rows}
    if len(settings) != 1:
        return None
    ((mode, group_size),) = settings
    return f"mode {mode}, groups of {group_size}"


def _table(rows: Sequence[Row]) -> str:
    table = io.StringIO()
    writer = csv.DictWriter(table, [*(field.name for field in fields(Row)), *DERIVED], lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.as_json() for row in rows)
    return table.getvalue()
