"""`w4a16gen clean`: remove a build."""

from __future__ import annotations

from pathlib import Path

import click

from w4a16gen.cli.help import ExampleCommand
from w4a16gen.cli.options import build_option, json_option
from w4a16gen.cli.output import note, print_result


@click.command(
    "clean",
    cls=ExampleCommand,
    examples=(
        ("w4a16gen clean", "remove the build in ./build"),
        ("w4a16gen clean --build-dir other", "remove the build in ./other"),
    ),
)
@build_option
@json_option
def command(folder: Path | None, as_json: bool) -> None:
    """Remove everything that `build` wrote into its folder: libraries, objects and logs.

    Tuning tables, kernel sources and files that `build` did not write stay.
    """
    from w4a16gen.build.clean import clean
    from w4a16gen.runtime.folders import default_build_folder

    path = folder or default_build_folder()
    removed = clean(path)
    if as_json:
        print_result("clean", {"folder": str(path), "removed": [str(item) for item in removed]})
    else:
        for item in removed:
            click.echo(item)
    note(f"Removed {len(removed)} files and folders." if removed else f"There is no build in {path}.")
