"""Packed weights: one block of bytes in the layout that a kernel reads, with the facts that identify it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from w4a16gen.config import QuantMode, Target
from w4a16gen.errors import InvalidValueError
from w4a16gen.problem import NATIVE_GROUP_MULTIPLE
from w4a16gen.quantize import Half, Nibbles, QuantizedWeight, canonical, pack_nibbles, unpack_nibbles

ALIGNMENT = 128
"""Alignment of a packed weight and of every section in it, bytes."""

TOO_WIDE_RANGE = (
    "lie too far below the channel's largest scale for layout fragment_blocks_v2, which holds a channel's values in "
    "one range of fp16: pack for target cutlass"
)
"""What is said of scales and zeros that the native layout would have to round."""


@dataclass(frozen=True)
class PackedWeight:
    """A weight in one layout.

    `data` is uint8 [bytes], a numpy array or any array on a GPU; the other fields say what it holds, so that a kernel
    of another layout refuses it.
    """

    data: Any
    layout: str
    n: int
    k: int
    group_size: int
    mode: QuantMode

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight."""
        return LAYOUTS[self.layout].packed_bytes(self)

    def unpack(self) -> QuantizedWeight:
        """Give the canonical form back, exactly. Needs the data in host memory.

        Raises:
            InvalidValueError: if the data is on a GPU or has not the layout's size.
        """
        if not isinstance(self.data, np.ndarray):
            raise InvalidValueError("the packed weight is on a GPU: unpack the host copy")
        if self.data.nbytes != self.nbytes:
            raise InvalidValueError(f"packed data of {self.data.nbytes} bytes must be {self.nbytes} bytes")
        return LAYOUTS[self.layout].unpack(self)


class Layout(NamedTuple):
    """How one layout is written, read and measured."""

    pack: Callable[[QuantizedWeight], npt.NDArray[np.uint8]]
    unpack: Callable[[PackedWeight], QuantizedWeight]
    packed_bytes: Callable[[PackedWeight], int]
    group_multiple: int
    """Group sizes are multiples of this, or k."""


