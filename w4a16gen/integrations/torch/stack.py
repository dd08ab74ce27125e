"""Stacks of experts, out of the layers of a checkpoint or of packed weights, made on the device that will use them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from w4a16gen.errors import InvalidValueError
from w4a16gen.integrations.torch import formats
from w4a16gen.integrations.torch.device_weights import DeviceWeight, pack_decoded
from w4a16gen.integrations.torch.expert_projection import ExpertProjection
from w4a16gen.integrations.torch.fuse import interleaved, joined
from w4a16gen.integrations.torch.nibbles import Decoded, Tensor
from w4a16gen.integrations.torch.upload import Uploader
from w4a16gen.kernels.config import QuantMode
from w4a16gen.weights.division import regroup
from w4a16gen.weights.expert_layers import common_form
from w4a16gen.weights.experts import GATE_FIRST, PackedExperts, expert_stride
from w4a16gen.weights.importers.layer import CheckpointLayer
from w4a16gen.weights.importers.mapped import shown_name
from w4a16gen.weights.packed import PackedWeight, pack_weight
from w4a16gen.weights.packed_checkpoint import PackedLayer

Layer = CheckpointLayer | PackedLayer


def stack_layers(parts: Sequence[Sequence[Any]], uploader: Uploader, *, gate_up: bool) -> ExpertProjection:
    """Return one projection of all experts, out of layers of an opened checkpoint or of a packed one.

    Experts are read, packed and placed one after the other.

    Args:
        parts: the layers of each expert, in the order of the experts: one, or the gate and the up projection, whose
            rows are joined.
        uploader: copies bytes to the device.
        gate_up: whether the rows of each expert are those of a gate, and then of an up projection. They are packed
            for kernels that apply the gate.

    Raises:
        InvalidValueError: if a layer is damaged, has a bias, or the layout cannot hold it. If the layers of an expert
            cannot be joined, or experts differ in their sizes.
        NotBuiltError: on a GPU, if no native kernel of the mode is built.
    """
    form = common_form([layer for expert in parts for layer in expert])
    buffer: Tensor = None
    first: PackedWeight | None = None
    orders, scales, alphas = [], [], []
    for index, layers in enumerate(parts):
        for layer in layers:
            check_no_bias(layer)
        permutation, scale = (_common(layers, part) for part in ("permutation", "input_scale"))
        make = _of_packed if isinstance(layers[0], PackedLayer) else _of_checkpoint
        made = make(layers, form, permutation, uploader, gated=gate_up)
        weight = made.packed
        if first is None:
            first = weight
            stride = expert_stride(weight.layout, weight.geometry)
            buffer = torch.zeros((len(parts), stride), dtype=torch.uint8, device=uploader.device)
        if weight.geometry != first.geometry:
            raise InvalidValueError(
                f"layer {shown_name(layers[0].name)} is {list(weight.geometry[:2])}, but that of expert 0 is "
                f"{list(first.geometry[:2])}: experts must have equal sizes"
            )
        buffer[index, : weight.nbytes] = weight.data
        orders.append(permutation)
        scales.append(scale)
        alphas.append(made.alpha)
    if first is None:
        raise InvalidValueError("there must be one expert or more")
    order = GATE_FIRST if gate_up else None
    packed = PackedExperts(buffer, first.layout, *first.geometry, order)
    return ExpertProjection(
        packed,
        permutation=_stacked(orders, np.arange(first.k)),
        input_scale=_stacked(scales, np.ones(first.k, np.float16)),
        alphas=alphas,
    )


def check_no_bias(layer: Layer) -> None:
    """Raise if a layer has a bias that is not 0: experts have none. Some writers of GPTQ store zeros.

    Args:
        layer: a layer of an opened checkpoint or of a packed one.

    Raises:
        InvalidValueError: naming the layer.
    """
    bias = layer.bias
    if bias is not None and bias.any():
        raise InvalidValueError(f"layer {shown_name(layer.name)} has a bias: experts with biases are not served")


def _common(layers: Sequence[Layer], part: str) -> Any:
    """Return the permutation or the input scale that all layers of an expert have, or None.

    Raises:
        InvalidValueError: if they differ.
    """
    first = getattr(layers[0], part)
    for layer in layers[1:]:
        other = getattr(layer, part)
        if (first is None) != (other is None) or (first is not None and not np.array_equal(first, other)):
            names = " and ".join(shown_name(layer.name) for layer in (layers[0], layer))
            raise InvalidValueError(f"layers {names} have different {part}, so that one product cannot serve both")
    return first


def _stacked(parts: Sequence[Any], default: Any) -> Tensor | None:
    """Return arrays of all experts as a tensor, with the default for those that have none; None if none has any."""
    if all(part is None for part in parts):
        return None
    return torch.from_numpy(np.stack([default if part is None else part for part in parts]))


def _of_checkpoint(
    layers: Sequence[CheckpointLayer], form: tuple[int, QuantMode], order: Any, uploader: Uploader, *, gated: bool
) -> DeviceWeight:
    """Decode the layers of an expert on the device, join their rows, and pack them."""
    decoded = [_in_form(_decoded(layer, uploader), form) for layer in layers]
    whole = decoded[0]
    if len(decoded) > 1:
        zeros = None if whole.zeros is None else torch.cat([part.zeros for part in decoded], dim=1)
        q, scales = (torch.cat([part[i] for part in decoded], dim=i) for i in range(2))
        whole = Decoded(q, scales, zeros)
    permutation = None if order is None else uploader.array(np.asarray(order, np.int64))
    return pack_decoded(whole, permutation, name=shown_name(layers[0].name), gated=gated)


def _decoded(layer: CheckpointLayer, uploader: Uploader) -> Decoded:
    """Return a layer's values and factors on the device, with K in the order of the file."""
    decoded = formats.decode(layer, uploader)
    if decoded is not None:
        return decoded
    factors = layer.stored.factors()
    zeros = None if layer.stored.is_symmetric() or factors.zeros is None else uploader.array(factors.zeros)
    return Decoded(uploader.array(layer.stored.values()), uploader.array(factors.scales), zeros)


