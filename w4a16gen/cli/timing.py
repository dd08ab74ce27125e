"""The commands on which kernel is fastest: bench measures, explain shows what `gemm` goes by."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import click

from w4a16gen import __version__
from w4a16gen.choose.cards import card_of
from w4a16gen.choose.cost_model import default_cost_model
from w4a16gen.cli.app import (
    EXIT_FAILED,
    build_option,
    fail,
    json_option,
    main,
    notes,
    print_json,
    print_table,
    problem_arguments,
    show_progress,
)
from w4a16gen.cli.problems import problems_options
from w4a16gen.kernels.config import QuantMode
from w4a16gen.kernels.problem import Problem
from w4a16gen.measure.compare import compare
from w4a16gen.measure.plots import has_plots
from w4a16gen.measure.probes import tensor_peak
from w4a16gen.measure.record import Recorder, Row, Run, read_record, row_of, run_of
from w4a16gen.measure.report import write_report
from w4a16gen.measure.results import Comparison, smallest_set
from w4a16gen.measure.rivals import RIVALS
from w4a16gen.runtime.default import load

HEADINGS = (
    "m x n x k",
    "kernel",
    "us",
    "as called us",
    "dependent us",
    "floor us",
    "of the floor",
    "GB/s",
    "TFLOP/s",
    "over cuBLAS FP16",
    "over other 4-bit",
)


@main.command()
@problem_arguments(least_tokens=1)
@click.option("--top", type=click.IntRange(min=1), default=5, show_default=True, help="Kernels to show.")
@build_option
@json_option
def explain(problem: Problem, mode: QuantMode, top: int, folder: Path | None, as_json: bool) -> None:
    """Show which built kernel a call with M tokens, N output channels and K values gets, and the runners-up."""
    library = load(folder)
    device = next(iter(library.hopper_devices()), None)
    choice = library.choose(problem, mode)
    estimated = library.chooser.estimates(problem, mode, device)
    fp16 = default_cost_model().dense_microseconds(problem, card_of(device))
    expected = choice.microseconds or dict(estimated).get(choice.kernel)
    if as_json:
        shown = [{"kernel": config.name, "estimated_microseconds": round(us, 2)} for config, us in estimated[:top]]
        print_json(
            {
                "problem": vars(problem),
                "mode": mode.value,
                "chosen": choice.kernel.name,
                "source": choice.source.value,
                "dependent": choice.dependent,
                "microseconds": None if expected is None else round(expected, 2),
                "fp16_microseconds": round(fp16, 2),
                "estimates": shown,
            }
        )
        return
    click.echo(choice.kernel.name)
    time = "" if expected is None else f": {expected:.1f} us"
    launches = ", which is of dependent launches" if choice.dependent else ""
    notes.print(f"chosen by {choice.source.sentence}{launches}{time}")
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
        f"{len(estimated)} native kernels of the build can run it. Estimates are for an H100 and off by 13 % (root "
        f"mean square); `w4a16gen bench --problem {shape}` measures."
    )


@main.command()
@problems_options
@click.option("--finalists", type=click.IntRange(min=1), default=4, show_default=True, help="Kernels timed in turn.")
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=9,
    show_default=True,
    help="Timed replays of each; of long problems a third as many blocks of a second.",
)
@click.option(
    "--rivals/--no-rivals",
    default=False,
    help=f"Also time other 4-bit kernels where they are installed: {', '.join(rival.package for rival in RIVALS)}.",
)
@click.option(
    "--smallest-set",
    "slack",
    type=click.FloatRange(min=0),
    help="Also name the smallest set of kernels within so many percent of the fastest on every problem.",
)
@click.option(
    "--report",
    "report_folder",
    type=click.Path(path_type=Path, file_okay=False),
    help="Also write JSON lines, CSV, plots and an HTML page into this folder.",
)
@build_option
@json_option
def bench(
    named: Sequence[tuple[str, Problem]],
    mode: QuantMode,
    finalists: int,
    rounds: int,
    rivals: bool,
    slack: float | None,
    report_folder: Path | None,
    folder: Path | None,
    as_json: bool,
) -> None:
    """Time the kernels of the build on problems, with cold L2, beside cuBLAS FP16 where torch is installed."""
    library = load(folder)
    gpu = library.hopper_device()
    peak = tensor_peak(library, gpu.index)
    run = run_of(gpu, datetime.now(tz=timezone.utc).strftime("%Y-%m-%d"), __version__, peak)
    recorder = Recorder(report_folder, run) if report_folder else None
    comparisons, measured = [], []
    for name, asked in named:
        with show_progress(str(asked)) as progress:
            found = compare(
                library,
                asked,
                mode,
                finalists=finalists,
                rounds=rounds,
                rivals=RIVALS if rivals else (),
                progress=progress,
            )
        comparisons.append(found)
        if not found.screened:
            notes.print(f"{asked}: no built kernel of mode {mode} can run it")
            continue
        measured.append(row_of(name, found, peak))
        if recorder is not None:
            recorder.add(measured[-1], found)
        left_out = f"; {found.left_out} kernels with tiles far from m not timed" if found.left_out else ""
        layer = f" ({name})" if name else ""
        notes.print(f"{asked}{layer}: {found.best.median:.2f} us, {found.best.contender}{left_out}")
        _note(measured[-1], found)
    small = smallest_set(comparisons, slack / 100) if slack is not None else []
    if not any(found.cublas for found in comparisons):
        notes.print("torch is not installed: cuBLAS FP16 was not timed beside the kernels")
    if report_folder is not None:
        _write_report(report_folder, run, measured)
    if as_json:
        print_json(
            {
                "gpu": gpu.as_json(),
                "peak_tflops": None if peak is None else vars(peak),
                "comparisons": [found.as_json() for found in comparisons],
                "smallest_set": small,
            },
        )
        return
    if peak is not None:
        notes.print(
            f"the tensor cores reach {peak.burst:.0f} TFLOP/s for 0.1 ms and {peak.sustained:.0f} at the power limit"
        )
    print_table(f"{gpu.name}, mode {mode}, cold L2, medians", HEADINGS, map(_cells, measured))
    for name in small:
        click.echo(name)
    if any(not error <= 1 for found in comparisons for error in found.error_over_bound.values()):
        fail(EXIT_FAILED, "a kernel's result is off: see above")


@main.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False, exists=True))
def report(folder: Path) -> None:
    """Write a run's table, plots and page again, from the JSON lines that `bench --report FOLDER` left there."""
    _write_report(folder, *read_record(folder))


