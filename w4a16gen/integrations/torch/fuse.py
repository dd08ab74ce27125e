"""Several layers with one input as one layer: q|k|v and gate|up, by one kernel instead of two or three."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from w4a16gen.errors import InvalidValueError
from w4a16gen.integrations.torch.interleave import interleave
from w4a16gen.integrations.torch.linear import W4A16Linear
from w4a16gen.integrations.torch.nibbles import Tensor
from w4a16gen.integrations.torch.ops import on_torch
from w4a16gen.kernels.config import QuantMode
from w4a16gen.kernels.epilogue import Activation
from w4a16gen.weights.layouts.fragments import channels_join, factors_start
from w4a16gen.weights.packed import GATED_LAYOUT, LAYOUT_TARGETS, PackedWeight, pack_weight
from w4a16gen.weights.quantized import QuantizedWeight


def fuse(layers: Iterable[W4A16Linear]) -> W4A16Linear:
    """Return one layer whose output channels are those of several layers, one after the other.

    Where all but the last n are multiples of 64, packed bytes are joined on their device. Otherwise the weights are
    unpacked and packed again on the host.

    Args:
        layers: layers with the same input, such as q, k and v, on one device.

    Raises:
        InvalidValueError: if k, the group size, the device, the permutation, the input scale or alpha differ.

    Example:
        >>> import torch
        >>> from w4a16gen.integrations.torch import W4A16Linear, fuse
        >>> gate, up = (W4A16Linear.from_linear(torch.nn.Linear(256, 64, bias=False)) for _ in range(2))
        >>> fuse([gate, up]).out_features
        128
    """
    layers = list(layers) if isinstance(layers, Iterable) else []
    if not layers or not all(isinstance(layer, W4A16Linear) for layer in layers):
        raise InvalidValueError("layers must be one or more W4A16Linear")
    first = layers[0]
    _check(layers)
    fused = W4A16Linear(
        joined([layer.weight_of() for layer in layers]),
        _joined_bias(layers),
        permutation=first.permutation,
        input_scale=first.input_scale,
        alpha=first.alpha,
        activation=first.activation,
    )
    _keep_settings(fused, layers)
    return fused


def _keep_settings(fused: W4A16Linear, layers: Sequence[W4A16Linear]) -> None:
    """Keep the scales and the settings of the parts of a fused layer."""
    fused.activation_scale = max(layer.activation_scale for layer in layers)
    fused.output_scale = max(layer.output_scale for layer in layers)
    if any(layer.overflow == "check" for layer in layers):
        fused.overflow = "check"
    fused.train(layers[0].training)


def _check(layers: Sequence[W4A16Linear]) -> None:
    """Raise unless layers can be one.

    Raises:
        InvalidValueError: naming what differs.
    """
    first = layers[0]
    if first.layout == GATED_LAYOUT:
        raise InvalidValueError("layers whose gates are interleaved cannot be fused: fuse them before")
    for layer in layers[1:]:
        for name in ("k", "group_size", "alpha", "activation"):
            found, wanted = getattr(layer, name), getattr(first, name)
            if found != wanted:
                raise InvalidValueError(f"layers with {name} of {wanted} and {found} cannot be fused: keep them apart")
        if layer.packed.device != first.packed.device:
            raise InvalidValueError(
                f"layers on {first.packed.device} and {layer.packed.device} cannot be fused: move them to one device"
            )
        for name in ("permutation", "input_scale"):
            if not _are_equal(getattr(layer, name), getattr(first, name)):
                raise InvalidValueError(f"layers with different {name} cannot be fused: keep them apart")


def _are_equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else bool(torch.equal(one, other))


def _joined_bias(layers: Sequence[W4A16Linear]) -> Tensor | None:
    """Return the biases one after the other, zeros where a layer has none."""
    if all(layer.bias is None for layer in layers):
        return None
    device = layers[0].packed.device
    parts = [
        torch.zeros(layer.n, dtype=torch.float16, device=device) if layer.bias is None else layer.bias
        for layer in layers
    ]
    return torch.cat(parts)


def joined(weights: Sequence[PackedWeight]) -> PackedWeight:
    """Return the packed weight of the output channels of several."""
    first = weights[0]
    same = all((weight.mode, weight.layout) == (first.mode, first.layout) for weight in weights)
    if not same or not all(channels_join(weight.layout, weight.n) for weight in weights[:-1]):
        return on_torch(_packed_again(weights), first.data.device)
    blocks, factors = [], []
    for weight in weights:
        start = factors_start(weight.geometry)
        blocks.append(weight.data[:start])
        factors.append(weight.data[start:])
    return replace(first, n=sum(weight.n for weight in weights), data=torch.cat([*blocks, *factors]))


def fuse_gated(gate: W4A16Linear, up: W4A16Linear, activation: Activation | str = Activation.SWIGLU) -> W4A16Linear:
    """Return one layer that computes the gated product of two: function(gate(x)) * up(x).

    Where both have n of a multiple of 32 and one mode, packed bytes are interleaved on their device. Otherwise, or
    where a scale would lose bits, the weights are unpacked and packed again on the host.

    Args:
        gate: the layer whose outputs go through the function.
        up: the layer whose outputs they multiply, with the same input.
        activation: swiglu, geglu_tanh or geglu.

    Raises:
        InvalidValueError: if they differ in what `fuse` asks for, in n or in target, or have output scales or
            activations.

    Example:
        >>> import torch
        >>> from w4a16gen.integrations.torch import W4A16Linear, fuse_gated
        >>> gate, up = (W4A16Linear.from_linear(torch.nn.Linear(256, 64, bias=False)) for _ in range(2))
        >>> fuse_gated(gate, up, "swiglu")(torch.ones(2, 256, dtype=torch.float16)).shape
        torch.Size([2, 64])
    """
    layers = [gate, up]
    if not all(isinstance(layer, W4A16Linear) for layer in layers):
        raise InvalidValueError("gate and up must be W4A16Linear")
    _check(layers)
    _check_gated(gate, up)
    fused = W4A16Linear(
        interleaved([gate.weight_of(), up.weight_of()]),
        _joined_bias(layers),
        permutation=gate.permutation,
        input_scale=gate.input_scale,
        alpha=gate.alpha,
        activation=activation,
    )
    _keep_settings(fused, layers)
    return fused


def _check_gated(gate: W4A16Linear, up: W4A16Linear) -> None:
    """Raise unless two layers can be gate and factor.

    Raises:
        InvalidValueError: naming what is in the way.
    """
    if gate.n != up.n:
        raise InvalidValueError(f"layers with n of {gate.n} and {up.n} cannot be gate and factor: keep them apart")
    if gate.activation != str(Activation.NONE):
        raise InvalidValueError(f"layers with activation {gate.activation} cannot be gate and factor: keep them apart")
    scales = {layer.output_scale for layer in (gate, up)}
    if scales != {1.0}:
        raise InvalidValueError(
            f"output_scale of {max(scales)} divides what goes into the activation: keep the layers apart"
        )


def interleaved(weights: Sequence[PackedWeight]) -> PackedWeight:
    """Return the packed weight of gates and factors, for gated activations.

    Args:
        weights: the gates and their factors; or one weight of both, the gates first.

    Raises:
        InvalidValueError: if the layout for gated activations cannot hold them.
    """
    first = weights[0]
    if all((weight.mode, weight.layout) == (first.mode, first.layout) for weight in weights):
        data = interleave(*weights)
        if data is not None:
            return replace(first, data=data, layout=GATED_LAYOUT, n=sum(weight.n for weight in weights))
    return on_torch(_packed_again(weights, gated=True), first.data.device)


def _packed_again(weights: Sequence[PackedWeight], *, gated: bool = False) -> PackedWeight:
    """Unpack, join and pack; weights without zeros get zeros of 0 if another has them."""
    parts = [weight.to_host().unpack() for weight in weights]
    has_zeros = any(part.zeros is not None for part in parts)
    grouped = has_zeros or any(part.mode.is_grouped for part in parts)
    scales: list[Any] = [np.atleast_2d(part.scales) if grouped else part.scales for part in parts]
    zeros: list[Any] = [
        np.zeros_like(scale) if part.zeros is None else part.zeros for part, scale in zip(parts, scales, strict=True)
    ]
    if has_zeros:
        mode = QuantMode.FINEGRAINED_SCALE_AND_ZEROS
    else:
        mode = QuantMode.FINEGRAINED_SCALE_ONLY if grouped else QuantMode.PER_COLUMN_SCALE_ONLY
    joined = QuantizedWeight(
        np.concatenate([part.q for part in parts]),
        np.concatenate(scales, axis=-1),
        np.concatenate(zeros, axis=-1) if has_zeros else None,
        parts[0].group_size,
        mode,
    )
    target = LAYOUT_TARGETS[weights[0].layout]
    return pack_weight(joined, target=target, gated=gated)
