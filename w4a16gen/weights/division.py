"""How a layer divides among GPUs: along which dimension, and with which group size on each."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from math import gcd

from w4a16gen.kernels.problem import DIMENSION_MULTIPLE, NATIVE_GROUP_MULTIPLE


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
