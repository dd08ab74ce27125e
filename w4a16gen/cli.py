"""The command line: arguments in, tables or JSON out; every decision is made elsewhere."""

from __future__ import annotations

import json
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from w4a16gen import bench, space, toolchain, verify
from w4a16gen.build import BuildReport, describe_failures
from w4a16gen.build import build as build_kernels
from w4a16gen.config import ClusterShape, CtaShape, KernelConfig, QuantMode, Target
from w4a16gen.errors import (
    BuildError,
    InvalidValueError,
    MissingToolError,
    NoHopperGpuError,
    NotBuiltError,
    W4A16Error,
)
from w4a16gen.files import write_if_changed
from w4a16gen.module import BUILD_FOLDER_VARIABLE, Library, default_build_folder, load
from w4a16gen.problem import Problem
from w4a16gen.render import emit as emit_kernels

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_MISSING = 3
EXIT_INTERRUPTED = 130

_Command = TypeVar("_Command", bound=Callable[..., Any])
_notes = Console(stderr=True, highlight=False)


class _Parsed(click.ParamType[Any]):
    """An option that a parser reads; its error becomes click's."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse a string; pass through what is parsed already."""
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def _mode(text: str) -> QuantMode:
    for mode in QuantMode:
        if text.lower() in (mode.value, mode.name.lower()):
            return mode
    raise InvalidValueError(f"{text!r} is not one of {', '.join(mode.value for mode in QuantMode)}")


def _target(text: str) -> Target:
    if text in (target.value for target in Target):
        return Target(text)
    raise InvalidValueError(f"{text!r} is not one of {', '.join(target.value for target in Target)}")


class _Group(click.Group):
    """Turns the package's errors into messages and the documented exit codes."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; see the class."""
        try:
            return super().invoke(ctx)
        except InvalidValueError as error:
            _fail(EXIT_USAGE, str(error))
        except (MissingToolError, NotBuiltError, NoHopperGpuError) as error:
            _fail(EXIT_MISSING, str(error))
        except W4A16Error as error:
            _fail(EXIT_FAILED, str(error))
        except OSError as error:
            _fail(EXIT_FAILED, f"{error.filename or 'a file'}: {error.strerror}: choose another folder or file")
        except KeyboardInterrupt:
            _fail(EXIT_INTERRUPTED, "interrupted: what was finished is kept, and the next run goes on from there")


def _fail(code: int, message: str) -> None:
    _notes.print(f"[bold red]error:[/] {_escape(message)}", soft_wrap=True)
    sys.exit(code)


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


def _terminate(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="w4a16gen")
def main() -> None:
    """Generate, build, prove and run FP16 x uint4 GEMM kernels for NVIDIA Hopper GPUs.

    Shapes are CHANNELSxTOKENSxK: output channels, tokens, k.

    Exit codes: 0 success; 1 a proof, a compilation or a write failed; 2 a wrong call; 3 a tool, a build or a GPU is
    missing; 130 interrupted.
    """
    signal.signal(signal.SIGTERM, _terminate)


def _filters(default_space: str) -> Callable[[_Command], _Command]:
    """Add the options that choose kernels; the command gets `wanted` and `space_name`."""

    def decorate(command: _Command) -> _Command:
        options = [
            click.option("--cta", "ctas", multiple=True, type=_Parsed("shape", CtaShape.parse), help="CTA shape."),
            click.option(
                "--cluster", "clusters", multiple=True, type=_Parsed("shape", ClusterShape.parse), help="Cluster shape."
            ),
            click.option("--mode", "modes", multiple=True, type=_Parsed("mode", _mode), help="cs, fgs or fgsz."),
            click.option("--target", "targets", multiple=True, type=_Parsed("target", _target), help="Kernel family."),
            click.option(
                "--space",
                "space_name",
                type=click.Choice(list(space.SPACES)),
                default=default_space,
                show_default=True,
                help="Named set to choose from.",
            ),
        ]
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on standard output.")
_generated_option = click.option(
    "--generated-dir",
    "generated",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("generated"),
    show_default=True,
    help="Folder of the emitted sources.",
)
_build_option = click.option(
    "--build-dir",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    default=None,
    help=f"Folder of the build.  [default: ${BUILD_FOLDER_VARIABLE}, or build]",
)
_jobs_option = click.option(
    "--jobs", "-j", type=click.IntRange(min=1), help="Compilers at once.  [default: by cores and free memory]"
)
_gpu_option = click.option("--require-gpu", is_flag=True, help="Fail where there is no Hopper GPU for the numerics.")
_report_option = click.option(
    "--report", type=click.Path(path_type=Path, dir_okay=False), help="Also write the report, as JSON and as .md."
)


