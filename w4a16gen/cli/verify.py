"""`w4a16gen verify` and `w4a16gen build-and-verify`: prove a build."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from w4a16gen.cli.build import build_as_json, build_kernels, failed_status
from w4a16gen.cli.cluster import ClusterChoice, cluster_options
from w4a16gen.cli.help import METHOD, OUTPUT, ExampleCommand, option
from w4a16gen.cli.list import by_shape, shape_pattern
from w4a16gen.cli.options import (
    build_option,
    counts,
    filter_options,
    generated_option,
    jobs_option,
    json_option,
    sources_option,
    wide_option,
)
from w4a16gen.cli.output import note, print_result, result
from w4a16gen.cli.paths import NamedPath
from w4a16gen.cli.services import services
from w4a16gen.cli.tables import Column, print_table
from w4a16gen.errors import BuildError, InvalidValueError, NoHopperGpuError
from w4a16gen.kernels.config import QuantMode

if TYPE_CHECKING:
    from w4a16gen.kernels.config import ClusterShape, CtaShape, Epilogue, Target
    from w4a16gen.runtime.library import Library
    from w4a16gen.verify.report import Report

MOST_RANDOM_PROBLEMS = 10_000_000
NAMED_KERNELS = 24
"""The most kernels that have a row each; more have a row per shape."""

gpu_option = option(
    "--require-gpu",
    is_flag=True,
    section=METHOD,
    help="Exit with 3 if there is no Hopper GPU to run the numerical checks on.",
)
report_option = option(
    "--report",
    type=NamedPath(dir_okay=False),
    section=OUTPUT,
    help="Also write the report to this file, as .json and as .md.",
)


def _prove(library: Library, generated: Path | None, *, sampled: bool = False, random_problems: int = 0) -> Report:
    from w4a16gen.kernels.render import source_name

    sources = generated or library.build.sources
    if sources is None or not any((sources / source_name(info.config)).is_file() for info in library.kernels):
        raise InvalidValueError(
            f"{sources or library.build.folder} has no sources of the kernels: pass --generated-dir with the folder "
            "that `w4a16gen build` wrote them to"
        )
    with services().show_progress("Proving", lines=True) as progress:
        proven: Report = services().verify(
            library, generated, sampled=sampled, drawn_problems=random_problems, progress=progress
        )
    return proven


def _tell(proven: Report, report: Path | None, *, wide: bool, as_json: bool) -> None:
    """Write the report's files, and show its table unless JSON is asked for."""
    from w4a16gen.files import write_if_changed

    if report is not None:
        write_if_changed(report.with_suffix(".json"), json.dumps(result("verify", proven.value), indent=2) + "\n")
        write_if_changed(report.with_suffix(".md"), proven.markdown())
    if not as_json:
        columns, rows = proof_table(proven.value, wide=wide)
        print_table("Proofs", columns, rows, wide=wide)
    for violation in proven.violations():
        note(violation, label="FAILED")
    note(proven.summary())


def _status(proven: Report, *, require_gpu: bool) -> int:
    """Return the exit status of proofs; print a sentence if it is not 0."""
    if not proven.ok:
        note(f"{len(proven.violations())} proofs failed", label="error:")
        return BuildError.exit_code
    if require_gpu and not proven.numerics_ran:
        note("--require-gpu: the numerical proofs did not run, because there is no Hopper GPU", label="error:")
        return NoHopperGpuError.exit_code
    return 0


def proof_table(value: dict[str, Any], *, wide: bool) -> tuple[Sequence[Column], Iterable[Sequence[str]]]:
    """Return the table of a report: a row for each kernel, or for each shape of many kernels."""
    from w4a16gen.kernels.config import KernelConfig

    kernels = {KernelConfig.parse(kernel["name"]): kernel for kernel in value["static"]["kernels"]}
    numerics = {kernel["name"]: kernel for kernel in value["numerics"]["kernels"]}
    groups = [[config] for config in sorted(kernels)]
    if len(groups) > NAMED_KERNELS and not wide:
        groups = by_shape(kernels)
    columns = [
        Column("kernel", keep=True, own_line=True),
        Column("checks", right=True, keep=True),
        Column("error", right=True),
        Column("registers", right=True),
        Column("stages", right=True),
        Column("shared KiB", right=True),
        Column("code KiB", right=True),
        Column("compile CPU s", right=True),
        Column("compile peak GB", right=True),
    ]
    rows = [
        _proof_row(group, [kernels[config] for config in group], [numerics.get(config.name) for config in group])
        for group in groups
    ]
    return columns, rows


