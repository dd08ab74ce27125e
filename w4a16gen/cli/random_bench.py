"""`w4a16gen bench --random`: a comparison with rivals on layers and token counts that nobody picked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from w4a16gen import __version__
from w4a16gen.cli.first_build import load_or_build
from w4a16gen.cli.help import METHOD, WHICH_PROBLEMS, option
from w4a16gen.cli.options import Parsed, count_option, counts, parse_minutes
from w4a16gen.cli.output import note, print_result
from w4a16gen.cli.report import write_pages
from w4a16gen.cli.services import services
from w4a16gen.cli.tables import Column, print_table
from w4a16gen.errors import BuildError
from w4a16gen.kernels.named_spaces import GEMM_SPACES

if TYPE_CHECKING:
    from w4a16gen.kernels.config import QuantMode
    from w4a16gen.measure.bands import Band, Standing
    from w4a16gen.measure.random_bench import RandomBench
    from w4a16gen.measure.rivals import Rival

_Command = TypeVar("_Command", bound=Callable[..., Any])
MOST_CELLS = 100_000
SECONDS_PER_MINUTE = 60
COLUMNS = (
    Column("tokens", keep=True),
    Column("cells", right=True, keep=True),
    Column("rival / call", right=True, keep=True),
    Column("worst", right=True, keep=True),
    Column("lost", right=True, keep=True),
    Column("by > 5 %", right=True, keep=True),
    Column("worst cell"),
    Column("call / best", right=True),
    Column("worst loss", right=True),
    Column("its cell"),
    Column("rival / best", right=True),
)
RIVAL_COLUMNS = (Column("call beside", keep=True), *COLUMNS[:7])


@dataclass(frozen=True)
class RandomChoice:
    """What the options of the command say."""

    count: int
    seed: int
    budget: float | None
    """Minutes."""
    mode: QuantMode
    finalists: int | None
    rounds: int
    rivals: Sequence[Rival]
    space: str | None


def random_options(command: _Command) -> _Command:
    """Add the options of a draw; the command gets random, seed, budget and choose_from."""
    for add in (
        option(
            "--choose-from",
            type=click.Choice(list(GEMM_SPACES)),
            metavar="SPACE",
            section=METHOD,
            help="With --random: choose the call's kernel among those of SPACE, such as default, in a larger build.",
        ),
        option(
            "--budget",
            type=Parsed("MINUTES", parse_minutes),
            section=METHOD,
            help="With --random: begin no cell that would end after MINUTES, and say how many are left.",
        ),
        option(
            "--seed",
            type=counts(0),
            default=0,
            show_default=True,
            section=WHICH_PROBLEMS,
            help="With --random: the draw depends on the seed alone, not on the GPU.",
        ),
        count_option(
            "--random",
            section=WHICH_PROBLEMS,
            most=MOST_CELLS,
            help="Draw COUNT layers and token counts at random, half of the layers from known models. Groups of 128.",
        ),
    ):
        command = add(command)
    return command


def random_bench(choice: RandomChoice, folder: Path | None, report: Path | None, *, wide: bool, as_json: bool) -> int:
    """Time a draw, show what it says, and return the exit status."""
    from w4a16gen.measure.cell import CellOptions
    from w4a16gen.measure.random_bench import RandomDraw

    written_to = report or Path(f"bench-random-{choice.seed}")
    budget = None if choice.budget is None else choice.budget * SECONDS_PER_MINUTE
    finalists = CellOptions().finalists if choice.finalists is None else choice.finalists
    measured: RandomBench = services().random_bench(
        load_or_build(folder),
        RandomDraw(choice.count, choice.seed, choice.mode, budget),
        CellOptions(finalists, choice.rounds, choice.rivals, choice.space),
        version=__version__,
        report=written_to,
        tell=note,
        show_progress=services().show_progress,
    )
    written = write_pages(written_to, measured.run, measured.rows)
    if as_json:
        print_result("bench", measured.as_json() | {"written": [str(path) for path in written], "nodes": []})
    else:
        _show(measured, wide=wide)
    _say_what_is_missing(measured, written_to)
    if not measured.wrong:
        return 0
    note(f"wrong results: {', '.join(measured.wrong)}", label="error:")
    return BuildError.exit_code


def _show(measured: RandomBench, *, wide: bool) -> None:
    bands = measured.bands
    if not bands:
        return
    where = f"{measured.gpu.name}, mode {measured.draw.mode}, seed {measured.draw.seed}, cold L2"
    title = f"The call beside the fastest FP16 rival, cuBLAS included; {where}"
    print_table(title, COLUMNS, [_cells(band) for band in bands], wide=wide)
    rows = [
        (name, band.tokens, *_standing(standing))
        for name in dict.fromkeys(name for band in bands for name in band.rivals)
        for band in bands
        if (standing := band.rivals.get(name))
    ]
    if rows:
        click.echo()
        print_table("The call beside each rival; bf16 draws less power than fp16", RIVAL_COLUMNS, rows, wide=wide)


def _cells(band: Band) -> tuple[str, ...]:
    """Return the cells of a band's row, under COLUMNS."""
    beside = _standing(band.call)[1:] if band.call else ("",) * 5
    loss = ("", "", "")
    if band.choice is not None:
        loss = (f"{1 / band.choice.mean:.3f}", f"{1 / band.choice.worst:.3f}", band.choice.worst_cell)
    return (band.tokens, str(band.cells), *beside, *loss, f"{band.best.mean:.3f}" if band.best else "")


def _standing(standing: Standing) -> tuple[str, ...]:
    return (
        str(standing.cells),
        f"{standing.mean:.3f}",
        f"{standing.worst:.3f}",
        str(standing.lost),
        str(standing.lost_clearly),
        standing.worst_cell,
    )


def _say_what_is_missing(measured: RandomBench, folder: Path) -> None:
    for (rival, reason), cells in measured.rivals_left_out.items():
        note(f"{rival} was not timed in {cells} of {len(measured.cells)} cells: {reason}")
    unscreened = sum(found.left_out for found in measured.comparisons)
    if unscreened:
        note(
            f"{unscreened / len(measured.comparisons):.0f} kernels a cell, on average, were not timed: their token "
            "tiles do not suit the problem, or their estimate is far from the best one"
        )
    if measured.left_out:
        note(
            f"{measured.left_out} of {measured.draw.count} cells are left out, because the time is used up: the same "
            f"command goes on with {folder}",
            label="warning:",
        )
