"""The commands on kernels as values: list and emit."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import click

from w4a16gen import space
from w4a16gen.api import load
from w4a16gen.cli.app import build_option, json_option, kernel_filters, main, notes, print_json, print_table
from w4a16gen.errors import InvalidValueError
from w4a16gen.render import emit as emit_kernels


@main.command("list")
@kernel_filters("trtllm-native")
@click.option("--explain", is_flag=True, help="Show what the space leaves out, and why, instead of what it holds.")
@click.option("--built", is_flag=True, help="Show the kernels of the build instead of a space's.")
@build_option
@json_option
def list_command(
    wanted: space.Filter,
    space_name: str,
    explain: bool,
    built: bool,
    folder: Path | None,
    as_json: bool,
) -> None:
    """List the kernels of a space: a table on a terminal, bare names in a pipe."""
    if explain:
        _explain(wanted, space_name, as_json)
        return
    configs = wanted.select(load(folder).configs()) if built else space.select(space_name, wanted)
    if not configs:
        raise InvalidValueError("no kernel of the build matches: `w4a16gen list --built` shows what it holds")
    if as_json:
        print_json([config.as_json() for config in configs])
    elif sys.stdout.isatty():
        headings = ("mode", "CTA (channels x tokens x k)", "cluster", "schedule", "scheduler", "target")
        rows = (
            (str(c.mode), str(c.cta), str(c.cluster), str(c.schedule), str(c.scheduler), str(c.target)) for c in configs
        )
        print_table(f"{len(configs)} kernels", headings, rows)
    else:
        for config in configs:
            click.echo(config.name)
    counts = Counter(str(config.mode) for config in configs)
    shown = ", ".join(f"{count} {mode}" for mode, count in counts.items())
    notes.print(f"{len(configs)} kernels ({shown}) in {'the build' if built else f'space {space_name}'}")


def _explain(wanted: space.Filter, space_name: str, as_json: bool) -> None:
    """Show every configuration that a space does not hold, or how many share a reason."""
    left_out = [
        (config, why) for config in wanted.select(space.candidates()) if (why := space.why_not(config, space_name))
    ]
    if as_json:
        print_json([config.as_json() | {"kind": why.kind.value, "reason": why.sentence} for config, why in left_out])
    elif sys.stdout.isatty():
        counts = Counter(why for _, why in left_out)
        rows = ((str(count), why.kind.value, why.sentence) for why, count in counts.most_common())
        print_table(f"Not in space {space_name}", ("count", "kind", "why"), rows)
    else:
        for config, why in left_out:
            click.echo(f"{config.name}\t{why}")
    notes.print(f"{len(left_out)} of the grid's configurations are not in space {space_name}")


@main.command()
@kernel_filters("trtllm-native")
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("generated"),
    show_default=True,
    help="Folder to write to.",
)
@click.option("--remove-stale", is_flag=True, help="Remove kernel sources there that were not asked for.")
@json_option
def emit(
    wanted: space.Filter,
    space_name: str,
    output: Path,
    remove_stale: bool,
    as_json: bool,
) -> None:
    """Write the sources of the matching kernels, one file each, and print their paths."""
    emission = emit_kernels(space.select(space_name, wanted), output, remove_stale=remove_stale)
    if as_json:
        print_json({key: [str(path) for path in paths] for key, paths in vars(emission).items()})
    else:
        for path in emission.paths:
            click.echo(path)
    written = sum(path in emission.paths for path in emission.written)
    notes.print(
        f"{len(emission.paths)} kernels: {written} written, {len(emission.paths) - written} unchanged; "
        f"{len(emission.removed)} stale removed, {len(emission.stale)} stale kept"
    )
