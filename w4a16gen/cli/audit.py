"""`w4a16gen audit`: a folder of sources that TensorRT-LLM's generator wrote."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from w4a16gen.cli.help import FILES, ExampleCommand, option
from w4a16gen.cli.options import json_option, wide_option
from w4a16gen.cli.output import note, print_result
from w4a16gen.cli.paths import NamedPath
from w4a16gen.cli.tables import Column, print_table
from w4a16gen.errors import EXIT_FAILED
from w4a16gen.wording import counted

if TYPE_CHECKING:
    from w4a16gen.integrations.tensorrt_llm.audit import Audit


@click.command(
    "audit",
    cls=ExampleCommand,
    examples=(
        ("w4a16gen audit generated", "which of the 63 W4A16 kernels are there, and what else is"),
        ("w4a16gen audit generated --extract w4a16", "write the W4A16 instantiations only into ./w4a16"),
    ),
)
@click.argument("folder", type=NamedPath(file_okay=False, exists=True))
@option(
    "--extract",
    "output",
    type=NamedPath(file_okay=False),
    section=FILES,
    help="Write the FP16 x uint4 instantiations into this folder, also those in mixed files.",
)
@option(
    "--remove-stale",
    is_flag=True,
    section=FILES,
    help="With --extract: remove files that an earlier call wrote there and this one does not.",
)
@wide_option
@json_option
def command(folder: Path, output: Path | None, remove_stale: bool, wide: bool, as_json: bool) -> int:
    """Audit a folder of .cu files from TensorRT-LLM's generator.

    It reports which of the 63 FP16 x uint4 kernels for Hopper are present, missing or duplicated, and which other
    kernels are there. Exit code 1 if the folder has anything but the 63, once each, or a file that cannot be read.
    """
    from w4a16gen.integrations.tensorrt_llm.audit import audit
    from w4a16gen.integrations.tensorrt_llm.extract import extract

    if remove_stale and output is None:
        raise click.UsageError("--remove-stale needs --extract")
    found = audit(folder)
    extracted = extract(found, output, remove_stale=remove_stale) if output is not None else []
    if as_json:
        print_result("audit", {**found.as_json(), "extracted": [str(path) for path in extracted]})
    else:
        _show(found, wide=wide)
    foreign = ", ".join(f"{count} {types}" for types, count in sorted(found.foreign.items())) or "none"
    note(
        f"{len(found.kernels)} of 63 FP16 x uint4 kernels found; {len(found.missing)} missing, "
        f"{len(found.duplicates)} duplicates, {len(found.unknown)} unknown, {len(found.conditional)} conditional; "
        f"unrelated: {foreign}; {counted(len(found.problems), 'problem')}"
    )
    if output is not None:
        note(f"Wrote {counted(len(extracted), 'file')} into {output}")
    return 0 if found.ok else EXIT_FAILED


def _show(found: Audit, *, wide: bool) -> None:
    from w4a16gen.integrations.tensorrt_llm.known import W4A16

    columns = (
        Column("file", keep=True, own_line=True),
        Column(W4A16, right=True, keep=True),
        Column("mixed"),
        Column("others"),
    )
    rows = (
        (
            file.name,
            str(file.types[W4A16]),
            "mixed" if file.is_mixed else "",
            ", ".join(f"{count} {types}" for types, count in sorted(file.types.items()) if types != W4A16),
        )
        for file in found.files
    )
    print_table(
        f"{counted(found.total, 'instantiation')} in {counted(len(found.files), 'file')}", columns, rows, wide=wide
    )
    for label, lines in (
        ("missing", [config.name for config in found.missing]),
        ("duplicate", [config.name for config in found.duplicates]),
        (
            "unknown FP16 x uint4 kernel",
            [f"{what} at {place}" for what, place in zip(found.unknown, found.unknown_places, strict=True)],
        ),
        ("unrelated", [f"{types} at {', '.join(places)}" for types, places in sorted(found.foreign_places.items())]),
        ("conditional", [f"{what}, if {condition}" for what, condition in found.conditional]),
        ("problem", found.problems),
    ):
        for line in lines:
            click.echo(f"{label}: {line}")