def _select(
    ctas: Sequence[CtaShape],
    clusters: Sequence[ClusterShape],
    modes: Sequence[QuantMode],
    targets: Sequence[Target],
    space_name: str,
) -> list[KernelConfig]:
    return space.select(space_name, space.Filter(ctas, clusters, modes, targets))


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2))


def _print_table(title: str, headings: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    table = Table(*headings, title=title)
    for row in rows:
        table.add_row(*row)
    Console(highlight=False).print(table)


@contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """Show a bar on standard error while a long task reports (done, total, name)."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=_notes, transient=True) as bar:
        task = bar.add_task(title, total=None)

        def report(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, description=f"{title}: {name}")

        yield report


@main.command("list")
@_filters("trtllm")
@click.option("--explain", is_flag=True, help="Show what the space leaves out, and why, instead of what it holds.")
@click.option("--built", is_flag=True, help="Show the kernels of the build instead of a space's.")
@_build_option
@_json_option
def list_command(  # noqa: PLR0913
    ctas: Sequence[CtaShape],
    clusters: Sequence[ClusterShape],
    modes: Sequence[QuantMode],
    targets: Sequence[Target],
    space_name: str,
    explain: bool,
    built: bool,
    folder: Path | None,
    as_json: bool,
) -> None:
    """List the kernels of a space: a table on a terminal, bare names in a pipe."""
    wanted = space.Filter(ctas, clusters, modes, targets)
    if explain:
        _explain(wanted, space_name, as_json)
        return
    configs = wanted.select(load(folder).configs()) if built else space.select(space_name, wanted)
    if as_json:
        _print_json([config.as_json() for config in configs])
    elif sys.stdout.isatty():
        headings = ("mode", "CTA (channels x tokens x k)", "cluster", "schedule", "scheduler", "target")
        rows = (
            (str(c.mode), str(c.cta), str(c.cluster), str(c.schedule), str(c.scheduler), str(c.target)) for c in configs
        )
        _print_table(f"{len(configs)} kernels", headings, rows)
    else:
        for config in configs:
            click.echo(config.name)
    counts = Counter(str(config.mode) for config in configs)
    shown = ", ".join(f"{count} {mode}" for mode, count in counts.items())
    _notes.print(f"{len(configs)} kernels ({shown}) in {'the build' if built else f'space {space_name}'}")


def _explain(wanted: space.Filter, space_name: str, as_json: bool) -> None:
    """Show every configuration that a space does not hold, or how many share a reason."""
    left_out = [
        (config, why) for config in wanted.select(space.candidates()) if (why := space.why_not(config, space_name))
    ]
    if as_json:
        _print_json([config.as_json() | {"kind": why.kind.value, "reason": why.sentence} for config, why in left_out])
    elif sys.stdout.isatty():
        counts = Counter(why for _, why in left_out)
        rows = ((str(count), why.kind.value, why.sentence) for why, count in counts.most_common())
        _print_table(f"Not in space {space_name}", ("count", "kind", "why"), rows)
    else:
        for config, why in left_out:
            click.echo(f"{config.name}\t{why}")
    _notes.print(f"{len(left_out)} of the grid's configurations are not in space {space_name}")


@main.command()
@_filters("trtllm")
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("generated"),
    show_default=True,
    help="Folder to write to.",
)
@click.option("--remove-stale", is_flag=True, help="Remove kernel sources there that were not asked for.")
@_json_option
def emit(  # noqa: PLR0913
    ctas: Sequence[CtaShape],
    clusters: Sequence[ClusterShape],
    modes: Sequence[QuantMode],
    targets: Sequence[Target],
    space_name: str,
    output: Path,
    remove_stale: bool,
    as_json: bool,
) -> None:
    """Write the sources of the matching kernels, one file each, and print their paths."""
    emission = emit_kernels(_select(ctas, clusters, modes, targets, space_name), output, remove_stale=remove_stale)
    if as_json:
        _print_json({key: [str(path) for path in paths] for key, paths in vars(emission).items()})
    else:
        for path in emission.paths:
            click.echo(path)
    written = sum(path in emission.paths for path in emission.written)
    _notes.print(
        f"{len(emission.paths)} kernels: {written} written, {len(emission.paths) - written} unchanged; "
        f"{len(emission.removed)} stale removed, {len(emission.stale)} stale kept"
    )


def _build(configs: Sequence[KernelConfig], generated: Path, folder: Path | None, jobs: int | None) -> BuildReport:
    with _progress(f"Building {len(configs)} kernels") as progress:
        report = build_kernels(
            configs, generated=generated, folder=folder or default_build_folder(), jobs=jobs, progress=progress
        )
    count = len(report.build.configs)
    _notes.print(f"{report.compiled} kernels compiled, {count - report.compiled} up to date: {report.build.library}")
    return report


def _check_failures(report: BuildReport) -> None:
    if report.failures:
        raise BuildError(describe_failures(report.failures))


@main.command()
@_filters("default")
@_generated_option
@_build_option
@_jobs_option
@_json_option
def build(  # noqa: PLR0913
    ctas: Sequence[CtaShape],
    clusters: Sequence[ClusterShape],
    modes: Sequence[QuantMode],
    targets: Sequence[Target],
    space_name: str,
    generated: Path,
    folder: Path | None,
    jobs: int | None,
    as_json: bool,
) -> None:
    """Emit, compile and link the matching kernels; only what changed is compiled again."""
    report = _build(_select(ctas, clusters, modes, targets, space_name), generated, folder, jobs)
    if as_json:
        _print_json(report.build.manifest)
    _check_failures(report)


def _verify(  # noqa: PLR0913
    library: Library, generated: Path, report: Path | None, require_gpu: bool, as_json: bool, sampled: bool = False
) -> None:
    """Prove a build, show and write the report, and fail as the flags say."""
    with _progress("Proving") as progress:
        outcome = verify.verify(library, generated, sampled=sampled, progress=progress)
    if report is not None:
        write_if_changed(report.with_suffix(".json"), json.dumps(outcome.value, indent=2) + "\n")
        write_if_changed(report.with_suffix(".md"), outcome.markdown())
    if as_json:
        _print_json(outcome.value)
    else:
        _print_table("Proofs", verify.HEADINGS, outcome.rows())
    for violation in outcome.violations():
        _notes.print(f"[red]FAILED[/] {_escape(violation)}", soft_wrap=True)
    _notes.print(outcome.summary(), soft_wrap=True)
    if not outcome.ok:
        raise BuildError(f"{len(outcome.violations())} proofs failed")
    if require_gpu and not outcome.numerics_ran:
        raise NoHopperGpuError("--require-gpu was given, and the numerical proofs could not run")


@main.command("verify")
@_generated_option
@_build_option
@_gpu_option
@_report_option
@click.option("--sample", is_flag=True, help="Numerics of one kernel per CTA shape and mode, small problems only.")
@_json_option
def verify_command(  # noqa: PLR0913
    generated: Path, folder: Path | None, require_gpu: bool, report: Path | None, sample: bool, as_json: bool
) -> None:
    """Prove a build: statically anywhere, numerically on a Hopper GPU."""
    _verify(load(folder), generated, report, require_gpu, as_json, sample)


@main.command("build-and-verify")
@_filters("default")
@_generated_option
@_build_option
@_jobs_option
@_gpu_option
@_report_option
@_json_option
def build_and_verify(  # noqa: PLR0913
    ctas: Sequence[CtaShape],
    clusters: Sequence[ClusterShape],
    modes: Sequence[QuantMode],
    targets: Sequence[Target],
    space_name: str,
    generated: Path,
    folder: Path | None,
    jobs: int | None,
    require_gpu: bool,
    report: Path | None,
    as_json: bool,
) -> None:
    """Build the matching kernels, then prove them."""
    built = _build(_select(ctas, clusters, modes, targets, space_name), generated, folder, jobs)
    for failure in built.failures:
        _notes.print(f"[red]FAILED[/] {failure.name}: {_escape(failure.summary)}, log: {failure.log}", soft_wrap=True)
    _verify(load(built.build.folder), generated, report, require_gpu, as_json)


@main.command()
@click.argument("m", type=click.IntRange(min=0))
@click.argument("n", type=click.IntRange(min=1))
@click.argument("k", type=click.IntRange(min=1))
@click.option("--group-size", type=click.IntRange(min=1), help="Values of K per scale.  [default: 128, or k in cs]")
@click.option("--mode", type=_Parsed("mode", _mode), default="fgs", show_default=True, help="cs, fgs or fgsz.")
@click.option("--config", "name", help="Canonical name of the kernel; chosen where none is given.")
@_build_option
@_json_option
def run(  # noqa: PLR0913
    m: int,
    n: int,
    k: int,
    group_size: int | None,
    mode: QuantMode,
    name: str | None,
    folder: Path | None,
    as_json: bool,
) -> None:
    """Run one problem on random data: M tokens, N output channels, K values each; check it and time it."""
    library = load(folder)
    problem = Problem(m, n, k, group_size or (min(128, k) if mode.is_grouped else k))
    plan = bench.plan(library, problem, mode, name)
    gpu = bench.hopper_gpu(library)
    _notes.print(f"GPU: {gpu['name']}, compute capability {'.'.join(map(str, gpu['compute_capability']))}")
    outcome = bench.run(library, plan)
    median = outcome.median_microseconds
    value = {
        "gpu": gpu,
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
        _print_json(value)
    else:
        spread = f"{min(outcome.microseconds):.2f} to {max(outcome.microseconds):.2f}"
        verdict = "passed" if outcome.ok else "FAILED"
        click.echo(f"GPU          {gpu['name']}, {gpu['sm_count']} SMs")
        click.echo(f"Problem      m={m} n={n} k={k}, group size {problem.group_size}, mode {mode}")
        click.echo(f"Kernels      {len(plan.candidates)} of {plan.built} built can run it; using {plan.config.name}")
        click.echo(f"Workspace    {outcome.workspace_bytes} bytes")
        click.echo(
            f"Correctness  {verdict}: largest error {outcome.error_over_bound:.3f} of its bound, "
            f"{outcome.checked_rows} rows against float64"
        )
        click.echo(
            f"Time         {median:.2f} us, median of {len(outcome.microseconds)} graphs of {outcome.launches} launches "
            f"with cold L2 ({spread}); {value['tflops']:.1f} TFLOP/s"
        )
    if not outcome.ok:
        raise BuildError(f"{plan.config.name} is wrong: the error is {outcome.error_over_bound:.3g} times its bound")


@main.command()
@_build_option
@_json_option
def doctor(folder: Path | None, as_json: bool) -> None:
    """Show what a build needs and what is there, and the command that mends what is not."""
    findings = [*toolchain.diagnose(), *_gpu_findings(folder)]
    if as_json:
        _print_json([finding.as_json() for finding in findings])
    else:
        rows = (("ok" if found.ok else "MISSING", found.subject, found.detail, found.fix) for found in findings)
        _print_table("Environment", ("", "what", "found", "mend it with"), rows)
    if not all(finding.ok for finding in findings if finding.subject != "Hopper GPU"):
        sys.exit(EXIT_MISSING)


def _gpu_findings(folder: Path | None) -> list[toolchain.Finding]:
    """Look for a build and, through it, for a GPU."""
    try:
        library = load(folder)
    except NotBuiltError as error:
        return [toolchain.Finding("build", ok=True, detail=f"none yet: {error}", fix="w4a16gen build")]
    names = ", ".join(device["name"] for device in library.devices()) or "no CUDA GPU or driver"
    hopper = bool(library.hopper_devices())
    fix = "" if hopper else "numerics need an H100, H800 or H200; everything else works here"
    return [
        toolchain.Finding("build", ok=True, detail=f"{len(library.configs())} kernels in {library.build.folder}"),
        toolchain.Finding("Hopper GPU", hopper, names, fix),
    ]


if __name__ == "__main__":
    main()
