"""Integer zero points, as GPTQ and AWQ store them, and the multiplied zeros that kernels read."""

from __future__ import annotations

from typing import Any

import numpy as np

from w4a16gen.errors import InvalidValueError
from w4a16gen.weights.host import host_array
from w4a16gen.weights.quantized import MAX_Q, OFFSET, Half, why_not_half, wrong_shape

FORMULA = "zeros = (8 - zero point) * scale"


def zeros_of(zero_points: Any, scales: Any) -> Half:
    """Return (8 - zero point) * scale, rounded once to fp16.

    Args:
        zero_points: integers of 0 to 15, [k / group_size, n].
        scales: fp16, of the same shape.

    Raises:
        InvalidValueError: if a dtype, a shape or a value is off.
    """
    points = host_array("zero_points", zero_points, must_be="integers of 0 to 15")
    factors = host_array("scales", scales, must_be="float16")
    if factors.ndim == 1:
        raise InvalidValueError(
            "zero_points need scales of shape [k / group size, n]: for one group, reshape both to [1, n]"
        )
    if factors.dtype != np.float16:
        raise InvalidValueError(why_not_half("scales", str(factors.dtype)))
    if points.dtype.kind not in "iu":
        raise InvalidValueError(
            f"zero_points of dtype {points.dtype} must be integers of 0 to {MAX_Q}; for others pass {FORMULA}"
        )
    if points.shape != factors.shape:
        hint = _hint(points.shape, factors.shape)
        raise InvalidValueError(wrong_shape("zero_points", points.shape, factors.shape) + hint)
    if points.size and not 0 <= int(points.min()) <= int(points.max()) <= MAX_Q:
        raise InvalidValueError(
            f"zero_points hold {int(points.min())} to {int(points.max())}; they must hold 0 to {MAX_Q}"
        )
    with np.errstate(over="ignore", invalid="ignore"):
        zeros: Half = ((OFFSET - points.astype(np.float64)) * factors).astype(np.float16)
    if np.isfinite(factors).all() and not np.isfinite(zeros).all():
        raise InvalidValueError("(8 - zero point) * scale exceeds fp16's 65504: scale the layer down and pass alpha")
    return zeros


def _hint(shape: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    packed = len(shape) == len(wanted) and shape[:-1] == wanted[:-1] and 8 * shape[-1] == wanted[-1]
    return ": they look like packed qzeros; unpack eight values from each word" if packed else ""
