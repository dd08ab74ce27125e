"""`w4a16gen bench`: time the built kernels side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from w4a16gen import __version__
from w4a16gen.cli.cluster import ClusterChoice, cluster_options, tell_nodes
from w4a16gen.cli.first_build import load_or_build
from w4a16gen.cli.gpus import GpuChoice, card_option, one_kind_of
from w4a16gen.cli.help import METHOD, OUTPUT, ExampleCommand, option
from w4a16gen.cli.moe_bench import MOE_TOKENS, MoeChoice, moe_bench, moe_option
from w4a16gen.cli.options import (
    Parsed,
    build_option,
    count_option,
    epilogues_option,
    json_option,
    parse_percent,
    wide_option,
)
from w4a16gen.cli.output import note, print_result
from w4a16gen.cli.paths import NamedPath
from w4a16gen.cli.problems import named_problems, problems_options
from w4a16gen.cli.random_bench import RandomChoice, random_bench, random_options
from w4a16gen.cli.report import write_pages
from w4a16gen.cli.services import services
from w4a16gen.cli.step_bench import StepChoice, step_bench, step_options
from w4a16gen.cli.tables import Column, print_table
from w4a16gen.errors import BuildError
from w4a16gen.kernels.config import Epilogue

if TYPE_CHECKING:
    from w4a16gen.kernels.config import QuantMode, Target
    from w4a16gen.kernels.problem import Problem
    from w4a16gen.measure.bench import Bench
    from w4a16gen.measure.record import Row
    from w4a16gen.measure.results import Comparison
    from w4a16gen.measure.rivals import Rival

RIVAL_PACKAGES = "humming-kernels, quack-kernels, lmdeploy, torch"
MOST_ROUNDS = 10_000
COLUMNS = (
    Column("M x N x K", keep=True),
    Column("fastest kernel", keep=True, own_line=True),
    Column("us", right=True, keep=True),
    Column("vs FP16", right=True),
    Column("gemm() us", right=True),
    Column("dependent us", right=True),
    Column("of floor", right=True),
    Column("TFLOP/s", right=True),
    Column("GB/s", right=True),
    Column("floor us", right=True),
    Column("vs other 4-bit", right=True),
)

_NAMED = ("problems", "models", "files")
_OF_PROBLEMS = (*_NAMED, "tokens")
_OF_STEPS = ("sequences", "context", "prefill", "layers")
_OF_DRAWS = ("seed", "budget", "choose_from")
_OF_SINGLES = ("slack", "report_folder")
_OF_CLUSTERS = ("ray", "ray_env", "card")
_FRONT = 4
"""Columns in front of those of targets."""


@click.command(
    "bench",
    cls=ExampleCommand,
    examples=(
        ("w4a16gen bench --problem 16x4096x4096", "one problem"),
        ("w4a16gen bench --model llama-3-8b --tokens 1 --tokens 16 --report out", "a model's layers, with plots"),
        ("w4a16gen bench --random 150 --seed 1 --budget 10", "layers and token counts drawn at random"),
        ("w4a16gen bench --step llama-3-8b --sequences 1 --sequences 8", "a decoder's step in one CUDA graph"),
        ("w4a16gen bench --moe qwen3-30b-a3b --tokens 16", "a layer of experts, with grouped kernels"),
        ("w4a16gen build --space default --space trtllm", "TensorRT-LLM's set beside ours; then bench shows both"),
    ),
)
@problems_options
@epilogues_option
@random_options
@step_options
@moe_option
@count_option("--finalists", section=METHOD, help="Kernels to time in alternation.  [default: 4; with --random 2]")
@count_option(
    "--rounds",
    section=METHOD,
    most=MOST_ROUNDS,
    default=9,
    show_default=True,
    help="Timed repetitions per kernel; long problems use a third of this number of one-second blocks.",
)
@option(
    "--rivals/--no-rivals",
    default=None,
    section=METHOD,
    help=f"Also time other 4-bit kernels, if installed: {RIVAL_PACKAGES}.  [default: only with --random and --moe]",
)
@option(
    "--rival",
    "rival_names",
    metavar="NAME",
    multiple=True,
    section=METHOD,
    help="Also time this rival only: humming, quack_bf16, turbomind or tinygemm_bf16.",
)
@option(
    "--smallest-set",
    "slack",
    type=Parsed("PERCENT", parse_percent),
    section=OUTPUT,
    help="Report the smallest kernel set within PERCENT of the fastest on every problem.",
)
@option(
    "--report",
    "report_folder",
    type=NamedPath(file_okay=False),
    section=OUTPUT,
    help="Write JSON lines, CSV, plots and an HTML page into this folder.",
)
@wide_option
@cluster_options
@card_option
@build_option
@json_option
def command(
    problems: Sequence[Problem],
    models: Sequence[tuple[str, int, int]],
    files: Sequence[Path],
    tokens: Sequence[int],
    mode: QuantMode,
    epilogues: Sequence[Epilogue],
    random: int | None,
    seed: int,
    budget: float | None,
    choose_from: str | None,
    steps: Sequence[tuple[str, int, int]],
    sequences: Sequence[int],
    context: int,
    prefill: int | None,
    layers: int | None,
    mixtures: Sequence[str],
    finalists: int | None,
    rounds: int,
    rivals: bool | None,
    rival_names: Sequence[str],
    slack: float | None,
    report_folder: Path | None,
    wide: bool,
    ray: str | None,
    ray_env: Path | None,
    card: str | None,
    folder: Path | None,
    as_json: bool,
) -> int:
    """Time the built kernels with a cold L2 cache, beside cuBLAS FP16 if torch is installed.

    If kernels of several targets are built, the fastest of each target is printed for every problem. If ./build has no
    build yet, the default kernels are built first.

    With --random, layers and token counts are drawn from a seed. Each cell is saved as soon as it is timed, so that an
    interrupted run resumes. The result is the lead over rivals, and the loss of the choice, by bands of token counts.

    With --step, a whole decoder's step is timed in one CUDA graph: this package's products, cuBLAS FP16 and other 4-bit
    kernels, with the same norms, attention and SwiGLU between them.

    With --moe, a layer of experts is timed: grouped kernels that `w4a16gen build --space default --space experts`
    builds, dense experts in BF16 with torch, and humming's kernels where they are installed. The routing, each product
    and the combination are timed by themselves too.
    """
    from w4a16gen.measure.bench import BenchOptions
    from w4a16gen.measure.rivals import RIVALS, RIVALS_OF_DRAWS

    named_rivals = _named_rivals(rival_names, rivals)
    if mixtures:
        _refuse("--moe runs on this machine", *_OF_CLUSTERS)
        _refuse("--moe lets the kernels apply the gate if the build has such ones", "epilogues")
        _refuse("--moe times the kernels that calls get", *_OF_SINGLES, "finalists")
        _refuse("--moe times layers of experts", "random", *_NAMED, *_OF_DRAWS, "steps", *_OF_STEPS)
        counts = tokens if _is_given("tokens") else MOE_TOKENS
        choice_of_layers = MoeChoice(mixtures, counts, mode, rounds, _wants_humming(named_rivals, rivals))
        return moe_bench(choice_of_layers, folder, wide=wide, as_json=as_json)
    if steps:
        _refuse("--step runs on this machine", *_OF_CLUSTERS)
        _refuse("--step times products with SwiGLU and residual if the build has them", "epilogues")
        _refuse("--step times a whole model", "random", *_OF_PROBLEMS, *_OF_DRAWS, *_OF_SINGLES, "finalists")
        of_steps = named_rivals or (RIVALS_OF_DRAWS if rivals else ())
        choice = StepChoice(steps, sequences, context, prefill, layers, mode, rounds, of_steps)
        return step_bench(choice, folder, wide=wide, as_json=as_json)
    _refuse("only --step takes them", *_OF_STEPS)
    where = GpuChoice(ClusterChoice(ray, ray_env), card=card)
    if random is not None:
        _refuse("--random runs on this machine", *_OF_CLUSTERS)
        _refuse("--random draws the problems", *_OF_PROBLEMS)
        _refuse("--random times the promising kernels only", "slack")
        _refuse("--random times plain products", "epilogues")
        chosen_rivals = named_rivals or (() if rivals is False else RIVALS_OF_DRAWS)
        return random_bench(
            RandomChoice(random, seed, budget, mode, finalists, rounds, chosen_rivals, choose_from),
            folder,
            report_folder,
            wide=wide,
            as_json=as_json,
        )
    _refuse("only --random takes them", *_OF_DRAWS)

    named = named_problems(problems, models, files, tokens, mode, others=", --random, --step, --moe")
    options = BenchOptions(
        finalists or 4,
        rounds,
        named_rivals or (RIVALS if rivals else ()),
        None if slack is None else slack / 100,
        tuple(epilogues) or (Epilogue.NONE,),
    )
    library = load_or_build(folder) if ray is None else services().load(folder)
    for epilogue in options.epilogues:
        library.chooser.check_built(mode, epilogue)
    with one_kind_of(where, library) as cards:
        measured: Bench = services().bench(
            library,
            named,
            mode,
            options,
            version=__version__,
            report=report_folder,
            tell=note,
            show_progress=services().show_progress,
            **({} if cards is None else {"cards": cards}),
        )
        nodes = [] if cards is None else cards.executor.summaries
    tell_nodes(nodes)
    if not measured.cublas_timed:
        note("torch is not installed: cuBLAS FP16 was not timed beside the kernels.")
    written = [] if report_folder is None else write_pages(report_folder, measured.run, measured.rows)
    if as_json:
        more = {"written": [str(path) for path in written], "nodes": [node.as_json() for node in nodes]}
        print_result("bench", measured.as_json() | more)
    else:
        _show(measured, mode, wide=wide)
    if not measured.wrong:
        return 0
    note(f"wrong results: {', '.join(measured.wrong)}", label="error:")
    return BuildError.exit_code


def _named_rivals(names: Sequence[str], rivals: bool | None) -> tuple[Rival, ...]:
    """Return the rivals that `--rival` names.

    Raises:
        click.UsageError: if there is none of a name, or `--no-rivals` is given too.
    """
    from w4a16gen.measure.rivals import RIVALS

    if names and rivals is False:
        raise click.UsageError("--rival times a rival, and --no-rivals none: pass one of them")
    known = [rival.name for rival in RIVALS]
    for name in names:
        if name not in known:
            raise click.UsageError(f"--rival {name} must be one of {', '.join(known)}")
    return tuple(rival for rival in RIVALS if rival.name in names)


def _wants_humming(named: Sequence[Rival], rivals: bool | None) -> bool | None:
    """Return whether the user wants humming's kernels beside layers of experts; None if nothing was said.

    Raises:
        click.UsageError: if another rival is named.
    """
    from w4a16gen.measure.rivals import HUMMING

    others = [rival.name for rival in named if rival is not HUMMING]
    if others:
        raise click.UsageError(f"--moe times no rival but {HUMMING.name}: drop --rival {others[0]}")
    return True if named else rivals


def _refuse(reason: str, *parameters: str) -> None:
    """Raise a usage error if the user named one of some parameters, which do not go with another one."""
    given = [
        parameter.opts[0]
        for parameter in click.get_current_context().command.params
        if parameter.name in parameters and _is_given(parameter.name)
    ]
    if given:
        raise click.UsageError(f"{reason}: drop {' and '.join(given)}")


def _is_given(parameter: str) -> bool:
    """Whether the user named a parameter."""
    return click.get_current_context().get_parameter_source(parameter) is not ParameterSource.DEFAULT


def _show(measured: Bench, mode: QuantMode, *, wide: bool) -> None:
    peak = measured.peak
    if peak is not None:
        note(f"The tensor cores reach {peak.burst:.0f} TFLOP/s for 0.1 ms, {peak.sustained:.0f} at the power limit.")
    if measured.rows:
        columns, rows = bench_table(measured)
        print_table(f"{measured.gpu.name}, mode {mode}, cold L2, medians", columns, rows, wide=wide)
    for name in measured.smallest_set:
        click.echo(name)


def bench_table(measured: Bench) -> tuple[Sequence[Column], Sequence[Sequence[str]]]:
    """Return the table of a bench run: a row per problem, and a column per target if several were timed."""
    comparisons = [found for found in measured.comparisons if found.kernels]
    fastest = [_fastest_by_target(found) for found in comparisons]
    targets = sorted({target for times in fastest for target in times})
    if len(targets) < 2:  # noqa: PLR2004
        return COLUMNS, [_cells(row) for row in measured.rows]
    front = COLUMNS[:_FRONT]
    columns = (*front, *(Column(f"{target} us", right=True, keep=True) for target in targets), *COLUMNS[_FRONT:])
    rows = []
    for row, times in zip(measured.rows, fastest, strict=True):
        cells = _cells(row)
        of_targets = (f"{times[target]:.2f}" if target in times else "" for target in targets)
        rows.append((*cells[:_FRONT], *of_targets, *cells[_FRONT:]))
    return columns, rows


def _fastest_by_target(found: Comparison) -> dict[Target, float]:
    """Return the time of the fastest kernel of each target that was timed."""
    from w4a16gen.kernels.config import KernelConfig

    times: dict[Target, float] = {}
    for timing in reversed(found.kernels):
        times[KernelConfig.parse(timing.contender).target] = timing.median
    return times


def _cells(row: Row) -> tuple[str, ...]:
    """Return the cells of a row, under COLUMNS."""
    from w4a16gen.kernels.config import KernelConfig

    def shown(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    rival = row.best_rival_microseconds
    return (
        f"{row.m}x{row.shape}",
        KernelConfig.parse(row.kernel).short_name,
        shown(row.microseconds),
        shown(row.speedup_over_fp16),
        shown(row.chosen_microseconds),
        shown(row.dependent_microseconds),
        shown(row.share_of_floor),
        f"{row.tflops:.0f}",
        f"{row.gigabytes_per_second:.0f}",
        shown(row.floor_microseconds),
        shown(None if rival is None else rival / row.microseconds),
    )
