"""Layout `fragment_blocks_v2`: blocks of 64 channels x 128 k in the order of WGMMA's register fragments.

Layout `fragment_blocks_v2_gated` is the same of a weight whose gates and factors are interleaved, 8 by 8.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.config import QuantMode
from w4a16gen.kernels.epilogue import why_not_gated
from w4a16gen.weights.layouts.geometry import WeightGeometry
from w4a16gen.weights.quantized import Half, Nibbles, QuantizedWeight

TOO_WIDE_RANGE = (
    "lie too far below the channel's largest scale for layout fragment_blocks_v2, which holds a channel's values in "
    "one range of fp16: pack for target cutlass"
)
"""The refusal of scales and zeros that the native layout would have to round."""


_NOT_THIS_WEIGHT = "is damaged, or its group size or mode is not what the PackedWeight says"


class _FragmentBlocks(NamedTuple):
    """Sizes of layout `fragment_blocks_v2`; cuda/native/layout.h states the same and the reasons."""

    channel_blocks: int
    k_blocks: int
    scale_rows: int
    header_rows: int
    block_bytes: int
    factors: int
    end: int

    @classmethod
    def of(cls, n: int, k: int, group_size: int, mode: QuantMode) -> _FragmentBlocks:
        channel_blocks, k_blocks = -(-n // 64), -(-k // 128)
        rows = 1 if group_size == k or group_size % 128 == 0 else 2 if group_size % 64 == 0 else 4
        rows = rows if mode.is_grouped else 0
        header_rows = rows * (2 if mode.has_zeros else 1)
        block_bytes = 4096 + 128 * header_rows
        factors = channel_blocks * k_blocks * block_bytes
        return cls(channel_blocks, k_blocks, rows, header_rows, block_bytes, factors, factors + channel_blocks * 256)


def unit_exponents(channels: int, mode: QuantMode) -> npt.NDArray[np.int32]:
    """Return the exponent of two by which one step of a nibble is scaled when it meets its scale, [channels]."""
    units = np.where(np.arange(channels) // 8 % 2 == 0, -21, -17) + (15 if mode.has_zeros else 0)
    return units.astype(np.int32)


def scale_exponents(scales: Half, mode: QuantMode) -> npt.NDArray[np.int32]:
    """Return the exponents of two by which layout `fragment_blocks_v2` divides the scales of each channel.

    Args:
        scales: fp16 [groups, n].
        mode: a grouped mode.

    Returns:
        int32 [n]: 0 for channels whose scales all lie below 2^-5, or with zeros 2^10; else what brings them there.
    """
    largest = np.abs(scales.astype(np.float32)).max(axis=0)
    excess = np.frexp(largest)[1] - (10 if mode.has_zeros else -5)
    return np.where(largest > 0, np.maximum(excess, 0), 0).astype(np.int32)


def pack(weight: QuantizedWeight) -> npt.NDArray[np.uint8]:
    """Return the packed bytes, uint8 [bytes]."""
    n, k = weight.n, weight.k
    sizes = _FragmentBlocks.of(n, k, weight.group_size, weight.mode)
    nb, kb = sizes.channel_blocks, sizes.k_blocks
    data = np.zeros(sizes.end, np.uint8)
    blocks = data[: sizes.factors].reshape(nb, kb, sizes.block_bytes)
    q = weight.q
    if q.shape != (nb * 64, kb * 128):
        q = np.full((nb * 64, kb * 128), 8, np.uint8)
        q[:n, :k] = weight.q
    for block, channels in zip(blocks, q.reshape(nb, 4, 2, 8, kb, 2, 4, 2, 4, 2), strict=True):
        _pack_words(channels, block[:, sizes.block_bytes - 4096 :])
    factors = data[sizes.factors :].view(np.float32)
    units = unit_exponents(n, weight.mode)
    if weight.mode.is_grouped:
        exponents = scale_exponents(weight.scales, weight.mode)
        factors[:n] = np.ldexp(np.float32(1), exponents)
        parts = [_shifted("scales", weight.scales, -exponents - units)]
        if weight.zeros is not None:
            parts.append(_shifted("zeros", weight.zeros, -exponents))
        header = np.concatenate([_block_rows(part, weight, sizes) for part in parts], axis=2)
        blocks[..., : 128 * sizes.header_rows] = header.view(np.uint8).reshape(nb, kb, -1)
    else:
        factors[:n] = np.ldexp(weight.scales.astype(np.float32), -units)
    return data


def _shifted(name: str, values: Half, exponents: npt.NDArray[np.int32]) -> Half:
    """Multiply each channel by a power of two, exactly.

    Raises:
        InvalidValueError: if that would round a value.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # damaged data may hold anything
        exact = np.ldexp(values.astype(np.float32), exponents)
        result: Half = exact.astype(np.float16)
    rounded = (result != exact).any(axis=0)
    if rounded.any():
        channel = int(rounded.argmax())
        raise InvalidValueError(f"{name} of channel {channel} {TOO_WIDE_RANGE}")
    return result


