"""Layout `kmajor_s4_v1`: rows of signed 4-bit values along K, then scales and zeros; what CUTLASS's kernels read."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from w4a16gen.kernels.config import QuantMode
from w4a16gen.weights.layouts.geometry import WeightGeometry, align
from w4a16gen.weights.quantized import Half, Nibbles, QuantizedWeight, pack_nibbles, unpack_nibbles


class _KMajorSections(NamedTuple):
    """Byte offsets of layout `kmajor_s4_v1`; cuda/cutlass/layout.h says the same and why."""

    row_values: int
    scales: int
    zeros: int
    end: int

    @classmethod
    def of(cls, n: int, k: int, group_size: int, mode: QuantMode) -> _KMajorSections:
        row_values = align(k, 32)
        scale_bytes = align(k // group_size * n * 2)
        scales = align(n * row_values // 2)
        zeros = scales + scale_bytes
        return cls(row_values, scales, zeros, zeros + (scale_bytes if mode.has_zeros else 0))


def pack(weight: QuantizedWeight) -> npt.NDArray[np.uint8]:
    """Return the packed bytes, uint8 [bytes]."""
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


def unpack(data: npt.NDArray[np.uint8], geometry: WeightGeometry) -> QuantizedWeight:
    """Return the canonical weight; the exact inverse of `pack`."""
    n, k = geometry.n, geometry.k
    sections = _KMajorSections.of(n, k, geometry.group_size, geometry.mode)
    rows = data[: n * sections.row_values // 2].reshape(n, sections.row_values // 2)
    groups = k // geometry.group_size

    def read(offset: int) -> Half:
        values: Half = data[offset : offset + groups * n * 2].view(np.float16)
        return values.reshape(groups, n).copy()

    scales = read(sections.scales)
    return QuantizedWeight(
        q=unpack_nibbles(rows)[:, :k] ^ np.uint8(8),
        scales=scales if geometry.mode.is_grouped else scales[0],
        zeros=read(sections.zeros) if geometry.mode.has_zeros else None,
        group_size=geometry.group_size,
        mode=geometry.mode,
    )


def packed_bytes(geometry: WeightGeometry) -> int:
    """Return the bytes that `pack` writes for a weight of these sizes."""
    return _KMajorSections.of(geometry.n, geometry.k, geometry.group_size, geometry.mode).end
