"""Weights of checkpoints, decoded and packed by torch operations on the device that will use them.

The checkpoint's own bytes go to the device, so that a GPU does the work that takes minutes on the host. On the CPU the
same code runs on tensors in host memory. The packed bytes are those of `pack_weight(layer.quantized())`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from w4a16gen.errors import InvalidValueError
from w4a16gen.integrations.torch import formats
from w4a16gen.integrations.torch.nibbles import Decoded, Tensor, round_to_half
from w4a16gen.integrations.torch.upload import Uploader
from w4a16gen.kernels.config import QuantMode, Target
from w4a16gen.runtime.default import library_in_use
from w4a16gen.weights.importers.layer import CheckpointLayer
from w4a16gen.weights.importers.rounding import round_factors
from w4a16gen.weights.importers.stored import Factors
from w4a16gen.weights.packed import PackedWeight, check_layout_group_size, layout_for, pack_weight
from w4a16gen.weights.quantized import QuantizedWeight


@dataclass(frozen=True, eq=False)
class DeviceWeight:
    """A packed weight on a device, and what a call needs beside it.

    Attributes:
        packed: the packed weight; its data is a torch tensor.
        permutation: the columns of the activations in the order of the weight, int64 [k], or None.
        alpha: the factor of the product, a power of two, and 1 unless the scales do not fit fp16.
    """

    packed: PackedWeight
    permutation: Tensor | None = None
    alpha: float = 1.0


def load_layer(layer: CheckpointLayer, device: Any = "cpu", *, uploader: Uploader | None = None) -> DeviceWeight:
    """Read a layer of a checkpoint, and pack it for the native kernels on a device.

    GPTQ, AWQ (gemm), compressed-tensors and GGUF are decoded on the device. Other formats are decoded on the host.

    Args:
        layer: the layer.
        device: the device, in torch's terms.
        uploader: copies bytes to that device; pass one for all layers, so that its buffers are allocated once.

    Raises:
        InvalidValueError: if the layer is damaged, or the layout cannot hold it.
        NotBuiltError: on a GPU, if no native kernel of the mode is built.
    """
    moved = uploader or Uploader(device)
    decoded = formats.decode(layer, moved)
    permutation = None if layer.permutation is None else moved.array(layer.permutation.astype(np.int64))
    if decoded is not None:
        return pack_decoded(decoded, permutation, name=layer.name)
    weight = layer.quantized()
    return DeviceWeight(_pack_quantized(weight, moved), permutation, layer.alpha)


def pack_decoded(
    decoded: Decoded,
    permutation: Tensor | None = None,
    *,
    name: str = "weight",
    mode: QuantMode | None = None,
    gated: bool = False,
) -> DeviceWeight:
    """Round the factors of a weight to fp16, and pack it on its device.

    Args:
        decoded: the weight, with K in the order of the file.
        permutation: the order of K that the packed weight shall have, int64 [k], or None.
        name: what messages call the layer.
        mode: the quantisation mode, for weights of which other weights decide; None is the plainest that holds it.
        gated: whether it is for gated activations: the first half of its channels gates the second.

    Raises:
        InvalidValueError: if a factor is not finite, or the layout cannot hold the weight.
        NotBuiltError: on a GPU, if no native kernel of the mode is built.
    """
    q, scales, zeros = decoded
    groups, k = len(scales), q.shape[1]
    if groups == 0 or k % groups != 0:
        raise InvalidValueError(f"layer {name}: {groups} groups do not divide k = {k}")
    mode = _plainest(zeros, groups) if mode is None else mode
    check_layout_group_size(layout_for(Target.NATIVE, gated=gated), k, k // groups, mode)
    halves, added, alpha = _rounded(scales, zeros, name)
    if permutation is not None:
        q = q.index_select(1, permutation)
    packed = _pack(q, halves if mode.is_grouped else halves[0], added, k // groups, mode, gated=gated)
    return DeviceWeight(packed, permutation, alpha)


def _plainest(zeros: Tensor | None, groups: int) -> QuantMode:
    """Return the mode that says no more than a weight needs."""
    if zeros is not None:
        return QuantMode.FINEGRAINED_SCALE_AND_ZEROS
    return QuantMode.PER_COLUMN_SCALE_ONLY if groups == 1 else QuantMode.FINEGRAINED_SCALE_ONLY


def _rounded(scales: Tensor, zeros: Tensor | None, name: str) -> tuple[Tensor, Tensor | None, float]:
    """Return scales and zeros in fp16, and alpha. Waits for the device once."""
    groups = len(scales)
    halves, fit = round_to_half(scales if zeros is None else torch.cat((scales, zeros)))
    if fit:
        return halves[:groups], None if zeros is None else halves[groups:], 1.0
    factors = Factors(scales.cpu().numpy(), None if zeros is None else zeros.cpu().numpy())
    rounded = round_factors(factors, name=name)  # which finds alpha, or refuses
    moved = None if rounded.zeros is None else torch.from_numpy(rounded.zeros).to(scales.device)
    return torch.from_numpy(rounded.scales).to(scales.device), moved, rounded.exactness.alpha


def _pack(
    q: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int, mode: QuantMode, *, gated: bool = False
) -> PackedWeight:
    """Pack checked factors, and values of 0 to 15, where they are."""
    if q.is_cuda:
        packer = library_in_use().packer
        added = None if zeros is None else zeros.contiguous()
        return packer.pack_checked(q, scales.contiguous(), added, group_size, mode, gated=gated)
    parts = [None if part is None else part.numpy() for part in (q, scales, zeros)]
    weight = QuantizedWeight(parts[0], parts[1], parts[2], group_size, mode)  # type: ignore[arg-type]
    return _on_host(weight, gated=gated)


def _pack_quantized(weight: QuantizedWeight, moved: Uploader) -> PackedWeight:
    """Pack a weight that was decoded on the host."""
    if moved.device.type == "cpu":
        return _on_host(weight)
    zeros = None if weight.zeros is None else moved.array(weight.zeros)
    check_layout_group_size(layout_for(Target.NATIVE, gated=False), weight.k, weight.group_size, weight.mode)
    return _pack(moved.array(weight.q), moved.array(weight.scales), zeros, weight.group_size, weight.mode)


def _on_host(weight: QuantizedWeight, *, gated: bool = False) -> PackedWeight:
    packed = pack_weight(weight, gated=gated)
    return PackedWeight(
        torch.from_numpy(packed.data), packed.layout, packed.n, packed.k, packed.group_size, packed.mode
    )


def dense_weight(
    weight: QuantizedWeight, alpha: float, permutation: Tensor | None, input_scale: Tensor | None
) -> Tensor:
    """Return the weight that multiplies activations as they are, float64 [n, k], in host memory.

    Args:
        weight: the weight, with K in the order of the permutation.
        alpha: factor of the product.
        permutation: int64 [k], or None.
        input_scale: factors of the activations, [k], or None.
    """
    exact = torch.from_numpy(weight.dequantize() * alpha)
    if permutation is not None:
        exact = torch.empty_like(exact).index_copy_(1, permutation.cpu(), exact)
    return exact if input_scale is None else exact * input_scale.cpu().double()
