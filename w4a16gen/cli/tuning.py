"""The command that measures kernels for later choices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from w4a16gen import __version__
from w4a16gen.choose.timing_table import TABLE, TuningTable
from w4a16gen.cli.app import build_option, json_option, main, notes, print_json, show_progress
from w4a16gen.cli.problems import problems_options
from w4a16gen.kernels.config import QuantMode
from w4a16gen.kernels.problem import Problem
from w4a16gen.measure.tune import Job
from w4a16gen.runtime.default import load
from w4a16gen.runtime.devices import find_driver


@main.command()
@problems_options
@click.option(
    "--table",
    type=click.Path(path_type=Path, dir_okay=False),
    help=f"The file that times go to.  [default: {TABLE} in the build's folder, where `gemm` looks]",
)
@click.option(
    "--gpus",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="GPUs of this machine to measure on, each problem on one of them.",
)
@click.option("--again", is_flag=True, help="Also measure what the table holds already.")
@click.option(
    "--dependent",
    is_flag=True,
    help="Measure chains of dependent launches, so that calls choose what is fastest in these.",
)
@build_option
@json_option
def tune(
    named: Sequence[tuple[str, Problem]],
    mode: QuantMode,
    table: Path | None,
    gpus: int,
    again: bool,
    dependent: bool,
    folder: Path | None,
    as_json: bool,
) -> None:
    """Measure the kernels of the build on problems, so that calls choose by times instead of estimates.

    Every time is kept at once: an interrupted run goes on where it was. Kernels that are built anew are measured anew.
    """
    library = load(folder)
    gpu = library.hopper_device()
    same = [found for found in library.hopper_devices() if found.name == gpu.name]
    if gpus > len(same):
        raise click.UsageError(f"--gpus {gpus} is more than the {len(same)} {gpu.name} of this machine")
    path = table or library.build.folder / TABLE
    known = TuningTable(gpu.name, gpu.sm_count, dependent=dependent)
    if path.exists():
        known = TuningTable.read(path).updated(known)  # which one of another kind of GPU, or of launches, refuses
    driver = find_driver()
    versions = {
        "w4a16gen": __version__,
        "compiler": str(library.build.manifest.compiler),
        "driver": "none" if driver is None else f"CUDA {driver.cuda_version[0]}.{driver.cuda_version[1]}",
    }
    job = Job(library, gpu, mode, path, known, again, dependent, versions)
    devices = [found.index for found in same[:gpus]]
    outcomes = job.run(named, devices, tell=notes.print, show_progress=show_progress)
    if as_json:
        print_json({"gpu": gpu.as_json(), "table": str(path), "problems": [outcome.as_json() for outcome in outcomes]})
        return
    notes.print(f"{path}: processes that start from now on choose by it" if table is None else f"{path} is written")
