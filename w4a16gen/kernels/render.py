"""From configurations to text: kernel sources, the registry, compile units. The only importer of jinja2."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import jinja2

from w4a16gen.kernels.arrangement import NATIVE_WARPGROUPS
from w4a16gen.kernels.config import KernelConfig, QuantMode, Schedule, Scheduler, Target

_MODE_NAMES = {mode: f"W4A16_{mode.name}" for mode in QuantMode}
_CUTLASS_SCHEDULES = {Schedule.PINGPONG: "Pingpong", Schedule.COOPERATIVE: "Cooperative"}
_CUTLASS_SCHEDULERS = {Scheduler.PERSISTENT: "Persistent", Scheduler.STREAM_K: "StreamK"}


def templates_folder() -> Path:
    """Give the folder of the templates: inside an installed package, beside it in a source tree."""
    package = Path(__file__).resolve().parents[1]
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
    template = _environment().get_template(f"kernels/{config.target}_kernel.cu.jinja")
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
    return _environment().get_template("kernels/registry.cpp.jinja").render(names=names)


def render_unit(sources: Sequence[str]) -> str:
    """Give a compile unit that includes several kernel sources, named relative to its include path."""
    return _environment().get_template("kernels/unit.cu.jinja").render(sources=sources)


def render_text(template: str, **values: object) -> str:
    """Give a text from a template; in HTML, values are escaped."""
    return _environment().get_template(template).render(values)


def source_name(config: KernelConfig) -> str:
    """Give the file name of a kernel's source."""
    return f"{config.name}.cu"
