"""The modules of the stand-in under SGLang's names."""

from __future__ import annotations

import sys
from collections import defaultdict
from types import ModuleType
from typing import Any

import pytest

from fakes.sglang_package import engine

HOOKS = "sglang.srt.plugins.hook_registry"
_GPU = "sglang.srt.hardware_backend.gpu.quantization"
_SCHEME = "sglang.srt.layers.quantization.compressed_tensors.schemes.compressed_tensors_wNa16"
MODULES: dict[str, tuple[str, ...]] = {
    HOOKS: ("HookRegistry", "HookType"),
    f"{_GPU}.gptq_kernels": ("GPTQMarlinLinearKernel", "MarlinLinearLayerConfig"),
    f"{_GPU}.awq_kernels": ("AWQMarlinLinearKernel",),
    _SCHEME: ("CompressedTensorsWNA16",),
}


def install(patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Put the modules into place for one test, without hooks, and return them by name, with the scheme's class."""
    made: dict[str, Any] = {}
    for name in MODULES:
        for part in range(name.count(".") + 1):
            path = ".".join(name.split(".")[: part + 1])
            made.setdefault(path, ModuleType(path))
    for name, members in MODULES.items():
        made[name].__dict__.update({member: getattr(engine, member) for member in members})
    for path, module in made.items():
        patch.setitem(sys.modules, path, module)
    patch.setattr(engine.HookRegistry, "_hooks", defaultdict(list))
    scheme = engine.CompressedTensorsWNA16
    for method in ("create_weights", "process_weights_after_loading", "apply_weights"):
        patch.setattr(scheme, method, getattr(scheme, method))
    made[f"{_SCHEME}.CompressedTensorsWNA16"] = scheme
    return made
