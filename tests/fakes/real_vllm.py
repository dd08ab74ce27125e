"""vLLM's own code on a machine without a GPU: a pretended Hopper GPU, and configurations as vLLM finds them."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from w4a16gen.integrations.engines import limits
from w4a16gen.integrations.vllm import plugin


def register_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the plug-in with vLLM on what it takes for a Hopper GPU, whose build has every kernel of a product."""
    monkeypatch.setattr(limits, "why_no_kernel", lambda *_: None)
    platforms = importlib.import_module("vllm.platforms")
    interface = importlib.import_module("vllm.platforms.interface")
    current = type(platforms.current_platform)
    monkeypatch.setattr(current, "_enum", platforms.PlatformEnum.CUDA, raising=False)
    answer = classmethod(lambda *_, **__: interface.DeviceCapability(9, 0))
    monkeypatch.setattr(interface.Platform, "get_device_capability", answer)
    monkeypatch.setattr(current, "get_device_capability", answer, raising=False)
    plugin.register()


def config_of(kind: str, group: int, *, is_symmetric: bool = True, desc_act: bool = False) -> Any:
    """Return vLLM's configuration of a model, found by its name.

    Args:
        kind: `gptq`, `awq` or `compressed-tensors`.
        group: the group size; -1 is one group for each channel.
        is_symmetric: whether there are no zero points; AWQ always has them.
        desc_act: whether a GPTQ model has act-order.
    """
    quantization: Any = importlib.import_module("vllm.model_executor.layers.quantization")
    if kind == "gptq":
        raw = {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": desc_act, "sym": is_symmetric}
        return quantization.get_quantization_config("auto_gptq").from_config(raw)
    if kind == "awq":
        raw = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
        return quantization.get_quantization_config("awq").from_config(raw)
    weights = {"num_bits": 4, "type": "int", "symmetric": is_symmetric}
    weights |= {"strategy": "channel"} if group == -1 else {"strategy": "group", "group_size": group}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    raw = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups, "ignore": []}
    return quantization.get_quantization_config("compressed-tensors").from_config(raw)
