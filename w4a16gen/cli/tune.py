"""`w4a16gen tune`: measure kernels for later choices."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from w4a16gen import __version__
from w4a16gen.cli.help import FILES, METHOD, WHICH_KERNELS, ExampleCommand, option
from w4a16gen.cli.options import (
    Parsed,
    build_option,
    count_option,
    generated_option,
    jobs_option,
    json_option,
    parse_minutes,
)
from w4a16gen.cli.output import note, print_result
from w4a16gen.cli.problems import checkpoint_option, checkpoint_problems, named_problems, problems_options
from w4a16gen.cli.progress import termination_interrupts
from w4a16gen.cli.services import services
from w4a16gen.errors import NotBuiltError
from w4a16gen.kernels.named_spaces import SPACES

if TYPE_CHECKING:
    from w4a16gen.choose.timing_table import TuningTable
    from w4a16gen.kernels.config import KernelConfig, QuantMode
    from w4a16gen.kernels.device import Device
    from w4a16gen.kernels.problem import Problem
    from w4a16gen.measure.space_tuning import SpaceTuned, Workshop
    from w4a16gen.measure.tune import Job
    from w4a16gen.runtime.library import Library

MOST_GPUS = 1024
SECONDS_PER_MINUTE = 60


@click.command(
    "tune",
    cls=ExampleCommand,
    examples=(
        ("w4a16gen tune --model llama-3-8b --tokens 1 --tokens 16", "a model's layers with 1 and 16 tokens"),
        ("w4a16gen tune --model llama-3-70b/8 --gpus 8", "on eight GPUs"),
        ("w4a16gen tune --space native --checkpoint DIR --budget 10", "the kernels that a checkpoint needs"),
    ),
)
@problems_options
@checkpoint_option
@option(
    "--space",
    type=click.Choice(list(SPACES)),
    metavar="SPACE",
    section=WHICH_KERNELS,
    help="Also build the kernels of a space, such as native, that are estimated to be near the fastest. Leaves a "
    "build of the smallest set within 1 % of the fastest on every problem. CUTLASS's and other modes' kernels stay.",
)
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
@option(
    "--budget",
    type=Parsed("MINUTES", parse_minutes),
    section=METHOD,
    help="End within about MINUTES. What is left out is said, and the same command goes on.",
)
@generated_option
@jobs_option
@build_option
@json_option
def command(
    problems: Sequence[Problem],
    models: Sequence[tuple[str, int, int]],
    files: Sequence[Path],
    tokens: Sequence[int],
    mode: QuantMode,
    checkpoints: Sequence[Path],
    space: str | None,
    table: Path | None,
    gpus: int,
    again: bool,
    dependent: bool,
    budget: float | None,
    generated: Path,
    jobs: int | None,
    folder: Path | None,
    as_json: bool,
) -> None:
    """Measure the built kernels on problems, so that gemm picks by measured times, not by estimates.

    Every time is written at once, and an interrupted run resumes. Rebuilt kernels are measured again.

    With --space, the kernels need not be built: the promising ones of a space are built first, and the few that are
    needed are kept.
    """
    by_mode = _problems_by_mode(problems, models, files, tokens, mode, checkpoints)
    seconds = None if budget is None else budget * SECONDS_PER_MINUTE
    if space is None:
        deadline = None if seconds is None else time.monotonic() + seconds
        library = services().load(folder)
        gpu = library.hopper_device()
        devices = _devices(library.hopper_devices(), gpu, gpus)
        outcomes = []
        for of_mode, named in by_mode.items():
            job = _job(library, gpu, of_mode, table, again=again, dependent=dependent, deadline=deadline)
            outcomes += job.run(named, devices, tell=note, show_progress=services().show_progress)
        found = None
        left_out = sum(map(len, by_mode.values())) - len(outcomes)
        if left_out:
            note(f"{left_out} problems are not measured: the same command goes on", label="warning:")
    else:
        if table is not None:
            raise click.UsageError("--table does not go with --space: the times belong to the build that is left")
        from w4a16gen.build.limits import usable_cores
        from w4a16gen.measure.space_tuning import SpaceRequest, tune_space

        gpu = _find_gpu(gpus)
        request = SpaceRequest(space, by_mode, folder or _default_folder(), jobs or usable_cores(), seconds)
        _known(_table_of(request.folder, None), gpu, dependent=dependent)  # refused before anything is built

        def job_of(library: Library, of_mode: QuantMode) -> Job:
            return _job(library, gpu, of_mode, None, again=again, dependent=dependent)

        found = tune_space(request, gpu, job_of, _workshop(request.folder, generated, jobs), gpus=gpus)
        outcomes = list(found.outcomes)
        library = services().load(request.folder)
        _say(found, request.folder)
    path = _table_of(library.build.folder, table)
    if as_json:
        measured = [outcome.as_json() for outcome in outcomes]
        of_space = None if found is None else found.as_json()
        print_result("tune", {"gpu": gpu.as_json(), "table": str(path), "problems": measured, "space": of_space})
    if any(outcome.times for outcome in outcomes):
        note(f"Wrote {path}" + ("" if table else ". New processes will use it to choose kernels."))


def _workshop(folder: Path, generated: Path, jobs: int | None) -> Workshop:
    """Return the services of this command that build and load kernels."""
    from w4a16gen.measure.space_tuning import Workshop

    def load() -> Library | None:
        try:
            return services().load(folder)
        except NotBuiltError:
            return None

    def build(configs: Sequence[KernelConfig]) -> Library:
        title = f"Building {len(configs)} kernels"
        with termination_interrupts(), services().show_progress(title, lines=True) as progress:
            report = services().build(configs, generated=generated, folder=folder, jobs=jobs, progress=progress)
        note(f"{report.compiled} kernels compiled, {len(report.build.configs) - report.compiled} up to date")
        for failure in report.failures:
            note(f"{failure.name}: {failure.summary}; log: {failure.log}", label="FAILED")
        return services().load(folder)

    def compiled(configs: Sequence[KernelConfig]) -> set[KernelConfig]:
        return set(services().compiled(configs, folder))

    return Workshop(load, build, compiled, note, services().show_progress)


def _problems_by_mode(
    problems: Sequence[Problem],
    models: Sequence[tuple[str, int, int]],
    files: Sequence[Path],
    tokens: Sequence[int],
    mode: QuantMode,
    checkpoints: Sequence[Path],
) -> dict[QuantMode, list[tuple[str, Problem]]]:
    """Return the problems that the options name, by mode, each once: models share layers."""
    by_mode = checkpoint_problems(checkpoints, tokens)
    if problems or models or files or not checkpoints:
        named = named_problems(problems, models, files, tokens, mode, others=", --checkpoint")
        by_mode[mode] = [*named, *by_mode.get(mode, [])]
    names: dict[QuantMode, dict[Problem, str]] = {of_mode: {} for of_mode in by_mode}
    for of_mode, every in by_mode.items():
        for name, problem in every:
            names[of_mode].setdefault(problem, name)
    return {of_mode: [(name, problem) for problem, name in found.items()] for of_mode, found in names.items()}


def _devices(hopper: Sequence[Device], gpu: Device, gpus: int) -> list[int]:
    """Return the GPUs to measure on: as many as asked for, of the first one's model."""
    same = [found.index for found in hopper if found.name == gpu.name]
    if gpus > len(same):
        raise click.UsageError(f"--gpus {gpus} is more than the {len(same)} {gpu.name} of this machine")
    return same[:gpus]


