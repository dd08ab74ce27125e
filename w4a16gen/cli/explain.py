"""`w4a16gen explain`: which kernel a call of gemm gets, and why."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from w4a16gen.cli.help import OUTPUT, WHICH_KERNELS, ExampleCommand, option
from w4a16gen.cli.options import (
    build_option,
    count_option,
    dimension_arguments,
    json_option,
    mode_option,
    problem_of,
    wide_option,
)
from w4a16gen.cli.output import note, print_result
from w4a16gen.cli.services import services
from w4a16gen.cli.tables import Column, print_table
from w4a16gen.errors import NotBuiltError
from w4a16gen.kernels.config import KernelConfig, QuantMode
from w4a16gen.kernels.named_spaces import GEMM_SPACES

if TYPE_CHECKING:
    from w4a16gen.choose.chooser import Choice, Chooser
    from w4a16gen.kernels.device import Device
    from w4a16gen.kernels.problem import Problem


@dataclass(frozen=True)
class Choosable:
    """Kernels to choose among, and the GPU to choose for."""

    chooser: Chooser
    device: Device | None
    where: str
    is_built: bool


choice_space_option = option(
    "--space",
    "spaces",
    multiple=True,
    type=click.Choice(list(GEMM_SPACES)),
    metavar="SPACE",
    section=WHICH_KERNELS,
    help=f"Choose among a named set instead of the build: {', '.join(GEMM_SPACES)}. Repeatable: the union.",
)


@click.command(
    "explain",
    cls=ExampleCommand,
    examples=(
        ("w4a16gen explain 16 4096 4096", "16 tokens, 4,096 output channels, K of 4,096"),
        ("w4a16gen explain 1 28672 8192 --space native", "the best of all native kernels, built or not"),
    ),
)
@dimension_arguments(least_tokens=1)
@mode_option
@choice_space_option
@count_option("--top", section=OUTPUT, default=5, show_default=True, help="Kernels to show.")
@wide_option
@build_option
@json_option
def command(
    m: int,
    n: int,
    k: int,
    group_size: int | None,
    mode: QuantMode,
    spaces: Sequence[str],
    top: int,
    wide: bool,
    folder: Path | None,
    as_json: bool,
) -> None:
    """Show which kernel gemm picks for M tokens, N output channels and K, and the runners-up.

    Without a build it picks among the kernels that `w4a16gen build` would build. No GPU is needed.
    """
    from w4a16gen.choose.cards import card_of
    from w4a16gen.choose.cost_model import default_cost_model

    kernels = kernels_to_choose_among(spaces, folder)
    problem = problem_of(m, n, k, group_size, mode)
    choice = kernels.chooser.choose(problem, mode, device=kernels.device)
    rows = _rows(choice, kernels.chooser.estimates(problem, mode, kernels.device), top)
    fp16 = default_cost_model().dense_microseconds(problem, card_of(kernels.device))
    if as_json:
        result = {"problem": vars(problem), "mode": mode.value, **_as_json(kernels, choice)}
        times = {"microseconds": rows[0]["microseconds"], "fp16_microseconds": round(fp16, 2), "kernels": rows}
        print_result("explain", result | times)
        return
    if not kernels.is_built:
        note(f"No build is used: choosing among {kernels.where}.")
    click.echo(choice.kernel.name)
    launches = ", for dependent launches" if choice.dependent else ""
    note(f"Chosen by {choice.source.sentence}{launches}.")
    if rows[0]["microseconds"] is not None:
        note(_beside_fp16(problem, fp16, rows[0]["microseconds"]))
    _print_rows(f"{problem}, mode {mode}", rows, wide=wide)
    if any(row["basis"] == "estimate" for row in rows):
        note(f"Estimates are for {_card(kernels.device)}.")
    note(f"To measure: w4a16gen bench --problem {m}x{n}x{k},{problem.group_size} --mode {mode}")


def _as_json(kernels: Choosable, choice: Choice) -> dict[str, Any]:
    """Return the members of the command's JSON object that describe the choice."""
    return {
        "built": kernels.is_built,
        "among": kernels.where,
        "gpu": None if kernels.device is None else kernels.device.as_json(),
        "kernel": choice.kernel.name,
        "source": choice.source.value,
        "dependent": choice.dependent,
    }


