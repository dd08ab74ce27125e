"""The commands on which kernel is fastest: bench measures, explain estimates as `gemm` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from w4a16gen import dispatch, sweep
from w4a16gen.api import load
from w4a16gen.bench import hopper_gpu
from w4a16gen.cli.app import (
    Parsed,
    build_option,
    json_option,
    main,
    mode_option,
    notes,
    print_json,
    print_table,
    problem_arguments,
    show_progress,
)
from w4a16gen.config import QuantMode
from w4a16gen.errors import InvalidValueError
from w4a16gen.models import MODELS, model_problems
from w4a16gen.problem import Problem

MODEL_TOKENS = (1, 16, 64, 256, 1024)
HEADINGS = ("m x n x k", "kernel", "us", "dependent us", "TB/s", "TFLOP/s", "over cuBLAS FP16")


def parse_problem(text: str) -> Problem:
    """Read `MxNxK` or `MxNxK,GROUP`; the group is 128 unless given.

    Raises:
        InvalidValueError: if the text is anything else.
    """
    shape, _, group = text.partition(",")
    parts = [*shape.split("x"), group or "128"]
    if len(parts) != 4 or not all(part.isdigit() and int(part) > 0 for part in parts):  # noqa: PLR2004
        raise InvalidValueError(f"{text!r} must be MxNxK or MxNxK,GROUP, positive integers such as 16x4096x4096,128")
    return Problem(*(int(part) for part in parts))


def parse_model(text: str) -> tuple[str, int, int]:
    """Read `NAME`, `NAME/GPUS`, or either and `,GROUP`; one GPU and groups of 128 unless given.

    Raises:
        InvalidValueError: if the text is anything else, or there is no such model.
    """
    rest, comma, group = text.partition(",")
    name, slash, gpus = rest.partition("/")
    counts = (gpus if slash else "1", group if comma else "128")
    if name not in MODELS or not all(count.isdigit() and int(count) > 0 for count in counts):
        raise InvalidValueError(
            f"{text!r} must be NAME[/GPUS][,GROUP] such as llama-3-70b/8,128; the models are {', '.join(MODELS)}"
        )
    return name, int(counts[0]), int(counts[1])


@main.command()
@problem_arguments(least_tokens=1)
@click.option("--top", type=click.IntRange(min=1), default=5, show_default=True, help="Kernels to show.")
@build_option
@json_option
def explain(problem: Problem, mode: QuantMode, top: int, folder: Path | None, as_json: bool) -> None:
    """Show which built kernel a call with M tokens, N output channels and K values gets, and the runners-up."""
    configs = load(folder).configs()
    used = next((config for config in dispatch.kernels_in_use() if config.mode is mode), None)
    chosen = used or dispatch.choose(configs, mode, problem)
    estimated = dispatch.estimate(configs, mode, problem)
    if used is not None:
        notes.print(f"{dispatch.KERNELS_VARIABLE} names {used.name}: calls use it, whatever the estimates")
    if as_json:
        shown = [{"kernel": config.name, "estimated_microseconds": round(us, 2)} for config, us in estimated[:top]]
        print_json({"problem": vars(problem), "mode": mode.value, "chosen": chosen.name, "estimates": shown})
        return
    if estimated:
        rows = ((config.name.removeprefix("w4a16_sm90_"), f"{us:.1f}") for config, us in estimated[:top])
        print_table(
            f"{problem}, mode {mode}" + (": the first is chosen" if used is None else ""),
            ("kernel", "estimated us"),
            rows,
        )
        shape = f"{problem.m}x{problem.n}x{problem.k},{problem.group_size}"
        notes.print(
            f"{len(estimated)} native kernels of the build can run it. Estimates are for an H100 and off by 12 % (root "
            f"mean square); `w4a16gen bench --problem {shape}` measures."
        )
    else:
        click.echo(chosen.name)
    if not estimated and used is None:
        notes.print("No native kernel of the build can run it: chosen by a rule of thumb among CUTLASS's.")


@main.command()
@click.option(
    "--problem",
    "problems",
    multiple=True,
    type=Parsed("MxNxK[,GROUP]", parse_problem),
    help="Tokens, output channels, K; may be repeated.",
)
@click.option(
    "--model",
    "models",
    multiple=True,
    type=Parsed("NAME[/GPUS][,GROUP]", parse_model),
    help="The layers of a model on one of so many GPUs, such as llama-3-70b/8; may be repeated.",
)
@click.option(
    "--tokens", multiple=True, type=click.IntRange(min=1), default=MODEL_TOKENS, show_default=True, help="m of --model."
)
@mode_option
@click.option("--finalists", type=click.IntRange(min=1), default=4, show_default=True, help="Kernels timed in turn.")
@click.option("--rounds", type=click.IntRange(min=1), default=9, show_default=True, help="Timed replays of each.")
@click.option(
    "--smallest-set",
    "slack",
    type=click.FloatRange(min=0),
    help="Also name the smallest set of kernels within so many percent of the fastest on every problem.",
)
@build_option
@json_option
def bench(
    problems: Sequence[Problem],
    models: Sequence[tuple[str, int, int]],
    tokens: Sequence[int],
    mode: QuantMode,
    finalists: int,
    rounds: int,
    slack: float | None,
    folder: Path | None,
    as_json: bool,
) -> None:
    """Time the kernels of the build on problems, with cold L2, beside cuBLAS FP16 where torch is installed."""
    named = [("", problem) for problem in problems]
    for name, gpus, group_size in models:
        named += model_problems(name, tokens, tensor_parallel=gpus, group_size=group_size)
    if not named:
        raise click.UsageError("name what to time: --problem 16x4096x4096, or --model llama-3-8b")
    library = load(folder)
    gpu = hopper_gpu(library)
    comparisons = []
    for name, problem in named:
        asked = problem if mode.is_grouped else Problem(problem.m, problem.n, problem.k, problem.k)
        with show_progress(str(asked)) as progress:
            found = sweep.compare(library, asked, mode, finalists=finalists, rounds=rounds, progress=progress)
        comparisons.append(found)
        if found.screened:
            left_out = f"; {found.left_out} kernels with tiles far from m not timed" if found.left_out else ""
            layer = f" ({name})" if name else ""
            notes.print(f"{asked}{layer}: {found.best.median:.2f} us, {found.best.contender}{left_out}")
        else:
            notes.print(f"{asked}: no built kernel of mode {mode} can run it")
    small = sweep.smallest_set(comparisons, slack / 100) if slack is not None else []
    if not any(found.cublas for found in comparisons):
        notes.print("torch is not installed: cuBLAS FP16 was not timed beside the kernels")
    if as_json:
        print_json(
            {"gpu": gpu, "comparisons": [found.as_json() for found in comparisons], "smallest_set": small},
        )
        return
    print_table(f"{gpu['name']}, mode {mode}, cold L2, medians", HEADINGS, map(_row, comparisons))
    for name in small:
        click.echo(name)


def _row(found: sweep.Comparison) -> tuple[str, ...]:
    """Show the fastest kernel of one problem."""
    problem = found.problem
    shape = f"{problem.m}x{problem.n}x{problem.k}"
    if not found.screened:
        return (shape, "none", *[""] * (len(HEADINGS) - 2))
    best, cublas = found.best, found.cublas
    scale_bytes = 2 * problem.groups * problem.n * (2 if found.mode.has_zeros else 1)
    weight_bytes = problem.n * problem.k / 2 + scale_bytes
    dependent = best.dependent_median
    return (
        shape,
        best.contender.removeprefix("w4a16_sm90_"),
        f"{best.median:.2f}",
        "" if dependent is None else f"{dependent:.2f}",
        f"{weight_bytes / best.median / 1e6:.2f}",
        f"{problem.flops / best.median / 1e6:.0f}",
        "" if cublas is None else f"{cublas.median / best.median:.2f}",
    )
