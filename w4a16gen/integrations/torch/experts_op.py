"""The operator `w4a16gen::moe`: a layer of experts for torch's dispatcher, compiler, exporter and graphs.

On a GPU it launches the grouped kernels of the default build, and waits for nothing. Without grouped kernels in the
build, and in host memory, it computes one expert after the other. Every fact of a call is a plain argument.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from w4a16gen.errors import InvalidValueError
from w4a16gen.integrations.torch import ops
from w4a16gen.integrations.torch.apart import FUNCTIONS, gates_first
from w4a16gen.integrations.torch.nibbles import Tensor
from w4a16gen.kernels.config import QuantMode, shown
from w4a16gen.runtime.default import library_in_use
from w4a16gen.runtime.expert_calls import check_pair, gate_function
from w4a16gen.weights.experts import GATE_FIRST, PackedExperts
from w4a16gen.weights.packed import LAYOUT_TARGETS, TARGET_LAYOUTS

_ARGUMENTS = (
    "(Tensor hidden, Tensor topk_ids, Tensor topk_weights, Tensor w13, Tensor w2, int hidden_size, int "
    "intermediate_size, int gate_up_group_size, int down_group_size, str mode, str layout, str activation) -> Tensor"
)


def sum_of_experts(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    experts: int,
    one_expert: Callable[[Tensor, int], Tensor],
) -> Tensor:
    """Return the sum over each token's routes of weight * expert(x), fp32 [tokens, hidden], expert by expert.

    It waits for the device, to ask how many tokens each expert has.

    Args:
        x: floating point [tokens, hidden].
        topk_ids: integers [tokens, slots]; numbers that name no expert are skipped.
        topk_weights: floating point [tokens, slots].
        experts: number of experts.
        one_expert: returns the result of an expert for some rows, fp32 [m, hidden].
    """
    tokens, slots = topk_ids.shape
    ids = topk_ids.to(torch.int64)
    is_local = (ids >= 0) & (ids < experts)
    ids = torch.where(is_local, ids, experts).reshape(-1)
    order = torch.argsort(ids, stable=True)
    counts = torch.bincount(ids, minlength=experts + 1)[:experts].tolist()
    rows = torch.zeros((tokens * slots, x.shape[1]), dtype=torch.float32, device=x.device)
    start = 0
    for expert, count in enumerate(counts):
        if count:
            routes = order[start : start + count]
            rows[routes] = one_expert(x[routes // slots], expert)
            start += count
    by_slot = rows.view(tokens, slots, x.shape[1]).unbind(1)
    weights = torch.where(is_local, topk_weights.float(), 0.0).unbind(1)
    out = torch.zeros((tokens, x.shape[1]), dtype=torch.float32, device=x.device)
    for row, weight in zip(by_slot, weights, strict=True):
        out = out + row * weight[:, None]
    return out


class _Facts(NamedTuple):
    """The arguments of the operator behind its tensors."""

    hidden_size: int
    intermediate_size: int
    gate_up_group_size: int
    down_group_size: int
    mode: str
    layout: str
    """That of gate and up. The down projections have the layout of its target without a gate."""
    activation: str

    def packed(self, w13: Any, w2: Any) -> tuple[PackedExperts, PackedExperts]:
        """Return the projections of all experts: gate and up, and down.

        Raises:
            InvalidValueError: if there is no such layout or mode, or a tensor has another shape.
        """
        if self.layout not in LAYOUT_TARGETS:
            raise InvalidValueError(f"layout {shown(self.layout)} must be one of {', '.join(LAYOUT_TARGETS)}")
        hidden, inner, mode = self.hidden_size, self.intermediate_size, QuantMode.parse(self.mode)
        plain = TARGET_LAYOUTS[LAYOUT_TARGETS[self.layout]]
        return (
            PackedExperts(w13, self.layout, 2 * inner, hidden, self.gate_up_group_size, mode, GATE_FIRST),
            PackedExperts(w2, plain, hidden, inner, self.down_group_size, mode),
        )


def _check(hidden: Any, topk_ids: Any, topk_weights: Any, hidden_size: int) -> None:
    """Raise unless the tensors of a call have the dtypes and the shapes of the operator's."""
    if hidden.dtype != torch.float16 or hidden.dim() != 2 or hidden.shape[1] != hidden_size:  # noqa: PLR2004
        found = f"{str(hidden.dtype).removeprefix('torch.')} {list(hidden.shape)}"
        raise InvalidValueError(f"hidden states of {found} must be float16 [tokens, {hidden_size}]")
    if topk_ids.dtype not in {torch.int32, torch.int64} or topk_weights.dtype != torch.float32:
        raise InvalidValueError("topk_ids must be int32 or int64, and topk_weights float32")


