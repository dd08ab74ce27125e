"""Packed weights: one block of bytes in the layout that a kernel reads, with the facts that identify it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.config import QuantMode, Target
from w4a16gen.kernels.problem import NATIVE_GROUP_MULTIPLE
from w4a16gen.weights.layouts import fragments, kmajor
from w4a16gen.weights.layouts.geometry import WeightGeometry
from w4a16gen.weights.quantized import QuantizedWeight, canonical


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
    def geometry(self) -> WeightGeometry:
        """The sizes and the mode."""
        return WeightGeometry(self.n, self.k, self.group_size, self.mode)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight."""
        return LAYOUTS[self.layout].packed_bytes(self.geometry)

    def unpack(self) -> QuantizedWeight:
        """Give the canonical form back, exactly. Needs the data in host memory.

        Raises:
            InvalidValueError: if the data is on a GPU or has not the layout's size.
        """
        if not isinstance(self.data, np.ndarray):
            raise InvalidValueError("the packed weight is on a GPU: unpack the host copy")
        if self.data.nbytes != self.nbytes:
            raise InvalidValueError(f"packed data of {self.data.nbytes} bytes must be {self.nbytes} bytes")
        return LAYOUTS[self.layout].unpack(self.data, self.geometry)


class Layout(NamedTuple):
    """How one layout is written, read and measured."""

    pack: Callable[[QuantizedWeight], npt.NDArray[np.uint8]]
    unpack: Callable[[npt.NDArray[np.uint8], WeightGeometry], QuantizedWeight]
    packed_bytes: Callable[[WeightGeometry], int]
    group_multiple: int
    """Group sizes are multiples of this, or k."""


LAYOUTS: dict[str, Layout] = {
    "kmajor_s4_v1": Layout(kmajor.pack, kmajor.unpack, kmajor.packed_bytes, 1),
    "fragment_blocks_v2": Layout(fragments.pack, fragments.unpack, fragments.packed_bytes, NATIVE_GROUP_MULTIPLE),
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
