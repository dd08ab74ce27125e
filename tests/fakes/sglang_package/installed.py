"""The modules of the stand-in under SGLang's names."""

from __future__ import annotations

import sys
from collections import defaultdict
from types import ModuleType
from typing import Any

import pytest

from fakes.sglang_package import engine, experts

HOOKS = "sglang.srt.plugins.hook_registry"
_GPU = "sglang.srt.hardware_backend.gpu.quantization"
_QUANTIZATION = "sglang.srt.layers.quantization"
_COMPRESSED = f"{_QUANTIZATION}.compressed_tensors.schemes"
MODULES: dict[str, tuple[str, ...]] = {
    HOOKS: ("HookRegistry", "HookType"),
    f"{_GPU}.gptq_kernels": ("GPTQMarlinLinearKernel", "MarlinLinearLayerConfig"),
    f"{_GPU}.awq_kernels": ("AWQMarlinLinearKernel",),
    f"{_COMPRESSED}.compressed_tensors_wNa16": ("CompressedTensorsWNA16",),
}
"""What the plug-in needs, by module."""
EXPERTS: dict[str, tuple[str, ...]] = {
    f"{_QUANTIZATION}.gptq.schemes.gptq_moe": ("GPTQMarlinMoEScheme",),
    f"{_QUANTIZATION}.awq.schemes.awq_moe": ("AWQMoEScheme",),
    f"{_COMPRESSED}.compressed_tensors_wNa16_moe": ("CompressedTensorsWNA16MoE",),
    "sglang.srt.layers.moe.utils": ("get_moe_runner_backend", "get_moe_a2a_backend"),
    "sglang.srt.layers.moe.token_dispatcher": ("StandardCombineInput",),
    "sglang.srt.runtime_context": ("get_lora",),
}
"""What experts need, by module."""
_HOOKED = ("create_weights", "process_weights_after_loading", "apply_weights", "restore_weights_before_loading")


def install(patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Put the modules into place for one test, without hooks, and return them by name, with the schemes' classes."""
    made: dict[str, Any] = {}
    for name in (*MODULES, *EXPERTS):
        for part in range(name.count(".") + 1):
            path = ".".join(name.split(".")[: part + 1])
            made.setdefault(path, ModuleType(path))
    for source, modules in ((engine, MODULES), (experts, EXPERTS)):
        for name, members in modules.items():
            made[name].__dict__.update({member: getattr(source, member) for member in members})
    for path, module in made.items():
        patch.setitem(sys.modules, path, module)
    patch.setattr(engine.HookRegistry, "_hooks", defaultdict(list))
    for name in (*MODULES, *EXPERTS):
        made |= {f"{name}.{scheme.__name__}": scheme for scheme in _schemes(made[name], patch)}
    return made


def _schemes(module: ModuleType, patch: pytest.MonkeyPatch) -> list[type]:
    """Return the schemes of a module, whose methods are as before when the test ends."""
    found = [
        member for member in vars(module).values() if isinstance(member, type) and hasattr(member, "apply_weights")
    ]
    for scheme in found:
        for method in [method for method in _HOOKED if hasattr(scheme, method)]:
            patch.setattr(scheme, method, getattr(scheme, method))
    return found
