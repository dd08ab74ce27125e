"""Where vLLM keeps its kernels and its quantization configurations, in this release and older ones."""

from __future__ import annotations

import importlib
import logging
from typing import Any, NamedTuple

from w4a16gen.errors import MissingToolError
from w4a16gen.integrations.engines.switch import tried
from w4a16gen.integrations.vllm.experts import ExpertsOverride
from w4a16gen.integrations.vllm.experts_formats import AWQExperts, CompressedTensorsExperts, GPTQExperts
from w4a16gen.integrations.vllm.gptq import ConfigOverride, LinearMethod
from w4a16gen.integrations.vllm.kernel import LinearKernel
from w4a16gen.integrations.vllm.modular_experts import FUSED_MOE, ModularExperts

LOGGER = logging.getLogger("vllm.w4a16gen")
KERNEL = "W4A16GenLinearKernel"
"""The kernel's name in vLLM's log and in VLLM_DISABLED_KERNELS."""
METHOD = "W4A16GenGPTQLinearMethod"
CONFIG = "W4A16GenGPTQConfig"
EXPERTS = "W4A16GenExperts"
"""The name of the modular experts in vLLM's log."""
CONFIG_NAMES = ("auto_gptq", "gptq", "gptq_marlin")
"""The names under which vLLM looks for the configuration of a GPTQ model."""
_KERNEL_MODULES = (
    "vllm.model_executor.kernels.linear",
    "vllm.model_executor.layers.quantization.kernels.mixed_precision",
)
_QUANTIZATION = "vllm.model_executor.layers.quantization"
_COMPRESSED = f"{_QUANTIZATION}.compressed_tensors"

_NEEDED = {
    "modular_kernel": ("FusedMoEActivationFormat", "FusedMoEExpertsModular", "FusedMoEKernel"),
    "all2all_utils": ("maybe_make_prepare_finalize",),
    "topk_weight_and_reduce": ("TopKWeightAndReduceNoOP",),
    "config": ("FUSED_MOE_UNQUANTIZED_CONFIG",),
}
"""What experts use, by vLLM's module."""


class _Format(NamedTuple):
    """A format whose experts are served."""

    module: str
    """Where vLLM has its method of experts."""
    method: str
    ours: type
    """The part of this package's method."""


class _Overridden(NamedTuple):
    """A configuration that is registered for the experts' sake."""

    module: str
    config: str
    names: tuple[str, ...]
    """The names under which vLLM looks for it."""
    format: _Format


_GPTQ_EXPERTS = _Format(f"{_QUANTIZATION}.auto_gptq", "AutoGPTQMoEMethod", GPTQExperts)
_EXPERTS_CONFIGS = {
    "W4A16GenAWQConfig": _Overridden(
        f"{_QUANTIZATION}.auto_awq",
        "AutoAWQConfig",
        ("awq", "awq_marlin", "auto_awq"),
        _Format(f"{_QUANTIZATION}.auto_awq", "AutoAWQMoEMethod", AWQExperts),
    ),
    "W4A16GenCompressedTensorsConfig": _Overridden(
        f"{_COMPRESSED}.compressed_tensors",
        "CompressedTensorsConfig",
        ("compressed-tensors",),
        _Format(
            f"{_COMPRESSED}.compressed_tensors_moe.compressed_tensors_moe_wna16",
            "CompressedTensorsWNA16MoEMethod",
            CompressedTensorsExperts,
        ),
    ),
}
"""By the name that the configuration gets."""


def register_all() -> str:
    """Register everything with vLLM, and return the line of the log.

    Raises:
        ImportError: if vLLM's modules are not where any known release has them.
        MissingToolError: if there is no list of kernels.
    """
    lines = [
        _insert_kernel(),
        tried(LOGGER, _override_gptq, "GPTQ models with act-order or zero points stay refused"),
        tried(LOGGER, _override_experts, "experts are left to vLLM"),
    ]
    return "; ".join(lines)


def _first_module(names: tuple[str, ...]) -> Any:
    """Return the first module that can be imported."""
    missing: ImportError | None = None
    for name in names:
        try:
            return importlib.import_module(name)
        except ImportError as error:
            missing = missing or error
    raise missing or ImportError("no module was named")


def _insert_kernel() -> str:
    """Put the kernel at the head of the list of mixed-precision linear kernels."""
    linear = _first_module(_KERNEL_MODULES)
    kernels = _kernels_of(linear)
    if not any(kernel.__name__ == KERNEL for kernel in kernels):
        kernels.insert(0, _combined(KERNEL, LinearKernel, linear.MPLinearKernel))
    return f"{KERNEL} is first of vLLM's {len(kernels)} mixed-precision linear kernels"


