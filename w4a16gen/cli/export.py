"""`w4a16gen export`: the build for other programs."""

from __future__ import annotations

from pathlib import Path

import click

from w4a16gen import __version__
from w4a16gen.cli.help import FILES, ExampleCommand, option
from w4a16gen.cli.options import build_option, json_option
from w4a16gen.cli.output import note, print_result
from w4a16gen.cli.paths import NamedPath
from w4a16gen.wording import counted


@click.command(
    "export",
    cls=ExampleCommand,
    examples=(
        ("w4a16gen export --prefix /opt/w4a16", "for C and C++, by CMake or pkg-config"),
        ("w4a16gen export --wheel", "a wheel of the built kernels, in ./dist"),
    ),
)
@option(
    "--prefix",
    type=NamedPath(file_okay=False),
    section=FILES,
    help="Write lib/, include/, a CMake package and a pkg-config file into this folder.",
)
@option(
    "--wheel",
    type=NamedPath(file_okay=False),
    is_flag=False,
    flag_value=Path("dist"),
    section=FILES,
    help="Write a wheel of the built kernels into this folder; without a value, into ./dist.",
)
@build_option
@json_option
def command(prefix: Path | None, wheel: Path | None, folder: Path | None, as_json: bool) -> None:
    """Write the build as a package for C++, or as a wheel for machines without a compiler."""
    from w4a16gen.build.export import export_prefix, export_wheel
    from w4a16gen.runtime.artifact import load_build
    from w4a16gen.runtime.folders import folder_to_load

    if prefix is None and wheel is None:
        raise click.UsageError("Specify --prefix, --wheel, or both")
    build = load_build(folder or folder_to_load())
    written = [] if prefix is None else export_prefix(build, prefix, __version__)
    if wheel is not None:
        written.append(export_wheel(build, wheel, __version__))
    if as_json:
        print_result("export", {"kernels": len(build.configs), "written": [str(path) for path in written]})
    else:
        for path in written:
            click.echo(path)
    note(f"{counted(len(build.configs), 'kernel')} exported")
