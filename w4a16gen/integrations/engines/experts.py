"""A layer of experts of an engine, packed on its own device, expert by expert, and called as one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from w4a16gen.errors import InvalidValueError
from w4a16gen.integrations.engines.layer import WAY_OUT, Call, EngineLayer, RawLayer, pack_layer
from w4a16gen.integrations.engines.order import Order
from w4a16gen.integrations.engines.words import awq_points
from w4a16gen.integrations.torch import experts_op  # noqa: F401  (registers the operator)
from w4a16gen.integrations.torch.nibbles import expand, expand_awq
from w4a16gen.kernels.config import QuantMode
from w4a16gen.runtime.default import moe
from w4a16gen.weights.experts import GATE_FIRST, PackedExperts, expert_stride
from w4a16gen.weights.layouts.geometry import WeightGeometry


@dataclass(frozen=True)
class ExpertsCall:
    """Everything of a layer's calls that is no tensor.

    Attributes:
        gate_up: facts of one expert's gate and up projections together.
        down: facts of one expert's down projection.
    """

    gate_up: Call
    down: Call

    def packed(self, w13: Any, w2: Any) -> tuple[PackedExperts, PackedExperts]:
        """Return tensors that `pack_projection` packed as what kernels take.

        Args:
            w13: uint8 [experts, stride], gate and up.
            w2: uint8 [experts, stride], down.
        """
        parts = (w13, self.gate_up, GATE_FIRST), (w2, self.down, None)
        first, second = (
            PackedExperts(data, call.layout, call.n, call.k, call.group_size, QuantMode.parse(call.mode), order)
            for data, call, order in parts
        )
        return first, second


def gptq_expert(words: Any, scales: Any, points: Any = None) -> RawLayer:
    """Return an expert whose words hold eight values of K.

    Args:
        words: int32 [k / 8, n].
        scales: floats [groups, n].
        points: uint8 [groups, n], 0 to 15; None for symmetric weights.
    """
    return RawLayer(expand(words.t()), scales, points)


def awq_expert(words: Any, scales: Any, points: Any) -> RawLayer:
    """Return an expert of an AWQ model.

    Args:
        words: int32 [k, n / 8], in AWQ's order.
        scales: floats [groups, n].
        points: int32 [groups, n / 8], in AWQ's order; None if weights have no zero points.
    """
    return RawLayer(expand_awq(words), scales, None if points is None else awq_points(points))


def pack_projection(
    expert: Callable[[int], RawLayer], count: int, mode: QuantMode, *, gated: bool, name: str
) -> EngineLayer:
    """Pack one projection of all experts, one after the other, on the device that holds them.

    Args:
        expert: returns the weight of an expert by its number, gates before up projections. Groups follow one another.
        count: number of experts.
        mode: the mode of all projections of the layer.
        gated: whether they are gates and up projections, for kernels that apply the gate.
        name: what messages call the projection.

    Returns:
        A layer whose packed weight is uint8 [experts, stride], as `pack_experts` returns it.

    Raises:
        InvalidValueError: if the parts of an expert do not fit together, or its scales do not fit the packed layout or
            fp16.
    """
    buffer: Any = None
    call: Call | None = None
    for index in range(count):
        raw, called = expert(index), f"expert {index} of {name}"
        k, groups = raw.q.shape[1], len(raw.scales)
        rows = torch.arange(groups, device=raw.scales.device)
        layer = pack_layer(raw, Order(k, k // groups, rows), name=called, mode=mode, gated=gated)
        if layer.call.alpha != 1:
            raise InvalidValueError(
                f"{called} cannot be packed: its scales do not fit fp16 without a factor of {layer.call.alpha}, which "
                f"kernels of experts do not have; {WAY_OUT}"
            )
        if call is None:
            call = layer.call
            stride = expert_stride(call.layout, WeightGeometry(call.n, call.k, call.group_size, mode))
            buffer = torch.zeros((count, stride), dtype=torch.uint8, device=layer.packed.device)
        buffer[index, : len(layer.packed)] = layer.packed
    if call is None:
        raise InvalidValueError(f"{name} must have one expert or more")
    return EngineLayer(buffer, None, call)


def sum_of_experts(
    hidden: Any,
    weights: tuple[PackedExperts, PackedExperts],
    topk_ids: Any,
    topk_weights: Any,
    out: Any,
    *,
    expert_map: Any = None,
    activation: str = "silu",
) -> None:
    """Write the sum over each token's routes of weight * expert(x).

    The kernels compute in fp16. Activations of another dtype are cast before them, and their result after them.

    Args:
        hidden: fp16 or bf16 [tokens, hidden].
        weights: gate and up, and down, of the experts here.
        topk_ids: integers [tokens, slots]; numbers that name no expert are skipped.
        topk_weights: floating point [tokens, slots].
        out: [tokens, hidden] of the dtype of `hidden`, contiguous, which is written.
        expert_map: int32 [all experts], the expert here for each id, or -1; None if ids are those.
        activation: name of the function of the gate.
    """
    result = moe(
        hidden.to(torch.float16).contiguous(),
        *weights,
        _kernel_ids(topk_ids).contiguous(),
        topk_weights.to(torch.float32).contiguous(),
        expert_map=expert_map,
        activation=activation,
        out=out if out.dtype == torch.float16 else None,
        dependent_launch="auto",
    )
    if result is not out:
        out.copy_(result)


def traced_sum_of_experts(
    hidden: Any,
    weights: tuple[Any, Any],
    call: ExpertsCall,
    topk_ids: Any,
    topk_weights: Any,
    *,
    activation: str = "silu",
) -> Any:
    """Return the sum over each token's routes of weight * expert(x), in a form that torch's compiler traces.

    Activations of another dtype than fp16 are cast before the operator, and its result after it.

    Args:
        hidden: fp16 or bf16 [tokens, hidden].
        weights: uint8 [experts, stride], as `pack_projection` packed them: gate and up, and down.
        call: everything of the layer's calls that is no tensor.
        topk_ids: integers [tokens, slots]; numbers that name no expert are skipped.
        topk_weights: floating point [tokens, slots].
        activation: name of the function of the gate.

    Returns:
        A new tensor [tokens, hidden] of the dtype of `hidden`.
    """
    first, second = call.gate_up, call.down
    facts = second.n, second.k, first.group_size, second.group_size, first.mode, first.layout, activation
    ids, factors = _kernel_ids(topk_ids), topk_weights.to(torch.float32)
    return torch.ops.w4a16gen.moe(hidden.to(torch.float16), ids, factors, *weights, *facts).to(hidden.dtype)


def _kernel_ids(topk_ids: Any) -> Any:
    """Return numbers of experts in a dtype that kernels read."""
    return topk_ids if topk_ids.dtype in (torch.int32, torch.int64) else topk_ids.to(torch.int64)
