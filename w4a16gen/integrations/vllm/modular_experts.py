"""The experts of a layer as vLLM's modular kernels call them, between the dispatch of tokens and their combination.

The class is combined with vLLM's base at registration, so this module needs no vLLM.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from w4a16gen.errors import UnsupportedProblemError
from w4a16gen.integrations.engines.experts import ExpertsCall, sum_of_experts
from w4a16gen.integrations.engines.layer import WAY_OUT
from w4a16gen.integrations.engines.limits import HOPPER
from w4a16gen.integrations.vllm.kernel import capability
from w4a16gen.runtime.expert_calls import GATED_ACTIVATIONS

FUSED_MOE = "vllm.model_executor.layers.fused_moe"


class ModularExperts:
    """The experts of a layer; vLLM's `FusedMoEExpertsModular` is its other base."""

    call: ExpertsCall
    """Set by the method that packs the layer."""
    post_gemm2_hook: Any = None

    @staticmethod
    def activation_format() -> Any:
        """Return that activations come as rows of tokens, not as blocks of each expert."""
        return importlib.import_module(f"{FUSED_MOE}.modular_kernel").FusedMoEActivationFormat.Standard

    @staticmethod
    def _supports_current_device() -> bool:
        return capability() == HOPPER

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return False

    @staticmethod
    def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
        del weight_key, activation_key  # the method has asked about the weights
        return True

    @staticmethod
    def _supports_activation(activation: Any) -> bool:
        return activation.value in GATED_ACTIVATIONS

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: Any) -> bool:
        config = moe_parallel_config
        by_others = config.use_all2all_kernels and not config.use_ag_rs_all2all_kernels
        return not (by_others or config.use_passthrough_all2all or config.enable_eplb)

    def finalize_weight_and_reduce_impl(self) -> Any:
        """Return that results are weighted and added already."""
        return importlib.import_module(f"{FUSED_MOE}.topk_weight_and_reduce").TopKWeightAndReduceNoOP()

    def moe_problem_size(self, a1: Any, w1: Any, w2: Any, topk_ids: Any) -> tuple[int, int, int, int, int]:
        """Return experts, tokens, rows of gate and up, length of activations, and slots.

        Args:
            a1: activations [tokens, hidden].
            w1: uint8 [experts, stride].
            w2: uint8 [experts, stride].
            topk_ids: [tokens, slots].
        """
        del w2
        return len(w1), len(a1), self.call.gate_up.n, a1.shape[1], topk_ids.shape[1]

    def workspace_shapes(
        self,
        M: int,  # noqa: N803  (vLLM's names)
        N: int,  # noqa: N803
        K: int,  # noqa: N803
        topk: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: Any,
        activation: Any,
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of two workspaces, which are not used, and of the result.

        Args:
            M: tokens.
            N: rows of gate and up.
            K: length of activations.
            topk: experts of a token.
            global_num_experts: experts on all GPUs.
            local_num_experts: experts on this GPU.
            expert_tokens_meta: None, since activations are rows of tokens.
            activation: function of the gate.
        """
        del N, topk, global_num_experts, local_num_experts, expert_tokens_meta, activation
        return (0,), (0,), (M, K)

    def apply(  # noqa: PLR0913  (vLLM's)
        self,
        output: Any,
        hidden_states: Any,
        w1: Any,
        w2: Any,
        topk_weights: Any,
        topk_ids: Any,
        activation: Any,
        global_num_experts: int,
        expert_map: Any,
        a1q_scale: Any,
        a2_scale: Any,
        workspace13: Any,
        workspace2: Any,
        expert_tokens_meta: Any,
        apply_router_weight_on_input: bool,
    ) -> None:
        """Write the sum of each token's experts.

        Args:
            output: [tokens, hidden], of the dtype of the activations.
            hidden_states: fp16 or bf16 [tokens, hidden].
            w1: uint8 [experts, stride]: gate and up projections, packed.
            w2: uint8 [experts, stride]: down projections, packed.
            topk_weights: [tokens, slots].
            topk_ids: integers [tokens, slots]: numbers among the experts of all GPUs.
            activation: vLLM's function of the gate.
            global_num_experts: experts on all GPUs.
            expert_map: int32 [experts of all GPUs]: the number here of each expert, or -1; None if all are here.
            a1q_scale: None, since activations are not quantized.
            a2_scale: None.
            workspace13: not used.
            workspace2: not used.
            expert_tokens_meta: not used.
            apply_router_weight_on_input: whether vLLM has multiplied the activations by the weights.

        Raises:
            UnsupportedProblemError: if the model computes something between the down projections and their sum.
        """
        del global_num_experts, a1q_scale, a2_scale, workspace13, workspace2, expert_tokens_meta
        if self.post_gemm2_hook is not None:
            raise UnsupportedProblemError(
                f"this model computes something between the down projections of experts and their sum; {WAY_OUT}"
            )
        weights = torch.ones_like(topk_weights) if apply_router_weight_on_input else topk_weights
        packed = self.call.packed(w1, w2)
        sum_of_experts(
            hidden_states, packed, topk_ids, weights, output, expert_map=expert_map, activation=activation.value
        )