def _write_report(folder: Path, run: Run, rows: Sequence[Row]) -> None:
    for path in write_report(folder, run, rows):
        notes.print(f"{path} is written", soft_wrap=True)
    if not has_plots():
        notes.print(
            f"matplotlib is not installed, so there are no plots: pip install 'w4a16gen[plot]', then `w4a16gen report "
            f"{folder}`",
            soft_wrap=True,
            markup=False,
        )


def _note(row: Row, found: Comparison) -> None:
    """Say what the reader of a row should not overlook."""
    for name, error in found.error_over_bound.items():
        if not error <= 1:
            notes.print(f"  {name} is off by {error:.3g} times its bound: `w4a16gen verify` tells more")
    for name, reason in found.rivals_left_out.items():
        notes.print(f"  {name} was not timed: {reason}", markup=False)
    if row.speedup_over_fp16 is not None and row.speedup_over_fp16 < 1:
        notes.print(f"  dense FP16 is faster here: {row.cublas_microseconds:.2f} us")


def _cells(row: Row) -> tuple[str, ...]:
    """Show a row."""

    def shown(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    return (
        f"{row.m}x{row.shape}",
        row.kernel.removeprefix("w4a16_sm90_"),
        shown(row.microseconds),
        shown(row.chosen_microseconds),
        shown(row.dependent_microseconds),
        shown(row.floor_microseconds),
        shown(row.share_of_floor),
        f"{row.gigabytes_per_second:.0f}",
        f"{row.tflops:.0f}",
        shown(row.speedup_over_fp16),
        shown(None if row.best_rival_microseconds is None else row.best_rival_microseconds / row.microseconds),
    )
