"""`w4a16gen tune`: measure kernels for later choices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from w4a16gen.cli.cluster import ClusterChoice, cluster_options, tell_nodes
from w4a16gen.cli.gpus import GpuChoice, card_option
from w4a16gen.cli.help import FILES, METHOD, WHICH_KERNELS, ExampleCommand, option
from w4a16gen.cli.options import (
    Parsed,
    build_option,
    count_option,
    epilogues_option,
    generated_option,
    jobs_option,
    json_option,
    parse_minutes,
)
from w4a16gen.cli.output import note, print_result
from w4a16gen.cli.paths import NamedPath
from w4a16gen.cli.problems import checkpoint_option, checkpoint_problems, named_problems, problems_options
from w4a16gen.cli.tuning import How, build_and_tune, table_of, tune_build
from w4a16gen.kernels.config import Epilogue
from w4a16gen.kernels.named_spaces import GEMM_SPACES
from w4a16gen.wording import counted

if TYPE_CHECKING:
    from w4a16gen.kernels.config import QuantMode
    from w4a16gen.kernels.problem import Problem
    from w4a16gen.measure.space_tuning import SpaceTuned

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
@epilogues_option
@checkpoint_option
@option(
    "--space",
    type=click.Choice(list(GEMM_SPACES)),
    metavar="SPACE",
    section=WHICH_KERNELS,
    help="Also build the kernels of a space, such as native, that are estimated to be near the fastest. Leaves a "
    "build of the smallest set within 1 % of the fastest on every problem. CUTLASS's and other modes' kernels stay.",
)
@option(
    "--table",
    type=NamedPath(dir_okay=False),
    section=FILES,
    help="File for the times.  [default: tuning.json in the build's folder, where gemm looks]",
)
@count_option(
    "--gpus",
    section=METHOD,
    most=MOST_GPUS,
    help="GPUs to measure on, one problem at a time on each.  [default: 1; with --ray all of each kind]",
)
@card_option
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
@cluster_options
@build_option
@json_option
def command(
    problems: Sequence[Problem],
    models: Sequence[tuple[str, int, int]],
    files: Sequence[Path],
    tokens: Sequence[int],
    mode: QuantMode,
    epilogues: Sequence[Epilogue],
    checkpoints: Sequence[Path],
    space: str | None,
    table: Path | None,
    gpus: int | None,
    card: str | None,
    again: bool,
    dependent: bool,
    budget: float | None,
    generated: Path,
    jobs: int | None,
    ray: str | None,
    ray_env: Path | None,
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
    where = GpuChoice(ClusterChoice(ray, ray_env), gpus, card)
    how = How(table, again, dependent, epilogues or (Epilogue.NONE,))
    if space is None:
        found = None
        measured = tune_build(by_mode, seconds, where, how, folder)
    else:
        if set(epilogues) - {Epilogue.NONE}:
            raise click.UsageError(
                "--epilogue does not go with --space: `w4a16gen build --space` builds such kernels, then tune them"
            )
        if table is not None:
            raise click.UsageError("--table does not go with --space: the times belong to the build that is left")
        from w4a16gen.build.limits import usable_cores
        from w4a16gen.measure.space_tuning import SpaceRequest

        request = SpaceRequest(space, by_mode, folder or _default_folder(), jobs or usable_cores(), seconds)
        found, measured = build_and_tune(request, where, how, generated, jobs)
        _say(found, request.folder)
    if ray is not None:
        tell_nodes(measured.nodes)
    if as_json:
        of_space = None if found is None else found.as_json()
        print_result("tune", measured.as_json() | {"space": of_space})
    written = {outcome.card for outcome in measured.outcomes if outcome.times}
    for path in (path for card_name, path in measured.tables.items() if card_name in written):
        used = path == table_of(measured.folder)
        note(f"Wrote {path}" + (". New processes will use it to choose kernels." if used else ""))


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


def _default_folder() -> Path:
    from w4a16gen.runtime.folders import default_build_folder

    return default_build_folder()


def _say(found: SpaceTuned, folder: Path) -> None:
    """Say what is left, and what the budget left out."""
    summary = found.as_json()
    if found.losses:
        mean, worst = summary["mean_loss"], summary["worst_loss"]
        note(
            f"{folder} has {counted(len(found.kernels), 'kernel')} for {counted(len(found.losses), 'problem')}. "
            f"Calls take {mean:.3f} times as long as the fastest kernel measured, at worst {worst:.3f}"
        )
    if found.not_built or found.not_measured:
        note(
            f"{found.not_built} of {found.promising} promising kernels are not built, and "
            f"{counted(found.not_measured, 'problem')} not measured: the same command goes on",
            label="warning:",
        )
