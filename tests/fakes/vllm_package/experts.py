"""Layers of experts: the module that loads them, vLLM's methods of three formats, and its modular kernels."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from types import SimpleNamespace
from typing import Any

import torch

from fakes.engine_experts import StoredExperts
from fakes.vllm_package.kernels import scalar_types
from fakes.vllm_package.parameters import World

FUSED_MOE_UNQUANTIZED_CONFIG = SimpleNamespace(quant_dtype=None)
Shapes = dict[str, tuple[tuple[int, ...], Any]]
"""The shape and the dtype of parameters by name."""


class FusedMoEActivationFormat(Enum):
    """How activations reach the experts."""

    Standard = ("standard",)
    BatchedExperts = ("batched_experts",)


class MoEActivation(Enum):
    """Functions of the gate."""

    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    SWIGLUOAI = "swigluoai"


@dataclass
class FusedMoEParallelConfig:
    """How tokens reach the experts of other GPUs."""

    use_all2all_kernels: bool = False
    use_ag_rs_all2all_kernels: bool = False
    use_passthrough_all2all: bool = False
    enable_eplb: bool = False


@dataclass
class FusedMoEConfig:
    """A layer of experts on one rank."""

    hidden_dim: int
    intermediate_size_per_partition: int
    activation: MoEActivation = MoEActivation.SILU
    moe_parallel_config: FusedMoEParallelConfig = field(default_factory=FusedMoEParallelConfig)
    moe_backend: str = "auto"
    has_bias: bool = False
    is_lora_enabled: bool = False
    swiglu_limit: float | None = None
    swiglu_alpha: float | None = None
    swiglu_beta: float | None = None


class FusedMoEExpertsModular:
    """The base of experts that get their tokens from someone else."""

    post_gemm2_hook: Any = None

    def __init__(
        self,
        moe_config: FusedMoEConfig,
        quant_config: Any,
        max_num_tokens: int | None = None,
        num_dispatchers: int | None = None,
    ) -> None:
        assert max_num_tokens is None
        assert num_dispatchers is None
        assert quant_config.quant_dtype is None
        self.moe_config = moe_config

    @staticmethod
    def is_monolithic() -> bool:
        return False

    @staticmethod
    def is_supported_config(
        cls: Any,  # noqa: PLW0211  (as vLLM calls it)
        moe_config: FusedMoEConfig,
        weight_key: Any,
        activation_key: Any,
        activation_format: Any,
    ) -> tuple[bool, str | None]:
        parallel = moe_config.moe_parallel_config
        for is_supported, what in (
            (cls._supports_current_device(), "current device"),
            (cls._supports_activation(moe_config.activation), f"{moe_config.activation} activation"),
            (cls._supports_quant_scheme(weight_key, activation_key), "quantization scheme"),
            (cls._supports_parallel_config(parallel), f"parallel config {parallel}"),
            (activation_format == cls.activation_format(), "activation format"),
            (not moe_config.is_lora_enabled, "LoRA"),
        ):
            if not is_supported:
                return False, f"kernel does not support {what}"
        return True, None


class TopKWeightAndReduceNoOP:
    """Says that results are weighted and added."""


class FusedMoEKernel:
    """Passes activations on to the experts of this GPU."""

    def __init__(self, prepare_finalize: Any, fused_experts: Any) -> None:
        assert prepare_finalize == "dispatched"
        assert fused_experts.activation_format() is FusedMoEActivationFormat.Standard
        assert isinstance(fused_experts.finalize_weight_and_reduce_impl(), TopKWeightAndReduceNoOP)
        self.fused_experts = fused_experts

    def apply(
        self,
        hidden_states: Any,
        w1: Any,
        w2: Any,
        topk_weights: Any,
        topk_ids: Any,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: Any,
        apply_router_weight_on_input: bool,
    ) -> Any:
        x = hidden_states * topk_weights.to(hidden_states.dtype) if apply_router_weight_on_input else hidden_states
        _, m, n, k, topk = self.fused_experts.moe_problem_size(x, w1, w2, topk_ids)
        shapes = self.fused_experts.workspace_shapes(m, n, k, topk, global_num_experts, len(w1), None, activation)
        first, second, output = (torch.empty(shape, dtype=x.dtype) for shape in shapes)
        self.fused_experts.apply(
            output=output,
            hidden_states=x,
            w1=w1,
            w2=w2,
            topk_weights=topk_weights,
            topk_ids=topk_ids,
            activation=activation,
            global_num_experts=global_num_experts,
            expert_map=expert_map,
            a1q_scale=None,
            a2_scale=None,
            workspace13=first,
            workspace2=second,
            expert_tokens_meta=None,
            apply_router_weight_on_input=apply_router_weight_on_input,
        )
        return output


def maybe_make_prepare_finalize(
    moe: FusedMoEConfig,
    quant_config: Any,
    routing_tables: Any = None,
    allow_new_interface: bool = False,
    use_monolithic: bool = False,
    all2all_manager: Any = None,
    input_dtype: Any = None,
) -> str:
    """Return what dispatches tokens."""
    assert allow_new_interface
    assert not use_monolithic
    assert (routing_tables, all2all_manager, input_dtype) == (None, None, None)
    assert moe.hidden_dim > 0
    assert quant_config is FUSED_MOE_UNQUANTIZED_CONFIG
    return "dispatched"


class FusedMoEMethodBase:
    """The base of methods of experts, which hold a layer's configuration."""

    def __init__(self, moe: FusedMoEConfig) -> None:
        self.moe = moe
        self.moe_quant_config: Any = None
        self.moe_kernel: Any = None
        self.experts_cls: Any = MarlinExperts

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
        for part, n, length in (("w13", 2 * inner, k), ("w2", k, inner)):
            for name, (shape, dtype) in self.shapes(n, length, params_dtype).items():
                parameter = torch.nn.Parameter(torch.zeros(num_experts, *shape, dtype=dtype), requires_grad=False)
                layer.register_parameter(f"{part}_{name}", parameter)
        assert extra_weight_attrs["weight_loader"] == layer.weight_loader

    def shapes(self, n: int, k: int, dtype: Any) -> Shapes:
        """Return the shape and the dtype of the parameters of one expert."""
        raise NotImplementedError

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.w13_weight = "Marlin's"

    def get_fused_moe_quant_config(self, layer: Any) -> Any:
        del layer
        return "vLLM's"

    def apply(
        self, layer: Any, x: Any, topk_weights: Any, topk_ids: Any, shared_experts: Any, shared_experts_input: Any
    ) -> Any:
        assert (shared_experts, shared_experts_input) == (None, None)
        return self.moe_kernel.apply(
            hidden_states=x,
            w1=layer.w13_weight,
            w2=layer.w2_weight,
            topk_weights=topk_weights,
            topk_ids=topk_ids,
            activation=layer.activation,
            global_num_experts=layer.global_num_experts,
            expert_map=layer.expert_map,
            apply_router_weight_on_input=layer.apply_router_weight_on_input,
        )


