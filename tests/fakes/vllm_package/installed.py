"""The modules of the stand-in under vLLM's names."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from fakes.vllm_package import configs, experts, kernels, layers, parameters
from fakes.vllm_package.parameters import World

_LAYERS = "vllm.model_executor.layers"
QUANTIZATION = f"{_LAYERS}.quantization"
COMPRESSED_EXPERTS = f"{QUANTIZATION}.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_wna16"
MODULES: dict[str, tuple[ModuleType, tuple[str, ...]]] = {
    "vllm.platforms": (kernels, ("PlatformEnum",)),
    "vllm.scalar_type": (kernels, ("ScalarType", "scalar_types")),
    "vllm.model_executor.kernels.linear": (
        kernels,
        ("MPLinearKernel", "MPLinearLayerConfig", "choose_mp_linear_kernel", "register_linear_kernel"),
    ),
    "vllm.model_executor.parameter": (
        parameters,
        (
            *("BasevLLMParameter", "RowvLLMParameter", "PackedvLLMParameter", "PackedColumnParameter"),
            *("GroupQuantScaleParameter", "ChannelQuantScaleParameter", "permute_param_layout_"),
        ),
    ),
    f"{_LAYERS}.linear": (
        layers,
        (
            *("LinearBase", "LinearMethodBase", "UnquantizedLinearMethod"),
            *("WEIGHT_LOADER_V2_SUPPORTED", "register_weight_loader_v2_supported_method"),
        ),
    ),
    f"{_LAYERS}.fused_moe": (experts, ("RoutedExperts",)),
    f"{_LAYERS}.fused_moe.modular_kernel": (
        experts,
        ("FusedMoEActivationFormat", "FusedMoEExpertsModular", "FusedMoEKernel"),
    ),
    f"{_LAYERS}.fused_moe.all2all_utils": (experts, ("maybe_make_prepare_finalize",)),
    f"{_LAYERS}.fused_moe.topk_weight_and_reduce": (experts, ("TopKWeightAndReduceNoOP",)),
    f"{_LAYERS}.fused_moe.config": (experts, ("FUSED_MOE_UNQUANTIZED_CONFIG",)),
    QUANTIZATION: (
        configs,
        ("QUANTIZATION_METHODS", "register_quantization_config", "get_quantization_config"),
    ),
    f"{QUANTIZATION}.auto_gptq": (configs, ("AutoGPTQConfig",)),
    f"{QUANTIZATION}.auto_awq": (configs, ("AutoAWQConfig",)),
    f"{QUANTIZATION}.compressed_tensors.compressed_tensors": (configs, ("CompressedTensorsConfig",)),
    COMPRESSED_EXPERTS: (experts, ("CompressedTensorsWNA16MoEMethod",)),
    f"{QUANTIZATION}.utils.gptq_utils": (configs, ("get_linear_quant_method",)),
    "vllm.model_executor.models.utils": (configs, ("WeightsMapper",)),
}
"""Each module, where this stand-in has it, and its names."""


def install(patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Put the modules into place for one test, with fresh lists, and return them by name."""
    made: dict[str, Any] = {}
    for name, (source, names) in MODULES.items():
        for part in range(name.count(".") + 1):
            path = ".".join(name.split(".")[: part + 1])
            if path not in made:
                made[path] = ModuleType(path)
        made[name].__dict__.update({member: getattr(source, member) for member in names})
    for module, method in (("auto_gptq", experts.AutoGPTQMoEMethod), ("auto_awq", experts.AutoAWQMoEMethod)):
        setattr(made[f"{QUANTIZATION}.{module}"], method.__name__, method)
    for path, module in made.items():
        parent, _, child = path.rpartition(".")
        if parent:
            setattr(made[parent], child, module)
        patch.setitem(sys.modules, path, module)
    made["vllm.platforms"].current_platform = kernels.Platform
    fresh = {kernels.PlatformEnum.CUDA: [kernels.MacheteLinearKernel]}
    patch.setattr(kernels, "_POSSIBLE_KERNELS", fresh)
    made["vllm.model_executor.kernels.linear"]._POSSIBLE_KERNELS = fresh  # noqa: SLF001
    patch.setattr(kernels.Platform, "capability", (9, 0))
    patch.setattr(kernels.Platform, "_enum", kernels.PlatformEnum.CUDA)
    customized: dict[str, Any] = {}
    patch.setattr(configs, "_CUSTOMIZED_METHOD_TO_QUANT_CONFIG", customized)
    made[QUANTIZATION]._CUSTOMIZED_METHOD_TO_QUANT_CONFIG = customized  # noqa: SLF001
    patch.setattr(World, "rank", 0)
    patch.setattr(World, "size", 1)
    return made
