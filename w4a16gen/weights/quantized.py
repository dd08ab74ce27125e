"""The numpy reference of 4-bit weights: quantise, pack, unpack, dequantise.

Canonical forms, which everything else is checked against:

- `q`: uint8 [n, k], one value of 0 to 15 per weight, output channels first;
- `scales`: fp16 [k / group_size, n] in the grouped modes, fp16 [n] in per-column mode;
- `zeros`: fp16 [k / group_size, n], already multiplied: (8 - zero point) * scale.

The weight is (q - 8) * scale, plus the zero in the mode that has one. `k` may end in a shorter last group nowhere: the
group size divides k.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.config import QuantMode

Half = npt.NDArray[np.float16]
Nibbles = npt.NDArray[np.uint8]
Double = npt.NDArray[np.float64]

MAX_Q = 15
OFFSET = 8
"""The implicit zero point of symmetric weights."""


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight in canonical form; see the module's docstring for shapes and dtypes."""

    q: Nibbles
    scales: Half
    zeros: Half | None
    group_size: int
    mode: QuantMode

    @property
    def n(self) -> int:
        """Output channels."""
        return int(self.q.shape[0])

    @property
    def k(self) -> int:
        """Reduction length."""
        return int(self.q.shape[1])

    def dequantize(self) -> Double:
        """Give the exact weight in float64 [n, k]: no rounding to fp16."""
        return dequantize(self.q, self.scales, self.zeros, group_size=self.group_size)

    def channels(self, index: npt.NDArray[np.intp]) -> QuantizedWeight:
        """Give the weight of some output channels."""
        zeros = None if self.zeros is None else self.zeros[..., index]
        return replace(self, q=self.q[index], scales=self.scales[..., index], zeros=zeros)


def check_group_size(k: int, group_size: int) -> None:
    """Raise unless the group size divides k.

    Raises:
        InvalidValueError: naming both.
    """
    if group_size <= 0 or k % group_size != 0:
        raise InvalidValueError(f"group size {group_size} must divide k = {k}")


def mode_and_group_size(
    k: int, scales: tuple[int, ...], group_size: int | None, *, zeros: bool
) -> tuple[QuantMode, int]:
    """Name the mode and the group size that the shape of the scales means.

    Args:
        k: values of K.
        scales: shape of the scales: [n] for per-column mode, or [k / group_size, n].
        group_size: values of K per scale; None takes k / rows of the scales.
        zeros: whether there are zeros.

    Raises:
        InvalidValueError: if they contradict each other.
    """
    if len(scales) == 1:
        if group_size not in (None, k):
            raise InvalidValueError(f"group size {group_size} must be {k} (= k) where the scales are [n]")
        if zeros:
            raise InvalidValueError("zeros need scales of shape [k / group size, n]; per-column scales [n] take none")
        return QuantMode.PER_COLUMN_SCALE_ONLY, k
    if len(scales) != 2 or (group_size is None and scales[0] == 0):  # noqa: PLR2004
        raise InvalidValueError(f"scales of shape {scales} must be [n] or [k / group size, n]")
    size = group_size if group_size is not None else k // scales[0]
    check_group_size(k, size)
    return (QuantMode.FINEGRAINED_SCALE_AND_ZEROS if zeros else QuantMode.FINEGRAINED_SCALE_ONLY), size


def canonical(
    q: npt.ArrayLike, scales: npt.ArrayLike, zeros: npt.ArrayLike | None, *, group_size: int | None
) -> QuantizedWeight:
    """Check the parts of a weight and name its mode.

    Args:
        q: integers of 0 to 15, [n, k].
        scales: fp16 [n] for per-column mode, or [k / group_size, n].
        zeros: fp16 of the scales' shape, or None.
        group_size: values of K per scale; None takes k / rows of the scales.

    Raises:
        InvalidValueError: if a dtype, a shape or a value is off.
    """
    q, scales = np.asarray(q), np.asarray(scales)
    if q.ndim != 2 or q.size == 0:  # noqa: PLR2004
        raise InvalidValueError(f"q of shape {q.shape} must be [n, k] with at least one value")
    if q.dtype.kind not in "iu":
        raise InvalidValueError(f"q of dtype {q.dtype} must be integers of 0 to {MAX_Q}")
    if int(q.min()) < 0 or int(q.max()) > MAX_Q:
        raise InvalidValueError(f"q holds {int(q.min())} to {int(q.max())}; it must hold 0 to {MAX_Q}")
    n, k = q.shape
    mode, size = mode_and_group_size(k, scales.shape, group_size, zeros=zeros is not None)
    shape = (k // size, n) if mode.is_grouped else (n,)
    for name, array in (("scales", scales), ("zeros", None if zeros is None else np.asarray(zeros))):
        _check_half(name, array, shape)
    return QuantizedWeight(
        q=np.ascontiguousarray(q, dtype=np.uint8),
        scales=np.ascontiguousarray(scales),
        zeros=None if zeros is None else np.ascontiguousarray(np.asarray(zeros)),
        group_size=size,
        mode=mode,
    )


def _check_half(name: str, array: npt.NDArray[Any] | None, shape: tuple[int, ...]) -> None:
    if array is None:
        return
    if array.dtype != np.float16:
        raise InvalidValueError(f"{name} of dtype {array.dtype} must be float16")
    if array.shape != shape:
        raise InvalidValueError(f"{name} of shape {list(array.shape)} must be {list(shape)}")
    if not np.isfinite(array).all():
        raise InvalidValueError(f"{name} must be finite")


def pack_nibbles(q: Nibbles) -> Nibbles:
    """Put two 4-bit values into a byte, the even k in the lower half: uint8 [n, k] to uint8 [n, k / 2].

    Raises:
        InvalidValueError: if k is odd.
    """
    if q.shape[-1] % 2 != 0:
        raise InvalidValueError(f"k of {q.shape[-1]} must be even to pack two values per byte")
    return (q[..., 0::2] | (q[..., 1::2] << 4)).astype(np.uint8)


def unpack_nibbles(packed: Nibbles) -> Nibbles:
    """Exact inverse of `pack_nibbles`: uint8 [n, k / 2] to uint8 [n, k]."""
    q = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), np.uint8)
    q[..., 0::2] = packed & MAX_Q
    q[..., 1::2] = packed >> 4
    return q


def dequantize(q: Nibbles, scales: Half, zeros: Half | None, *, group_size: int) -> Double:
    """Give (q - 8) * scale [+ zero] in float64 [n, k], exact: the product has 15 significant bits."""
    n, k = q.shape
    per_group = np.broadcast_to(np.atleast_2d(scales), (k // group_size, n)).astype(np.float64)
    values = (q.astype(np.float64) - OFFSET).reshape(n, k // group_size, group_size) * per_group.T[..., None]
    if zeros is not None:
        values = values + zeros.astype(np.float64).T[..., None]
    return values.reshape(n, k)