class MarlinExperts:
    """vLLM's own experts, which these tests never run."""


class AutoGPTQMoEMethod(FusedMoEMethodBase):
    """GPTQ."""

    def __init__(self, quant_config: Any, moe: FusedMoEConfig) -> None:
        super().__init__(moe)
        self.quant_config = quant_config

    def shapes(self, n: int, k: int, dtype: Any) -> Shapes:
        groups = 1 if self.quant_config.group_size == -1 else k // self.quant_config.group_size
        return {
            "qweight": ((k // 8, n), torch.int32),
            "scales": ((groups, n), dtype),
            "qzeros": ((groups, n // 8), torch.int32),
            "bias": ((n,), dtype),
        }


class AutoAWQMoEMethod(FusedMoEMethodBase):
    """AWQ."""

    def __init__(self, quant_config: Any, moe: FusedMoEConfig) -> None:
        super().__init__(moe)
        self.quant_config = quant_config
        self.quant_type = scalar_types.uint4

    def shapes(self, n: int, k: int, dtype: Any) -> Shapes:
        groups = k // self.quant_config.group_size
        return {
            "qweight": ((k, n // 8), torch.int32),
            "scales": ((groups, n), dtype),
            "qzeros": ((groups, n // 8), torch.int32),
        }


class CompressedTensorsWNA16MoEMethod(FusedMoEMethodBase):
    """compressed-tensors."""

    def __init__(self, weight_quant: Any, input_quant: Any, moe: FusedMoEConfig, layer_name: str | None = None) -> None:
        super().__init__(moe)
        assert (input_quant, layer_name) == (None, None)
        self.symmetric, self.group_size = weight_quant.symmetric, weight_quant.group_size
        self.quant_type = scalar_types.uint4b8 if self.symmetric else scalar_types.uint4

    def shapes(self, n: int, k: int, dtype: Any) -> Shapes:
        groups = 1 if self.group_size == -1 else k // self.group_size
        every: Shapes = {"weight_packed": ((n, k // 8), torch.int32), "weight_scale": ((n, groups), dtype)}
        return every if self.symmetric else every | {"weight_zero_point": ((n // 8, groups), torch.int32)}


class RoutedExperts(torch.nn.Module):  # type: ignore[misc]
    """The experts of a mixture on one rank, which own the parameters of their method."""

    def __init__(
        self,
        quant_config: Any,
        moe: FusedMoEConfig,
        experts: int,
        dtype: Any = torch.float16,
        *,
        expert_map: Any = None,
        apply_router_weight_on_input: bool = False,
        unpadded: int | None = None,
    ) -> None:
        """Take the configuration of a model, and that of this layer; with a map, `experts` are all experts."""
        super().__init__()
        self.layer_name, self.moe_config, self.activation = "model.experts", moe, moe.activation
        self.global_num_experts, self.expert_map = experts, expert_map
        self.apply_router_weight_on_input = apply_router_weight_on_input
        self._loaded_expert_biases: set[str] = set()
        self._dtype, self._unpadded = dtype, unpadded or moe.hidden_dim
        self.quant_method = quant_config.get_quant_method(self, self.layer_name)
        self.create()

    def create(self) -> None:
        """Register parameters, as before the first load and before each other one."""
        here = self.global_num_experts if self.expert_map is None else int((self.expert_map >= 0).sum())
        self.quant_method.create_weights(
            layer=self,
            num_experts=here,
            hidden_size=self.moe_config.hidden_dim,
            unpadded_hidden_size=self._unpadded,
            intermediate_size_per_partition=self.moe_config.intermediate_size_per_partition,
            params_dtype=self._dtype,
            weight_loader=self.weight_loader,
            global_num_experts=self.global_num_experts,
        )

    def _expert_routing_tables(self) -> None:
        return None

    def weight_loader(self, param: Any, loaded: Any, shard: str, expert: int) -> None:
        """Load a shard of an expert: gates are the first half, up projections the second one."""
        place = param.data[expert]
        if shard == "w2":
            place.copy_(loaded)
            return
        sizes = zip(place.shape, loaded.shape, strict=True)
        axis = next(axis for axis, (both, one) in enumerate(sizes) if both == 2 * one)
        place.chunk(2, dim=axis)[shard == "w3"].copy_(loaded)

    def load(self, stored: StoredExperts, kind: str) -> None:
        """Load a checkpoint's tensors, and process them."""
        assert World.size == 1
        for expert, shard, tensors in stored.shards(kind):
            here = expert if self.expert_map is None else int(self.expert_map[expert])
            for name, tensor in tensors.items():
                parameter = getattr(self, f"{'w2' if shard == 'w2' else 'w13'}_{name}", None)
                if here >= 0 and parameter is not None:
                    self.weight_loader(parameter, tensor, shard, here)
        self.quant_method.process_weights_after_loading(self)

    def forward(self, x: Any, topk_weights: Any, topk_ids: Any) -> Any:
        return self.quant_method.apply(self, x, topk_weights, topk_ids, None, None)
