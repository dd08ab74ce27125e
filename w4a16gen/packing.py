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
    """Sizes of layout `fragment_blocks_v1`; cuda/native_layout.h says the same and why."""

    channel_blocks: int
    k_blocks: int
    scale_rows: int
    header_rows: int
    block_bytes: int
    end: int

    @classmethod
    def of(cls, n: int, k: int, group_size: int, mode: QuantMode) -> _FragmentBlocks:
        channel_blocks, k_blocks = -(-n // 64), -(-k // 128)
        rows = 1 if group_size == k or group_size % 128 == 0 else 2 if group_size % 64 == 0 else 4
        rows = rows if mode.is_grouped else 0
        header_rows = rows * (2 if mode.has_zeros else 1)
        block_bytes = 4096 + 128 * header_rows
        channel_scales = 0 if mode.is_grouped else channel_blocks * 128
        end = channel_blocks * k_blocks * block_bytes + channel_scales
        return cls(channel_blocks, k_blocks, rows, header_rows, block_bytes, end)


def _pack_fragments(weight: QuantizedWeight) -> npt.NDArray[np.uint8]:
    sizes = _FragmentBlocks.of(weight.n, weight.k, weight.group_size, weight.mode)
    nb, kb = sizes.channel_blocks, sizes.k_blocks
    data = np.zeros(sizes.end, np.uint8)
    blocks = data[: nb * kb * sizes.block_bytes].reshape(nb, kb, sizes.block_bytes)
    q = np.full((nb * 64, kb * 128), 8, np.uint8)
    q[: weight.n, : weight.k] = weight.q
    # Channels: nb, warp, channel + 8, row. k: kb, half, step, k + 8, pair, odd k.
    axes = q.reshape(nb, 4, 2, 8, kb, 2, 4, 2, 4, 2).transpose(0, 4, 5, 1, 3, 8, 6, 9, 7, 2)
    # Now words: nb, kb, half, warp, row, pair, step; and in a word nibbles: odd k, k + 8, channel + 8.
    nibbles = axes.reshape(nb, kb, 1024, 8)
    words = np.zeros((nb, kb, 1024), np.uint32)
    for position in range(8):
        words |= nibbles[..., position].astype(np.uint32) << np.uint32(4 * position)
    blocks[..., sizes.block_bytes - 4096 :] = words.view(np.uint8).reshape(nb, kb, 4096)
    if weight.mode.is_grouped:
        rows = [weight.scales] if weight.zeros is None else [weight.scales, weight.zeros]
        header = np.concatenate([_block_rows(row, weight, sizes) for row in rows], axis=2)
        blocks[..., : 128 * sizes.header_rows] = header.view(np.uint8).reshape(nb, kb, -1)
    else:
        padded = np.zeros(nb * 64, np.float16)
        padded[: weight.n] = weight.scales
        _write(data, nb * kb * sizes.block_bytes, padded)
    return data


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
    blocks = data[: nb * kb * sizes.block_bytes].reshape(nb, kb, sizes.block_bytes)
    words = np.ascontiguousarray(blocks[..., sizes.block_bytes - 4096 :]).view(np.uint32)
    nibbles = np.stack([(words >> np.uint32(4 * position)) & 15 for position in range(8)], axis=-1).astype(np.uint8)
    # nb, kb, half, warp, row, pair, step | odd, +8 of k, +8 of channel
    axes = nibbles.reshape(nb, kb, 2, 4, 8, 4, 4, 2, 2, 2).transpose(0, 3, 9, 4, 1, 2, 6, 8, 5, 7)
    q = axes.reshape(nb * 64, kb * 128)[:n, :k]

    def read(first_row: int) -> Half:
        header = np.ascontiguousarray(blocks[..., first_row * 128 : (first_row + sizes.scale_rows) * 128])
        rows = header.view(np.float16).reshape(nb, kb * sizes.scale_rows, 4, 8, 2).transpose(1, 0, 2, 4, 3)
        wanted = np.arange(k // group) * group * sizes.scale_rows // 128
        values: Half = np.ascontiguousarray(rows.reshape(kb * sizes.scale_rows, nb * 64)[wanted, :n])
        return values

    per_channel = data[nb * kb * sizes.block_bytes :].view(np.float16)[:n].copy()
    scales = read(0) if packed.mode.is_grouped else per_channel
    zeros = read(sizes.scale_rows) if packed.mode.has_zeros else None
    return QuantizedWeight(np.ascontiguousarray(q), scales, zeros, group, packed.mode)


def _fragment_bytes(packed: PackedWeight) -> int:
    return _FragmentBlocks.of(packed.n, packed.k, packed.group_size, packed.mode).end


LAYOUTS: dict[str, Layout] = {
    "kmajor_s4_v1": Layout(_pack_kmajor, _unpack_kmajor, _kmajor_bytes, 1),
    "fragment_blocks_v1": Layout(_pack_fragments, _unpack_fragments, _fragment_bytes, NATIVE_GROUP_MULTIPLE),
}
"""Every layout by its tag; the tag ends in a version that changes with the bytes."""
TARGET_LAYOUTS: dict[Target, str] = {Target.CUTLASS: "kmajor_s4_v1", Target.NATIVE: "fragment_blocks_v1"}
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
