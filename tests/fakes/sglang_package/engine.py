"""SGLang's kernels and scheme, which remember that they were called, and its registry of hooks."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

import torch

from fakes.vllm_package import parameters


class HookType(Enum):
    """Kinds of hooks."""

    AROUND = "around"
    REPLACE = "replace"


class HookRegistry:
    """Keeps hooks until they are applied."""

    _hooks: ClassVar[dict[str, list[tuple[HookType, Any, Any]]]] = defaultdict(list)

    @classmethod
    def register(cls, target: str, hook: Callable[..., Any], hook_type: HookType, *, source: Any = None) -> None:
        if isinstance(hook, type):
            assert hook_type is HookType.REPLACE
        cls._hooks[target].append((hook_type, hook, source))

    @classmethod
    def apply_hooks(cls, owners: dict[str, Any]) -> None:
        """Replace classes in the modules that own them, and go around methods."""
        for target, hooks in cls._hooks.items():
            owner, _, name = target.rpartition(".")
            for kind, hook, _source in hooks:
                original = getattr(owners[owner], name)
                wrapped = hook if kind is HookType.REPLACE else _around(original, hook)
                setattr(owners[owner], name, wrapped)


def _around(original: Callable[..., Any], hook: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapper(*args: Any, **options: Any) -> Any:
        return hook(original, *args, **options)

    return wrapper


@dataclass
class MarlinLinearLayerConfig:
    """What SGLang's kernels know about a layer."""

    full_weight_shape: tuple[int, int]
    partition_weight_shape: tuple[int, int]
    weight_type: Any
    act_type: torch.dtype
    group_size: int
    zero_points: bool
    has_g_idx: bool


class _Marlin:
    """A kernel of SGLang."""

    def __init__(self, quant_config: Any = None) -> None:
        self.quant_config = quant_config

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        layer.processed_by_sglang = True

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
        del layer, x, bias
        return "SGLang"


class GPTQMarlinLinearKernel(_Marlin):
    """The kernel of GPTQ layers."""


class AWQMarlinLinearKernel(_Marlin):
    """The kernel of AWQ layers."""


class CompressedTensorsWNA16:
    """The scheme of compressed-tensors layers."""

    kernel_config: MarlinLinearLayerConfig

    def create_weights(self, layer: torch.nn.Module, config: MarlinLinearLayerConfig) -> None:
        del layer
        self.kernel_config = config

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        layer.processed_by_sglang = True

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> Any:
        del layer, x, bias
        return "SGLang"


def layer_of(tensors: dict[str, Any], dims: dict[str, dict[str, int]]) -> Any:
    """Return a module with SGLang's parameters, which are vLLM's older ones."""
    layer = torch.nn.Module()
    fill(layer, tensors, dims)
    return layer


def fill(layer: Any, tensors: dict[str, Any], dims: dict[str, dict[str, int]]) -> None:
    """Register parameters as before a weight is loaded."""
    for name, tensor in tensors.items():
        along = dims[name]
        kind: Any = parameters.RowvLLMParameter if along == {"input_dim": 0} else parameters.GroupQuantScaleParameter
        if "packed_dim" in along:
            kind, along = parameters.PackedvLLMParameter, along | {"packed_factor": 8}
        parameter = kind(data=tensor.clone(), weight_loader=None, **along)
        layer.register_parameter(name, parameter)
