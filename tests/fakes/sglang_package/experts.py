"""Layers of experts: the module that loads them, SGLang's schemes of three formats, its dispatcher and its settings."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import torch

from fakes.engine_experts import StoredExperts

Shapes = dict[str, tuple[tuple[int, ...], Any]]
"""The shape and the dtype of parameters by name."""


class Backend(Enum):
    """What a setting of SGLang names."""

    AUTO = "auto"
    NONE = "none"
    MARLIN = "marlin"
    DEEPEP = "deepep"


class Settings:
    """SGLang's settings, which tests change."""

    runner: ClassVar[Backend] = Backend.AUTO
    all_to_all: ClassVar[Backend] = Backend.NONE
    lora: ClassVar[Any] = SimpleNamespace(enable_lora=None, lora_paths=None)


def get_moe_runner_backend() -> Backend:
    return Settings.runner


def get_moe_a2a_backend() -> Backend:
    return Settings.all_to_all


def get_lora() -> Any:
    return Settings.lora


class StandardTopKOutput(NamedTuple):
    """Routes of tokens."""

    topk_weights: Any
    topk_ids: Any
    router_logits: Any


class StandardDispatchOutput(NamedTuple):
    """Activations and routes to the experts of this GPU."""

    hidden_states: Any
    topk_output: Any


class StandardCombineInput(NamedTuple):
    """The sum of each token's experts of this GPU."""

    hidden_states: Any


@dataclass
class MoeRunnerConfig:
    """What SGLang knows about a layer of experts on one rank."""

    num_local_experts: int
    hidden_size: int
    intermediate_size_per_partition: int
    params_dtype: Any
    top_k: int = 2
    activation: str = "silu"
    is_gated: bool = True
    no_combine: bool = False
    apply_router_weight_on_input: bool = False
    routed_scaling_factor: float | None = None
    swiglu_limit: float | None = None
    gemm1_alpha: float | None = None
    gemm1_beta: float | None = None
    gemm1_clamp_limit: float | None = None


class _Scheme:
    """A scheme of SGLang, which repacks weights for kernels that these tests never run."""

    def shapes(self, n: int, k: int, ranks: int, dtype: Any) -> Shapes:
        """Return the shape and the dtype of the parameters of one expert; ranks divide K."""
        raise NotImplementedError

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: Any,
        **extra_weight_attrs: Any,
    ) -> None:
        k, inner = hidden_size, intermediate_size_per_partition
        for part, n, length, ranks in (("w13", 2 * inner, k, 1), ("w2", k, inner, layer.moe_tp_size)):
            for name, (shape, dtype) in self.shapes(n, length, ranks, params_dtype).items():
                parameter = torch.nn.Parameter(torch.zeros(num_experts, *shape, dtype=dtype), requires_grad=False)
                vars(parameter).update(extra_weight_attrs)
                layer.register_parameter(f"{part}_{name}", parameter)

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.processed_by_sglang = True

    def apply_weights(self, layer: Any, dispatch_output: Any) -> Any:
        del layer, dispatch_output
        return StandardCombineInput("SGLang")


