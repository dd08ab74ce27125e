"""FP16 x uint4 GEMM kernels for NVIDIA Hopper GPUs: generate, build, prove, call.

Multiply FP16 activations by a 4-bit weight. On numpy arrays this runs anywhere; on GPU arrays it launches a kernel
of the build that `w4a16gen build` made:

    >>> import numpy as np
    >>> import w4a16gen
    >>> weight = np.random.default_rng(0).standard_normal((64, 256))
    >>> packed = w4a16gen.pack_weight(w4a16gen.quantize(weight, group_size=128))
    >>> activations = np.ones((4, 256), np.float16)
    >>> w4a16gen.gemm(activations, packed).shape
    (4, 64)

With torch and a Hopper GPU:

    packed = w4a16gen.to_device(packed)
    result = w4a16gen.gemm(torch.ones(4, 256, dtype=torch.float16, device="cuda"), packed)

Weights of 4-bit checkpoints go through `pack(q, scales, zero_points=...)`. Errors are subclasses of W4A16Error.
Only a file that cannot be read or written raises OSError.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from w4a16gen.choose.overrides import use_kernels
    from w4a16gen.errors import (
        BuildError,
        BuildLockedError,
        ClusterError,
        CudaError,
        InvalidValueError,
        MissingToolError,
        NoHopperGpuError,
        NotBuiltError,
        UnsupportedProblemError,
        W4A16Error,
    )
    from w4a16gen.kernels.config import (
        ClusterShape,
        CtaShape,
        Epilogue,
        KernelConfig,
        QuantMode,
        Schedule,
        Scheduler,
        Target,
    )
    from w4a16gen.kernels.epilogue import Activation
    from w4a16gen.kernels.problem import Problem
    from w4a16gen.runtime.default import (
        configs,
        gemm,
        grouped_gemm,
        list_rows,
        load,
        moe,
        pack,
        route_tokens,
        to_device,
    )
    from w4a16gen.runtime.expert_rows import ExpertRows
    from w4a16gen.runtime.library import Library
    from w4a16gen.weights.experts import PackedExperts, pack_experts
    from w4a16gen.weights.importers.checkpoint import open_checkpoint
    from w4a16gen.weights.packed import PackedWeight, pack_weight
    from w4a16gen.weights.packed_checkpoint import open_packed
    from w4a16gen.weights.quantize import quantize
    from w4a16gen.weights.quantized import QuantizedWeight

__version__ = "0.1.0"

__all__ = [
    "Activation",
    "BuildError",
    "BuildLockedError",
    "ClusterError",
    "ClusterShape",
    "CtaShape",
    "CudaError",
    "Epilogue",
    "ExpertRows",
    "InvalidValueError",
    "KernelConfig",
    "Library",
    "MissingToolError",
    "NoHopperGpuError",
    "NotBuiltError",
    "PackedExperts",
    "PackedWeight",
    "Problem",
    "QuantMode",
    "QuantizedWeight",
    "Schedule",
    "Scheduler",
    "Target",
    "UnsupportedProblemError",
    "W4A16Error",
    "__version__",
    "configs",
    "gemm",
    "grouped_gemm",
    "list_rows",
    "load",
    "moe",
    "open_checkpoint",
    "open_packed",
    "pack",
    "pack_experts",
    "pack_weight",
    "quantize",
    "route_tokens",
    "to_device",
    "use_kernels",
]

_MODULES = {
    "choose.overrides": ("use_kernels",),
    "errors": (
        *("BuildError", "BuildLockedError", "ClusterError", "CudaError", "InvalidValueError", "MissingToolError"),
        *("NoHopperGpuError", "NotBuiltError", "UnsupportedProblemError", "W4A16Error"),
    ),
    "kernels.config": (
        *("ClusterShape", "CtaShape", "Epilogue", "KernelConfig", "QuantMode", "Schedule", "Scheduler", "Target"),
    ),
    "kernels.epilogue": ("Activation",),
    "kernels.problem": ("Problem",),
    "runtime.default": (
        *("configs", "gemm", "grouped_gemm", "list_rows", "load", "moe", "pack", "route_tokens", "to_device"),
    ),
    "runtime.expert_rows": ("ExpertRows",),
    "runtime.library": ("Library",),
    "weights.experts": ("PackedExperts", "pack_experts"),
    "weights.importers.checkpoint": ("open_checkpoint",),
    "weights.packed": ("PackedWeight", "pack_weight"),
    "weights.packed_checkpoint": ("open_packed",),
    "weights.quantize": ("quantize",),
    "weights.quantized": ("QuantizedWeight",),
}
"""The module of each public name. It is imported on first use, so that the command line starts without numpy."""
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

if not TYPE_CHECKING:  # a type checker that sees this function would accept any misspelt name

    def __getattr__(name: str) -> Any:
        """Import a public name on first use and keep it."""
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    """Return the public names."""
    return list(__all__)
