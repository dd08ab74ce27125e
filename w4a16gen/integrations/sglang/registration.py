"""The hooks: classes that stand in for SGLang's Marlin kernels, and functions around a scheme's methods."""

from __future__ import annotations

import importlib
from typing import Any

from w4a16gen.integrations.sglang.kernels import AWQKernel, GPTQKernel
from w4a16gen.integrations.sglang.scheme import around_apply, around_create, around_process

_HOOKS = "sglang.srt.plugins.hook_registry"
_GPU = "sglang.srt.hardware_backend.gpu.quantization"
KERNELS: tuple[tuple[str, str, type], ...] = (
    (f"{_GPU}.gptq_kernels", "GPTQMarlinLinearKernel", GPTQKernel),
    (f"{_GPU}.awq_kernels", "AWQMarlinLinearKernel", AWQKernel),
)
"""Module, class, and the class that goes before it."""
_QUANTIZATION = "sglang.srt.layers.quantization"
SCHEME = f"{_QUANTIZATION}.compressed_tensors.schemes.compressed_tensors_wNa16.CompressedTensorsWNA16"
METHODS = {
    "create_weights": around_create,
    "process_weights_after_loading": around_process,
    "apply_weights": around_apply,
}


def register_all() -> str:
    """Register the hooks once per process, and return the line of the log. SGLang applies them later.

    Raises:
        ImportError: if SGLang's modules are not where any known release has them.
    """
    importlib.import_module(_QUANTIZATION)  # first: the modules of kernels import it, and it imports them
    hooks = importlib.import_module(_HOOKS)
    registry, kinds = hooks.HookRegistry, hooks.HookType
    if not _is_registered(registry):
        for module, name, kernel in KERNELS:
            parent = getattr(importlib.import_module(module), name)
            replacement = type(f"W4A16Gen{name}", (kernel, parent), {"__module__": __name__})
            registry.register(f"{module}.{name}", replacement, kinds.REPLACE)
        for method, around in METHODS.items():
            registry.register(f"{SCHEME}.{method}", around, kinds.AROUND)
    return "w4a16gen goes before SGLang's Marlin kernels for GPTQ, AWQ and compressed-tensors layers"


def _is_registered(registry: Any) -> bool:
    """Return whether this process has the hooks already."""
    known = getattr(registry, "_hooks", {})
    return any(around_process in hook for hook in known.get(f"{SCHEME}.process_weights_after_loading", ()))
