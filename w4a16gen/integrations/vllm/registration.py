"""Where vLLM keeps its kernels and its quantization configurations, in this release and older ones."""

from __future__ import annotations

import importlib
import logging
from typing import Any

from w4a16gen.errors import MissingToolError
from w4a16gen.integrations.vllm.gptq import ConfigOverride, LinearMethod
from w4a16gen.integrations.vllm.kernel import LinearKernel

LOGGER = logging.getLogger("vllm.w4a16gen")
KERNEL = "W4A16GenLinearKernel"
"""The kernel's name in vLLM's log and in VLLM_DISABLED_KERNELS."""
METHOD = "W4A16GenGPTQLinearMethod"
CONFIG = "W4A16GenGPTQConfig"
CONFIG_NAMES = ("auto_gptq", "gptq", "gptq_marlin")
"""The names under which vLLM looks for the configuration of a GPTQ model."""
_KERNEL_MODULES = (
    "vllm.model_executor.kernels.linear",
    "vllm.model_executor.layers.quantization.kernels.mixed_precision",
)
_QUANTIZATION = "vllm.model_executor.layers.quantization"


def register_all() -> str:
    """Register everything with vLLM, and return the line of the log.

    Raises:
        ImportError: if vLLM's modules are not where any known release has them.
        MissingToolError: if there is no list of kernels.
    """
    line = _insert_kernel()
    try:
        added = _override_gptq()
    except Exception as error:  # the kernel serves most models without it
        LOGGER.debug("no GPTQ configuration was registered", exc_info=True)
        return f"{line}; GPTQ models with act-order or zero points stay refused ({type(error).__name__}: {error})"
    return f"{line}; {added}"


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
    quantization = importlib.import_module(_QUANTIZATION)
    known = getattr(quantization, "_CUSTOMIZED_METHOD_TO_QUANT_CONFIG", {})
    if not any(config.__name__ == CONFIG for config in known.values()):
        config = _config()
        for name in CONFIG_NAMES:
            if name in quantization.QUANTIZATION_METHODS:
                quantization.register_quantization_config(name)(config)
    return "GPTQ models with act-order, zero points or any group size are served"


def _config() -> Any:
    """Return the configuration's class, with the method of its layers."""
    parent = importlib.import_module(f"{_QUANTIZATION}.auto_gptq").AutoGPTQConfig
    linear = importlib.import_module("vllm.model_executor.layers.linear")
    method = _combined(METHOD, LinearMethod, linear.LinearMethodBase)
    if METHOD not in linear.WEIGHT_LOADER_V2_SUPPORTED:
        linear.register_weight_loader_v2_supported_method(method)
    config = _combined(CONFIG, ConfigOverride, parent)
    config.linear_method = method
    return config


def _combined(name: str, ours: type, base: type) -> Any:
    """Return the class of this package with vLLM's as its other base, the same one whenever it is asked for."""
    known = globals().get(name)
    if known is None or base not in known.__mro__:
        known = globals()[name] = type(name, (ours, base), {"__module__": __name__})
    return known


def __getattr__(name: str) -> Any:
    """Make the configuration's class when a process of vLLM unpickles an instance before it loads plug-ins."""
    if name == CONFIG:
        return _config()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
