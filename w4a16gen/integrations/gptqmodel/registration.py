"""Where GPTQModel keeps its kernels; the classes come into being when GPTQModel is there."""

from __future__ import annotations

import importlib
import logging
from typing import Any

from w4a16gen.errors import MissingToolError
from w4a16gen.integrations.engines.switch import why_off

LOGGER = logging.getLogger("w4a16gen.gptqmodel")
KEY = "w4a16gen"
"""The key of the kernels in GPTQModel's table."""
GPTQ_KERNEL, AWQ_KERNEL = "W4A16GenGPTQLinear", "W4A16GenAWQLinear"


def register() -> list[str]:
    """Put the kernels at the front of GPTQModel's table for GPTQ, GPTQ v2 and AWQ (GEMM).

    GPTQModel asks them first about each model, and goes on to its own kernels where they refuse. It may be called any
    number of times. W4A16GEN_PLUGINS=off turns it off.

    Returns:
        The formats that the kernels are in front of; empty if they are turned off.

    Raises:
        MissingToolError: if GPTQModel cannot be imported, or has no such table.

    Example:
        >>> import w4a16gen.integrations.gptqmodel
        >>> w4a16gen.integrations.gptqmodel.register()  # doctest: +SKIP
        ['gptq: gptq', 'gptq: gptq_v2', 'awq: gemm']
    """
    reason = why_off()
    if reason is not None:
        LOGGER.info("w4a16gen leaves GPTQModel alone: %s", reason)
        return []
    try:
        table = importlib.import_module("gptqmodel.utils.importer").AUTO_BACKEND_KERNEL_MAPPING
        quantization = importlib.import_module("gptqmodel.quantization")
    except (ImportError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "gptqmodel":
            raise MissingToolError("gptqmodel is not installed: pip install gptqmodel") from None
        raise MissingToolError(
            f"GPTQModel has no table of kernels that is known ({type(error).__name__}: {error}): "
            "`pip install gptqmodel`, or update it"
        ) from error
    methods, formats = quantization.METHOD, quantization.FORMAT
    places = (
        *((methods.GPTQ, kind, GPTQ_KERNEL) for kind in (formats.GPTQ, formats.GPTQ_V2)),
        (methods.AWQ, formats.GEMM, AWQ_KERNEL),
    )
    filled = []
    for method, kind, name in places:
        kernels = table.get(method, {}).get(kind)
        if not kernels:
            continue
        if KEY not in kernels:
            kernels[KEY] = _class_of(name, kind)
        kernels.move_to_end(KEY, last=False)
        filled.append(f"{method.value}: {kind.value}")
    LOGGER.info("w4a16gen is first of GPTQModel's kernels for %s", ", ".join(filled) or "no format")
    return filled


_classes: dict[str, Any] = {}
"""The classes of this process, by name."""


def _class_of(name: str, kind: Any) -> Any:
    """Return a kernel's class, which is made once."""
    from w4a16gen.integrations.gptqmodel.kernels import make_kernel  # noqa: PLC0415  (imports torch)

    if name not in _classes:
        _classes[name] = make_kernel(name, is_awq=name == AWQ_KERNEL)
    _classes[name].SUPPORTS_FORMATS.setdefault(kind, _PRIORITY)
    return _classes[name]


_PRIORITY = 200
"""Above those of GPTQModel's own kernels, which are 101 at most."""
