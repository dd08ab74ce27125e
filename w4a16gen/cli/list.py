"""`w4a16gen list`: the kernels of spaces or of the build."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from w4a16gen.cli.help import OUTPUT, WHICH_KERNELS, ExampleCommand, option
from w4a16gen.cli.options import build_option, filter_options, json_option, wide_option
from w4a16gen.cli.output import is_terminal, note, print_result, wrapped
from w4a16gen.cli.services import services
from w4a16gen.cli.tables import Column, print_table
from w4a16gen.errors import InvalidValueError
from w4a16gen.wording import counted

if TYPE_CHECKING:
    from w4a16gen.kernels.config import ClusterShape, CtaShape, Epilogue, KernelConfig, QuantMode, Target
    from w4a16gen.kernels.spaces import Filter, Reason

NAMED_KERNELS = 80
"""The most kernels that a terminal shows one by one; more are shown by shape."""
NAMED_SHAPES = 80
"""The most shapes that a terminal shows one by one; more are shown by CTA shape."""


@click.command(
    "list",
    cls=ExampleCommand,
    examples=(
        ("w4a16gen list", "the kernels that `w4a16gen build` builds"),
        ("w4a16gen list --space native --cta 64x16x128 --mode fgs", "one CTA shape of all native kernels"),
        ("w4a16gen list --epilogue gated", "the same kernels with SwiGLU and GeGLU"),
        ("w4a16gen list --built --json", "the kernels of the build, for programs"),
        ("w4a16gen list --explain --space trtllm --cta 256x64x64", "why TensorRT-LLM's set lacks a shape"),
    ),
)
@filter_options
@option(
    "--built",
    is_flag=True,
    section=WHICH_KERNELS,
    help="List the kernels of the build, with every epilogue, not of a space.",
)
@option(
    "--explain",
    is_flag=True,
    section=OUTPUT,
    help="List the legal kernels that the space leaves out, each with the reason, instead of those it contains.",
)
@option(
    "--forbidden",
    is_flag=True,
    section=OUTPUT,
    help="With --explain: list what the hardware or an implementation forbids instead.",
)
@wide_option
@json_option
@build_option
def command(
    ctas: Sequence[CtaShape],
    clusters: Sequence[ClusterShape],
    modes: Sequence[QuantMode],
    targets: Sequence[Target],
    epilogues: Sequence[Epilogue],
    spaces: Sequence[str],
    built: bool,
    explain: bool,
    forbidden: bool,
    wide: bool,
    as_json: bool,
    folder: Path | None,
) -> None:
    """List kernels: one name per line in a pipe; names or a summary on a terminal."""
    from w4a16gen.kernels.spaces import Filter, select_kernels

    wanted = Filter(ctas, clusters, modes, targets, epilogues)
    if built and (spaces or explain):
        raise click.UsageError("--built lists the build's kernels: --space and --explain are for spaces")
    if forbidden and not explain:
        raise click.UsageError("--forbidden needs --explain")
    if explain:
        _explain(wanted, spaces or ("default",), as_json=as_json, forbidden=forbidden)
        return
    if built:
        configs: Sequence[KernelConfig] = _of_build(wanted, folder)
        where, value = "the build", {"built": True, "spaces": []}
    else:
        selection = select_kernels(wanted, spaces)
        configs = selection.configs
        where, value = f"space {' + '.join(selection.spaces)}", {"built": False, "spaces": list(selection.spaces)}
    if as_json:
        print_result("list", {**value, "kernels": [config.as_json() for config in configs]})
    elif is_terminal(sys.stdout):
        _show(configs, wide=wide)
    else:
        for config in configs:
            click.echo(config.name)
    counts = Counter(str(config.mode) for config in configs)
    shown = ", ".join(f"{count} {mode}" for mode, count in counts.items())
    note(f"{counted(len(configs), 'kernel')} ({shown}) in {where}")


def _of_build(wanted: Filter, folder: Path | None) -> list[KernelConfig]:
    library = services().load(folder)
    configs = sorted([*library.configs(), *library.grouped_configs()])
    found = wanted.select(configs)
    if not found:
        raise InvalidValueError(f"the build has no kernel with {wanted}: `w4a16gen list --built` lists all it has")
    return found


def shape_pattern(configs: Sequence[KernelConfig], modes: str | None = None) -> str:
    """Return one short name for kernels that differ in mode only.

    Args:
        configs: the kernels.
        modes: what stands for their modes; None takes braces, which a shell expands.
    """
    first = configs[0]
    if len(configs) == 1:
        return first.short_name
    listed = ",".join(str(config.mode) for config in configs)
    return first.short_name.replace(f"_{first.mode}_", f"_{modes or f'{{{listed}}}'}_", 1)


def by_shape(configs: Iterable[KernelConfig]) -> list[list[KernelConfig]]:
    """Group kernels that differ in mode only."""

    def shape(config: KernelConfig) -> tuple[Any, ...]:
        return config.target, config.cta, config.cluster, config.schedule, config.scheduler, config.epilogue

    return [list(group) for _, group in itertools.groupby(sorted(configs, key=shape), shape)]


def _show(configs: Sequence[KernelConfig], *, wide: bool) -> None:
    """Print kernels for a person: names, or shapes, or how many there are of each CTA shape."""
    title = counted(len(configs), "kernel")
    shapes = by_shape(configs)
    if wide:
        headings = ("name", "target", "mode", "CTA", "cluster", "schedule", "scheduler", "epilogue")
        columns = [Column(heading) for heading in headings]
        rows = ((c.name, c.target, c.mode, c.cta, c.cluster, c.schedule, c.scheduler, c.epilogue) for c in configs)
        print_table(title, columns, (tuple(map(str, row)) for row in rows), wide=True)
    elif len(configs) <= NAMED_KERNELS:
        for config in configs:
            click.echo(config.name)
    elif len(shapes) <= NAMED_SHAPES:
        print_table(
            f"{title} of {len(shapes)} shapes", [Column("kernel", keep=True)], ([shape_pattern(s)] for s in shapes)
        )
        note("Names are w4a16_sm90_ and one of these, with one of the modes in braces. --wide lists every kernel.")
    else:
        columns = [
            Column("target", keep=True),
            Column("CTA (channels x tokens x K)", keep=True),
            Column("kernels", right=True, keep=True),
            Column("clusters"),
            Column("schedules"),
        ]
        ordered = sorted(configs, key=lambda config: (config.target, config.cta))
        groups = itertools.groupby(ordered, lambda config: (config.target, config.cta))
        print_table(title, columns, (_summary(list(group)) for _, group in groups))
        note("--cta, --cluster, --mode, --target and --epilogue narrow the list; --wide lists every kernel.")


def _summary(group: Sequence[KernelConfig]) -> tuple[str, ...]:
    first = group[0]
    clusters = len({config.cluster for config in group})
    schedules = sorted({config.schedule for config in group})
    return str(first.target), str(first.cta), str(len(group)), str(clusters), ", ".join(map(str, schedules))


def _explain(wanted: Filter, spaces: Sequence[str], *, as_json: bool, forbidden: bool) -> None:
    """Print the kernels that spaces do not contain, or on a terminal how many share each reason."""
    left_out = list(_left_out(wanted, spaces, forbidden=forbidden))
    where = " + ".join(spaces)
    what = "forbidden configurations" if forbidden else f"legal kernels that space {where} leaves out"
    if as_json:
        kernels = [config.as_json() | {"kind": why.kind.value, "reason": why.sentence} for config, why in left_out]
        print_result("list", {"built": False, "spaces": list(spaces), "kernels": kernels})
    elif is_terminal(sys.stdout):
        for why, count in Counter(why for _, why in left_out).most_common():
            for line in wrapped(f"{count:<8}{why.sentence}", sys.stdout, 8):
                click.echo(line)
    else:
        for config, why in left_out:
            click.echo(f"{config.name}\t{why}")
    note(f"{len(left_out)} {what}" + ("" if forbidden else "; --forbidden shows what is not legal"))


def _left_out(wanted: Filter, spaces: Sequence[str], *, forbidden: bool) -> Iterable[tuple[KernelConfig, Reason]]:
    from w4a16gen.kernels.config import Epilogue
    from w4a16gen.kernels.legality import why_forbidden
    from w4a16gen.kernels.spaces import Reason, ReasonKind, candidates, enumerate_space, why_not, with_epilogues

    if forbidden:
        for plain, epilogue in itertools.product(candidates(), wanted.epilogues or [Epilogue.NONE]):
            config = replace(plain, epilogue=epilogue)
            if wanted.matches(config) and (why := why_forbidden(config)):
                yield config, Reason(ReasonKind.FORBIDDEN, why)
        return
    for config in wanted.select(with_epilogues(enumerate_space("all"), wanted.epilogues)):
        plain = replace(config, epilogue=Epilogue.NONE)  # all that spaces contain
        reasons = [why_not(plain, space) for space in spaces]
        if None not in reasons:
            yield config, Reason(ReasonKind.LEFT_OUT, "; ".join(reason.sentence for reason in reasons if reason))
