"""Packed weights: one block of bytes in the layout that a kernel reads, with the facts that identify it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from w4a16gen.config import QuantMode, Target
from w4a16gen.errors import InvalidValueError
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


LAYOUTS: dict[str, Layout] = {"kmajor_s4_v1": Layout(_pack_kmajor, _unpack_kmajor, _kmajor_bytes)}
"""Every layout by its tag; the tag ends in a version that changes with the bytes."""
TARGET_LAYOUTS: dict[Target, str] = {Target.CUTLASS: "kmajor_s4_v1"}
"""The layout that each target's kernels read."""


def pack(
    q: npt.ArrayLike,
    scales: npt.ArrayLike,
    zeros: npt.ArrayLike | None = None,
    *,
    group_size: int | None = None,
    target: Target = Target.CUTLASS,
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


def pack_weight(weight: QuantizedWeight, *, target: Target = Target.CUTLASS) -> PackedWeight:
    """Pack what `quantize` or `canonical` gave; see `pack`."""
    layout = TARGET_LAYOUTS[target]
    data = LAYOUTS[layout].pack(weight)
    return PackedWeight(data, layout, weight.n, weight.k, weight.group_size, weight.mode)