class GPTQMarlinMoEScheme(_Scheme):
    """GPTQ."""

    def __init__(self, quant_config: Any) -> None:
        self.quant_config = quant_config

    def shapes(self, n: int, k: int, ranks: int, dtype: Any) -> Shapes:
        group = self.quant_config.group_size
        groups = 1 if group == -1 else k * ranks // group
        return {
            "qweight": ((k // 8, n), torch.int32),
            "scales": ((groups, n), torch.float16),
            "qzeros": ((groups, n // 8), dtype),
            "g_idx": ((k,), torch.int32),
        }


class AWQMoEScheme(_Scheme):
    """AWQ."""

    def __init__(self, quant_config: Any) -> None:
        self.quant_config = quant_config

    def shapes(self, n: int, k: int, ranks: int, dtype: Any) -> Shapes:
        del ranks
        groups = k // self.quant_config.group_size
        return {
            "qweight": ((k, n // 8), torch.int32),
            "scales": ((groups, n), dtype),
            "qzeros": ((groups, n // 8), torch.int32),
        }


class CompressedTensorsWNA16MoE(_Scheme):
    """compressed-tensors."""

    num_bits = 4
    actorder: Any = None

    def __init__(self, quant_config: Any) -> None:
        self.group_size, self.sym = quant_config.group_size, quant_config.is_sym

    def shapes(self, n: int, k: int, ranks: int, dtype: Any) -> Shapes:
        del ranks
        groups = 1 if self.group_size == -1 else k // self.group_size
        every: Shapes = {"weight_packed": ((k // 8, n), torch.int32), "weight_scale": ((groups, n), dtype)}
        return every if self.sym else every | {"weight_zero_point": ((groups, n // 8), torch.int32)}

    def restore_weights_before_loading(self, layer: Any) -> None:
        layer.restored_by_sglang = True


class CompressedTensorsWNA16TritonMoE(CompressedTensorsWNA16MoE):
    """compressed-tensors for other kernels: it inherits what it does not change."""


class _Method:
    """A method of SGLang, which leaves everything to the scheme of its layer."""

    def create_weights(self, layer: Any, **facts: Any) -> None:
        layer.scheme.create_weights(layer=layer, **facts)

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.scheme.process_weights_after_loading(layer)

    def restore_weights_before_loading(self, layer: Any) -> None:
        layer.scheme.restore_weights_before_loading(layer)

    def apply(self, layer: Any, dispatch_output: Any) -> Any:
        return layer.scheme.apply_weights(layer, dispatch_output)


class GPTQMarlinMoEMethod(_Method):
    """GPTQ."""


class AWQMoEMethod(_Method):
    """AWQ."""


class CompressedTensorsFusedMoEMethod(_Method):
    """compressed-tensors."""


_OF_KIND: dict[str, tuple[Any, Any]] = {
    "gptq": (GPTQMarlinMoEMethod, GPTQMarlinMoEScheme),
    "awq": (AWQMoEMethod, AWQMoEScheme),
    "compressed-tensors": (CompressedTensorsFusedMoEMethod, CompressedTensorsWNA16MoE),
    "triton": (CompressedTensorsFusedMoEMethod, CompressedTensorsWNA16TritonMoE),
}


@dataclass(frozen=True)
class QuantConfig:
    """The quantization of a model."""

    kind: str
    group_size: int
    is_sym: bool = True
    weight_bits: int = 4
    desc_act: bool = False


class FusedMoE(torch.nn.Module):  # type: ignore[misc]
    """The experts of a layer on one rank."""

    def __init__(
        self,
        quant_config: QuantConfig,
        config: MoeRunnerConfig,
        *,
        expert_map: Any = None,
        moe_tp_size: int = 1,
        with_bias: bool = False,
    ) -> None:
        """Take the quantization, and the layer; a map has the number here of each expert, or -1."""
        super().__init__()
        self.layer_name, self.moe_runner_config, self.with_bias = "model.experts", config, with_bias
        self.moe_tp_size, self._expert_map = moe_tp_size, expert_map
        method, scheme = _OF_KIND[quant_config.kind]
        self.quant_method, self.scheme = method(), scheme(quant_config)
        self.quant_method.create_weights(
            self,
            num_experts=config.num_local_experts,
            hidden_size=config.hidden_size,
            intermediate_size_per_partition=config.intermediate_size_per_partition,
            params_dtype=config.params_dtype,
            weight_loader=self.weight_loader,
        )

    def weight_loader(self, param: Any, loaded: Any, shard: str, expert: int) -> None:
        """Load a shard of an expert: gates are the first half of the columns; rows that are too many stay 0."""
        place = param.data[expert]
        if shard != "w2":
            place = place.chunk(2, dim=1)[shard == "w3"]
        place[: len(loaded)].copy_(loaded)

    def load(self, stored: StoredExperts, kind: str) -> None:
        """Load a checkpoint's tensors, and process them."""
        for expert, shard, tensors in stored.shards(kind):
            here = expert if self._expert_map is None else int(self._expert_map[expert])
            for name, tensor in tensors.items():
                parameter = getattr(self, f"{'w2' if shard == 'w2' else 'w13'}_{name}", None)
                if here >= 0 and parameter is not None:
                    parameter.weight_loader(parameter, tensor.t() if name.startswith("weight") else tensor, shard, here)
        self.quant_method.process_weights_after_loading(self)

    def forward(self, x: Any, topk_weights: Any, topk_ids: Any) -> Any:
        """Dispatch tokens to the experts of this GPU, as SGLang's standard dispatcher does."""
        if self._expert_map is not None:
            topk_ids = self._expert_map[topk_ids.long()]
        routes = StandardTopKOutput(topk_weights, topk_ids, None)
        return self.quant_method.apply(self, StandardDispatchOutput(x, routes)).hidden_states
