"""The hooks: classes that stand in for SGLang's Marlin kernels, and functions around methods of its schemes."""

from __future__ import annotations

import importlib
from typing import Any

from w4a16gen.errors import MissingToolError
from w4a16gen.integrations.engines.switch import tried
from w4a16gen.integrations.sglang import experts
from w4a16gen.integrations.sglang.kernels import LOGGER, AWQKernel, GPTQKernel
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
EXPERTS = (
    f"{_QUANTIZATION}.gptq.schemes.gptq_moe.GPTQMarlinMoEScheme",
    f"{_QUANTIZATION}.awq.schemes.awq_moe.AWQMoEScheme",
    f"{_QUANTIZATION}.compressed_tensors.schemes.compressed_tensors_wNa16_moe.CompressedTensorsWNA16MoE",
)
"""The schemes of experts."""
EXPERTS_RESTORE = "restore_weights_before_loading"
"""The method of schemes whose experts SGLang loads again."""
EXPERTS_METHODS = {
    "create_weights": experts.around_create,
    "process_weights_after_loading": experts.around_process,
    "apply_weights": experts.around_apply,
    EXPERTS_RESTORE: experts.around_restore,
}
_NEEDED = {
    "sglang.srt.layers.moe.utils": ("get_moe_runner_backend", "get_moe_a2a_backend"),
    "sglang.srt.layers.moe.token_dispatcher": ("StandardCombineInput",),
    "sglang.srt.runtime_context": ("get_lora",),
}
"""What experts use, by SGLang's module."""


def register_all() -> str:
    """Register the hooks once per process, and return the line of the log. SGLang applies them later.

    Raises:
        ImportError: if SGLang's modules are not where any known release has them.
    """
    importlib.import_module(_QUANTIZATION)  # first: the modules of kernels import it, and it imports them
    hooks = importlib.import_module(_HOOKS)
    registry, kinds = hooks.HookRegistry, hooks.HookType
    if not _is_registered(registry, f"{SCHEME}.process_weights_after_loading", around_process):
        for module, name, kernel in KERNELS:
            parent = getattr(importlib.import_module(module), name)
            replacement = type(f"W4A16Gen{name}", (kernel, parent), {"__module__": __name__})
            registry.register(f"{module}.{name}", replacement, kinds.REPLACE)
        for method, around in METHODS.items():
            registry.register(f"{SCHEME}.{method}", around, kinds.AROUND)
    served = tried(LOGGER, lambda: _around_experts(hooks), "their experts are left to SGLang")
    return f"w4a16gen goes before SGLang's Marlin kernels for GPTQ, AWQ and compressed-tensors layers; {served}"


def _around_experts(hooks: Any) -> str:
    """Register the hooks of experts, when all that they need has been found."""
    for name, members in _NEEDED.items():
        module = importlib.import_module(name)
        if absent := [member for member in members if not hasattr(module, member)]:
            raise MissingToolError(f"there is no {name}.{absent[0]}: this release of SGLang is not known")
    arounds: dict[str, Any] = {}
    for path in EXPERTS:
        module_name, _, name = path.rpartition(".")
        scheme = getattr(importlib.import_module(module_name), name)
        methods = [method for method in EXPERTS_METHODS if method != EXPERTS_RESTORE or method in vars(scheme)]
        arounds |= {f"{path}.{method}": EXPERTS_METHODS[method] for method in methods if getattr(scheme, method)}
    for target, around in arounds.items():
        if not _is_registered(hooks.HookRegistry, target, around):
            hooks.HookRegistry.register(target, around, hooks.HookType.AROUND)
    return "their experts are served too"


def _is_registered(registry: Any, target: str, around: Any) -> bool:
    """Return whether this process has a hook already."""
    return any(around in hook for hook in getattr(registry, "_hooks", {}).get(target, ()))
