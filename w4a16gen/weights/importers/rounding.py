"""Round exact scales and zeros to fp16, and say what that cost."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from w4a16gen.errors import InvalidValueError
from w4a16gen.weights.importers.stored import Double, Factors
from w4a16gen.weights.quantized import Half

LARGEST_HALF = 65504.0
LEAST_NORMAL_HALF = 2.0**-14
_MAX_EXPONENT = 120
"""Largest power of two in alpha; alpha is FP32."""


@dataclass(frozen=True)
class Exactness:
    """What a layer of a checkpoint loses when its scales and zeros become fp16. The 4-bit values lose nothing.

    Attributes:
        scales_exact: whether all scales are exact.
        max_scale_error: the largest relative error of a scale.
        zeros_exact: whether all zeros are exact; true where there are none.
        max_zero_error_steps: the largest error of a zero, in steps of its group; a step is the scale.
        out_of_range: scales and zeros that fp16 cannot hold without `alpha`: too large, or so small that bits are lost.
        alpha: the power of two that gemm multiplies by, because the scales and zeros were divided by it; mostly 1.
        notes: what else a reader should know, one sentence each.

    Example:
        >>> Exactness().is_exact
        True
    """

    scales_exact: bool = True
    max_scale_error: float = 0.0
    zeros_exact: bool = True
    max_zero_error_steps: float = 0.0
    out_of_range: int = 0
    alpha: float = 1.0
    notes: tuple[str, ...] = field(default=())

    @property
    def is_exact(self) -> bool:
        """Whether every weight is exactly that of the checkpoint."""
        return self.scales_exact and self.zeros_exact


@dataclass(frozen=True, eq=False)
class Rounded:
    """Scales and zeros in fp16, [k / group_size, n], and what rounding cost."""

    scales: Half
    zeros: Half | None
    exactness: Exactness


def round_factors(factors: Factors, *, name: str) -> Rounded:
    """Round scales and zeros to fp16, after a division by a power of two where they do not fit.

    Args:
        factors: the exact values.
        name: what messages call the layer.

    Raises:
        InvalidValueError: if a value is not finite, or no power of two makes the values fit.
    """
    arrays = [array for array in (factors.scales, factors.zeros) if array is not None]
    if not all(np.isfinite(array).all() for array in arrays):
        raise InvalidValueError(f"layer {name}: scales and zeros must be finite")
    lost = sum(int(_is_out_of_range(array).sum()) for array in arrays)
    exponent = _exponent(factors) if lost else 0
    if abs(exponent) > _MAX_EXPONENT:
        raise InvalidValueError(f"layer {name}: its scales would need an alpha of 2^{exponent}, beyond FP32")
    scales, scale_error = _rounded(factors.scales, exponent)
    zeros = None if factors.zeros is None else _rounded(factors.zeros, exponent)
    steps = 0.0 if zeros is None else _largest_ratio(zeros[1], np.abs(factors.scales))
    exactness = Exactness(
        scales_exact=not scale_error.any(),
        max_scale_error=_largest_ratio(scale_error, np.abs(factors.scales)),
        zeros_exact=zeros is None or not zeros[1].any(),
        max_zero_error_steps=steps,
        out_of_range=lost,
        alpha=2.0**exponent,
        notes=factors.notes,
    )
    return Rounded(scales, None if zeros is None else zeros[0], exactness)


def _is_out_of_range(values: Double) -> npt.NDArray[np.bool_]:
    """Return which values are too large for fp16, or are subnormal there and lose bits."""
    size = np.abs(values)
    with np.errstate(over="ignore"):
        loses_bits = values.astype(np.float16).astype(np.float64) != values
    lost: npt.NDArray[np.bool_] = (size > LARGEST_HALF) | ((size < LEAST_NORMAL_HALF) & loses_bits)
    return lost


def _exponent(factors: Factors) -> int:
    """Return x so that scales and zeros divided by 2^x fit fp16 best; large values have precedence over small ones."""
    sizes = np.abs(factors.scales)
    largest = max(float(sizes.max()), 0.0 if factors.zeros is None else float(np.abs(factors.zeros).max()))
    # 65504 is the largest number of 11 bits below 2^16, so a value below 2^16 may still round up to infinity.
    lowest = int(np.ceil(np.log2(largest / LARGEST_HALF))) if largest > 0 else -_MAX_EXPONENT
    while largest / 2.0**lowest > LARGEST_HALF:
        lowest += 1
    if lowest > 0:
        return lowest
    smallest = float(sizes[sizes > 0].min(initial=np.inf))
    if smallest >= LEAST_NORMAL_HALF:
        return 0  # only zeros lose bits: those of magnitude below 2^-14 are tiny beside their scales
    return max(lowest, int(np.floor(np.log2(smallest / LEAST_NORMAL_HALF))))


def _rounded(values: Double, exponent: int) -> tuple[Half, Double]:
    """Return values / 2^exponent in fp16, and the errors in terms of the values themselves."""
    half = np.ldexp(values, -exponent).astype(np.float16)
    return half, np.abs(np.ldexp(half.astype(np.float64), exponent) - values)


def _largest_ratio(errors: Double, scales: Double) -> float:
    """Return the largest error in terms of the scale; infinite where the scale is 0 and the error is not."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(errors == 0, 0.0, errors / scales)
    return float(ratios.max())
