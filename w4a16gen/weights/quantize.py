"""Rounding a weight to 4 bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.integers import integer
from w4a16gen.weights.host import host_array
from w4a16gen.weights.quantized import MAX_Q, OFFSET, Double, Nibbles, QuantizedWeight, canonical, check_group_size

_HALF_MAX = float(np.finfo(np.float16).max)


def quantize(weight: Any, *, group_size: int | None = None, zero_points: bool = False) -> QuantizedWeight:
    """Round a weight to the nearest 4-bit values.

    Symmetric: scale = max |w| / 7 over the group, q = round(w / scale) + 8, so 1 to 15. With zero points: scale =
    (max - min) / 15 with the range widened to hold 0, zero point = round(-min / scale), q = round(w / scale) + zero
    point, so 0 to 15. Both divide by the scale as fp16 holds it; a group of zeros gets scale 1.

    Args:
        weight: floating point [n, k], output channels first, as torch.nn.Linear stores it: a numpy array, or a torch
            tensor or parameter in host memory, bfloat16 included.
        group_size: values of K per scale; None for one scale per output channel.
        zero_points: whether each group gets a zero point; needs a group size.

    Returns:
        The weight in canonical form, in host memory; `pack_weight` packs it.

    Raises:
        InvalidValueError: if the weight is not finite floating point [n, k], the group size does not divide k, or a
            group is too large for an fp16 scale.

    Example:
        >>> import numpy as np
        >>> import w4a16gen
        >>> weight = np.random.default_rng(0).standard_normal((64, 256))
        >>> quantized = w4a16gen.quantize(weight, group_size=128)
        >>> bool(abs(quantized.dequantize() - weight).max() < 0.3)
        True
    """
    weight = host_array("weight", weight)
    if weight.ndim != 2 or weight.size == 0 or weight.dtype.kind != "f":  # noqa: PLR2004
        raise InvalidValueError(
            f"weight of dtype {weight.dtype} and shape {list(weight.shape)} must be floating point [n, k]"
        )
    with np.errstate(over="ignore"):  # a long double may exceed float64
        weight = weight.astype(np.float64)
    if not np.isfinite(weight).all():
        raise InvalidValueError("weight must be finite")
    if not isinstance(zero_points, (bool, np.bool_)):
        raise InvalidValueError(f"zero_points of type {type(zero_points).__name__} must be True or False")
    if zero_points and group_size is None:
        raise InvalidValueError("zero points need a group size; group_size=k gives one group per channel")
    k = weight.shape[1]
    size = k if group_size is None else integer("group_size", group_size)
    check_group_size(k, size)
    rounded = round_to_nearest(weight, size, zero_points=bool(zero_points))
    scales = np.ascontiguousarray(rounded.scales.T).astype(np.float16)
    zeros = (OFFSET - rounded.zero_points.astype(np.float64)) * rounded.scales
    return canonical(
        rounded.q,
        scales if group_size is not None else scales[0],
        np.ascontiguousarray(zeros.T).astype(np.float16) if zero_points else None,
        group_size=size,
    )


@dataclass(frozen=True, eq=False)
class RoundedWeight:
    """A weight (q - zero_point) * scale.

    Attributes:
        q: uint8 [n, k], 0 to 15.
        scales: float64 [n, k / group_size], exact in the dtype that was asked for.
        zero_points: uint8 [n, k / group_size], 0 to 15; 8 if they were not asked for.
    """

    q: Nibbles
    scales: Double
    zero_points: Nibbles


def round_to_nearest(
    weight: Double, group_size: int, *, zero_points: bool, round_scale: Callable[[Double], Double] | None = None
) -> RoundedWeight:
    """Round a weight; see `quantize` for the rule.

    Args:
        weight: float64 [n, k], finite.
        group_size: values of K per scale; divides k.
        zero_points: whether each group gets a zero point.
        round_scale: rounds scales to the dtype that stores them; None rounds to fp16.

    Raises:
        InvalidValueError: if a group is too large for an fp16 scale.
    """
    n, k = weight.shape
    grouped = weight.reshape(n, k // group_size, group_size)
    round_scale = round_scale or _half
    if zero_points:
        low = np.minimum(grouped.min(axis=2), 0)
        scale = _usable_scale((np.maximum(grouped.max(axis=2), 0) - low) / MAX_Q, round_scale)
        point = np.clip(np.rint(-low / scale), 0, MAX_Q)
    else:
        scale = _usable_scale(np.abs(grouped).max(axis=2) / (MAX_Q // 2), round_scale)
        point = np.full_like(scale, OFFSET)
    q = np.clip(np.rint(grouped / scale[..., None]) + point[..., None], 0, MAX_Q)
    return RoundedWeight(q.reshape(n, k).astype(np.uint8), scale, point.astype(np.uint8))


def bfloat16_scale(scale: Double) -> Double:
    """Round scales to bfloat16, to the nearest, ties to even."""
    bits = scale.astype(np.float32).view(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
    return nearest.astype(np.uint32).view(np.float32).astype(np.float64)


def _half(scale: Double) -> Double:
    return scale.astype(np.float16).astype(np.float64)


def _usable_scale(scale: Double, round_scale: Callable[[Double], Double]) -> Double:
    """Round scales, never to 0; a group of zeros gets 1."""
    if scale.max(initial=0.0) * OFFSET > _HALF_MAX:
        raise InvalidValueError(
            f"a group needs scale {scale.max():.4g}, and 8 times that exceeds fp16's {_HALF_MAX:.0f}"
        )
    smallest = float(np.finfo(np.float16).smallest_subnormal)
    return np.where(scale == 0, 1.0, round_scale(np.maximum(scale, smallest)))