def has_grouped_kernels(mode: str) -> bool:
    """Return whether the default build has grouped kernels of a quantisation mode.

    Raises:
        NotBuiltError: if there is no usable build.
    """
    return any(str(config.mode) == mode for config in library_in_use().experts.configs)


def _on_gpu(hidden: Any, topk_ids: Any, topk_weights: Any, w13: Any, w2: Any, *given: Any) -> Any:
    """Launch the grouped kernels of the default build on the current stream."""
    facts = _Facts(*given)
    _check(hidden, topk_ids, topk_weights, facts.hidden_size)
    if not has_grouped_kernels(facts.mode):
        return _one_by_one(hidden, topk_ids, topk_weights, w13, w2, *given)
    states, ids, weights = (tensor.detach().contiguous() for tensor in (hidden, topk_ids, topk_weights))
    first, second = facts.packed(w13, w2)
    call = states, first, second, ids, weights
    return library_in_use().moe(*call, activation=facts.activation, dependent_launch="auto")


def _one_by_one(hidden: Any, topk_ids: Any, topk_weights: Any, w13: Any, w2: Any, *given: Any) -> Any:
    """Compute one expert after the other."""
    facts = _Facts(*given)
    _check(hidden, topk_ids, topk_weights, facts.hidden_size)
    for name, tensor in (("topk_ids", topk_ids), ("topk_weights", topk_weights)):
        if tensor.dim() != 2 or len(tensor) != len(hidden) or tensor.shape != topk_ids.shape:  # noqa: PLR2004
            raise InvalidValueError(f"{name} of shape {list(tensor.shape)} must be [{len(hidden)}, slots], both alike")
    packed, function = facts.packed(w13, w2), FUNCTIONS[gate_function(facts.activation).function]
    check_pair(*packed)

    def product(x: Any, weights: PackedExperts, expert: int) -> Any:
        weight = replace(weights.expert(expert), layout=packed[1].layout)
        y = torch.ops.w4a16gen.gemm(x, weight.data, None, *ops.facts_of(weight), 1.0).float()
        return gates_first(y) if weights.gated else y

    def one_expert(x: Any, expert: int) -> Any:
        gate, up = product(x, packed[0], expert).chunk(2, dim=-1)
        return product((function(gate) * up).half(), packed[1], expert)

    return sum_of_experts(hidden, topk_ids, topk_weights, packed[0].experts, one_expert).half()


def _fake(hidden: Any, topk_ids: Any, topk_weights: Any, w13: Any, w2: Any, hidden_size: int, *facts: Any) -> Any:
    """Return a tensor of the result's shape, for tracing."""
    del facts
    _check(hidden, topk_ids, topk_weights, hidden_size)
    for name, tensor in (("topk_ids", topk_ids), ("topk_weights", topk_weights), ("w13", w13), ("w2", w2)):
        if tensor.device != hidden.device:
            raise InvalidValueError(
                f"hidden states are on {hidden.device}, but {name} on {tensor.device}: move them to one device"
            )
    return torch.empty_like(hidden)


def _register() -> Any:
    """Define the operator once per process, and return the object that keeps it."""
    if hasattr(torch.ops.w4a16gen, "moe"):
        return None
    library = torch.library.Library(ops.NAMESPACE, "FRAGMENT")
    library.define("moe" + _ARGUMENTS, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_contiguous_strides))
    library.impl("moe", _on_gpu, "CUDA")
    library.impl("moe", _one_by_one, "CPU")
    torch.library.register_fake(f"{ops.NAMESPACE}::moe", _fake, lib=library)
    return library


_library = _register() or globals().get("_library")
"""Keeps the operator registered; a module that is loaded again keeps the first."""