def _kernels_of(linear: Any) -> list[Any]:
    """Return vLLM's list of kernels for CUDA, the object itself.

    Raises:
        MissingToolError: if it is not where it is known to be.
    """
    found = getattr(linear, "_POSSIBLE_KERNELS", None)
    if isinstance(found, dict):
        cuda = importlib.import_module("vllm.platforms").PlatformEnum.CUDA
        found = found.setdefault(cuda, [])
    if not isinstance(found, list):
        raise MissingToolError(f"{linear.__name__} has no list _POSSIBLE_KERNELS: this release of vLLM is not known")
    return found


def _override_gptq() -> str:
    """Register the configuration of GPTQ models under vLLM's own names for it."""
    _register(CONFIG, CONFIG_NAMES)
    return "GPTQ models with act-order, zero points or any group size are served"


def _override_experts() -> str:
    """Register the configurations of AWQ and compressed-tensors models, for their experts."""
    for format_ in (_GPTQ_EXPERTS, *(overridden.format for overridden in _EXPERTS_CONFIGS.values())):
        _experts_method(format_)
    for name, overridden in _EXPERTS_CONFIGS.items():
        _register(name, overridden.names)
    return "experts of GPTQ, AWQ and compressed-tensors are served"


def _register(name: str, names: tuple[str, ...]) -> None:
    """Register a configuration of this package under vLLM's names, unless it is registered."""
    quantization = importlib.import_module(_QUANTIZATION)
    known = getattr(quantization, "_CUSTOMIZED_METHOD_TO_QUANT_CONFIG", {})
    if any(config.__name__ == name for config in known.values()):
        return
    config = _config(name)
    for vllms in names:
        if vllms in quantization.QUANTIZATION_METHODS:
            quantization.register_quantization_config(vllms)(config)


def _config(name: str) -> Any:
    """Return the class of a configuration, with the methods of its layers."""
    if name == CONFIG:
        return _gptq_config()
    overridden = _EXPERTS_CONFIGS[name]
    parent = getattr(importlib.import_module(overridden.module), overridden.config)
    config = _combined(name, ExpertsOverride, parent)
    config.experts_methods = _experts_methods(overridden.format)
    return config


def _gptq_config() -> Any:
    """Return the class of the configuration of GPTQ models, which serves more than experts."""
    parent = importlib.import_module(f"{_QUANTIZATION}.auto_gptq").AutoGPTQConfig
    linear = importlib.import_module("vllm.model_executor.layers.linear")
    method = _combined(METHOD, LinearMethod, linear.LinearMethodBase)
    if METHOD not in linear.WEIGHT_LOADER_V2_SUPPORTED:
        linear.register_weight_loader_v2_supported_method(method)
    config = _combined(CONFIG, ConfigOverride, parent)
    config.linear_method = method
    config.experts_methods = _experts_methods(_GPTQ_EXPERTS)
    return config


def _experts_methods(format_: _Format) -> dict[type, type]:
    """Return this package's method of experts by vLLM's one, or nothing where this release of vLLM is not known."""
    try:
        theirs, ours = _experts_method(format_)
    except Exception:  # the engine may have changed in any way
        LOGGER.debug("experts are left to vLLM", exc_info=True)
        return {}
    return {theirs: ours}


def _experts_method(format_: _Format) -> tuple[type, type]:
    """Return vLLM's method of experts of a format, and this package's one."""
    theirs = getattr(importlib.import_module(format_.module), format_.method)
    parts = {name: importlib.import_module(f"{FUSED_MOE}.{name}") for name in _NEEDED}
    absent = [f"{name}.{part}" for name, module in parts.items() for part in _NEEDED[name] if not hasattr(module, part)]
    if absent:
        raise MissingToolError(f"there is no {' and no '.join(absent)}: this release of vLLM is not known")
    ours = _combined(f"W4A16Gen{format_.method}", format_.ours, theirs)
    ours.experts = _combined(EXPERTS, ModularExperts, parts["modular_kernel"].FusedMoEExpertsModular)
    return theirs, ours


def _combined(name: str, ours: type, base: type) -> Any:
    """Return the class of this package with vLLM's as its other base, the same one whenever it is asked for."""
    known = globals().get(name)
    if known is None or base not in known.__mro__:
        known = globals()[name] = type(name, (ours, base), {"__module__": __name__})
    return known


def __getattr__(name: str) -> Any:
    """Make a configuration's class when a process of vLLM unpickles an instance before it loads plug-ins."""
    if name == CONFIG or name in _EXPERTS_CONFIGS:
        return _config(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
