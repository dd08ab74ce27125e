"""`w4a16gen convert`: the packed form of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from w4a16gen.cli.help import ExampleCommand
from w4a16gen.cli.options import json_option
from w4a16gen.cli.output import note, print_result
from w4a16gen.cli.paths import NamedPath
from w4a16gen.cli.progress import termination_interrupts
from w4a16gen.cli.services import services
from w4a16gen.wording import counted

if TYPE_CHECKING:
    from w4a16gen.weights.writers.convert import Written


@click.command(
    "convert",
    cls=ExampleCommand,
    examples=(
        ("w4a16gen convert Qwen3-8B-GPTQ Qwen3-8B-packed", "a folder of GPTQ, AWQ or another format"),
        ("w4a16gen convert model.gguf model-packed", "a GGUF file"),
    ),
)
@click.argument("checkpoint", metavar="CHECKPOINT", type=NamedPath())
@click.argument("out", metavar="OUT", type=NamedPath())
@json_option
def command(checkpoint: Path, out: Path, as_json: bool) -> None:
    """Write the 4-bit layers of CHECKPOINT, packed for the native kernels, into the new folder OUT.

    Dense tensors, config.json and the tokenizer are copied. `w4a16gen.open_packed` opens the folder by memory map. An
    interrupted run continues when it is started again.
    """
    from w4a16gen.weights.writers.convert import convert

    with termination_interrupts(), services().show_progress(f"Packing {checkpoint.name}", lines=True) as progress:
        written = convert(checkpoint, out, progress=progress)
    report("convert", written, as_json=as_json)


def report(command_name: str, written: Written, *, as_json: bool) -> None:
    """Print what a command has written."""
    if as_json:
        value = {**vars(written), "folder": str(written.folder), "skipped": dict(written.skipped)}
        print_result(command_name, value)
    else:
        click.echo(written.folder)
    if written.was_complete:
        note(f"{written.folder} was complete already: nothing was written.")
    files = counted(written.shards, "file")
    layers = counted(written.layers, "layer")
    note(f"{layers} of 4 bits, {written.dense} dense tensors, {written.bytes / 1e9:.2f} GB in {files}")
    for reason, names in by_reason(written.skipped).items():
        note(f"Dense, because {reason}: {names}")


def by_reason(skipped: Mapping[str, str]) -> dict[str, str]:
    """Return the names of skipped layers by reason, with numbers in names as *."""
    import re

    found: dict[str, dict[str, int]] = {}
    for name, reason in skipped.items():
        pattern = re.sub(r"\b\d+\b", "*", name)
        counts = found.setdefault(re.sub(r"^layer '.*?': ", "", reason), {})
        counts[pattern] = counts.get(pattern, 0) + 1
    return {
        reason: ", ".join(name if count == 1 else f"{name} ({count})" for name, count in counts.items())
        for reason, counts in found.items()
    }
