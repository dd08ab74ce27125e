"""`w4a16gen emit`: kernel sources, or TensorRT-LLM's instantiations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from w4a16gen.cli.help import FILES, METHOD, WHICH_KERNELS, ExampleCommand, option
from w4a16gen.cli.options import (
    TARGETS,
    Parsed,
    cluster_option,
    cta_option,
    epilogues_option,
    json_option,
    modes_option,
    parse_target,
    space_option,
)
from w4a16gen.cli.output import note, print_result
from w4a16gen.cli.paths import NamedPath
from w4a16gen.errors import InvalidValueError
from w4a16gen.wording import counted

if TYPE_CHECKING:
    from w4a16gen.kernels.config import ClusterShape, CtaShape, Epilogue, KernelConfig, QuantMode, Target

TRTLLM = "trtllm"
"""The target that stands for TensorRT-LLM's own source tree."""


@dataclass(frozen=True)
class _Emitted:
    """The files of an emission."""

    files: Mapping[Path, Sequence[KernelConfig]]
    written: frozenset[Path]
    removed: Sequence[Path]
    stale: int
    """Files of earlier calls that stay."""


def parse_emitted_target(text: str) -> Target | str:
    """Read a kernel family, or `trtllm`."""
    if text == TRTLLM:
        return text
    try:
        return parse_target(text)
    except InvalidValueError as error:
        raise InvalidValueError(f"{error}, {TRTLLM}") from None


@click.command(
    "emit",
    cls=ExampleCommand,
    examples=(
        ("w4a16gen emit --cta 128x128x64 --cluster 2x1x1", "one shape in all three modes, into ./generated"),
        ("w4a16gen emit --target trtllm --output DIR", "TensorRT-LLM's 63 kernels, for its source tree"),
    ),
)
@cta_option
@cluster_option
@modes_option
@option(
    "--target",
    "targets",
    multiple=True,
    type=Parsed("TARGET", parse_emitted_target, lambda _: [*TARGETS, TRTLLM]),
    section=WHICH_KERNELS,
    help="Kernel family: native or cutlass, repeatable; or trtllm: TensorRT-LLM's own instantiations.",
)
@epilogues_option
@space_option
@option(
    "--output",
    type=NamedPath(file_okay=False),
    default=Path("generated"),
    show_default=True,
    section=FILES,
    help="Folder to write to.",
)
@option(
    "--remove-stale",
    is_flag=True,
    section=FILES,
    help="Remove other kernel sources that an earlier call wrote there.",
)
@option(
    "--mixed-input-schedules",
    is_flag=True,
    section=METHOD,
    help="With --target trtllm: main loop schedules that end in MixedInput, as older releases have them.",
)
@option(
    "--trtllm-source",
    "source",
    type=NamedPath(file_okay=False, exists=True),
    section=METHOD,
    help="With --target trtllm: source tree that the files are for. The default fits every release of TensorRT-LLM.",
)
@option(
    "--trtllm-namespace",
    "namespace",
    metavar="NAMESPACE",
    section=METHOD,
    help="With --target trtllm: namespace of the launcher, such as tensorrt_llm::kernels::cutlass_kernels.",
)
@json_option
def command(
    ctas: Sequence[CtaShape],
    clusters: Sequence[ClusterShape],
    modes: Sequence[QuantMode],
    targets: Sequence[Target | str],
    epilogues: Sequence[Epilogue],
    spaces: Sequence[str],
    output: Path,
    remove_stale: bool,
    mixed_input_schedules: bool,
    source: Path | None,
    namespace: str | None,
    as_json: bool,
) -> None:
    """Write one source file for each kernel and print its path.

    With --target trtllm, write explicit instantiations of TensorRT-LLM's own kernels, up to eight a file.
    """
    from w4a16gen.kernels.spaces import Filter, select_kernels

    families = [target for target in targets if not isinstance(target, str)]
    for_trtllm = len(families) < len(targets)
    if for_trtllm and families:
        raise click.UsageError("--target trtllm cannot be combined with another target: it writes other files")
    if not for_trtllm:
        _refuse(
            {
                "--mixed-input-schedules": mixed_input_schedules,
                "--trtllm-source": source,
                "--trtllm-namespace": namespace,
            }
        )
    wanted = Filter(ctas, clusters, modes, families, epilogues)
    selection = select_kernels(wanted, spaces or ((TRTLLM,) if for_trtllm else ()))
    where = f"space {' + '.join(selection.spaces)}"
    if for_trtllm:
        emitted = _emit_trtllm(
            selection.configs,
            output,
            remove_stale,
            mixed_input=mixed_input_schedules,
            source=source,
            namespace=namespace,
        )
        where += f" in {counted(len(emitted.files), 'file')}"
    else:
        emitted = _emit(selection.configs, output, remove_stale)
    if as_json:
        print_result("emit", {"spaces": list(selection.spaces), "folder": str(output), **_as_json(emitted)})
    else:
        for path, kernels in emitted.files.items():
            click.echo(f"{path}\t{len(kernels)}" if for_trtllm else str(path))
    new = sum(path in emitted.written for path in emitted.files)
    unchanged = len(emitted.files) - new
    counts = f"{counted(new, 'file')} written, {unchanged} unchanged, {len(emitted.removed)} stale removed"
    note(f"{counted(len(selection.configs), 'kernel')} of {where}: {counts}")
    if emitted.stale:
        note(f"{output} keeps {counted(emitted.stale, 'file')} of earlier calls; --remove-stale removes them")


def _refuse(options: Mapping[str, object]) -> None:
    """Refuse options that need --target trtllm."""
    for name, value in options.items():
        if value:
            raise click.UsageError(f"{name} needs --target trtllm")


def _emit(configs: Sequence[KernelConfig], output: Path, remove_stale: bool) -> _Emitted:
    """Write one source per kernel."""
    from w4a16gen.build.emit import emit

    emission = emit(configs, output, remove_stale=remove_stale)
    files = {path: (config,) for path, config in zip(emission.paths, configs, strict=True)}
    return _Emitted(files, frozenset(emission.written), emission.removed, len(emission.stale))


def _emit_trtllm(
    configs: Sequence[KernelConfig],
    output: Path,
    remove_stale: bool,
    *,
    mixed_input: bool,
    source: Path | None,
    namespace: str | None,
) -> _Emitted:
    """Write instantiations for TensorRT-LLM's launcher, as its source tree or the user names it."""
    from w4a16gen.integrations.tensorrt_llm.emit import emit_trtllm
    from w4a16gen.integrations.tensorrt_llm.launcher import Launcher, read_launcher

    launcher = read_launcher(source) if source else Launcher()
    launcher = replace(launcher, namespace=namespace) if namespace else launcher
    units = emit_trtllm(configs, output, mixed_input=mixed_input, remove_stale=remove_stale, launcher=launcher)
    return _Emitted(units.files, frozenset(units.written), units.removed, len(units.stale))


def _as_json(emitted: _Emitted) -> dict[str, object]:
    """Return the members of the command's JSON object that describe files."""
    files = [
        {"path": str(path), "written": path in emitted.written, "kernels": [config.name for config in kernels]}
        for path, kernels in emitted.files.items()
    ]
    return {"files": files, "removed": [str(path) for path in emitted.removed]}
