"""The exact product, and how far a kernel's fp16 result may lie from it; docs/concepts/numerics.md derives it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from w4a16gen.kernels.config import QuantMode
from w4a16gen.kernels.epilogue import Activation
from w4a16gen.weights.activations import activated, activation_error
from w4a16gen.weights.layouts.fragments import scale_exponents
from w4a16gen.weights.quantized import Double, Half, QuantizedWeight, canonical

HALF_ROUNDING = 2.0**-11
"""Unit roundoff of fp16: rounding to nearest changes a normal value by at most this fraction."""
HALF_UNDERFLOW = 2.0**-25
"""Half of fp16's smallest subnormal: the most that rounding adds where the result is subnormal."""
FLOAT_TRUNCATION = 2.0**-23
"""Largest relative error of one fp32 addition that truncates, as tensor cores may (they align the addends of a step to
the largest and cut; Fasi et al., Numerical behavior of NVIDIA tensor cores, PeerJ CS 2021)."""
EPILOGUE_ROUNDINGS = 4
"""fp32 roundings after the accumulation: alpha, alpha * scale, the multiply-add, and a stream-K partial sum."""
_WEIGHT_ROUNDINGS = {
    QuantMode.PER_COLUMN_SCALE_ONLY: 0,  # the main loop multiplies by the exact q - 8
    QuantMode.FINEGRAINED_SCALE_ONLY: 1,  # (q - 8) * scale
    QuantMode.FINEGRAINED_SCALE_AND_ZEROS: 1,  # one fused multiply-add
}


@dataclass(frozen=True, eq=False)
class Extra:
    """What an epilogue does beside alpha and the bias."""

    activation: Activation = Activation.NONE
    residual: Half | None = None
    """fp16 of the output's shape, or with more rows."""


PLAIN = Extra()
"""Nothing."""


class Expectation:
    """The exact product of one problem, in float64, and what rounding may add to it."""

    def __init__(self, a: npt.NDArray[Any], weight: QuantizedWeight, error: Double | None = None) -> None:
        """Compute the product and the sum of its terms' magnitudes once, for any alpha and bias.

        Args:
            a: activations, [m, k].
            weight: the weight, [n, k].
            error: how far the activations that a kernel reads may lie from `a`, [m, k]; None if it reads `a` itself.
        """
        activations = a.astype(np.float64)
        values = weight.dequantize().T
        largest = np.abs(activations) if error is None else np.abs(activations) + error
        self._product: Double = activations @ values
        self._magnitude: Double = largest @ np.abs(values)
        self._sum: Double = largest.sum(axis=1, keepdims=True)
        self._carried: Double = np.zeros_like(self._sum) if error is None else error @ np.abs(values)
        self._k = weight.k
        self._weight_roundings = _WEIGHT_ROUNDINGS[weight.mode]
        self._underflow = weight_underflow(weight)

    def of_tokens(self, m: int) -> Expectation:
        """Return what is expected of the first m tokens."""
        result = copy.copy(self)
        parts = ("_product", "_magnitude", "_sum", "_carried")
        vars(result).update({name: getattr(self, name)[:m] for name in parts})
        return result

    def result(self, alpha: float, bias: Half | None, extra: Extra = PLAIN) -> Double:
        """Return activation(alpha * A x W + bias) + residual, exact up to float64."""
        return _with_residual(activated(extra.activation, self._argument(alpha, bias)), extra.residual)

    def bound(self, alpha: float, bias: Half | None, extra: Extra = PLAIN) -> Double:
        """Return the largest error that rounding explains, of the shape of the result."""
        weights = self._weight_roundings * (HALF_ROUNDING * self._magnitude + self._underflow * self._sum)
        terms = self._magnitude + weights
        sums = (self._k + EPILOGUE_ROUNDINGS) * FLOAT_TRUNCATION * terms
        before_store: Double = abs(alpha) * (self._carried + weights + sums)
        argument = self._argument(alpha, bias)
        if bias is not None:
            before_store = before_store + FLOAT_TRUNCATION * np.abs(bias.astype(np.float64))
        before_store = activation_error(extra.activation, argument, before_store)
        result = np.abs(_with_residual(activated(extra.activation, argument), extra.residual))
        if extra.residual is not None:
            before_store = before_store + FLOAT_TRUNCATION * (result + before_store)
        return before_store + HALF_ROUNDING * (result + before_store) + HALF_UNDERFLOW

    def _argument(self, alpha: float, bias: Half | None) -> Double:
        product: Double = float(np.float32(alpha)) * self._product
        return product if bias is None else product + bias.astype(np.float64)