def _align(count: int, multiple: int = ALIGNMENT) -> int:
    return -(-count // multiple) * multiple


class _KMajorSections(NamedTuple):
    """Byte offsets of layout `kmajor_s4_v1`; cuda/cutlass_layout.h says the same and why."""

    row_values: int
    scales: int
    zeros: int
    end: int

    @classmethod
    def of(cls, n: int, k: int, group_size: int, mode: QuantMode) -> _KMajorSections:
        row_values = _align(k, 32)
        scale_bytes = _align(k // group_size * n * 2)
        scales = _align(n * row_values // 2)
        zeros = scales + scale_bytes
        return cls(row_values, scales, zeros, zeros + (scale_bytes if mode.has_zeros else 0))


def _pack_kmajor(weight: QuantizedWeight) -> npt.NDArray[np.uint8]:
    sections = _KMajorSections.of(weight.n, weight.k, weight.group_size, weight.mode)
    data = np.zeros(sections.end, np.uint8)
    # q XOR 8 read as signed is q - 8; the padding's 0 is weight 0 times an activation that TMA fills with 0.
    rows = np.zeros((weight.n, sections.row_values), np.uint8)
    rows[:, : weight.k] = weight.q ^ 8
    data[: rows.size // 2] = pack_nibbles(rows).reshape(-1)
    _write(data, sections.scales, weight.scales)
    if weight.zeros is not None:
        _write(data, sections.zeros, weight.zeros)
    return data


def _write(data: Nibbles, offset: int, values: Half) -> None:
    data[offset : offset + values.nbytes] = values.reshape(-1).view(np.uint8)


def _unpack_kmajor(packed: PackedWeight) -> QuantizedWeight:
    n, k = packed.n, packed.k
    sections = _KMajorSections.of(n, k, packed.group_size, packed.mode)
    rows = packed.data[: n * sections.row_values // 2].reshape(n, sections.row_values // 2)
    groups = k // packed.group_size

    def read(offset: int) -> Half:
        values: Half = packed.data[offset : offset + groups * n * 2].view(np.float16)
        return values.reshape(groups, n).copy()

    scales = read(sections.scales)
    return QuantizedWeight(
        q=unpack_nibbles(rows)[:, :k] ^ np.uint8(8),
        scales=scales if packed.mode.is_grouped else scales[0],
        zeros=read(sections.zeros) if packed.mode.has_zeros else None,
        group_size=packed.group_size,
        mode=packed.mode,
    )


def _kmajor_bytes(packed: PackedWeight) -> int:
    return _KMajorSections.of(packed.n, packed.k, packed.group_size, packed.mode).end


class _FragmentBlocks(NamedTuple):
    """Sizes of layout `fragment_blocks_v2`; cuda/native_layout.h says the same and why."""

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


def _unit_exponents(channels: int, mode: QuantMode) -> npt.NDArray[np.int32]:
    """Give the power of two that one step of a nibble is worth where it meets its scale, for each channel."""
    units = np.where(np.arange(channels) // 8 % 2 == 0, -21, -17) + (15 if mode.has_zeros else 0)
    return units.astype(np.int32)


def scale_exponents(scales: Half, mode: QuantMode) -> npt.NDArray[np.int32]:
    """Give the powers of two by which layout `fragment_blocks_v2` divides the scales of each channel.

    Args:
        scales: fp16 [groups, n].
        mode: a grouped mode.

    Returns:
        int32 [n]: 0 for channels whose scales all lie below 2^-5, or with zeros 2^10; else what brings them there.
    """
    largest = np.abs(scales.astype(np.float32)).max(axis=0)
    excess = np.frexp(largest)[1] - (10 if mode.has_zeros else -5)
    return np.where(largest > 0, np.maximum(excess, 0), 0).astype(np.int32)


def _pack_fragments(weight: QuantizedWeight) -> npt.NDArray[np.uint8]:
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
    units = _unit_exponents(n, weight.mode)
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
    wanted = np.ldexp(values.astype(np.float32), exponents)
    result: Half = wanted.astype(np.float16)
    rounded = (result != wanted).any(axis=0)
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


def _block_rows(values: Half, weight: QuantizedWeight, sizes: _FragmentBlocks) -> Half:
    """Spread scales [groups, n] to [channel blocks, k blocks, rows, 64], pairs of channels 8 apart side by side."""
    starts = np.arange(sizes.k_blocks * sizes.scale_rows) * (128 // sizes.scale_rows)
    group = np.minimum(starts // weight.group_size, len(values) - 1)
    padded = np.zeros((len(starts), sizes.channel_blocks * 64), np.float16)
    padded[:, : weight.n] = values[group]
    shaped = padded.reshape(sizes.k_blocks, sizes.scale_rows, sizes.channel_blocks, 4, 2, 8)
    rows: Half = np.ascontiguousarray(shaped.transpose(2, 0, 1, 3, 5, 4))
    return rows.reshape(sizes.channel_blocks, sizes.k_blocks, sizes.scale_rows, 64)


def _unpack_fragments(packed: PackedWeight) -> QuantizedWeight:
    n, k, group = packed.n, packed.k, packed.group_size
    sizes = _FragmentBlocks.of(n, k, group, packed.mode)
    nb, kb = sizes.channel_blocks, sizes.k_blocks
    data = np.ascontiguousarray(packed.data)
    blocks = data[: sizes.factors].reshape(nb, kb, sizes.block_bytes)
    words = np.ascontiguousarray(blocks[..., sizes.block_bytes - 4096 :]).view(np.uint32)
    pairs = ((words >> np.uint32(3)) | (words << np.uint32(29))).view(np.uint8).reshape(nb, kb, 2, 4, 8, 4, 4, 2, 2)
    # nb, kb, half, warp, row, pair, step, odd, +8 of k -> nb, warp, row, kb, half, step, +8 of k, pair, odd
    pairs = np.ascontiguousarray(pairs.transpose(0, 3, 4, 1, 2, 6, 8, 5, 7)).reshape(nb, 4, 1, 8, kb * 128)
    q = np.concatenate([pairs & 15, pairs >> 4], axis=2).reshape(nb * 64, kb * 128)[:n, :k]

    def read(first_row: int, exponents: npt.NDArray[np.int32]) -> Half:
        header = np.ascontiguousarray(blocks[..., first_row * 128 : (first_row + sizes.scale_rows) * 128])
        rows = header.view(np.float16).reshape(nb, kb * sizes.scale_rows, 4, 8, 2).transpose(1, 0, 2, 4, 3)
        wanted = np.arange(k // group) * group * sizes.scale_rows // 128
        return _shifted("scales", rows.reshape(kb * sizes.scale_rows, nb * 64)[wanted, :n], exponents)

    factors, units = data[sizes.factors :].view(np.float32)[:n], _unit_exponents(n, packed.mode)
    if not packed.mode.is_grouped:
        scales = np.ldexp(factors, units).astype(np.float16)
        return QuantizedWeight(np.ascontiguousarray(q), scales, None, group, packed.mode)
    exponents = np.frexp(factors)[1].astype(np.int32) - 1
    zeros = read(sizes.scale_rows, exponents) if packed.mode.has_zeros else None
    return QuantizedWeight(np.ascontiguousarray(q), read(0, exponents + units), zeros, group, packed.mode)


def _fragment_bytes(packed: PackedWeight) -> int:
    return _FragmentBlocks.of(packed.n, packed.k, packed.group_size, packed.mode).end


LAYOUTS: dict[str, Layout] = {
    "kmajor_s4_v1": Layout(_pack_kmajor, _unpack_kmajor, _kmajor_bytes, 1),
    "fragment_blocks_v2": Layout(_pack_fragments, _unpack_fragments, _fragment_bytes, NATIVE_GROUP_MULTIPLE),
}
"""Every layout by its tag; the tag ends in a version that changes with the bytes."""
TARGET_LAYOUTS: dict[Target, str] = {Target.CUTLASS: "kmajor_s4_v1", Target.NATIVE: "fragment_blocks_v2"}
"""The layout that each target's kernels read."""


def pack(
    q: npt.ArrayLike,
    scales: npt.ArrayLike,
    zeros: npt.ArrayLike | None = None,
    *,
    group_size: int | None = None,
    target: Target = Target.NATIVE,
) -> PackedWeight:
    """Pack a canonical weight for the kernels of a target.

    Args:
        q: integers of 0 to 15, [n, k], output channels first.
        scales: fp16 [n] for per-column mode, or [k / group_size, n].
        zeros: fp16 [k / group_size, n], (8 - zero point) * scale, or None.
        group_size: values of K per scale; None takes k / rows of the scales.
        target: the kernel family that will read it.

    Returns:
        The packed weight in host memory; `w4a16gen.to_device` moves it.

    Raises:
        InvalidValueError: if a dtype, a shape or a value is off.
    """
    return pack_weight(canonical(q, scales, zeros, group_size=group_size), target=target)


def pack_weight(weight: QuantizedWeight, *, target: Target = Target.NATIVE) -> PackedWeight:
    """Pack what `quantize` or `canonical` gave; see `pack`."""
    layout = TARGET_LAYOUTS[target]
    multiple = LAYOUTS[layout].group_multiple
    if weight.group_size not in (weight.k, weight.group_size // multiple * multiple):
        raise InvalidValueError(
            f"group size {weight.group_size} must be {weight.k} (= k) or a multiple of {multiple} for target {target}"
        )
    data = LAYOUTS[layout].pack(weight)
    return PackedWeight(data, layout, weight.n, weight.k, weight.group_size, weight.mode)
