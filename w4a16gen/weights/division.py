"""How a layer divides among GPUs: along which dimension, and with which group size on each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from math import gcd
from typing import Any

import numpy as np

from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.config import QuantMode, shown
from w4a16gen.kernels.integers import integer
from w4a16gen.kernels.problem import DIMENSION_MULTIPLE, NATIVE_GROUP_MULTIPLE
from w4a16gen.weights.quantized import QuantizedWeight


class Axis(Enum):
    """The dimension along which tensor parallelism divides a layer."""

    CHANNELS = "n"
    REDUCTION = "k"
    NONE = "none"


_CHANNELS = {
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj", "query", "key", "value"),
    *(
        "query_key_value",
        "attn_q",
        "attn_k",
        "attn_v",
        "attn_qkv",
        "ffn_gate",
        "ffn_up",
        "ffn_gate_exps",
        "ffn_up_exps",
    ),
    *("w1", "w3", "c_attn", "c_fc", "fc1", "dense_h_to_4h", "Wqkv", "in_proj", "W_pack"),
}
_REDUCTION = {
    *("o_proj", "out_proj", "down_proj", "attn_output", "ffn_down", "ffn_down_exps", "w2", "c_proj", "fc2"),
    *("dense_4h_to_h", "dense", "wo"),
}


def axis_of(name: str) -> Axis:
    """Return the dimension along which engines divide a layer, by the last word of its name.

    Args:
        name: path of the module; trailing numbers of experts do not count.

    Example:
        >>> axis_of("model.layers.0.mlp.down_proj")
        <Axis.REDUCTION: 'k'>
    """
    words = [word for word in name.split(".") if not word.isdecimal()]
    last = words[-1] if words else ""
    if words[-2:] == ["intermediate", "dense"]:  # BERT's
        return Axis.CHANNELS
    if last in _REDUCTION:
        return Axis.REDUCTION
    return Axis.CHANNELS if last in _CHANNELS else Axis.NONE


@dataclass(frozen=True)
class Share:
    """The part of a layer on one GPU.

    Attributes:
        n: output channels.
        k: reduction length.
        group_size: values of K that share a scale. Smaller than the layer's where groups were divided, which is exact.
    """

    n: int
    k: int
    group_size: int


def share(whole: Share, axis: Axis, gpus: int, *, act_order: bool = False) -> Share | str:
    """Return the part of a layer on each of several GPUs, or why there is none.

    Args:
        whole: the layer.
        axis: the dimension to divide.
        gpus: number of GPUs.
        act_order: whether the layer has a permutation of K.

    Example:
        >>> share(Share(4096, 11008, 128), Axis.REDUCTION, 4)
        Share(n=4096, k=2752, group_size=64)
        >>> share(Share(4096, 11008, 128), Axis.REDUCTION, 3)
        'k = 11008 is no multiple of 3'
    """
    if axis is Axis.NONE or gpus == 1:
        return whole
    size = whole.n if axis is Axis.CHANNELS else whole.k
    if size % gpus != 0:
        return f"{axis.value} = {size} is no multiple of {gpus}"
    part = size // gpus
    if part % DIMENSION_MULTIPLE != 0:
        return f"{axis.value} = {size} / {gpus} = {part} is no multiple of {DIMENSION_MULTIPLE}"
    if axis is Axis.CHANNELS:
        return Share(part, whole.k, whole.group_size)
    if whole.group_size == whole.k:
        return Share(whole.n, part, part)
    if act_order:
        return "act-order spreads its groups over all of k"
    group = gcd(whole.group_size, part)
    if group % NATIVE_GROUP_MULTIPLE != 0:
        return f"k = {whole.k} / {gpus} = {part} has no group size that is a multiple of {NATIVE_GROUP_MULTIPLE}"
    return Share(whole.n, part, group)


def _check_weight(weight: Any) -> None:
    """Raise unless a weight can still be divided: packed bytes cannot.

    Raises:
        InvalidValueError: naming its type, and what makes a weight of it.
    """
    if not isinstance(weight, QuantizedWeight):
        raise InvalidValueError(
            f"weight of type {type(weight).__name__} must be a QuantizedWeight: see w4a16gen.quantize, quantized() of "
            "a checkpoint's layer, and unpack() of a packed weight"
        )


def divide(weight: QuantizedWeight, axis: Axis, gpus: int, rank: int) -> QuantizedWeight:
    """Return the part of a weight on one of several GPUs. No value changes.

    Where a group of K straddles two GPUs, groups become smaller: as large as fits both. Their scales and zeros are
    repeated. A gate and an up projection are divided one by one, before they are joined.

    Args:
        weight: the whole weight, [n, k].
        axis: the dimension to divide.
        gpus: number of GPUs.
        rank: number of the GPU, from 0.

    Raises:
        InvalidValueError: if a value is of another type, the rank is not one of the GPUs, or the weight has no such
            part.

    Example:
        >>> import numpy as np
        >>> from w4a16gen.weights.quantize import quantize
        >>> weight = quantize(np.eye(8, 768), group_size=128)
        >>> part = divide(weight, Axis.REDUCTION, 4, rank=1)
        >>> part.k, part.group_size, part.scales.shape
        (192, 64, (3, 8))
    """
    _check_weight(weight)
    if not isinstance(axis, Axis):
        raise InvalidValueError(f"axis of {shown(axis)} must be an Axis, such as axis_of(name)")
    gpus, rank = integer("gpus", gpus), integer("rank", rank)
    if gpus < 1 or not 0 <= rank < gpus:
        raise InvalidValueError(f"rank of {rank} must be 0 to {gpus - 1}, one of {gpus} GPUs")
    part = share(Share(weight.n, weight.k, weight.group_size), axis, gpus)
    if isinstance(part, str):
        raise InvalidValueError(f"the weight cannot be divided among {gpus} GPUs: {part}")
    if axis is Axis.NONE:
        return weight
    if axis is Axis.CHANNELS:
        return weight.channels(np.arange(rank * part.n, (rank + 1) * part.n))
    start = rank * part.k
    q = weight.q[:, start : start + part.k]
    if not weight.mode.is_grouped:
        return replace(weight, q=q, group_size=part.k)
    rows = (start + np.arange(0, part.k, part.group_size)) // weight.group_size
    zeros = None if weight.zeros is None else weight.zeros[rows]
    return replace(weight, q=q, scales=weight.scales[rows], zeros=zeros, group_size=part.group_size)


def regroup(weight: QuantizedWeight, group_size: int, mode: QuantMode | None = None) -> QuantizedWeight:
    """Return the same weight with smaller groups, or in a mode that can say more. No value changes.

    Scales and zeros are repeated; a mode with zeros gets zeros of 0.

    Args:
        weight: the weight.
        group_size: a divisor of the weight's group size.
        mode: a mode with scales and zeros where the weight has them; None keeps the weight's.

    Raises:
        InvalidValueError: if a value is of another type, or the group size or the mode would lose anything.
    """
    _check_weight(weight)
    target = weight.mode if mode is None else mode
    group_size = integer("group_size", group_size)
    if not isinstance(target, QuantMode):
        raise InvalidValueError(f"mode of type {type(target).__name__} must be a QuantMode")
    if group_size <= 0 or weight.group_size % group_size != 0:
        raise InvalidValueError(f"group size {group_size} must divide the weight's {weight.group_size}")
    if (weight.mode.has_zeros and not target.has_zeros) or (weight.mode.is_grouped and not target.is_grouped):
        raise InvalidValueError(f"mode {target} cannot hold a weight of mode {weight.mode}")
    if (group_size, target) == (weight.group_size, weight.mode):
        return weight
    if not target.is_grouped:
        raise InvalidValueError(
            f"group size {group_size} must be {weight.k} (= k) in mode {target}: name a grouped mode"
        )
    times = weight.group_size // group_size
    scales = np.repeat(np.atleast_2d(weight.scales), times, axis=0)
    zeros = None if weight.zeros is None else np.repeat(weight.zeros, times, axis=0)
    if target.has_zeros and zeros is None:
        zeros = np.zeros_like(scales)
    return replace(weight, scales=scales, zeros=zeros, group_size=group_size, mode=target)
