"""`w4a16gen run`: one GEMM, checked and timed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from w4a16gen.cli.first_build import load_or_build
from w4a16gen.cli.help import METHOD, ExampleCommand, option
from w4a16gen.cli.options import (
    MODE,
    MODE_HELP,
    Parsed,
    build_option,
    complete_kernels,
    dimension_arguments,
    json_option,
    parse_kernel,
    problem_of,
)
from w4a16gen.cli.output import note, print_result
from w4a16gen.cli.services import services
from w4a16gen.errors import BuildError
from w4a16gen.kernels.config import KernelConfig, QuantMode

if TYPE_CHECKING:
    from w4a16gen.measure.single import Outcome, Plan


@click.command(
    "run",
    cls=ExampleCommand,
    examples=(
        ("w4a16gen run 16 4096 4096", "16 tokens, 4,096 output channels, K of 4,096"),
        ("w4a16gen run 1 4096 4096 --mode fgsz --group-size 64", "with zeros, groups of 64"),
        ("w4a16gen run 16 4096 4096 --config NAME", "with a kernel that `w4a16gen list --built` shows"),
    ),
)
@dimension_arguments(least_tokens=0)
@option("--mode", type=MODE, section=METHOD, help=f"{MODE_HELP}  [default: that of --config, else fgs]")
@option(
    "--config",
    "kernel",
    type=Parsed("KERNEL", parse_kernel, complete_kernels),
    section=METHOD,
    help="Name of the kernel to run.  [default: the one that gemm picks]",
)
@build_option
@json_option
def command(
    m: int,
    n: int,
    k: int,
    group_size: int | None,
    mode: QuantMode | None,
    kernel: KernelConfig | None,
    folder: Path | None,
    as_json: bool,
) -> int:
    """Run one GEMM of M tokens, N output channels and K on random data; check and time it.

    If ./build has no build yet, the default kernels are built first.
    """
    from w4a16gen.measure.single import plan

    used = mode or (kernel.mode if kernel else QuantMode.FINEGRAINED_SCALE_ONLY)
    library = load_or_build(folder)
    chosen = plan(library, problem_of(m, n, k, group_size, used), used, kernel.name if kernel else None)
    library.hopper_device()
    outcome = services().run_one(library, chosen)
    if as_json:
        print_result("run", run_as_json(chosen, outcome))
    else:
        _show(chosen, outcome)
    if outcome.ok:
        return 0
    error = f"{chosen.config.name} is wrong: its error is {outcome.error_over_bound:.3g} times the bound"
    note(error, label="error:")
    return BuildError.exit_code


def run_as_json(chosen: Plan, outcome: Outcome) -> dict[str, Any]:
    """Return the members of the command's JSON object."""
    return {
        "gpu": outcome.gpu.as_json(),
        "problem": vars(chosen.problem),
        "mode": chosen.mode.value,
        "built": chosen.built,
        "candidates": [config.name for config in chosen.candidates],
        "kernel": chosen.config.name,
        "workspace_bytes": outcome.workspace_bytes,
        "ok": outcome.ok,
        "error_over_bound": outcome.error_over_bound,
        "checked_rows": outcome.checked_rows,
        "microseconds": outcome.median_microseconds,
        "replays_microseconds": list(outcome.microseconds),
        "launches_per_replay": outcome.launches,
        "tflops": chosen.problem.flops / outcome.median_microseconds / 1e6,
    }


def _show(chosen: Plan, outcome: Outcome) -> None:
    problem, median = chosen.problem, outcome.median_microseconds
    verdict = "passed" if outcome.ok else "FAILED"
    lines = {
        "GPU": f"{outcome.gpu}, {outcome.gpu.sm_count} SMs",
        "Problem": f"m={problem.m} n={problem.n} k={problem.k}, group size {problem.group_size}, mode {chosen.mode}",
        "Kernel": chosen.config.short_name,
        "Able": f"{len(chosen.candidates)} of {chosen.built} built kernels can run the problem",
        "Workspace": f"{outcome.workspace_bytes} bytes",
        "Correctness": f"{verdict}: error {outcome.error_over_bound:.3f} of the bound, {outcome.checked_rows} rows",
        "Time": f"{median:.2f} us with cold L2 (median of {len(outcome.microseconds)} replays, "
        f"{min(outcome.microseconds):.2f} to {max(outcome.microseconds):.2f})",
        "Throughput": f"{problem.flops / median / 1e6:.1f} TFLOP/s",
    }
    for label, text in lines.items():
        click.echo(f"{label:13}{text}")
