"""`w4a16gen quantize`: a 4-bit model from one in FP16, BF16 or FP32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from w4a16gen.cli.convert import report
from w4a16gen.cli.help import METHOD, ExampleCommand, option
from w4a16gen.cli.options import count_option, json_option
from w4a16gen.cli.paths import NamedPath
from w4a16gen.cli.progress import termination_interrupts
from w4a16gen.cli.services import services

_FORMATS = ("compressed-tensors", "w4a16gen")


@click.command(
    "quantize",
    cls=ExampleCommand,
    examples=(
        ("w4a16gen quantize Qwen3-8B Qwen3-8B-int4", "for engines that read compressed-tensors"),
        ("w4a16gen quantize Qwen3-8B Qwen3-8B-packed --format w4a16gen", "packed for the native kernels"),
        ("w4a16gen quantize model out --group-size 64 --skip '*.layers.0.*'", "the first layer stays dense"),
    ),
)
@click.argument("model", metavar="MODEL", type=NamedPath())
@click.argument("out", metavar="OUT", type=NamedPath())
@count_option(
    "--group-size",
    section=METHOD,
    default=128,
    show_default=True,
    help="Values of K that share a scale; a multiple of 32.",
)
@option("--zeros", is_flag=True, section=METHOD, help="Give each group a zero point, which makes errors smaller.")
@option(
    "--format",
    "form",
    type=click.Choice(_FORMATS),
    default=_FORMATS[0],
    show_default=True,
    section=METHOD,
    help="Form of the result: for other engines, or packed for the native kernels.",
)
@option(
    "--skip",
    "skip",
    multiple=True,
    metavar="PATTERN",
    section=METHOD,
    help="Keep modules dense whose names match, with * for any text; lm_head, embeddings and norms always stay dense. "
    "Repeatable.",
)
@json_option
def command(
    model: Path, out: Path, group_size: int, zeros: bool, form: str, skip: Sequence[str], as_json: bool
) -> None:
    """Round the linear layers of MODEL, a folder of safetensors files, to the nearest 4-bit values.

    This needs no data and no GPU. GPTQ and AWQ lose less, but need other tools. An interrupted run continues when it is
    started again.
    """
    from w4a16gen.weights.writers.quantize import Settings, quantize_model

    settings = Settings(group_size, zero_points=zeros, format=form, skip=tuple(skip))
    with termination_interrupts(), services().show_progress(f"Quantizing {model.name}", lines=True) as progress:
        written = quantize_model(model, out, settings, progress=progress)
    report("quantize", written, as_json=as_json)
