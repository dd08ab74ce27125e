"""Text from templates: kernel sources, the registry, compile units. The only importer of jinja2."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from w4a16gen.errors import missing_extra
from w4a16gen.kernels.arrangement import native_arrangement
from w4a16gen.kernels.config import KernelConfig, Target

if TYPE_CHECKING:
    import jinja2


def templates_folder() -> Path:
    """Return the folder of the templates: inside an installed package, beside it in a source tree."""
    package = Path(__file__).resolve().parents[1]
    return next(folder for folder in (package / "templates", package.parent / "templates") if folder.is_dir())


@cache
def _environment() -> jinja2.Environment:
    """Return jinja2's environment.

    Raises:
        MissingToolError: if jinja2 is not installed.
    """
    try:
        import jinja2  # noqa: PLC0415 - the names of sources are known without it
    except ModuleNotFoundError:
        raise missing_extra("jinja2", "build") from None
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(templates_folder()),
        undefined=jinja2.StrictUndefined,
        autoescape=jinja2.select_autoescape(["html.jinja"], default=False),  # C++ is not escaped
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render_kernel(config: KernelConfig) -> str:
    """Return the source of one kernel.

    Args:
        config: a legal configuration.
    """
    values: dict[str, object] = {
        "name": config.name,
        "cta": ", ".join(map(str, config.cta.as_list())),
        "cluster": ", ".join(map(str, config.cluster.as_list())),
        "schedule": config.schedule.value,
        "scheduler": config.scheduler.value,
        "mode": config.mode.value,
    }
    if config.target is Target.NATIVE:
        arrangement = native_arrangement(config)
        values |= {
            "header": f"native/{'grouped' if config.is_grouped else 'launch'}.cuh",
            "family": "native::grouped" if config.is_grouped else "native",
            "epilogue": config.epilogue.value,
            "stages": arrangement.stages,
            "ctas_per_sm": arrangement.ctas_per_sm,
            "stores_through_shared": str(arrangement.stores_through_shared).lower(),
            "tail_tokens": arrangement.tail_tokens,
        }
    return render_text(f"kernels/{config.target}_kernel.cu.jinja", **values)


def render_registry(configs: Iterable[KernelConfig]) -> str:
    """Return the source of the kernel table that the library links."""
    return render_text("kernels/registry.cpp.jinja", names=[config.name for config in sorted(configs)])


def render_unit(sources: Sequence[str]) -> str:
    """Return a compile unit that includes several kernel sources, named relative to its include path."""
    return render_text("kernels/unit.cu.jinja", sources=sources)


def render_text(template: str, **values: object) -> str:
    """Return the text of a template, named relative to the folder of the templates. In HTML, values are escaped."""
    return _environment().get_template(template).render(values)


def source_name(config: KernelConfig) -> str:
    """Return the file name of a kernel's source."""
    return f"{config.name}.cu"
