"""Decoders of checkpoint formats in torch: for layers of a checkpoint, and for tensors that are on a device already."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from w4a16gen.errors import InvalidValueError
from w4a16gen.integrations.torch.nibbles import (
    INTEGERS,
    PER_WORD,
    Decoded,
    Tensor,
    expand,
    expand_awq,
    expand_bytes,
    zeros_of_points,
)
from w4a16gen.integrations.torch.upload import Uploader
from w4a16gen.kernels.integers import integer
from w4a16gen.weights.importers import gguf as gguf_blocks
from w4a16gen.weights.importers.awq import AwqGemmLayer
from w4a16gen.weights.importers.compressed_tensors import PackQuantizedLayer
from w4a16gen.weights.importers.gguf import GgufLayer
from w4a16gen.weights.importers.gptq import GptqLayer
from w4a16gen.weights.importers.layer import CheckpointLayer
from w4a16gen.weights.quantized import MAX_Q, OFFSET, Nibbles

_WORDS = (torch.int32, torch.uint32)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def decode(layer: CheckpointLayer, moved: Uploader) -> Decoded | None:
    """Return a layer's values and factors on a device, with K in the order of the file.

    Zero points are decoded on the host, where the doubts about them are known: they are a small part of the bytes.

    Args:
        layer: the layer.
        moved: copies bytes to the device.

    Returns:
        The weight, or None if its format is decoded on the host only.
    """
    decoder = _DECODERS.get(type(layer.stored))
    return None if decoder is None else decoder(layer.stored, moved)


def _gptq_layer(stored: GptqLayer, moved: Uploader) -> Decoded:
    qweight = moved.tensor(stored.tensors, f"{stored.name}.qweight")
    scales = moved.tensor(stored.tensors, f"{stored.name}.scales").double()
    points, _ = stored.zero_points()
    return Decoded(expand(qweight.t()), scales, _zeros(points, scales, moved))


def _awq_layer(stored: AwqGemmLayer, moved: Uploader) -> Decoded:
    qweight = moved.tensor(stored.tensors, f"{stored.name}.qweight")
    scales = moved.tensor(stored.tensors, f"{stored.name}.scales").double()
    return Decoded(expand_awq(qweight), scales, _zeros(stored.zero_points(), scales, moved))


def _compressed_layer(stored: PackQuantizedLayer, moved: Uploader) -> Decoded:
    words = moved.tensor(stored.tensors, f"{stored.name}.weight_packed")
    scales = moved.tensor(stored.tensors, f"{stored.name}.weight_scale").double().t().contiguous()
    points = stored.zero_points()
    zeros = None if points is None else _zeros(points, scales, moved)
    return Decoded(expand(words)[:, : stored.k].contiguous(), scales, zeros)


def _gguf_layer(stored: GgufLayer, moved: Uploader) -> Decoded | None:
    if stored.expert is not None:
        return None
    blocks = moved.bytes(stored.tensors.raw(stored.tensor))
    rows = blocks.view(stored.n, -1)
    if stored.rows is not None:
        rows = rows.index_select(0, moved.array(stored.rows.astype(np.int64)))
    return gguf(rows, stored.type)


_DECODERS: dict[type, Callable[[Any, Uploader], Decoded | None]] = {
    GptqLayer: _gptq_layer,
    AwqGemmLayer: _awq_layer,
    PackQuantizedLayer: _compressed_layer,
    GgufLayer: _gguf_layer,
}


def _zeros(points: Nibbles, scales: Tensor, moved: Uploader) -> Tensor | None:
    """Return the zeros that zero points on the host stand for, or None if all are 8."""
    return None if (points == OFFSET).all() else zeros_of_points(moved.array(points), scales)


def zeros_on_device(points: Tensor | None, scales: Tensor) -> Tensor | None:
    """Return the zeros that zero points stand for, or None if all are 8. Waits for the device."""
    if points is None or bool((points == OFFSET).all()):
        return None
    return zeros_of_points(points, scales)


def gptq(qweight: Tensor, scales: Tensor, qzeros: Tensor | None = None, *, version: int = 1) -> Decoded:
    """Decode GPTQ's tensors on their device.

    Args:
        qweight: int32 [k / 8, n], eight values along K in a word.
        scales: fp16, bf16 or fp32 [groups, n].
        qzeros: int32 [groups, n / 8], or None for zero points of 8.
        version: 1 if the zero points are stored minus 1, as `checkpoint_format` "gptq" does; 2 for "gptq_v2".

    Raises:
        InvalidValueError: if the shapes contradict each other.
    """
    qweight = _given("qweight", qweight, _WORDS, (None, None))
    n = qweight.shape[1]
    scales = _given("scales", scales, _FLOATS, (None, n))
    if version not in {1, 2}:
        raise InvalidValueError(f"version of {version} must be 1 (zero points minus 1) or 2")
    points = None
    if qzeros is not None:
        fields = expand(_given("qzeros", qzeros, _WORDS, (len(scales), -(-n // PER_WORD))))[:, :n]
        points = (fields + 1) & MAX_Q if version == 1 else fields
    factors = scales.double()
    return Decoded(expand(qweight.t()), factors, zeros_on_device(points, factors))


def awq(qweight: Tensor, scales: Tensor, qzeros: Tensor | None = None) -> Decoded:
    """Decode the tensors of AWQ's version gemm on their device.

    Args:
        qweight: int32 [k, n / 8], eight channels in a word, in AWQ's order.
        scales: fp16, bf16 or fp32 [groups, n].
        qzeros: int32 [groups, n / 8] in the same order, or None for zero points of 8.

    Raises:
        InvalidValueError: if the shapes contradict each other.
    """
    qweight = _given("qweight", qweight, _WORDS, (None, None))
    words = qweight.shape[1]
    scales = _given("scales", scales, _FLOATS, (None, words * PER_WORD))
    points = None
    if qzeros is not None:
        points = expand_awq(_given("qzeros", qzeros, _WORDS, (len(scales), words))).t()
    factors = scales.double()
    return Decoded(expand_awq(qweight), factors, zeros_on_device(points, factors))


def compressed_tensors(
    weight_packed: Tensor, weight_scale: Tensor, weight_zero_point: Tensor | None = None, *, k: int | None = None
) -> Decoded:
    """Decode the tensors of compressed-tensors' pack-quantized on their device.

    Args:
        weight_packed: int32 [n, k / 8], eight values along K in a word.
        weight_scale: fp16, bf16 or fp32 [n, groups].
        weight_zero_point: int32 [n / 8, groups], or None for zero points of 8.
        k: the length of the reduction if the last word is not full.

    Raises:
        InvalidValueError: if the shapes contradict each other.
    """
    weight_packed = _given("weight_packed", weight_packed, _WORDS, (None, None))
    n, words = weight_packed.shape
    weight_scale = _given("weight_scale", weight_scale, _FLOATS, (n, None))
    length = words * PER_WORD if k is None else integer("k", k)
    if not 0 < length <= words * PER_WORD:
        raise InvalidValueError(f"k of {length} must be 1 to {words * PER_WORD}, eight times the words of a row")
    factors = weight_scale.double().t().contiguous()
    points = None
    if weight_zero_point is not None:
        shape = (-(-n // PER_WORD), len(factors))
        points = expand(_given("weight_zero_point", weight_zero_point, _WORDS, shape).t())[:, :n]
    return Decoded(expand(weight_packed)[:, :length].contiguous(), factors, zeros_on_device(points, factors))


def gguf(blocks: Tensor, kind: str) -> Decoded:
    """Decode GGUF's blocks on their device.

    Args:
        blocks: uint8 [n, bytes of a row].
        kind: the type of the blocks, `Q4_0`, `Q4_1` or `Q4_K`.

    Raises:
        InvalidValueError: if the type is another one, or the bytes are no whole blocks.
    """
    if not isinstance(kind, str) or kind not in gguf_blocks.BLOCK_BYTES:
        raise InvalidValueError(f"type {kind!r} of GGUF must be one of {', '.join(gguf_blocks.BLOCK_BYTES)}")
    size = gguf_blocks.BLOCK_BYTES[kind]
    blocks = _given("blocks", blocks, (torch.uint8,), (None, None))
    n = len(blocks)
    if blocks.shape[1] % size:
        raise InvalidValueError(f"blocks of {kind} must be uint8 [n, bytes of a row], a multiple of {size} bytes")
    of_row = blocks.reshape(n, -1, size)
    data = of_row[..., gguf_blocks.DATA[kind] :]
    run = gguf_blocks.GROUP_SIZE if kind == "Q4_K" else gguf_blocks.GROUP_SIZE // 2
    q = expand_bytes(data, run).view(n, -1)
    scales = _halves(of_row, 0)
    if kind == "Q4_0":
        return Decoded(q, scales.t().contiguous(), None)
    minima = _halves(of_row, 2)
    if kind == "Q4_1":
        return Decoded(q, scales.t().contiguous(), (minima + OFFSET * scales).t().contiguous())
    first, second, third = (of_row[..., start : start + 4] for start in (4, 8, 12))
    of_scales = torch.cat([first & 63, (third & 15) | ((first >> 6) << 4)], -1)
    of_minima = torch.cat([second & 63, (third >> 4) | ((second >> 6) << 4)], -1)
    scales = (scales[..., None] * of_scales.double()).view(n, -1)
    minima = (minima[..., None] * of_minima.double()).view(n, -1)
    return Decoded(q, scales.t().contiguous(), (OFFSET * scales - minima).t().contiguous())


def _halves(blocks: Tensor, place: int) -> Tensor:
    """Return the halves at a place of each block, float64 [n, blocks of a row]."""
    return blocks[..., place : place + 2].contiguous().view(torch.float16)[..., 0].double()


def order_of(g_idx: Tensor | None, groups: int, k: int) -> Tensor | None:
    """Return the order that sorts K by groups, int64 [k], or None if it is sorted already. Waits for the device.

    Args:
        g_idx: the group of each value of K, integers [k]; None, or -1 everywhere, if groups follow one another.
        groups: number of groups.
        k: length of the reduction.

    Raises:
        InvalidValueError: if it is no such tensor, or the groups have different sizes.
    """
    if g_idx is None:
        return None
    g_idx = _given("g_idx", g_idx, INTEGERS, (k,))
    if bool((g_idx == -1).all()):
        return None
    in_order = torch.arange(k, device=g_idx.device) // max(1, k // groups)
    if bool((g_idx == in_order).all()):
        return None
    order = torch.argsort(g_idx, stable=True)
    if not bool((g_idx[order] == in_order).all()):
        raise InvalidValueError(
            f"g_idx must name each of {groups} groups {k // groups} times: groups of unequal size cannot be packed"
        )
    return order


def _given(name: str, tensor: Any, dtypes: tuple[Any, ...], shape: tuple[int | None, ...]) -> Tensor:
    """Return a tensor that the caller passed, without its history of gradients.

    Raises:
        InvalidValueError: if it is no tensor, or of another dtype or shape; None in a shape allows any positive size.
    """
    if not isinstance(tensor, torch.Tensor):
        raise InvalidValueError(f"{name} of type {type(tensor).__name__} must be a torch tensor: see torch.from_numpy")
    if tensor.dtype not in dtypes:
        found, *wanted = (str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, *dtypes))
        raise InvalidValueError(f"{name} of dtype {found} must be {' or '.join(wanted)}")
    if tensor.is_meta:
        raise InvalidValueError(f"{name} is on the meta device and has no values: load it first")
    fits = tensor.dim() == len(shape) and all(
        wanted in (None, found) and found > 0 for found, wanted in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        wanted = ["1 or more" if size is None else str(size) for size in shape]
        raise InvalidValueError(f"{name} of shape {list(tensor.shape)} must be [{', '.join(wanted)}]")
    return tensor.detach()