def _find_gpu(gpus: int) -> Device:
    """Return the first Hopper GPU, before anything is built."""
    from w4a16gen.runtime.devices import first_hopper

    driver = services().find_driver()
    found = () if driver is None else driver.gpus
    gpu = first_hopper(found)
    _devices([device for device in found if device.is_hopper], gpu, gpus)
    return gpu


def _default_folder() -> Path:
    from w4a16gen.runtime.folders import default_build_folder

    return default_build_folder()


def _table_of(folder: Path, table: Path | None) -> Path:
    from w4a16gen.choose.timing_table import TABLE

    return table or folder / TABLE


def _known(path: Path, gpu: Device, *, dependent: bool) -> TuningTable:
    """Return the times that are known.

    Raises:
        InvalidValueError: if the table is of another GPU or of other launches.
    """
    from w4a16gen.choose.timing_table import TuningTable

    known = TuningTable(gpu.name, gpu.sm_count, dependent=dependent)
    return TuningTable.read(path).updated(known) if path.exists() else known


def _job(
    library: Library,
    gpu: Device,
    mode: QuantMode,
    table: Path | None,
    *,
    again: bool,
    dependent: bool,
    deadline: float | None = None,
) -> Job:
    """Return the measuring job for a build."""
    from w4a16gen.measure.tune import Job

    path = _table_of(library.build.folder, table)
    driver = services().find_driver()
    versions = {
        "w4a16gen": __version__,
        "compiler": str(library.build.manifest.compiler),
        "driver": "none" if driver is None else f"CUDA {driver.cuda_version[0]}.{driver.cuda_version[1]}",
    }
    known = _known(path, gpu, dependent=dependent)
    return Job(library, gpu, mode, path, known, again, dependent, versions, deadline=deadline)


def _say(found: SpaceTuned, folder: Path) -> None:
    """Say what is left, and what the budget left out."""
    summary = found.as_json()
    if found.losses:
        mean, worst = summary["mean_loss"], summary["worst_loss"]
        note(
            f"{folder} has {len(found.kernels)} kernels for {len(found.losses)} problems. Calls take {mean:.3f} times "
            f"as long as the fastest kernel measured, at worst {worst:.3f}"
        )
    if found.not_built or found.not_measured:
        note(
            f"{found.not_built} of {found.promising} promising kernels are not built, and {found.not_measured} "
            "problems are not measured: the same command goes on",
            label="warning:",
        )
