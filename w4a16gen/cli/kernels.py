"""The commands on kernels as values: list and emit."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import click

from w4a16gen.build.emit import emit as emit_kernels
from w4a16gen.cli.app import (
    EXIT_FAILED,
    build_option,
    json_option,
    kernel_filters,
    main,
    notes,
    print_json,
    print_table,
)
from w4a16gen.errors import InvalidValueError
from w4a16gen.integrations.tensorrt_llm.audit import W4A16, audit, extract
from w4a16gen.integrations.tensorrt_llm.emit import emit_trtllm
from w4a16gen.kernels import spaces as space
from w4a16gen.runtime.default import load


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
@kernel_filters("trtllm-native", emits=True)
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("generated"),
    show_default=True,
    help="Folder to write to.",
)
@click.option("--remove-stale", is_flag=True, help="Remove kernel sources there that were not asked for.")
@click.option(
    "--mixed-input-schedules",
    is_flag=True,
    help="With --target trtllm: schedules that end in MixedInput, as older releases write them.",
)
@json_option
def emit(
    wanted: space.Filter,
    space_name: str | None,
    for_trtllm: bool,
    output: Path,
    remove_stale: bool,
    mixed_input_schedules: bool,
    as_json: bool,
) -> None:
    """Write the sources of the matching kernels, one file each, and print their paths.

    With --target trtllm: the explicit instantiations of TensorRT-LLM's own kernels, a few to a file, for its sources.
    """
    if for_trtllm:
        _emit_trtllm(wanted, space_name, output, remove_stale, mixed_input_schedules, as_json)
        return
    if mixed_input_schedules:
        raise click.UsageError("--mixed-input-schedules is for --target trtllm")
    emission = emit_kernels(space.select(space_name or "trtllm-native", wanted), output, remove_stale=remove_stale)
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


def _emit_trtllm(
    wanted: space.Filter,
    space_name: str | None,
    output: Path,
    remove_stale: bool,
    mixed_input: bool,
    as_json: bool,
) -> None:
    """Write TensorRT-LLM's instantiations, and say how many are in which file."""
    configs = space.select(space_name or "trtllm", wanted)
    emission = emit_trtllm(configs, output, mixed_input=mixed_input, remove_stale=remove_stale)
    if as_json:
        files = {str(path): [config.name for config in kernels] for path, kernels in emission.files.items()}
        written, removed = ([str(path) for path in paths] for paths in (emission.written, emission.removed))
        print_json({"files": files, "written": written, "removed": removed})
    else:
        for path, kernels in emission.files.items():
            click.echo(f"{path}\t{len(kernels)}")
    notes.print(
        f"{len(configs)} FP16 x uint4 kernels in {len(emission.files)} files: {len(emission.written)} written, "
        f"{len(emission.files) - len(emission.written)} unchanged, {len(emission.removed)} stale removed"
    )


@main.command("audit")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option(
    "--extract",
    "output",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write what is FP16 x uint4 into this folder, also out of mixed files.",
)
@json_option
def audit_command(folder: Path, output: Path | None, as_json: bool) -> None:
    """Say what the .cu files that TensorRT-LLM's generator wrote into a folder hold.

    Which of its 63 FP16 x uint4 kernels for Hopper are there, which are missing or there twice, and what else is. Exit
    code 1 if anything is foreign, missing or there twice.
    """
    found = audit(folder)
    extracted = extract(found, output) if output is not None else []
    if as_json:
        print_json({**found.as_json(), "extracted": [str(path) for path in extracted]})
    else:
        headings = ("file", "FP16 x uint4", "others", "")
        rows = (
            (
                str(file.path.relative_to(folder)),
                str(file.types[W4A16]),
                ", ".join(f"{count} {types}" for types, count in sorted(file.types.items()) if types != W4A16),
                "mixed" if file.is_mixed else "",
            )
            for file in found.files
        )
        print_table(f"{found.total} instantiations in {len(found.files)} files", headings, rows)
        for label, names in (
            ("missing", [config.name for config in found.missing]),
            ("there twice", [config.name for config in found.duplicates]),
            ("FP16 x uint4, but none of the 63", found.unknown),
        ):
            for name in names:
                click.echo(f"{label}: {name}")
    foreign = ", ".join(f"{count} {types}" for types, count in sorted(found.foreign.items())) or "nothing"
    notes.print(
        f"{len(found.kernels)} of 63 FP16 x uint4 kernels, {len(found.missing)} missing, {len(found.duplicates)} there "
        f"twice, {len(found.unknown)} unknown; foreign: {foreign}"
    )
    if output is not None:
        notes.print(f"{len(extracted)} files written to {output}")
    if not found.ok:
        sys.exit(EXIT_FAILED)