def _proof_row(
    group: Sequence[Any], static: Sequence[dict[str, Any]], numeric: Sequence[dict[str, Any] | None]
) -> Sequence[str]:
    """Return the cells of one row: the largest value of its kernels, and the sums of checks and CPU time."""
    proofs = [proof for proof in numeric if proof is not None]
    passed = sum(sum(proof["passed"].values()) for proof in proofs)
    failed = sum(len(proof["failures"]) for proof in proofs)

    def largest(field: str, divisor: float = 1, digits: int = 0) -> str:
        values = [kernel[field] for kernel in static if kernel.get(field) is not None]
        return f"{max(values) / divisor:.{digits}f}" if values else ""

    return (
        shape_pattern(group, modes="*" if len(group) == len(QuantMode) else None),
        f"{passed}/{passed + failed}" if proofs else "not run",
        f"{max(proof['worst_error_over_bound'] for proof in proofs):.3f}" if proofs else "",
        largest("registers"),
        largest("stages"),
        largest("shared_memory_bytes", 1024),
        largest("code_bytes", 1024),
        f"{sum(kernel['compile_cpu_seconds'] for kernel in static):.1f}",
        largest("compile_peak_bytes", 1e9, 1),
    )


@click.command(
    "verify",
    cls=ExampleCommand,
    examples=(
        ("w4a16gen verify", "prove the build in ./build"),
        ("w4a16gen verify --random 20000 --require-gpu", "add 20,000 random problems; fail without a GPU"),
    ),
)
@sources_option
@build_option
@gpu_option
@option(
    "--sample",
    is_flag=True,
    section=METHOD,
    help="Run numerical checks on one kernel per shape, schedule and mode only, with small problems.",
)
@option(
    "--random",
    "random_problems",
    type=counts(0, MOST_RANDOM_PROBLEMS),
    default=0,
    section=METHOD,
    help="Also run this many random problems.",
)
@report_option
@wide_option
@json_option
def command(
    generated: Path | None,
    folder: Path | None,
    require_gpu: bool,
    sample: bool,
    random_problems: int,
    report: Path | None,
    wide: bool,
    as_json: bool,
) -> int:
    """Prove a build: statically on any machine, numerically on a Hopper GPU.

    In the table, `checks` counts numerical checks, and `error` is the largest error as a share of its bound. Many
    kernels have one row for each shape; --wide shows every kernel.
    """
    proven = _prove(services().load(folder), generated, sampled=sample, random_problems=random_problems)
    _tell(proven, report, wide=wide, as_json=as_json)
    if as_json:
        print_result("verify", proven.value)
    return _status(proven, require_gpu=require_gpu)


@click.command(
    "build-and-verify",
    cls=ExampleCommand,
    examples=(
        ("w4a16gen build-and-verify", "the default kernels"),
        ("w4a16gen build-and-verify --report docs/proof", "write docs/proof.json and docs/proof.md too"),
    ),
)
@filter_options
@generated_option
@build_option
@jobs_option
@cluster_options
@gpu_option
@report_option
@wide_option
@json_option
def build_and_verify(
    ctas: Sequence[CtaShape],
    clusters: Sequence[ClusterShape],
    modes: Sequence[QuantMode],
    targets: Sequence[Target],
    epilogues: Sequence[Epilogue],
    spaces: Sequence[str],
    generated: Path,
    folder: Path | None,
    jobs: int | None,
    ray: str | None,
    ray_env: Path | None,
    require_gpu: bool,
    report: Path | None,
    wide: bool,
    as_json: bool,
) -> int:
    """Build kernels as `build` does, then prove them as `verify` does."""
    from w4a16gen.kernels.spaces import Filter

    wanted = Filter(ctas, clusters, modes, targets, epilogues)
    built = build_kernels(wanted, spaces, generated, folder, jobs, ClusterChoice(ray, ray_env))
    proven = _prove(services().load(built.build.folder), generated)
    _tell(proven, report, wide=wide, as_json=as_json)
    if as_json:
        proofs = {key: member for key, member in proven.value.items() if key != "schema"}
        print_result("build-and-verify", {"build": build_as_json(built), "verify": proofs})
    return _status(proven, require_gpu=require_gpu) or failed_status(built)
