"""`w4a16gen build`: compile and link kernels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from w4a16gen.cli.cluster import HERE, ClusterChoice, cluster_options, compile_options, connected, tell_nodes
from w4a16gen.cli.help import FILES, ExampleCommand, option
from w4a16gen.cli.options import build_option, filter_options, generated_option, jobs_option, json_option
from w4a16gen.cli.output import note, print_result
from w4a16gen.cli.progress import termination_interrupts
from w4a16gen.cli.services import services
from w4a16gen.errors import BuildError
from w4a16gen.wording import counted

if TYPE_CHECKING:
    from w4a16gen.build.pipeline import BuildReport
    from w4a16gen.kernels.config import ClusterShape, CtaShape, Epilogue, QuantMode, Target
    from w4a16gen.kernels.spaces import Filter


def build_kernels(
    wanted: Filter,
    spaces: Sequence[str],
    generated: Path,
    folder: Path | None,
    jobs: int | None,
    cluster: ClusterChoice = HERE,
) -> BuildReport:
    """Select, emit, compile and link kernels; say what was done and which kernels failed."""
    from w4a16gen.kernels.spaces import select_kernels
    from w4a16gen.runtime.folders import default_build_folder

    selection = select_kernels(wanted, spaces)
    count = len(selection.configs)
    note(f"{counted(count, 'kernel')} of space {' + '.join(selection.spaces)}")
    with (
        connected(cluster) as compilers,
        termination_interrupts(),
        services().show_progress(f"Building {counted(count, 'kernel')}", lines=True) as progress,
    ):
        report: BuildReport = services().build(
            selection.configs,
            generated=generated,
            folder=folder or default_build_folder(),
            jobs=jobs,
            progress=progress,
            **compile_options(compilers, selection.configs),
        )
    if cluster.address is not None:
        tell_nodes(report.nodes)
    current = len(report.build.configs) - report.compiled
    note(f"{counted(report.compiled, 'kernel')} compiled, {current} up to date: {report.build.library}")
    for failure in report.failures:
        note(f"{failure.name}: {failure.summary}; log: {failure.log}", label="FAILED")
    return report


def build_as_json(report: BuildReport) -> dict[str, Any]:
    """Return the members of the command's JSON object."""
    failures = [
        {"kernel": failure.name, "summary": failure.summary, "log": str(failure.log)} for failure in report.failures
    ]
    return {
        "folder": str(report.build.folder),
        "library": str(report.build.library),
        "compiled": report.compiled,
        "up_to_date": len(report.build.configs) - report.compiled,
        "failures": failures,
        "kernels": [config.name for config in report.build.configs],
        "nodes": [node.as_json() for node in report.nodes],
    }


def failed_status(report: BuildReport) -> int:
    """Return the exit status of a build; print a sentence if kernels failed."""
    if not report.failures:
        return 0
    note(f"{counted(len(report.failures), 'kernel')} failed to compile; the library has the others", label="error:")
    return BuildError.exit_code


@click.command(
    "build",
    cls=ExampleCommand,
    examples=(
        ("w4a16gen build", "the default kernels, into ./build"),
        ("w4a16gen build --cta 128x128x64 --cluster 2x1x1", "one shape in all three modes"),
        ("w4a16gen build --user", "for every program of yours, whatever its current folder"),
        ("w4a16gen build --space default --space trtllm -j 4", "also TensorRT-LLM's set, to compare by bench"),
        ("w4a16gen build --epilogue none --epilogue gated", "also SwiGLU and GeGLU in the kernels"),
        ("w4a16gen build --space all --ray auto", "compile on the nodes of a Ray cluster"),
    ),
)
@filter_options
@generated_option
@build_option
@option("--user", is_flag=True, section=FILES, help="Build into your own folder, where every program of yours looks.")
@jobs_option
@cluster_options
@json_option
def command(
    ctas: Sequence[CtaShape],
    clusters: Sequence[ClusterShape],
    modes: Sequence[QuantMode],
    targets: Sequence[Target],
    epilogues: Sequence[Epilogue],
    spaces: Sequence[str],
    generated: Path,
    folder: Path | None,
    user: bool,
    jobs: int | None,
    ray: str | None,
    ray_env: Path | None,
    as_json: bool,
) -> int:
    """Write, compile and link kernels. Only changed kernels are compiled again.

    The build replaces the one before in its folder, so name everything that you need.
    """
    from w4a16gen.kernels.spaces import Filter
    from w4a16gen.runtime.folders import user_build_folder

    if user and folder is not None:
        raise click.UsageError("--user and --build-dir name two folders: pass one of them")
    if user:
        folder = user_build_folder()
        generated = folder.parent / "generated"
    wanted = Filter(ctas, clusters, modes, targets, epilogues)
    report = build_kernels(wanted, spaces, generated, folder, jobs, ClusterChoice(ray, ray_env))
    if as_json:
        print_result("build", build_as_json(report))
    return failed_status(report)
