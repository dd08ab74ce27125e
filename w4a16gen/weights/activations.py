"""The activations of epilogues, exactly, and how far a kernel's fp32 value may lie from them."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from w4a16gen.kernels.epilogue import Activation
from w4a16gen.weights.quantized import Double

_ERFC = np.vectorize(math.erfc, otypes=[np.float64])
_FLOAT_ROUNDING = 2.0**-24
"""Unit roundoff of fp32."""


class _Accuracy(NamedTuple):
    """The properties of a function that turn an error of its argument into one of its value."""

    slope: float
    """Its largest slope."""
    relative: float
    """Error of a kernel's value as a fraction of it: the polynomial, and fp32 with approximate 2^x and 1 / x."""
    absolute: float
    """Error where the value itself almost vanishes."""


_ACCURACY = {
    Activation.SILU: _Accuracy(1.1, 2.0**-16, 2.0**-40),
    Activation.GELU_TANH: _Accuracy(1.13, 2.0**-16, 2.0**-40),
    Activation.GELU: _Accuracy(1.13, 2.0**-14 + 2.0**-16, 2.0**-27),
}
"""Measured over all of |x| < 30 by tests/kernels/test_activation.py; cuda/native/activation.h has the formula."""


def activated(activation: Activation, x: Double) -> Double:
    """Return an activation of x, exact up to float64.

    Args:
        activation: any activation.
        x: [m, n]; of gated activations the gates are the first half of the columns.

    Returns:
        [m, n], or [m, n / 2].
    """
    if activation.is_gated:
        gates, factors = np.split(x, 2, axis=-1)
        return _function(activation.function, gates) * factors
    return _function(activation, x)


def activation_error(activation: Activation, x: Double, error: Double) -> Double:
    """Return how far a kernel's value may lie from `activated`, before it is rounded to fp16.

    Args:
        activation: any activation.
        x: the exact argument, as for `activated`.
        error: the largest error of the argument, [m, n].
    """
    if not activation.is_gated:
        return _function_error(activation, x, error)
    gates, factors = np.split(x, 2, axis=-1)
    gate_error, factor_error = np.split(error, 2, axis=-1)
    of_function = _function_error(activation.function, gates, gate_error)
    largest = np.abs(_function(activation.function, gates)) + of_function
    exact = of_function * np.abs(factors) + largest * factor_error
    return exact + _FLOAT_ROUNDING * largest * (np.abs(factors) + factor_error)


def _function(activation: Activation, x: Double) -> Double:
    if activation is Activation.NONE:
        return x
    if activation is Activation.RELU2:
        positive: Double = np.maximum(x, 0.0)
        return positive * positive
    if activation is Activation.GELU:
        twice_phi: Double = _ERFC(-x / math.sqrt(2)) if x.size else x
        return x * 0.5 * twice_phi
    twice_u = x if activation is Activation.SILU else 2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    with np.errstate(over="ignore"):  # e^-x beyond float64 is infinity, and the quotient 0
        result: Double = x / (1 + np.exp(-twice_u))
        return result


def _function_error(activation: Activation, x: Double, error: Double) -> Double:
    if activation is Activation.NONE:
        return error
    value = np.abs(_function(activation, x))
    if activation is Activation.RELU2:
        moved = (2 * np.abs(x) + error) * error
        return moved + _FLOAT_ROUNDING * (value + moved)
    accuracy = _ACCURACY[activation]
    moved = accuracy.slope * error
    return moved + accuracy.relative * (value + moved) + accuracy.absolute