def weight_underflow(weight: QuantizedWeight) -> Double:
    """Return the most that rounding a weight adds where it is subnormal, [n].

    This is half of fp16's smallest subnormal. The native layout divides some channels by a power of two: for them it is
    twice that power as much, because -8 * scale is rounded as well as the weight.
    """
    if not weight.mode.is_grouped:
        return np.full(weight.n, HALF_UNDERFLOW)
    exponents = scale_exponents(weight.scales, weight.mode)
    return np.where(exponents > 0, 2 * np.ldexp(HALF_UNDERFLOW, exponents), HALF_UNDERFLOW)


def dequantized_half(weight: QuantizedWeight) -> Half:
    """Return the weight as a kernel's tensor cores see it, fp16 [n, k]: the exact value rounded once."""
    return weight.dequantize().astype(np.float16)


def gemm_reference(
    a: npt.NDArray[Any],
    weight: QuantizedWeight,
    *,
    alpha: float = 1.0,
    bias: Half | None = None,
    activation: Activation = Activation.NONE,
    residual: Half | None = None,
) -> Double:
    """Return activation(alpha * A x W + bias) + residual in float64, from fp16 activations and the exact weight.

    Alpha is rounded to fp32 first, as kernels take it.

    Args:
        a: fp16 [m, k].
        weight: the weight in canonical form; for gated activations its gates are the first half of the channels.
        alpha: factor of the product.
        bias: fp16 [n], or None.
        activation: the activation.
        residual: fp16 of the result's shape, or None.

    Returns:
        [m, n], or for gated activations [m, n / 2].
    """
    result = float(np.float32(alpha)) * (a.astype(np.float64) @ weight.dequantize().T)
    if bias is not None:
        result = result + bias.astype(np.float64)
    return _with_residual(activated(activation, result), residual)


def _with_residual(result: Double, residual: Half | None) -> Double:
    return result if residual is None else result + residual[: len(result)].astype(np.float64)


def random_weight(
    rng: np.random.Generator,
    n: int,
    k: int,
    group_size: int,
    mode: QuantMode,
    *,
    octaves: float = 1,
    size: float = 0.01,
) -> QuantizedWeight:
    """Return a random weight that uses all 16 values.

    Args:
        rng: source of the numbers.
        n: output channels.
        k: values of K.
        group_size: values of K per scale; ignored in per-column mode.
        mode: the quantisation mode.
        octaves: scales lie within this many powers of two of `size`, up or down.
        size: middle of the scales; zeros are at most eight scales.

    Returns:
        The weight in canonical form.
    """
    groups = k // group_size
    q = rng.integers(0, 16, (n, k), dtype=np.uint8)
    scales = (size * 2.0 ** rng.uniform(-octaves, octaves, (groups, n))).astype(np.float16)
    zeros = (scales.astype(np.float32) * rng.uniform(-8, 8, (groups, n))).astype(np.float16)
    if not mode.is_grouped:
        return canonical(q, scales[0], None, group_size=k)
    return canonical(q, scales, zeros if mode.has_zeros else None, group_size=group_size)


def error_over_bound(got: Half, expected: Expectation, alpha: float, bias: Half | None, extra: Extra = PLAIN) -> float:
    """Return the largest error as a multiple of its bound; infinity where a value was not written or is not finite."""
    asked = expected.of_tokens(got.shape[0])
    error = np.abs(got.astype(np.float64) - asked.result(alpha, bias, extra))
    ratio = error / asked.bound(alpha, bias, extra)
    return float("inf") if np.isnan(ratio).any() else float(ratio.max(initial=0.0))
