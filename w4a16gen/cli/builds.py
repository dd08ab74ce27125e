"""The commands on builds: build, verify, build-and-verify, run and doctor."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import click
from rich.markup import escape

from w4a16gen import __version__, verify
from w4a16gen.build import toolchain
from w4a16gen.build.export import export_prefix, export_wheel
from w4a16gen.build.pipeline import BuildReport, describe_failures
from w4a16gen.build.pipeline import build as build_kernels
from w4a16gen.cli.app import (
    EXIT_MISSING,
    build_option,
    generated_option,
    gpu_option,
    jobs_option,
    json_option,
    kernel_filters,
    main,
    notes,
    print_json,
    print_table,
    problem_arguments,
    report_option,
    show_progress,
    termination_interrupts,
)
from w4a16gen.errors import BuildError, NoHopperGpuError, NotBuiltError
from w4a16gen.files import write_if_changed
from w4a16gen.kernels import spaces as space
from w4a16gen.kernels.config import KernelConfig, QuantMode
from w4a16gen.kernels.problem import Problem
from w4a16gen.measure import single as bench
from w4a16gen.runtime.artifact import load_build
from w4a16gen.runtime.default import default_build_folder, load
from w4a16gen.runtime.devices import find_driver
from w4a16gen.runtime.library import Library


def _build(configs: Sequence[KernelConfig], generated: Path, folder: Path | None, jobs: int | None) -> BuildReport:
    with termination_interrupts(), show_progress(f"Building {len(configs)} kernels") as progress:
        report = build_kernels(
            configs, generated=generated, folder=folder or default_build_folder(), jobs=jobs, progress=progress
        )
    count = len(report.build.configs)
    notes.print(f"{report.compiled} kernels compiled, {count - report.compiled} up to date: {report.build.library}")
    return report


def _check_failures(report: BuildReport) -> None:
    if report.failures:
        raise BuildError(describe_failures(report.failures))


@main.command()
@kernel_filters("default")
@generated_option
@build_option
@jobs_option
@json_option
def build(
    wanted: space.Filter,
    space_name: str,
    generated: Path,
    folder: Path | None,
    jobs: int | None,
    as_json: bool,
) -> None:
    """Emit, compile and link the matching kernels; only what changed is compiled again."""
    report = _build(space.select(space_name, wanted), generated, folder, jobs)
    if as_json:
        print_json(report.build.manifest.as_json())
    _check_failures(report)


def _verify(
    library: Library,
    generated: Path,
    report: Path | None,
    require_gpu: bool,
    as_json: bool,
    *,
    sampled: bool = False,
    drawn_problems: int = 0,
) -> None:
    """Prove a build, show and write the report, and fail as the flags say."""
    with show_progress("Proving") as progress:
        outcome = verify.verify(library, generated, sampled=sampled, drawn_problems=drawn_problems, progress=progress)
    if report is not None:
        write_if_changed(report.with_suffix(".json"), json.dumps(outcome.value, indent=2) + "\n")
        write_if_changed(report.with_suffix(".md"), outcome.markdown())
    if as_json:
        print_json(outcome.value)
    else:
        print_table("Proofs", verify.HEADINGS, outcome.rows())
    for violation in outcome.violations():
        notes.print(f"[red]FAILED[/] {escape(violation)}", soft_wrap=True)
    notes.print(outcome.summary(), soft_wrap=True)
    if not outcome.ok:
        raise BuildError(f"{len(outcome.violations())} proofs failed")
    if require_gpu and not outcome.numerics_ran:
        raise NoHopperGpuError("--require-gpu was given, and the numerical proofs could not run")


@main.command("verify")
@generated_option
@build_option
@gpu_option
@report_option
@click.option(
    "--sample",
    is_flag=True,
    help="Numerics, --random's too, of one kernel per CTA shape, schedule and mode, on small problems.",
)
@click.option(
    "--random", "drawn_problems", type=click.IntRange(min=0), default=0, help="Also run so many random problems."
)
@json_option
def verify_command(
    generated: Path,
    folder: Path | None,
    require_gpu: bool,
    report: Path | None,
    sample: bool,
    drawn_problems: int,
    as_json: bool,
) -> None:
    """Prove a build: statically anywhere, numerically on a Hopper GPU."""
    _verify(load(folder), generated, report, require_gpu, as_json, sampled=sample, drawn_problems=drawn_problems)


@main.command("build-and-verify")
@kernel_filters("default")
@generated_option
@build_option
@jobs_option
@gpu_option
@report_option
@json_option
def build_and_verify(
    wanted: space.Filter,
    space_name: str,
    generated: Path,
    folder: Path | None,
    jobs: int | None,
    require_gpu: bool,
    report: Path | None,
    as_json: bool,
) -> None:
    """Build the matching kernels, then prove them."""
    built = _build(space.select(space_name, wanted), generated, folder, jobs)
    for failure in built.failures:
        notes.print(f"[red]FAILED[/] {failure.name}: {escape(failure.summary)}, log: {failure.log}", soft_wrap=True)
    _verify(load(built.build.folder), generated, report, require_gpu, as_json)


@main.command()
@problem_arguments(least_tokens=0)
@click.option("--config", "name", help="Canonical name of the kernel; chosen where none is given.")
@build_option
@json_option
def run(problem: Problem, mode: QuantMode, name: str | None, folder: Path | None, as_json: bool) -> None:
    """Run one problem on random data: M tokens, N output channels, K values each; check it and time it."""
    library = load(folder)
    plan = bench.plan(library, problem, mode, name)
    gpu = library.hopper_device()
    outcome = bench.run(library, plan)
    median = outcome.median_microseconds
    value = {
        "gpu": gpu.as_json(),
        "problem": vars(problem),
        "mode": mode.value,
        "built": plan.built,
        "candidates": [config.name for config in plan.candidates],
        "config": plan.config.name,
        "workspace_bytes": outcome.workspace_bytes,
        "error_over_bound": outcome.error_over_bound,
        "checked_rows": outcome.checked_rows,
        "microseconds": list(outcome.microseconds),
        "tflops": problem.flops / median / 1e6,
    }
    if as_json:
        print_json(value)
    else:
        spread = f"{min(outcome.microseconds):.2f} to {max(outcome.microseconds):.2f}"
        verdict = "passed" if outcome.ok else "FAILED"
        click.echo(f"GPU          {gpu}, {gpu.sm_count} SMs")
        click.echo(
            f"Problem      m={problem.m} n={problem.n} k={problem.k}, group size {problem.group_size}, mode {mode}"
        )
        click.echo(f"Kernels      {len(plan.candidates)} of {plan.built} built can run it; using {plan.config.name}")
        click.echo(f"Workspace    {outcome.workspace_bytes} bytes")
        click.echo(
            f"Correctness  {verdict}: largest error {outcome.error_over_bound:.3f} of its bound, "
            f"{outcome.checked_rows} rows against float64"
        )
        click.echo(
            f"Time         {median:.2f} us with cold L2 ({spread}), median of {len(outcome.microseconds)} graphs of "
            f"{outcome.launches} launches; {value['tflops']:.1f} TFLOP/s"
        )
    if not outcome.ok:
        raise BuildError(f"{plan.config.name} is wrong: the error is {outcome.error_over_bound:.3g} times its bound")


@main.command()
@build_option
@json_option
def doctor(folder: Path | None, as_json: bool) -> None:
    """Show what a build needs and what is there, and the command that mends what is not."""
    needed = toolchain.diagnose()
    findings = [*needed, *_runtime_findings(folder or default_build_folder())]
    if as_json:
        print_json([finding.as_json() for finding in findings])
    else:
        rows = (("ok" if found.ok else "MISSING", found.subject, found.detail, found.fix) for found in findings)
        print_table("Environment", ("", "what", "found", "mend it with"), rows)
    if not all(finding.ok for finding in needed):
        sys.exit(EXIT_MISSING)


def _runtime_findings(folder: Path) -> list[toolchain.Finding]:
    """Look for the driver, a GPU and a build: building needs none of them."""
    driver = find_driver()
    gpus = driver.gpus if driver else ()
    hopper = [gpu for gpu in gpus if gpu.is_hopper]
    shown = ", ".join(map(str, gpus)) or "none"
    no_gpu = "needs an H100, H800 or H200: only running kernels does, building and static proofs do not"
    version = f"supports CUDA {driver.cuda_version[0]}.{driver.cuda_version[1]}" if driver else "not found"
    try:
        build = load_build(folder)
        found = toolchain.Finding("build", ok=True, detail=f"{len(build.configs)} kernels in {folder}")
    except NotBuiltError as error:
        found = toolchain.Finding("build", ok=False, detail=str(error), fix="w4a16gen build")
    return [
        toolchain.Finding("NVIDIA driver", driver is not None, version, "" if driver else no_gpu),
        toolchain.Finding("Hopper GPU", bool(hopper), shown, "" if hopper else no_gpu),
        found,
    ]


@main.command("export")
@click.option(
    "--prefix",
    type=click.Path(path_type=Path, file_okay=False),
    help="Lay out lib/, include/, a CMake package and a pkg-config file here, for C and C++.",
)
@click.option(
    "--wheel",
    type=click.Path(path_type=Path, file_okay=False),
    is_flag=False,
    flag_value=Path("dist"),
    help="Write a wheel of the built kernels into this folder; without a value, into dist.",
)
@build_option
@json_option
def export_command(prefix: Path | None, wheel: Path | None, folder: Path | None, as_json: bool) -> None:
    """Give a finished build to other programs: to C++, or to machines without a compiler."""
    if prefix is None and wheel is None:
        raise click.UsageError("say what to write: --prefix DIR, --wheel, or both")
    build = load_build(folder or default_build_folder())
    written = [] if prefix is None else export_prefix(build, prefix, __version__)
    if wheel is not None:
        written.append(export_wheel(build, wheel, __version__))
    if as_json:
        print_json([str(path) for path in written])
        return
    for path in written:
        click.echo(path)
    notes.print(f"{len(build.configs)} kernels exported")
