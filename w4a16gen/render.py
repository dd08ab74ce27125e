"""From configurations to text: kernel sources, the registry, compile units. The only importer of jinja2."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jinja2

from w4a16gen.built import MANIFEST, SCHEMA_VERSION
from w4a16gen.config import KernelConfig, QuantMode, Schedule, Scheduler, Target
from w4a16gen.files import write_if_changed, write_json
from w4a16gen.legality import NATIVE_WARPGROUPS

_MODE_NAMES = {mode: f"W4A16_{mode.name}" for mode in QuantMode}
_CUTLASS_SCHEDULES = {Schedule.PINGPONG: "Pingpong", Schedule.COOPERATIVE: "Cooperative"}
_CUTLASS_SCHEDULERS = {Scheduler.PERSISTENT: "Persistent", Scheduler.STREAM_K: "StreamK"}


@dataclass(frozen=True)
class Emission:
    """What an emission did: paths of every kernel asked for, and which files were written or removed."""

    paths: tuple[Path, ...]
    written: tuple[Path, ...]
    stale: tuple[Path, ...]
    removed: tuple[Path, ...]


def templates_folder() -> Path:
    """Give the folder of the templates: inside an installed package, beside it in a source tree."""
    package = Path(__file__).resolve().parent
    return next(folder for folder in (package / "templates", package.parent / "templates") if folder.is_dir())


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(templates_folder()),
        undefined=jinja2.StrictUndefined,
        autoescape=jinja2.select_autoescape(["html.jinja"], default=False),  # C++ is not escaped
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render_kernel(config: KernelConfig) -> str:
    """Give the translation unit of one kernel."""
    parts = _cutlass_parts if config.target is Target.CUTLASS else _native_parts
    template = _environment().get_template(f"{config.target}_kernel.cu.jinja")
    return template.render(name=config.name, mode=_MODE_NAMES[config.mode], **parts(config))


def _cutlass_parts(config: KernelConfig) -> dict[str, object]:
    return {
        "cta": ", ".join(map(str, config.cta.as_list())),
        "cluster": ", ".join(map(str, config.cluster.as_list())),
        "schedule": _CUTLASS_SCHEDULES[config.schedule],
        "scheduler": _CUTLASS_SCHEDULERS[config.scheduler],
    }


def _native_parts(config: KernelConfig) -> dict[str, object]:
    return {
        "cta": ", ".join(map(str, config.cta.as_list())),
        "warpgroups": NATIVE_WARPGROUPS[config.schedule],
        "cluster": ", ".join(map(str, config.cluster.as_list())),
        "stream_k": str(config.scheduler is Scheduler.STREAM_K).lower(),
        "by_warps": config.schedule is Schedule.EIGHT_WARPS,
    }


def render_registry(configs: Iterable[KernelConfig]) -> str:
    """Give the table of kernels that the library links."""
    names = [config.name for config in sorted(configs)]
    return _environment().get_template("registry.cpp.jinja").render(names=names)


def render_unit(sources: Sequence[str]) -> str:
    """Give a compile unit that includes several kernel sources, named relative to its include path."""
    return _environment().get_template("unit.cu.jinja").render(sources=sources)


def render_text(template: str, **values: object) -> str:
    """Give a text from a template; in HTML, values are escaped."""
    return _environment().get_template(template).render(values)


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
    return _environment().get_template("trtllm_unit.cu.jinja").render(kernels=kernels)


def source_name(config: KernelConfig) -> str:
    """Give the file name of a kernel's source."""
    return f"{config.name}.cu"


def emit(configs: Iterable[KernelConfig], folder: Path, *, remove_stale: bool = False) -> Emission:
    """Write one source per configuration and a manifest into a folder.

    Files that hold the right text already are not touched. Kernel sources of other configurations stay, unless
    `remove_stale`; the manifest names this call's configurations only. Files that are not kernel sources are never
    removed.

    Raises:
        OSError: if the folder cannot be made or written.
    """
    wanted = sorted(set(configs))
    paths = tuple(folder / source_name(config) for config in wanted)
    written = [
        path for config, path in zip(wanted, paths, strict=True) if write_if_changed(path, render_kernel(config))
    ]
    manifest = folder / MANIFEST
    if write_json(manifest, {"schema": SCHEMA_VERSION, "kernels": [config.as_json() for config in wanted]}):
        written.append(manifest)
    stale = tuple(sorted(set(folder.glob("w4a16_sm90_*.cu")) - set(paths)))
    removed: tuple[Path, ...] = ()
    if remove_stale:
        for path in stale:
            path.unlink()
        stale, removed = (), stale
    return Emission(paths, tuple(written), stale, removed)
