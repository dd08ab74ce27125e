"""TensorRT-LLM's own W4A16 kernels, written for its source tree."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from w4a16gen.errors import InvalidValueError
from w4a16gen.integrations.tensorrt_llm.launcher import LAUNCHER, Launcher
from w4a16gen.integrations.tensorrt_llm.owned import write_owned
from w4a16gen.kernels.config import KernelConfig, Schedule
from w4a16gen.kernels.render import render_text
from w4a16gen.kernels.spaces import enumerate_space

KERNELS_PER_FILE = 8
"""At most; TensorRT-LLM's own generator puts as many into a file."""
SCHEMA = "w4a16gen.trtllm/1"
"""Kind and version of the manifest in a folder of these files."""
_TEMPLATES = "tensorrt_llm"
_ANY_RELEASE = "tensorrt_llm::w4a16gen::launchers"
"""The alias of the launcher's namespace in files that fit every release."""
_MAINLOOPS = {Schedule.PINGPONG: "Pingpong", Schedule.COOPERATIVE: "Cooperative"}
_EPILOGUES = {Schedule.PINGPONG: "", Schedule.COOPERATIVE: "Cooperative"}
"""Suffixes of CUTLASS's schedules."""


@dataclass(frozen=True)
class TrtllmEmission:
    """What an emission did: kernels by file, and which files were written or removed."""

    files: dict[Path, list[KernelConfig]]
    written: list[Path]
    removed: list[Path]
    stale: list[Path]
    """Files of an earlier call that are still there."""


def emit_trtllm(
    configs: Iterable[KernelConfig],
    folder: Path,
    *,
    mixed_input: bool = False,
    remove_stale: bool = False,
    launcher: Launcher | None = None,
) -> TrtllmEmission:
    """Write explicit instantiations of kernels of space `trtllm`, and a manifest that says which is in which file.

    A file has kernels of one mode and one main loop schedule, which share most of what the compiler instantiates. It
    has at most eight. Files are as equal as possible, so that many cores have work: all 63 make nine files of seven.

    Args:
        configs: the kernels.
        folder: where to write. Files there that no earlier call wrote are neither overwritten nor removed.
        mixed_input: whether main loop schedules end in MixedInput, as older releases write them.
        remove_stale: whether to remove files that an earlier call wrote there and this one did not.
        launcher: the launcher of the source tree that the files are for; by default one that fits every release of
            TensorRT-LLM. `read_launcher` reads it from a source tree.

    Returns:
        The files with their kernels, and what was written and removed.

    Example:
        >>> emission = emit_trtllm(enumerate_space("trtllm"), Path("generated"))  # doctest: +SKIP
        >>> len(emission.files)  # doctest: +SKIP
        9

    Raises:
        InvalidValueError: if one is no kernel that TensorRT-LLM generates, or the folder has a file in the way.
        OSError: if the folder cannot be written.
    """
    launcher = launcher or Launcher()
    wanted = sorted(set(configs), key=lambda config: (config.mode, config.schedule, config))
    known = set(enumerate_space("trtllm"))
    for config in wanted:
        if config not in known:
            raise InvalidValueError(f"{config.name} is not in space trtllm: TensorRT-LLM generates no such kernel")
    files: dict[str, list[KernelConfig]] = {}
    for (mode, schedule), group in groupby(wanted, key=lambda config: (config.mode, config.schedule)):
        kernels = list(group)
        count = -(-len(kernels) // KERNELS_PER_FILE)
        for number in range(count):
            part = kernels[len(kernels) * number // count : len(kernels) * (number + 1) // count]
            files[f"w4a16_trtllm_{mode}_{schedule}_{number + 1}.generated.cu"] = part
    contents = {
        name: render_trtllm_unit(kernels, mixed_input=mixed_input, launcher=launcher).encode()
        for name, kernels in files.items()
    }
    listed = [{**config.as_json(), "file": name} for name, kernels in files.items() for config in kernels]
    done = write_owned(folder, SCHEMA, contents, details={"kernels": listed}, remove_stale=remove_stale)
    return TrtllmEmission(
        {folder / name: kernels for name, kernels in files.items()}, done.written, done.removed, done.kept
    )


def render_trtllm_unit(
    configs: Iterable[KernelConfig], *, mixed_input: bool = False, launcher: Launcher | None = None
) -> str:
    """Return a file of explicit instantiations for a source tree.

    Args:
        configs: kernels of space `trtllm`.
        mixed_input: whether main loop schedules end in MixedInput, as older releases write them.
        launcher: the launcher of the source tree; by default one that fits every release of TensorRT-LLM.
    """
    launcher = launcher or Launcher()
    ending = "MixedInput" if mixed_input or launcher.mixed_input else ""
    kernels = [
        render_text(
            f"{_TEMPLATES}/kernel.cu.jinja",
            name=config.name,
            namespace=launcher.namespace or _ANY_RELEASE,
            launcher=LAUNCHER,
            root=launcher.root,
            mode=config.mode.name,
            cta=config.cta,
            cluster=config.cluster,
            mainloop=_MAINLOOPS[config.schedule] + ending,
            epilogue=_EPILOGUES[config.schedule],
        )
        for config in configs
    ]
    namespaces = "" if launcher.namespace else render_text(f"{_TEMPLATES}/any_release.cu.jinja")
    unit = render_text(
        f"{_TEMPLATES}/unit.cu.jinja", include=launcher.include, namespaces=namespaces, kernels="".join(kernels)
    )
    return unit.rstrip("\n") + "\n"
