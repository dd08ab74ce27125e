"""What follows a plain product, as operations of torch: for calls whose epilogue no kernel of the build computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from w4a16gen.kernels.config import Target
from w4a16gen.kernels.epilogue import SIDE_BY_SIDE, Activation, CallEpilogue
from w4a16gen.weights.packed import TARGET_LAYOUTS

FUNCTIONS: dict[Activation, Callable[[Any], Any]] = {
    Activation.NONE: lambda x: x,
    Activation.SILU: torch.nn.functional.silu,
    Activation.GELU_TANH: torch.nn.GELU(approximate="tanh"),
    Activation.GELU: torch.nn.functional.gelu,
    Activation.RELU2: lambda x: torch.relu(x).square(),
}
"""By `Activation.function`."""


def gates_first(values: Any) -> Any:
    """Return channels in the order of the canonical weight, out of the order of a weight for gated activations.

    Args:
        values: tensor [..., n]: 8 gates, their 8 factors, the next 8 gates, and so on.

    Returns:
        The tensor [..., n]: all gates, and then their factors.
    """
    return values.unflatten(-1, (-1, 2, SIDE_BY_SIDE)).transpose(-3, -2).flatten(-3)


def apart_from(product: Callable[..., Any], bias: Any, n: int, layout: str, call: CallEpilogue, residual: Any) -> Any:
    """Return activation(product) + residual, fp16: the product is rounded to fp16, the rest is computed in fp32.

    Args:
        product: computes the plain product; called with `bias` and `layout`, it returns fp16 [..., n].
        bias: fp16 [n] in the order of the canonical weight, or None.
        n: channels of the weight.
        layout: that of the packed weight. Gates and factors come out interleaved, as they are packed.
        call: the activation, and whether there is a residual.
        residual: fp16 of the result's shape, or None.
    """
    if not call.activation.is_gated:
        y = FUNCTIONS[call.activation](product(bias=bias, layout=layout).float())
    else:
        packed_bias = None if bias is None else bias.reshape(2, -1, SIDE_BY_SIDE).transpose(0, 1).reshape(n)
        pairs = product(bias=packed_bias, layout=TARGET_LAYOUTS[Target.NATIVE]).float()
        pairs = pairs.unflatten(-1, (-1, 2, SIDE_BY_SIDE))
        y = (FUNCTIONS[call.activation.function](pairs[..., 0, :]) * pairs[..., 1, :]).flatten(-2)
    return (y if residual is None else y + residual.float()).to(torch.float16)
