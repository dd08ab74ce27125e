"""`w4a16gen report`: pages from a bench record."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from w4a16gen.cli.help import ExampleCommand
from w4a16gen.cli.options import json_option
from w4a16gen.cli.output import note, print_result
from w4a16gen.cli.paths import NamedPath

if TYPE_CHECKING:
    from w4a16gen.measure.record import Row, Run


@click.command(
    "report",
    cls=ExampleCommand,
    examples=(("w4a16gen report out", "after `w4a16gen bench --report out`"),),
)
@click.argument("folder", type=NamedPath(file_okay=False, exists=True))
@json_option
def command(folder: Path, as_json: bool) -> None:
    """Regenerate CSV, plots and HTML from FOLDER/bench.jsonl, which `bench --report FOLDER` wrote."""
    from w4a16gen.measure.record import read_record

    run, rows = read_record(folder)
    written = write_pages(folder, run, rows)
    if as_json:
        files = [str(path) for path in written]
        print_result("report", {"folder": str(folder), "problems": len(rows), "written": files})


def write_pages(folder: Path, run: Run, rows: Sequence[Row]) -> list[Path]:
    """Write the table, the plots and the page of a bench run; say which files were written."""
    from w4a16gen.measure.plots import has_plots
    from w4a16gen.measure.report import write_report

    written = write_report(folder, run, rows)
    for path in written:
        note(f"Wrote {path}")
    if not has_plots():
        note(
            f"There are no plots, because matplotlib is not installed: pip install 'w4a16gen[plot]', then "
            f"`w4a16gen report {folder}`"
        )
    return written
