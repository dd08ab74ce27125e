"""`w4a16gen inspect`: the layers of a checkpoint, what they lose, and which kernels they get."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from w4a16gen.cli.explain import choice_space_option, kernels_to_choose_among
from w4a16gen.cli.help import METHOD, ExampleCommand
from w4a16gen.cli.options import build_option, count_option, json_option, wide_option
from w4a16gen.cli.output import note, print_result, wrapped
from w4a16gen.cli.paths import NamedPath
from w4a16gen.cli.services import services
from w4a16gen.cli.tables import Column, print_table
from w4a16gen.wording import counted

if TYPE_CHECKING:
    from w4a16gen.inspection.checkpoint import Inspection

MOST_GPUS = 1024


@click.command(
    "inspect",
    cls=ExampleCommand,
    examples=(
        ("w4a16gen inspect Qwen3-8B-GPTQ", "formats, exactness and kernels of all layers"),
        ("w4a16gen inspect model.gguf --tp 4", "and how they divide among four GPUs"),
    ),
)
@click.argument("checkpoint", metavar="CHECKPOINT", type=NamedPath())
@count_option(
    "--tp", "gpus", section=METHOD, most=MOST_GPUS, default=1, help="GPUs to divide each layer among.  [default: 1]"
)
@choice_space_option
@wide_option
@build_option
@json_option
def command(checkpoint: Path, gpus: int, spaces: Sequence[str], wide: bool, folder: Path | None, as_json: bool) -> None:
    """Show each kind of layer in CHECKPOINT: format, sizes, exactness, kernels, and what stays dense.

    The kernels are those that gemm would pick for 1, 16 and 256 tokens. Without a build they are picked among the
    kernels that `w4a16gen build` would build. No GPU is needed.
    """
    from w4a16gen.inspection.checkpoint import inspect_checkpoint

    kernels = kernels_to_choose_among(spaces, folder)
    with services().show_progress(f"Reading {checkpoint.name}", lines=True) as progress:
        found = inspect_checkpoint(checkpoint, kernels.chooser, kernels.device, gpus, progress)
    if as_json:
        among = {"built": kernels.is_built, "among": kernels.where}
        print_result("inspect", found.as_json() | among)
        return
    _print(found, wide=wide)
    if not kernels.is_built:
        note(f"No build is used: kernels are chosen among {kernels.where}.")


def _print(found: Inspection, *, wide: bool) -> None:
    """Print the tables and sentences of an inspection."""
    totals = found.totals
    layers = counted(totals["layers"], "layer")
    summary = (
        f"{found.path}: {found.method}, {layers} of 4 bits, {totals['layer_bytes'] / 1e9:.2f} GB; "
        f"packed {totals['packed_bytes'] / 1e9:.2f} GB, dense {totals['dense_bytes'] / 1e9:.2f} GB"
    )
    click.echo("\n".join(wrapped(summary, sys.stdout)))
    columns = [
        Column("layer", keep=True, own_line=True),
        Column("count", right=True, keep=True),
        Column("format", keep=True),
        Column("n", right=True, keep=True),
        Column("k", right=True, keep=True),
        Column("group", right=True, keep=True),
        Column("mode", keep=True),
        Column("values", keep=True),
    ]
    print_table("Layers", columns, [_layer_cells(kind) for kind in found.kinds], wide=wide)
    columns = [
        Column("kernel", keep=True, own_line=True),
        Column("n", right=True, keep=True),
        Column("k", right=True, keep=True),
        Column("group", right=True, keep=True),
        Column("mode", keep=True),
        Column("tokens", right=True, keep=True),
    ]
    print_table(f"Kernels{_on_each(found.gpus)}", columns, _kernel_cells(found), wide=wide)
    if found.gpus > 1:
        _print_division(found, wide=wide)
    if found.dense:
        columns = [
            Column("tensor", keep=True, own_line=True),
            Column("count", right=True, keep=True),
            Column("MB", right=True, keep=True),
            Column("dtype", keep=True),
            Column("reason", keep=True),
        ]
        print_table("Dense", columns, [_dense_cells(kind) for kind in found.dense], wide=wide)
    for pattern, reason in found.unsupported.items():
        note(f"Not readable: {pattern}: {reason}")
    for text in (*found.notes, *found.settings):
        note(text)


def _on_each(gpus: int) -> str:
    return f" on each of {gpus} GPUs" if gpus > 1 else ""


def _print_division(found: Inspection, *, wide: bool) -> None:
    columns = [
        Column("layer", keep=True, own_line=True),
        Column("along", keep=True),
        Column("n", right=True, keep=True),
        Column("k", right=True, keep=True),
        Column("group", right=True, keep=True),
        Column("verdict", keep=True),
    ]
    rows = [
        (
            kind.pattern,
            kind.axis.value,
            *(
                ("", "", "")
                if isinstance(kind.share, str)
                else map(str, (kind.share.n, kind.share.k, kind.share.group_size))
            ),
            kind.share if isinstance(kind.share, str) else kind.verdict,
        )
        for kind in found.kinds
    ]
    print_table(f"Divided among {found.gpus} GPUs", columns, rows, wide=wide)
    usable = ", ".join(map(str, found.usable_gpus)) or "none"
    note(f"All layers divide among these numbers of GPUs, up to 64: {usable}")


def _layer_cells(kind: Any) -> tuple[str, ...]:
    sizes = map(str, (kind.whole.n, kind.whole.k, kind.whole.group_size))
    return (kind.pattern, str(kind.count), kind.format, *sizes, str(kind.mode), kind.values)


def _kernel_cells(found: Inspection) -> list[tuple[str, ...]]:
    rows: dict[tuple[str, ...], list[str]] = {}
    for kind in found.kinds:
        part = kind.whole if isinstance(kind.share, str) else kind.share
        for tokens, kernel in kind.kernels.items():
            name = kernel if isinstance(kernel, str) else kernel.short_name
            shape = (name, str(part.n), str(part.k), str(part.group_size), str(kind.mode))
            counts = rows.setdefault(shape, [])
            if str(tokens) not in counts:
                counts.append(str(tokens))
    return [(*shape, ", ".join(counts)) for shape, counts in rows.items()]


def _dense_cells(kind: Any) -> tuple[str, ...]:
    return (kind.pattern, str(kind.count), f"{kind.bytes / 1e6:.1f}", kind.dtype, kind.reason)