def _pack_words(q: Nibbles, words: npt.NDArray[np.uint8]) -> None:
    """Write the words of 64 channels.

    Args:
        q: [warp, channel + 8, row, k block, half, step, k + 8, pair, odd k].
        words: uint8 [k block, 4096], written.
    """
    kb = q.shape[3]
    # Two nibbles, the channel and the one 8 above, to a byte: [warp, row, k block, half, step, k + 8, pair, odd k].
    pairs = q[:, 0] | (q[:, 1] << 4)
    # [k block, half, warp, row, pair, step] of words whose bytes are odd k, k + 8.
    ordered = np.ascontiguousarray(pairs.transpose(2, 3, 0, 1, 6, 4, 7, 5))
    plain = ordered.reshape(kb, 4096).view(np.uint32)
    words[...] = ((plain << np.uint32(3)) | (plain >> np.uint32(29))).view(np.uint8)


def _group_of_rows(sizes: _FragmentBlocks, group_size: int, groups: int) -> npt.NDArray[np.intp]:
    """Return the group whose scales each row of scales holds, [k blocks * scale rows]."""
    starts = np.arange(sizes.k_blocks * sizes.scale_rows) * (128 // sizes.scale_rows)
    return np.minimum(starts // group_size, groups - 1)


def _block_rows(values: Half, weight: QuantizedWeight, sizes: _FragmentBlocks) -> Half:
    """Spread scales [groups, n] to [channel blocks, k blocks, rows, 64], pairs of channels 8 apart side by side."""
    group = _group_of_rows(sizes, weight.group_size, len(values))
    padded = np.zeros((len(group), sizes.channel_blocks * 64), np.float16)
    padded[:, : weight.n] = values[group]
    shaped = padded.reshape(sizes.k_blocks, sizes.scale_rows, sizes.channel_blocks, 4, 2, 8)
    rows: Half = np.ascontiguousarray(shaped.transpose(2, 0, 1, 3, 5, 4))
    return rows.reshape(sizes.channel_blocks, sizes.k_blocks, sizes.scale_rows, 64)


def unpack(data: npt.NDArray[np.uint8], geometry: WeightGeometry) -> QuantizedWeight:
    """Return the canonical weight; the exact inverse of `pack`."""
    n, k, group = geometry.n, geometry.k, geometry.group_size
    sizes = _FragmentBlocks.of(n, k, group, geometry.mode)
    nb, kb = sizes.channel_blocks, sizes.k_blocks
    data = np.ascontiguousarray(data)
    blocks = data[: sizes.factors].reshape(nb, kb, sizes.block_bytes)
    words = np.ascontiguousarray(blocks[..., sizes.block_bytes - 4096 :]).view(np.uint32)
    pairs = ((words >> np.uint32(3)) | (words << np.uint32(29))).view(np.uint8).reshape(nb, kb, 2, 4, 8, 4, 4, 2, 2)
    # nb, kb, half, warp, row, pair, step, odd, +8 of k -> nb, warp, row, kb, half, step, +8 of k, pair, odd
    pairs = np.ascontiguousarray(pairs.transpose(0, 3, 4, 1, 2, 6, 8, 5, 7)).reshape(nb, 4, 1, 8, kb * 128)
    q = np.concatenate([pairs & 15, pairs >> 4], axis=2).reshape(nb * 64, kb * 128)[:n, :k]

    factors, units = data[sizes.factors :].view(np.float32)[:n], unit_exponents(n, geometry.mode)
    if not geometry.mode.is_grouped:
        with np.errstate(over="ignore", invalid="ignore"):
            scales = np.ldexp(factors, units).astype(np.float16)
        return QuantizedWeight(np.ascontiguousarray(q), scales, None, group, geometry.mode)
    with np.errstate(invalid="ignore"):  # damaged data may hold signalling NaN
        mantissas, exponents = np.frexp(factors)
    if (mantissas != 0.5).any() or (exponents < 1).any():  # noqa: PLR2004  (powers of two from 1 on)
        raise InvalidValueError(f"packed data {_NOT_THIS_WEIGHT}")
    exponents = exponents.astype(np.int32) - 1

    def read(first_row: int, shift: npt.NDArray[np.int32]) -> Half:
        header = np.ascontiguousarray(blocks[..., first_row * 128 : (first_row + sizes.scale_rows) * 128])
        rows = header.view(np.float16).reshape(nb, kb * sizes.scale_rows, 4, 8, 2).transpose(1, 0, 2, 4, 3)
        rows = rows.reshape(kb * sizes.scale_rows, nb * 64)[:, :n]
        values = rows[np.arange(k // group) * group * sizes.scale_rows // 128]
        if (values[_group_of_rows(sizes, group, len(values))] != rows).any():
            raise InvalidValueError(f"packed data {_NOT_THIS_WEIGHT}")
        return _shifted("scales", values, shift)

    zeros = read(sizes.scale_rows, exponents) if geometry.mode.has_zeros else None
    return QuantizedWeight(np.ascontiguousarray(q), read(0, exponents + units), zeros, group, geometry.mode)


def interleaved(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return channels, the last axis, as layout `fragment_blocks_v2_gated` orders them.

    Args:
        values: [..., n], the gates first, then their factors; n is a multiple of 16.

    Returns:
        8 gates, their 8 factors, the next 8 gates, and so on.
    """
    *rest, n = values.shape
    return np.ascontiguousarray(values.reshape(*rest, 2, n // 16, 8).swapaxes(-3, -2)).reshape(values.shape)


def apart(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the gates first, then their factors; the exact inverse of `interleaved`."""
    *rest, n = values.shape
    return np.ascontiguousarray(values.reshape(*rest, n // 16, 2, 8).swapaxes(-3, -2)).reshape(values.shape)


def _reordered(weight: QuantizedWeight, order: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]) -> QuantizedWeight:
    """Return a weight with its channels in another order."""
    return replace(
        weight,
        q=np.ascontiguousarray(order(weight.q.T).T),
        scales=order(weight.scales),
        zeros=None if weight.zeros is None else order(weight.zeros),
    )


def pack_gated(weight: QuantizedWeight) -> npt.NDArray[np.uint8]:
    """Return the packed bytes of a weight whose gates are the first half of its channels, uint8 [bytes].

    Raises:
        InvalidValueError: if the channels are no multiple of 16.
    """
    if (reason := why_not_gated(weight.n)) is not None:
        raise InvalidValueError(reason)
    return pack(_reordered(weight, interleaved))


def unpack_gated(data: npt.NDArray[np.uint8], geometry: WeightGeometry) -> QuantizedWeight:
    """Return the canonical weight; the exact inverse of `pack_gated`."""
    return _reordered(unpack(data, geometry), apart)


def packed_bytes(geometry: WeightGeometry) -> int:
    """Return the bytes that `pack` writes for a weight of these sizes."""
    return _FragmentBlocks.of(geometry.n, geometry.k, geometry.group_size, geometry.mode).end


def factors_start(geometry: WeightGeometry) -> int:
    """Return the byte at which the factors of the channels begin, after the blocks of all channels."""
    return _FragmentBlocks.of(geometry.n, geometry.k, geometry.group_size, geometry.mode).factors


def channels_join(layout: str, n: int) -> bool:
    """Return whether the blocks of other channels may follow those of n channels of this layout."""
    return layout == "fragment_blocks_v2" and n % 64 == 0
