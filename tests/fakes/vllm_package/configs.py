"""Quantization configurations, and the registry that finds them by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

from fakes.vllm_package import experts
from fakes.vllm_package.experts import RoutedExperts
from fakes.vllm_package.kernels import scalar_types
from fakes.vllm_package.layers import LinearBase, UnquantizedLinearMethod
from fakes.vllm_package.methods import AutoAWQMarlinLinearMethod, AutoGPTQLinearMethod, CompressedTensorsLinearMethod

QUANTIZATION_METHODS = ["awq", "auto_awq", "auto_gptq", "gptq", "gptq_marlin", "compressed-tensors"]
_CUSTOMIZED_METHOD_TO_QUANT_CONFIG: dict[str, Any] = {}


class QuantizationConfig:
    """The base of configurations."""

    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}

    @staticmethod
    def get_checkpoint_weight_mapper() -> WeightsMapper:
        return WeightsMapper(orig_to_new_suffix={".g_idx": None})


@dataclass
class WeightsMapper:
    """Renames or drops tensors while a checkpoint is read."""

    orig_to_new_suffix: Mapping[str, str | None] = field(default_factory=dict)


def register_quantization_config(quantization: str) -> Callable[[Any], Any]:
    """Register a configuration under a name, also one of vLLM's own."""

    def register(config: Any) -> Any:
        assert issubclass(config, QuantizationConfig)
        _CUSTOMIZED_METHOD_TO_QUANT_CONFIG[quantization] = config
        return config

    return register


def get_quantization_config(quantization: str) -> Any:
    """Return the configuration of a name."""
    known: dict[str, Any] = {
        "awq": AutoAWQConfig,
        "auto_awq": AutoAWQConfig,
        "compressed-tensors": CompressedTensorsConfig,
    }
    return _CUSTOMIZED_METHOD_TO_QUANT_CONFIG.get(quantization, known.get(quantization, AutoGPTQConfig))


class AutoGPTQConfig(QuantizationConfig):
    """GPTQ as vLLM itself takes it: symmetric, in order."""

    TYPE_MAP: ClassVar[dict[tuple[int, bool], Any]] = {
        (4, True): scalar_types.uint4b8,
        (8, True): scalar_types.uint8b128,
    }

    def __init__(
        self,
        weight_bits: int,
        group_size: int,
        desc_act: bool,
        is_sym: bool,
        lm_head_quantized: bool,
        dynamic: dict[str, dict[str, int | bool]],
        full_config: dict[str, Any],
        modules_in_block_to_quantize: list[str] | None = None,
    ) -> None:
        super().__init__()
        rules = [rule for name, rule in dynamic.items() if not name.startswith("-:")]
        if any(order and group_size != -1 for order in (desc_act, *(rule.get("desc_act") for rule in rules))):
            raise ValueError("desc_act=True is no longer supported")
        if (weight_bits, is_sym) not in self.TYPE_MAP:
            raise ValueError(f"Unsupported quantization config: bits={weight_bits}, sym={is_sym}")
        self.weight_bits, self.group_size, self.desc_act, self.is_sym = weight_bits, group_size, False, is_sym
        self.quant_type = self.TYPE_MAP[weight_bits, is_sym]
        self.dynamic, self.full_config, self.lm_head_quantized = dynamic, full_config, lm_head_quantized
        self.modules_in_block_to_quantize = modules_in_block_to_quantize or []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> AutoGPTQConfig:
        values: Any = [config[name] for name in ("bits", "group_size", "desc_act", "sym")]
        bits, group_size, desc_act, is_sym = values
        return cls(
            bits, group_size, desc_act, is_sym, config.get("lm_head", False), config.get("dynamic") or {}, config
        )

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        if isinstance(layer, RoutedExperts):
            if self.group_size not in (-1, 32, 64, 128):
                return "MoeWNA16Method"
            return experts.AutoGPTQMoEMethod(self, layer.moe_config)
        return get_linear_quant_method(self, layer, prefix, AutoGPTQLinearMethod)


def get_linear_quant_method(config: Any, layer: Any, prefix: str, linear_method_cls: Any) -> Any:
    """Return the method of a layer after the dynamic rules."""
    if not isinstance(layer, LinearBase):
        return None
    cloned = deepcopy(config)
    for pattern, rule in config.dynamic.items():
        if pattern.startswith("-:") and re.match(pattern[2:], prefix):
            return UnquantizedLinearMethod()
        if re.match(pattern.removeprefix("+:"), prefix):
            cloned.weight_bits = rule.get("bits", cloned.weight_bits)
            cloned.group_size = rule.get("group_size", cloned.group_size)
            cloned.desc_act = rule.get("desc_act", cloned.desc_act)
            cloned.is_sym = rule.get("sym", cloned.is_sym)
    return linear_method_cls(cloned)


class OtherConfig(QuantizationConfig):
    """AWQ or compressed-tensors."""

    methods: ClassVar[dict[str, Any]] = {
        "awq": AutoAWQMarlinLinearMethod,
        "compressed-tensors": CompressedTensorsLinearMethod,
    }

    def __init__(self, kind: str, group_size: int, *, is_sym: bool) -> None:
        super().__init__()
        self.kind, self.group_size, self.is_sym = kind, group_size, is_sym

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        del layer, prefix
        return self.methods[self.kind](self)


class AutoAWQConfig(OtherConfig):
    """AWQ."""

    def __init__(self, group_size: int, *, zero_point: bool = True) -> None:
        super().__init__("awq", group_size, is_sym=False)
        self.zero_point = zero_point

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        if isinstance(layer, RoutedExperts):
            return experts.AutoAWQMoEMethod(self, layer.moe_config)
        return super().get_quant_method(layer, prefix)


class CompressedTensorsConfig(OtherConfig):
    """compressed-tensors."""

    def __init__(self, group_size: int, *, is_sym: bool = True) -> None:
        super().__init__("compressed-tensors", group_size, is_sym=is_sym)

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        if isinstance(layer, RoutedExperts):
            weights = SimpleNamespace(symmetric=self.is_sym, group_size=self.group_size)
            return experts.CompressedTensorsWNA16MoEMethod(weights, None, layer.moe_config)
        return super().get_quant_method(layer, prefix)
