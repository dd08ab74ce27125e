"""FP16 x uint4 GEMM kernels for NVIDIA Hopper GPUs: generate, build, prove, call."""

from w4a16gen.choose.overrides import use_kernels
from w4a16gen.errors import W4A16Error
from w4a16gen.kernels.config import ClusterShape, CtaShape, KernelConfig, QuantMode, Schedule, Scheduler, Target
from w4a16gen.kernels.problem import Problem
from w4a16gen.runtime.default import configs, gemm, load, pack, to_device
from w4a16gen.runtime.library import Library
from w4a16gen.weights.packed import PackedWeight, pack_weight
from w4a16gen.weights.quantize import quantize
from w4a16gen.weights.quantized import QuantizedWeight

__version__ = "0.1.0"

__all__ = [
    "ClusterShape",
    "CtaShape",
    "KernelConfig",
    "Library",
    "PackedWeight",
    "Problem",
    "QuantMode",
    "QuantizedWeight",
    "Schedule",
    "Scheduler",
    "Target",
    "W4A16Error",
    "__version__",
    "configs",
    "gemm",
    "load",
    "pack",
    "pack_weight",
    "quantize",
    "to_device",
    "use_kernels",
]
