"""The commands on which kernel is fastest: bench measures, explain shows what `gemm` goes by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from w4a16gen import dispatch, sweep
from w4a16gen.api import load
from w4a16gen.bench import hopper_gpu
from w4a16gen.chooser import Choice
from w4a16gen.cli.app import (
    build_option,
    json_option,
    main,
    notes,
    print_json,
    print_table,
    problem_arguments,
    show_progress,
)
from w4a16gen.cli.problems import problems_options
from w4a16gen.config import QuantMode
from w4a16gen.problem import Problem

HEADINGS = ("m x n x k", "kernel", "us", "dependent us", "TB/s", "TFLOP/s", "over cuBLAS FP16")


@main.command()
@problem_arguments(least_tokens=1)
@click.option("--top", type=click.IntRange(min=1), default=5, show_default=True, help="Kernels to show.")
@build_option
@json_option
def explain(problem: Problem, mode: QuantMode, top: int, folder: Path | None, as_json: bool) -> None:
    """Show which built kernel a call with M tokens, N output channels and K values gets, and the runners-up."""
    library = load(folder)
    used = next((config for config in dispatch.kernels_in_use() if config.mode is mode), None)
    choice = library.choice(mode, problem)
    if used is not None:
        choice = Choice(used, None, f"what {dispatch.KERNELS_VARIABLE} names, whatever it takes")
    estimated = dispatch.estimate(library.configs(), mode, problem)
    fp16 = dispatch.dense_microseconds(problem)
    expected = choice.microseconds or dict(estimated).get(choice.kernel)
    if as_json:
        shown = [{"kernel": config.name, "estimated_microseconds": round(us, 2)} for config, us in estimated[:top]]
        print_json(
            {
                "problem": vars(problem),
                "mode": mode.value,
                "chosen": choice.kernel.name,
                "source": choice.source,
                "microseconds": None if expected is None else round(expected, 2),
                "fp16_microseconds": round(fp16, 2),
                "estimates": shown,
            }
        )
        return
    click.echo(choice.kernel.name)
    time = "" if expected is None else f": {expected:.1f} us"
    notes.print(f"chosen by {choice.source}{time}")
    if expected is not None and fp16 < expected:
        notes.print(
            f"dense FP16 would take about {fp16:.1f} us, less than this: with so many tokens the tensor cores decide, "
            "not the bytes of the weights, which are all that 4 bits save"
        )
    elif expected is not None:
        notes.print(f"dense FP16 takes about {fp16:.1f} us, {fp16 / expected:.1f} times as long")
    if not estimated:
        return
    rows = ((config.name.removeprefix("w4a16_sm90_"), f"{us:.1f}") for config, us in estimated[:top])
    print_table(f"{problem}, mode {mode}", ("kernel", "estimated us"), rows)
    shape = f"{problem.m}x{problem.n}x{problem.k},{problem.group_size}"
    notes.print(
        f"{len(estimated)} native kernels of the build can run it. Estimates are for an H100 and off by 14 % (root "
        f"mean square); `w4a16gen bench --problem {shape}` measures."
    )


@main.command()
@problems_options
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
    named: Sequence[tuple[str, Problem]],
    mode: QuantMode,
    finalists: int,
    rounds: int,
    slack: float | None,
    folder: Path | None,
    as_json: bool,
) -> None:
    """Time the kernels of the build on problems, with cold L2, beside cuBLAS FP16 where torch is installed."""
    library = load(folder)
    gpu = hopper_gpu(library)
    comparisons = []
    for name, asked in named:
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
