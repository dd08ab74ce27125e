"""The activations between the products of an expert, exactly, and what bounds their errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from w4a16gen.kernels.epilogue import Activation
from w4a16gen.weights.activations import activated
from w4a16gen.weights.quantized import Double


class GateFunction(NamedTuple):
    """A function of the gate, and what its errors are bounded by. All functions are of float64."""

    of: Callable[[Double], Double]
    slope: Callable[[Double], Double]
    """Magnitude of the derivative."""
    curvature: float
    """Largest magnitude of the second derivative."""
    rounded: Callable[[Double], Double]
    """What the roundings of an evaluation in fp32 are relative to."""


def _sigmoid(x: Double) -> Double:
    half: Double = 0.5 * (1 + np.tanh(0.5 * x))
    return half


def _silu_slope(x: Double) -> Double:
    part = _sigmoid(x)
    return np.abs(part * (1 + x * (1 - part)))


def _normal(x: Double) -> Double:
    """Return the distribution function of the normal distribution."""
    errors: Double = np.vectorize(math.erf, otypes=[np.float64])(x / math.sqrt(2))
    return 0.5 * (1 + errors)


def _gelu_slope(x: Double) -> Double:
    density = np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return np.abs(_normal(x) + x * density)


_SILU = partial(activated, Activation.SILU)
_TANH_FACTOR, _TANH_CUBIC = math.sqrt(2 / math.pi), 0.044715


def _gelu_tanh_slope(x: Double) -> Double:
    tanh = np.tanh(_TANH_FACTOR * (x + _TANH_CUBIC * x**3))
    inner = _TANH_FACTOR * (1 + 3 * _TANH_CUBIC * x * x)
    slope: Double = np.abs(0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * inner)
    return slope


ACTIVATIONS = {
    # A gelu subtracts numbers near 1 where x is negative, so that its roundings are relative to x.
    "silu": GateFunction(_SILU, _silu_slope, 0.5, lambda x: np.abs(_SILU(x))),
    "gelu": GateFunction(partial(activated, Activation.GELU), _gelu_slope, 0.8, np.abs),
    "gelu_tanh": GateFunction(partial(activated, Activation.GELU_TANH), _gelu_tanh_slope, 0.8, np.abs),
    "relu": GateFunction(lambda x: np.maximum(x, 0.0), np.ones_like, 0.0, np.abs),  # its slope has a step, so take 1
}
"""The activations of gated experts."""
