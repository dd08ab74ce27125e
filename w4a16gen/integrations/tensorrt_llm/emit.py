"""TensorRT-LLM's own W4A16 kernels, written for its source tree."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from w4a16gen.errors import InvalidValueError
from w4a16gen.files import write_if_changed, write_json
from w4a16gen.kernels.config import KernelConfig, Schedule
from w4a16gen.kernels.render import render_text
from w4a16gen.kernels.spaces import enumerate_space
from w4a16gen.runtime.artifact import MANIFEST

KERNELS_PER_FILE = 8
"""At most; as many as its own generator puts together."""
SCHEMA_VERSION = 1
_PREFIX = "w4a16_trtllm_"


@dataclass(frozen=True)
class TrtllmEmission:
    """What an emission did: kernels by file, and which files were written or removed."""

    files: dict[Path, list[KernelConfig]]
    written: list[Path]
    removed: list[Path]


def emit_trtllm(
    configs: Iterable[KernelConfig], folder: Path, *, mixed_input: bool = False, remove_stale: bool = False
) -> TrtllmEmission:
    """Write explicit instantiations of kernels of space `trtllm`, and a manifest that says which is in which file.

    A file holds kernels of one mode and one main loop schedule, which share most of what the compiler instantiates, and
    at most eight, in files as equal as possible, so that many cores have work: nine files of seven for all 63.

    Args:
        configs: the kernels.
        folder: where to write.
        mixed_input: whether main loop schedules end in MixedInput, as older releases write them.
        remove_stale: remove files there that an earlier call wrote and this one did not.

    Raises:
        InvalidValueError: if one is no kernel that TensorRT-LLM generates.
        OSError: if the folder cannot be written.
    """
    wanted = sorted(set(configs), key=lambda config: (config.mode, config.schedule, config))
    known = set(enumerate_space("trtllm"))
    for config in wanted:
        if config not in known:
            raise InvalidValueError(f"{config.name} is not in space trtllm: TensorRT-LLM generates no such kernel")
    files: dict[Path, list[KernelConfig]] = {}
    for (mode, schedule), group in groupby(wanted, key=lambda config: (config.mode, config.schedule)):
        kernels = list(group)
        count = -(-len(kernels) // KERNELS_PER_FILE)
        for number in range(count):
            part = kernels[len(kernels) * number // count : len(kernels) * (number + 1) // count]
            files[folder / f"{_PREFIX}{mode}_{schedule}_{number + 1}.generated.cu"] = part
    written = [
        path
        for path, kernels in files.items()
        if write_if_changed(path, render_trtllm_unit(kernels, mixed_input=mixed_input))
    ]
    stale = sorted(set(folder.glob(f"{_PREFIX}*.generated.cu")) - set(files))
    for path in stale if remove_stale else ():
        path.unlink()
    listed = [{**config.as_json(), "file": path.name} for path, kernels in files.items() for config in kernels]
    write_json(folder / MANIFEST, {"schema": SCHEMA_VERSION, "target": "trtllm", "kernels": listed})
    return TrtllmEmission(files, written, stale if remove_stale else [])


_TRTLLM_SCHEDULES = {
    Schedule.PINGPONG: ("KernelTmaWarpSpecializedPingpong", "TmaWarpSpecialized"),
    Schedule.COOPERATIVE: ("KernelTmaWarpSpecializedCooperative", "TmaWarpSpecializedCooperative"),
}
"""TensorRT-LLM's tags of the main loop and of the epilogue."""


def render_trtllm_unit(configs: Iterable[KernelConfig], *, mixed_input: bool = False) -> str:
    """Give a file of explicit instantiations for TensorRT-LLM's source tree.

    Args:
        configs: kernels of space `trtllm`.
        mixed_input: whether main loop schedules end in MixedInput, as older releases write them.
    """
    kernels = []
    for config in configs:
        mainloop, epilogue = _TRTLLM_SCHEDULES[config.schedule]
        kernels.append(
            {
                "name": config.name,
                "mode": config.mode.name,
                "cta": ", ".join(f"cute::Int<{value}>" for value in config.cta.as_list()),
                "cluster": ", ".join(f"cute::Int<{value}>" for value in config.cluster.as_list()),
                "mainloop_schedule": mainloop + ("MixedInput" if mixed_input else ""),
                "epilogue_schedule": epilogue,
            }
        )
    return render_text("tensorrt_llm/unit.cu.jinja", kernels=kernels)
