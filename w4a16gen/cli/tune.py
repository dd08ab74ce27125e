"""`w4a16gen tune`: measure kernels for later choices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from w4a16gen import __version__
from w4a16gen.cli.help import FILES, METHOD, ExampleCommand, option
from w4a16gen.cli.options import build_option, count_option, json_option
from w4a16gen.cli.output import note, print_result
from w4a16gen.cli.problems import named_problems, problems_options
from w4a16gen.cli.services import services

if TYPE_CHECKING:
    from w4a16gen.kernels.config import QuantMode
    from w4a16gen.kernels.problem import Problem

MOST_GPUS = 1024


@click.command(
    "tune",
    cls=ExampleCommand,
    examples=(
        ("w4a16gen tune --model llama-3-8b --tokens 1 --tokens 16", "a model's layers with 1 and 16 tokens"),
        ("w4a16gen tune --model llama-3-70b/8 --gpus 8", "on eight GPUs"),
    ),
)
@problems_options
@option(
    "--table",
    type=click.Path(path_type=Path, dir_okay=False),
    section=FILES,
    help="File for the times.  [default: tuning.json in the build's folder, where gemm looks]",
)
@count_option(
    "--gpus",
    section=METHOD,
    most=MOST_GPUS,
    default=1,
    show_default=True,
    help="GPUs of this machine to measure on, one problem at a time on each.",
)
@option("--again", is_flag=True, section=METHOD, help="Also measure what the table already has.")
@option(
    "--dependent",
    is_flag=True,
    section=METHOD,
    help="Time chains of dependent launches, so that gemm picks the kernels that are fastest in chains.",
)
@build_option
@json_option
def command(
    problems: Sequence[Problem],
    models: Sequence[tuple[str, int, int]],
    files: Sequence[Path],
    tokens: Sequence[int],
    mode: QuantMode,
    table: Path | None,
    gpus: int,
    again: bool,
    dependent: bool,
    folder: Path | None,
    as_json: bool,
) -> None:
    """Measure the built kernels on problems, so that gemm picks by measured times, not by estimates.

    Every time is written at once, and an interrupted run resumes. Rebuilt kernels are measured again.
    """
    from w4a16gen.choose.timing_table import TABLE, TuningTable
    from w4a16gen.measure.tune import Job

    named = named_problems(problems, models, files, tokens, mode)
    library = services().load(folder)
    gpu = library.hopper_device()
    same = [found for found in library.hopper_devices() if found.name == gpu.name]
    if gpus > len(same):
        raise click.UsageError(f"--gpus {gpus} is more than the {len(same)} {gpu.name} of this machine")
    path = table or library.build.folder / TABLE
    known = TuningTable(gpu.name, gpu.sm_count, dependent=dependent)
    if path.exists():
        known = TuningTable.read(path).updated(known)  # raises if it is of another GPU or of other launches
    driver = services().find_driver()
    versions = {
        "w4a16gen": __version__,
        "compiler": str(library.build.manifest.compiler),
        "driver": "none" if driver is None else f"CUDA {driver.cuda_version[0]}.{driver.cuda_version[1]}",
    }
    job = Job(library, gpu, mode, path, known, again, dependent, versions)
    devices = [found.index for found in same[:gpus]]
    outcomes = job.run(named, devices, tell=note, show_progress=services().show_progress)
    if as_json:
        measured = [outcome.as_json() for outcome in outcomes]
        print_result("tune", {"gpu": gpu.as_json(), "table": str(path), "problems": measured})
    note(f"Wrote {path}" + ("" if table else ". New processes will use it to choose kernels."))