def _in_form(decoded: Decoded, form: tuple[int, QuantMode]) -> Decoded:
    """Return the same weight with the group size and the zeros of a form that can hold it."""
    group_size, mode = form
    q, scales, zeros = decoded
    times = q.shape[1] // len(scales) // group_size
    if times > 1:
        scales = scales.repeat_interleave(times, dim=0)
        zeros = None if zeros is None else zeros.repeat_interleave(times, dim=0)
    if mode.has_zeros and zeros is None:
        zeros = torch.zeros_like(scales)
    return Decoded(q, scales, zeros)


def _of_packed(
    layers: Sequence[PackedLayer], form: tuple[int, QuantMode], _order: Any, uploader: Uploader, *, gated: bool
) -> DeviceWeight:
    """Join packed weights as bytes where their form allows it, or else unpack them and pack them again."""
    alphas = {layer.alpha for layer in layers}
    if len(alphas) > 1:
        raise InvalidValueError(
            f"layer {shown_name(layers[0].name)} has another alpha than the projection beside it: load the checkpoint "
            "that the folder was converted from"
        )
    weights = [layer.weight for layer in layers]
    if any((weight.group_size, weight.mode) != form for weight in weights):
        weights = [pack_weight(regroup(weight.to_host().unpack(), *form)) for weight in weights]
    moved = [replace(weight, data=_on_device(weight.data, uploader)) for weight in weights]
    if gated:
        return DeviceWeight(interleaved(moved), None, alphas.pop())
    return DeviceWeight(moved[0] if len(moved) == 1 else joined(moved), None, alphas.pop())


def _on_device(data: Any, uploader: Uploader) -> Tensor:
    return data.to(uploader.device) if isinstance(data, torch.Tensor) else uploader.bytes(data)
