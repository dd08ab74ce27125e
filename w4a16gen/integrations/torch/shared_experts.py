"""Shared experts as experts of the layer: routes of every token to them, beside those that the router chose."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch

from w4a16gen.errors import InvalidValueError
from w4a16gen.integrations.torch import given
from w4a16gen.integrations.torch.nibbles import INTEGERS, Tensor
from w4a16gen.kernels.integers import integer

_MATRIX = 2


def add_shared_experts(
    topk_ids: Tensor, topk_weights: Tensor, first: int, *, count: int = 1, weight: Any = 1.0
) -> tuple[Tensor, Tensor]:
    """Return routes with those of every token to shared experts behind them, for `moe` and `W4A16Experts`.

    The shared experts are packed behind the routed ones, and have their sizes. A shared expert with channels of several
    experts is as many shared experts: see `w4a16gen.weights.division.divide`.

    Args:
        topk_ids: integers [tokens, slots], the expert of each route.
        topk_weights: floating point [tokens, slots], as the results are multiplied, on the same device.
        first: number of the first shared expert: that of the routed experts, of all GPUs with a map of experts.
        count: number of shared experts, which follow one another.
        weight: what results of shared experts are multiplied by: a number, or floating point [tokens] or [tokens, 1],
            such as the sigmoid of a gate.

    Returns:
        Ids and weights [tokens, slots + count], of the dtypes of the arguments. Torch compiles and exports the call.

    Raises:
        InvalidValueError: if a tensor has another dtype, shape or device, or a number is out of range.

    Example:
        >>> ids, weights = torch.tensor([[3, 1], [0, 2]]), torch.full((2, 2), 0.5)
        >>> ids, weights = add_shared_experts(ids, weights, 4)
        >>> ids.tolist(), weights.tolist()
        ([[3, 1, 4], [0, 2, 4]], [[0.5, 0.5, 1.0], [0.5, 0.5, 1.0]])
    """
    _check_routes(topk_ids, topk_weights)
    start, number = integer("first", first), integer("count", count)
    if start < 0 or number < 1:
        raise InvalidValueError(f"first of {start} must be 0 or more, and count of {number} 1 or more")
    largest = torch.iinfo(topk_ids.dtype).max
    if start + number - 1 > largest:
        raise InvalidValueError(f"expert {start + number - 1} must be at most {largest}, as {topk_ids.dtype} holds")
    tokens = len(topk_ids)
    shared = torch.arange(start, start + number, dtype=topk_ids.dtype, device=topk_ids.device)
    factors = _factors(weight, topk_weights).expand(tokens, number)
    return torch.cat((topk_ids, shared.expand(tokens, number)), dim=1), torch.cat((topk_weights, factors), dim=1)


def _check_routes(topk_ids: Any, topk_weights: Any) -> None:
    """Raise unless ids and weights are routes of the same tokens.

    Raises:
        InvalidValueError: naming the tensor.
    """
    if not isinstance(topk_ids, torch.Tensor) or topk_ids.dtype not in INTEGERS or topk_ids.dim() != _MATRIX:
        raise InvalidValueError(f"topk_ids of {given.kind_of(topk_ids)} must be a tensor of integers, [tokens, slots]")
    if not isinstance(topk_weights, torch.Tensor) or not topk_weights.is_floating_point():
        raise InvalidValueError(f"topk_weights of {given.kind_of(topk_weights)} must be a floating point tensor")
    if topk_weights.shape != topk_ids.shape:
        raise InvalidValueError(
            f"topk_weights of shape {list(topk_weights.shape)} must be {list(topk_ids.shape)}, as topk_ids are"
        )
    if topk_weights.device != topk_ids.device:
        raise InvalidValueError(
            f"topk_weights are on {topk_weights.device}, but topk_ids on {topk_ids.device}: move them to one device"
        )


def _factors(weight: Any, like: Tensor) -> Tensor:
    """Return the weight of shared experts of each token, [tokens, 1] or [1, 1], in the dtype of other weights.

    Raises:
        InvalidValueError: if it is neither a number nor a tensor with one value for each token.
    """
    tokens = len(like)
    if not isinstance(weight, torch.Tensor):
        is_number = isinstance(weight, Real) and not isinstance(weight, bool)
        if not is_number or not math.isfinite(weight):
            found = weight if is_number else given.kind_of(weight)
            raise InvalidValueError(f"weight of {found} must be a finite number, or a tensor [{tokens}]")
        return torch.full((1, 1), float(weight), dtype=like.dtype, device=like.device)
    if not weight.is_floating_point() or list(weight.shape) not in ([tokens], [tokens, 1]):
        raise InvalidValueError(
            f"weight of {given.kind_of(weight)} and shape {list(weight.shape)} must be floating point, [{tokens}] or "
            f"[{tokens}, 1]"
        )
    if weight.device != like.device:
        raise InvalidValueError(f"weight is on {weight.device}, but topk_ids on {like.device}: move them to one device")
    return weight.reshape(-1, 1).to(like.dtype)
