"""Weights of 4 bits in canonical form, which every layout and every proof is checked against.

- `q`: uint8 [n, k], one value of 0 to 15 per weight, output channels first;
- `scales`: fp16 [k / group_size, n] in the grouped modes, fp16 [n] in per-column mode;
- `zeros`: fp16 [k / group_size, n], already multiplied: (8 - zero point) * scale.

The weight is (q - 8) * scale, plus the zero in the mode that has one. The group size divides k.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.config import QuantMode
from w4a16gen.kernels.integers import integer
from w4a16gen.weights.host import host_array

Half = npt.NDArray[np.float16]
Nibbles = npt.NDArray[np.uint8]
Double = npt.NDArray[np.float64]

MAX_Q = 15
OFFSET = 8
"""The implicit zero point of symmetric weights."""
_BYTE_MAX = 255
_MIN_ZERO_POINT, _MAX_ZERO_POINT = -8, 16
"""Zero points that occur in checkpoints: 0 to 15, GPTQ's 16, and signed ones."""


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight of 4 bits: (q - 8) * scale, plus the zero in the mode that has one.

    `quantize` returns one, `pack_weight` packs it. Two weights compare equal only if they are the same object.

    Attributes:
        q: uint8 [n, k], one value of 0 to 15 per weight, output channels first.
        scales: fp16 [k / group_size, n] in the grouped modes, fp16 [n] in per-column mode.
        zeros: fp16 [k / group_size, n], (8 - zero point) * scale; None in modes without zeros.
        group_size: values of K that share a scale; k itself in per-column mode.
        mode: the quantisation mode.

    Raises:
        InvalidValueError: if a dtype, a shape or a value is off.

    Example:
        >>> import numpy as np
        >>> import w4a16gen
        >>> weight = w4a16gen.quantize(np.eye(8, 64), group_size=32)
        >>> weight.q.shape, weight.scales.shape, str(weight.mode)
        ((8, 64), (2, 8), 'fgs')
    """

    q: Nibbles
    scales: Half
    zeros: Half | None
    group_size: int
    mode: QuantMode

    def __post_init__(self) -> None:
        """Check every part, and keep arrays row-major, as layouts read them; see the class."""
        object.__setattr__(self, "group_size", integer("group_size", self.group_size))
        for name in ("q", "scales", "zeros"):
            array = getattr(self, name)
            if isinstance(array, np.ndarray) and not isinstance(array, np.ma.MaskedArray):
                object.__setattr__(self, name, np.asarray(array))  # a subclass may compute anything
        self.check()
        for name in ("q", "scales", "zeros"):
            if (array := getattr(self, name)) is not None:
                object.__setattr__(self, name, np.ascontiguousarray(array))

    def check(self) -> None:
        """Check every part again: numpy arrays can be changed in place.

        Raises:
            InvalidValueError: if a dtype, a shape or a value is off.
        """
        _check_values(self.q)
        if not isinstance(self.mode, QuantMode):
            raise InvalidValueError(f"mode of type {type(self.mode).__name__} must be a QuantMode")
        check_group_size(self.k, self.group_size)
        if not self.mode.is_grouped and self.group_size != self.k:
            raise InvalidValueError(f"group size {self.group_size} must be {self.k} (= k) in per-column mode")
        if (self.zeros is not None) is not self.mode.has_zeros:
            raise InvalidValueError(
                f"zeros must be {'an array' if self.mode.has_zeros else 'None'} in mode {self.mode}"
            )
        check_factors(self.scales, self.zeros, n=self.n, groups=self.k // self.group_size, mode=self.mode)

    @property
    def n(self) -> int:
        """Output channels."""
        return int(self.q.shape[0])

    @property
    def k(self) -> int:
        """Reduction length."""
        return int(self.q.shape[1])

    def dequantize(self) -> Double:
        """Return the exact weight in float64 [n, k], without rounding to fp16."""
        return dequantize(self.q, self.scales, self.zeros, group_size=self.group_size)

    def channels(self, index: npt.NDArray[np.intp] | slice) -> QuantizedWeight:
        """Return the weight of some output channels.

        Args:
            index: their numbers, from 0, in any order; or a slice.

        Raises:
            InvalidValueError: if there is no channel, or one outside the weight.
        """
        if not isinstance(index, slice):
            _check_channels(index, self.n)
        zeros = None if self.zeros is None else self.zeros[..., index]
        return replace(self, q=self.q[index], scales=self.scales[..., index], zeros=zeros)


def _check_channels(index: Any, n: int) -> None:
    """Raise unless an index names channels of a weight one by one."""
    if not isinstance(index, np.ndarray) or index.ndim != 1 or index.dtype.kind not in "iu" or index.size == 0:
        what = f"type {type(index).__name__}"
        if isinstance(index, np.ndarray):
            what = f"dtype {index.dtype}, shape {list(index.shape)}"
        raise InvalidValueError(f"index of {what} must be a slice, or a numpy array of integers with one axis")
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= n:
        raise InvalidValueError(f"index holds {low} to {high}; it must hold 0 to {n - 1}, the weight's output channels")


def _check_values(q: Any) -> None:
    """Raise unless q is uint8 [n, k] of values 0 to 15."""
    if not isinstance(q, np.ndarray) or isinstance(q, np.ma.MaskedArray):
        raise InvalidValueError(f"q of type {type(q).__name__} must be a numpy array: w4a16gen.pack takes others")
    if q.ndim != 2 or q.size == 0:  # noqa: PLR2004
        raise InvalidValueError(f"q of shape {list(q.shape)} must be [n, k] with at least one value")
    if q.dtype != np.uint8:
        raise InvalidValueError(f"q of dtype {q.dtype} must be uint8")
    if q.max() > MAX_Q:
        raise InvalidValueError(why_not_values(q))


def why_not_values(q: npt.NDArray[Any]) -> str:
    """Return the sentence about integers that are not all 0 to 15, with what they look like."""
    low, high = int(q.min()), int(q.max())
    text = f"q holds {low} to {high}; it must hold 0 to {MAX_Q}"
    if low >= -OFFSET and high < OFFSET:
        return f"{text}: signed values need + {OFFSET}"
    if max(-low, high) > _BYTE_MAX:
        return f"{text}: {q.dtype} words look like GPTQ's or AWQ's packed qweight; unpack eight values from each"
    return f"{text}: if each byte packs two values, unpack them"


def check_factors(scales: Any, zeros: Any, *, n: int, groups: int, mode: QuantMode) -> None:
    """Raise unless scales and zeros are finite fp16 of the mode's shape, and zeros are multiplied by the scales.

    Raises:
        InvalidValueError: naming the array and what is off.
    """
    shape = (groups, n) if mode.is_grouped else (n,)
    for name, array in (("scales", scales), ("zeros", zeros)):
        if name == "zeros" and array is None:
            continue
        if not isinstance(array, np.ndarray) or isinstance(array, np.ma.MaskedArray):
            raise InvalidValueError(f"{name} of type {type(array).__name__} must be a numpy array")
        if array.dtype != np.float16:
            raise InvalidValueError(why_not_half(name, str(array.dtype)))
        if array.shape != shape:
            raise InvalidValueError(wrong_shape(name, array.shape, shape))
        if not np.isfinite(array).all():
            raise InvalidValueError(f"{name} must be finite")
    if zeros is not None and _are_raw_zero_points(zeros, scales):
        raise InvalidValueError(
            "zeros hold only small integers, beyond 8 * scale: they look like zero points. "
            "Pass them as zero_points=, or pass zeros = (8 - zero point) * scale"
        )


def why_not_half(name: str, dtype: str) -> str:
    """Return the sentence about an array of another dtype than float16."""
    return f"{name} of dtype {dtype} must be float16: convert it first"


def wrong_shape(name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """Return the sentence about an array of the wrong shape."""
    hint = ": they look transposed" if shape == wanted[::-1] and shape != wanted else ""
    return f"{name} of shape {list(shape)} must be {list(wanted)}{hint}"


def _are_raw_zero_points(zeros: Half, scales: Half) -> bool:
    """Return whether zeros are integers that no zero point of 0 to 15 gives with these scales.

    (8 - zero point) * scale is at most 8 * scale in magnitude. Raw zero points beside usual scales lie far beyond.
    """
    if not ((zeros >= _MIN_ZERO_POINT) & (zeros <= _MAX_ZERO_POINT) & (zeros == np.rint(zeros))).all():
        return False
    return bool((np.abs(zeros.astype(np.float32)) > 8.01 * np.abs(scales.astype(np.float32))).any())


def check_group_size(k: int, group_size: int) -> None:
    """Raise unless the group size divides k.

    Raises:
        InvalidValueError: naming both.
    """
    if group_size <= 0 or k % group_size != 0:
        raise InvalidValueError(
            f"group size {group_size} must divide k = {k}: pass k, or a multiple of 32 that divides k"
        )


def mode_and_group_size(
    n: int, k: int, scales: tuple[int, ...], group_size: int | None, *, zeros: bool
) -> tuple[QuantMode, int]:
    """Return the mode and the group size that the shape of the scales stands for.

    Args:
        n: output channels.
        k: values of K.
        scales: shape of the scales: [n] for per-column mode, or [k / group_size, n].
        group_size: values of K per scale; None takes k / rows of the scales.
        zeros: whether there are zeros.

    Raises:
        InvalidValueError: if they contradict each other.
    """
    size = None if group_size is None else integer("group_size", group_size)
    if len(scales) == 1:
        if size not in (None, k):
            raise InvalidValueError(f"group size {size} must be {k} (= k) where the scales are [n]")
        if zeros:
            raise InvalidValueError("zeros need scales of shape [k / group size, n]; per-column scales [n] take none")
        return QuantMode.PER_COLUMN_SCALE_ONLY, k
    if len(scales) != 2 or scales[0] == 0:  # noqa: PLR2004
        raise InvalidValueError(f"scales of shape {list(scales)} must be [n] or [k / group size, n]")
    if size is None:
        size = _group_size_of_rows(n, k, scales)
    check_group_size(k, size)
    return (QuantMode.FINEGRAINED_SCALE_AND_ZEROS if zeros else QuantMode.FINEGRAINED_SCALE_ONLY), size


def _group_size_of_rows(n: int, k: int, scales: tuple[int, ...]) -> int:
    rows, columns = scales
    if columns != n and n in scales:
        hint = "they look transposed" if columns > 1 else "for one scale per channel, pass scales[:, 0]"
        raise InvalidValueError(f"scales of shape {list(scales)} must be [k / group size, n] = [rows, {n}]: {hint}")
    if columns == k != n:
        raise InvalidValueError(f"q of shape {[n, k]} must be [n, k]: it looks transposed beside scales {list(scales)}")
    if k % rows != 0:
        raise InvalidValueError(f"{rows} rows of scales do not divide k = {k}: give group_size")
    return k // rows


def canonical(q: Any, scales: Any, zeros: Any, *, group_size: int | None) -> QuantizedWeight:
    """Check the parts of a weight and name its mode.

    Args:
        q: integers of 0 to 15, [n, k].
        scales: fp16 [n] for per-column mode, or [k / group_size, n].
        zeros: fp16 of the scales' shape, or None.
        group_size: values of K per scale; None takes k / rows of the scales.

    Raises:
        InvalidValueError: if a dtype, a shape or a value is off.
    """
    values = host_array("q", q, must_be=f"integers of 0 to {MAX_Q}")
    factors = host_array("scales", scales, must_be="float16")
    added = None if zeros is None else host_array("zeros", zeros, must_be="float16")
    if values.ndim != 2 or values.size == 0:  # noqa: PLR2004
        raise InvalidValueError(f"q of shape {list(values.shape)} must be [n, k] with at least one value")
    if values.dtype.kind not in "iu":
        raise InvalidValueError(f"q of dtype {values.dtype} must be integers of 0 to {MAX_Q}")
    if int(values.min()) < 0 or int(values.max()) > MAX_Q:
        raise InvalidValueError(why_not_values(values))
    n, k = values.shape
    mode, size = mode_and_group_size(n, k, factors.shape, group_size, zeros=added is not None)
    return QuantizedWeight(
        q=np.ascontiguousarray(values, dtype=np.uint8),
        scales=np.ascontiguousarray(factors),
        zeros=None if added is None else np.ascontiguousarray(added),
        group_size=size,
        mode=mode,
    )


def pack_nibbles(q: Nibbles) -> Nibbles:
    """Put two 4-bit values into a byte, the even k in the lower half: uint8 [n, k] to uint8 [n, k / 2].

    Raises:
        InvalidValueError: if k is odd.
    """
    if q.shape[-1] % 2 != 0:
        raise InvalidValueError(f"k of {q.shape[-1]} must be even to pack two values per byte")
    return (q[..., 0::2] | (q[..., 1::2] << 4)).astype(np.uint8)


def unpack_nibbles(packed: Nibbles) -> Nibbles:
    """Return uint8 [n, k] from uint8 [n, k / 2], the exact inverse of `pack_nibbles`."""
    q = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), np.uint8)
    q[..., 0::2] = packed & MAX_Q
    q[..., 1::2] = packed >> 4
    return q


def dequantize(q: Nibbles, scales: Half, zeros: Half | None, *, group_size: int) -> Double:
    """Return (q - 8) * scale [+ zero] in float64 [n, k], exact: the product has 15 significant bits."""
    n, k = q.shape
    per_group = np.broadcast_to(np.atleast_2d(scales), (k // group_size, n)).astype(np.float64)
    values = (q.astype(np.float64) - OFFSET).reshape(n, k // group_size, group_size) * per_group.T[..., None]
    if zeros is not None:
        values = values + zeros.astype(np.float64).T[..., None]
    return values.reshape(n, k)