def _print_rows(title: str, rows: Sequence[dict[str, Any]], *, wide: bool) -> None:
    """Print the table of kernels and their times."""
    columns = [
        Column("kernel", keep=True, own_line=True),
        Column("us", right=True, keep=True),
        Column("basis", keep=True),
    ]
    cells = (
        (
            KernelConfig.parse(row["kernel"]).short_name,
            "" if row["microseconds"] is None else f"{row['microseconds']:.1f}",
            str(row["basis"]),
        )
        for row in rows
    )
    print_table(title, columns, cells, wide=wide)


def _card(device: Device | None) -> str:
    return f"{device.name} with {device.sm_count} SMs" if device else "an H100, because this machine has no Hopper GPU"


def kernels_to_choose_among(spaces: Sequence[str], folder: Path | None) -> Choosable:
    """Return the build's kernels, or those of a space if one is named or there is no build."""
    from w4a16gen.choose.chooser import Chooser
    from w4a16gen.kernels.spaces import Filter, select_kernels
    from w4a16gen.runtime.artifact import MANIFEST
    from w4a16gen.runtime.folders import folder_to_load

    if not spaces:
        try:
            library = services().load(folder)
        except NotBuiltError:
            if folder is not None or os.path.lexists(folder_to_load() / MANIFEST):
                raise  # the user named a folder, or the build there is damaged
        else:
            device = next(iter(library.hopper_devices()), None)
            return Choosable(library.chooser, device, f"the kernels of {library.build.folder}", is_built=True)
    selection = select_kernels(Filter(), spaces)
    driver = services().find_driver()
    device = next((gpu for gpu in driver.gpus if gpu.is_hopper), None) if driver else None
    where = f"the {len(selection.configs)} kernels of space {' + '.join(selection.spaces)}"
    return Choosable(
        Chooser(dict.fromkeys(selection.configs, ""), Path("no tuning table")), device, where, is_built=False
    )


def _rows(choice: Choice, estimates: Sequence[tuple[KernelConfig, float]], top: int) -> list[dict[str, Any]]:
    """Return the chosen kernel, then the fastest others by estimate, each with the source of its time."""
    from w4a16gen.choose.chooser import ChoiceSource

    measured = choice.source is ChoiceSource.TUNING_TABLE
    microseconds = choice.microseconds or dict(estimates).get(choice.kernel)
    how = "measured" if measured else "unknown" if microseconds is None else "estimate"
    rows = [(choice.kernel, microseconds, how)]
    rows += [(config, us, "estimate") for config, us in estimates if config != choice.kernel]
    return [
        {"kernel": config.name, "microseconds": None if us is None else round(us, 2), "basis": known}
        for config, us, known in rows[:top]
    ]


def _beside_fp16(problem: Problem, fp16: float, expected: float) -> str:
    from w4a16gen.choose.cost_model import default_cost_model

    if fp16 < expected:
        reason = "the layer is too small for 4-bit weights to help"
        if default_cost_model().is_compute_bound(problem):
            reason = "at this many tokens the GEMM is compute-bound, so 4-bit weights no longer help"
        return f"Dense FP16 would take about {fp16:.1f} us, less than {expected:.1f} us: {reason}."
    if fp16 < 1.05 * expected:
        return f"Dense FP16 takes about {fp16:.1f} us, nearly the same as {expected:.1f} us."
    return f"Dense FP16 takes about {fp16:.1f} us, {fp16 / expected:.1f} times as long as {expected:.1f} us."
