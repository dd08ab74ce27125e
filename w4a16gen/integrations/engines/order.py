"""The order of K in a packed weight: sorted by groups, which are divided or padded where ranks or act-order need it.

Kernels read one scale per group of 32 values or a multiple. Three things break that in an engine:

- act-order: the values of a group lie anywhere in K, so they are gathered;
- tensor parallelism: a group straddles two ranks, so groups are divided, and scale rows repeated;
- both, or a share of K that is no multiple of 32: groups are padded to 32 with values that meet an activation of 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Any

import torch

from w4a16gen.errors import UnsupportedProblemError
from w4a16gen.kernels.problem import NATIVE_GROUP_MULTIPLE


@dataclass(frozen=True, eq=False)
class Order:
    """How K of a layer is laid out before it is packed.

    Attributes:
        k: reduction length of the packed weight.
        group_size: values of the packed K that share a scale.
        rows: int64 [k / group_size], the row of the layer's scales for each packed group.
        index: int64 [k], the layer's position for each packed one; the layer's own k stands for padding. None if the
            order is the layer's.
    """

    k: int
    group_size: int
    rows: Any
    index: Any = None


def plan_order(k: int, group_size: int, *, start: int = 0, device: Any = None) -> Order:
    """Return the order of a layer whose groups follow one another.

    Args:
        k: reduction length on this rank.
        group_size: values of K that share a scale.
        start: the first value of K on this rank.
        device: where the arrays go.

    Example:
        >>> order = plan_order(2752, 128, start=2752)  # k = 11008 on the second of four ranks
        >>> order.group_size, order.rows[:5].tolist()
        (64, [21, 22, 22, 23, 23])
    """
    if k == group_size and start % group_size == 0:
        return Order(k, k, torch.full((1,), start // group_size, device=device))
    part = gcd(group_size, k, start)
    if part % NATIVE_GROUP_MULTIPLE == 0:
        return Order(k, part, (start + torch.arange(0, k, part, device=device)) // group_size)
    return _padded((start + torch.arange(k, device=device)) // group_size)


def plan_act_order(groups: Any, group_size: int) -> Order:
    """Return the order of a layer with act-order.

    Args:
        groups: integers [k], the row of scales of each value of K.
        group_size: values of K that share a scale.

    Raises:
        UnsupportedProblemError: if a group is negative.

    Example:
        >>> order = plan_act_order(torch.arange(64) % 2, 32)
        >>> order.index[:3].tolist(), order.rows.tolist()
        ([0, 2, 4], [0, 1])
    """
    groups = groups.to(torch.int64)
    if groups.numel() == 0 or int(groups.min()) < 0:
        raise UnsupportedProblemError("g_idx must name a row of scales for every value of K: it holds negative values")
    if group_size % NATIVE_GROUP_MULTIPLE != 0:
        return _padded(groups)
    rows, counts = torch.unique(groups, return_counts=True)
    if not bool((counts == group_size).all()):
        return _padded(groups)
    index = torch.argsort(groups, stable=True)
    in_order = torch.equal(index, torch.arange(groups.numel(), device=groups.device))
    return Order(groups.numel(), group_size, rows, None if in_order else index)


def _padded(groups: Any) -> Order:
    """Return an order in which each group is padded to a multiple of 32."""
    size = NATIVE_GROUP_MULTIPLE
    rows, counts = torch.unique(groups, return_counts=True)
    blocks = (counts + size - 1) // size
    k = groups.numel()
    packed = int(blocks.sum()) * size
    index = torch.full((packed,), k, dtype=torch.int64, device=groups.device)
    first = (torch.cumsum(blocks, 0) - blocks) * size  # where each group begins in the packed K
    order = torch.argsort(groups, stable=True)
    place = torch.arange(k, device=groups.device) - torch.repeat_interleave(torch.cumsum(counts, 0) - counts, counts)
    index[torch.repeat_interleave(first, counts) + place] = order
    return Order(packed, size, torch.repeat_interleave(rows, blocks), index)
