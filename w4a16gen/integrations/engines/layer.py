"""A layer of an engine, packed on its own device: from its values and scales to the tensors that a call needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from w4a16gen.errors import InvalidValueError, UnsupportedProblemError, W4A16Error
from w4a16gen.integrations.engines.order import Order
from w4a16gen.integrations.engines.switch import OFF, PLUGINS_VARIABLE
from w4a16gen.integrations.torch.device_weights import pack_decoded
from w4a16gen.integrations.torch.nibbles import Decoded, zeros_of_points
from w4a16gen.integrations.torch.ops import facts_of
from w4a16gen.kernels.config import QuantMode
from w4a16gen.weights.quantized import OFFSET

WAY_OUT = f"to use the engine's own kernels, set {PLUGINS_VARIABLE}={OFF}"
"""Ends messages about layers that were taken, and then cannot be packed."""


@dataclass(frozen=True, eq=False)
class RawLayer:
    """A layer before it is packed, all parts on one device.

    Attributes:
        q: uint8 [n, k], 0 to 15.
        scales: floats [rows, n].
        zero_points: uint8 [rows, n], 0 to 15; None for symmetric weights.
    """

    q: Any
    scales: Any
    zero_points: Any = None


@dataclass(frozen=True)
class Call:
    """Everything of a layer's calls that is no tensor; two layers with equal calls run the same kernels.

    Attributes:
        n: output channels.
        k: reduction length of the packed weight.
        group_size: values of the packed K that share a scale.
        mode: the mode's tag.
        layout: the layout's tag.
        alpha: the power of two that the product is multiplied by.
    """

    n: int
    k: int
    group_size: int
    mode: str
    layout: str
    alpha: float


@dataclass(frozen=True, eq=False)
class EngineLayer:
    """A layer that is ready for calls.

    Attributes:
        packed: uint8 [bytes], the packed weight.
        index: int64 [call.k], the position of each packed value of K in the activations; None for their own order.
        call: the rest of the call.
    """

    packed: Any
    index: Any
    call: Call


def pack_layer(
    raw: RawLayer, order: Order, *, name: str = "layer", mode: QuantMode | None = None, gated: bool = False
) -> EngineLayer:
    """Pack a layer on the device that holds it.

    Args:
        raw: the layer.
        order: the order of K, as `plan_order` or `plan_act_order` returns it.
        name: what messages call the layer.
        mode: the quantisation mode, for weights of which other weights decide; None is the plainest that holds it.
        gated: whether it is for gated activations: the first half of its channels gates the second.

    Returns:
        The packed layer, on the same device. Scales are exact in fp16, or divided by a power of two, `call.alpha`.

    Raises:
        InvalidValueError: if the parts do not fit together, or the layer's scales do not fit the packed layout.
        UnsupportedProblemError: if no kernel takes the layer.

    Example:
        >>> from w4a16gen.integrations.engines.order import plan_order
        >>> raw = RawLayer(torch.full((64, 128), 9, dtype=torch.uint8), torch.ones(1, 64))
        >>> layer = pack_layer(raw, plan_order(128, 128))
        >>> layer.call.mode, product(layer.packed, torch.ones(1, 128).half(), None, layer.call)[0, 0].item()
        ('cs', 128.0)
    """
    try:
        return _pack(raw, order, name, mode, gated=gated)
    except W4A16Error as error:
        kind = UnsupportedProblemError if isinstance(error, UnsupportedProblemError) else InvalidValueError
        raise kind(f"{name} cannot be packed: {error}; {WAY_OUT}") from error


def _pack(raw: RawLayer, order: Order, name: str, mode: QuantMode | None, *, gated: bool) -> EngineLayer:
    n, _ = raw.q.shape
    if raw.scales.dim() != 2 or raw.scales.shape[1] != n:  # noqa: PLR2004
        raise InvalidValueError(f"scales of shape {list(raw.scales.shape)} must be [rows, {n}]")
    if int(order.rows.max()) >= raw.scales.shape[0]:
        raise InvalidValueError(
            f"{raw.scales.shape[0]} rows of scales are too few: groups name {int(order.rows.max())}"
        )
    q = raw.q
    if order.index is not None:
        q = torch.cat((q, q.new_full((n, 1), OFFSET)), dim=1).index_select(1, order.index)
    scales = raw.scales.index_select(0, order.rows).double()
    points = None if raw.zero_points is None else raw.zero_points.index_select(0, order.rows)
    zeros = None if points is None else zeros_of_points(points, scales)
    weight = pack_decoded(Decoded(q.contiguous(), scales, zeros), name=name, mode=mode, gated=gated)
    return EngineLayer(weight.packed.data, order.index, Call(*facts_of(weight.packed), weight.alpha))


def product(packed: Any, x: Any, bias: Any, call: Call, index: Any = None) -> Any:
    """Multiply activations by a layer's weight, in a form that torch's compiler traces as one graph.

    The kernels compute in fp16. Activations of another dtype are cast before the operator, and its result after it,
    so that a compiler can fuse the casts with their neighbours. Their bias is added in fp32.

    Args:
        packed: the layer's packed weight.
        x: fp16 or bf16 [..., k], on the same device.
        bias: [n], or None.
        call: the rest of the call.
        index: the layer's index.

    Returns:
        A new tensor [..., n] of the dtype of x.
    """
    if index is not None:
        source = torch.nn.functional.pad(x, (0, 1)) if call.k != x.shape[-1] else x
        x = source.index_select(-1, index)
    if x.dtype == torch.float16 and (bias is None or bias.dtype == torch.float16):
        return _gemm(x, packed, bias, call)
    result = _gemm(x.to(torch.float16), packed, None, call)
    if bias is not None:
        result = result + bias.float()
    return result.to(x.dtype)


def _gemm(x: Any, packed: Any, bias: Any, call: Call) -> Any:
    return torch.ops.w4a16gen.gemm(x, packed, bias, call.n, call.k, call.group_size, call.mode, call.layout, call.alpha)
