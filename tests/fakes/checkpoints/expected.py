"""What a reader must find in a checkpoint, and random parts of layers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Random = np.random.Generator
LAYER = "model.layers.0.mlp.up_proj"
N, K = 64, 256


@dataclass
class Expected:
    """What a reader must find: a weight is (q - 8) * scales + zeros, in float64."""

    path: Path
    format: str
    q: Array
    """[n, k], in the order of the file."""
    scales: Array
    """float64 [groups, n]."""
    zeros: Array | None = None
    """float64 [groups, n], before any rounding."""
    g_idx: Array | None = None
    name: str = LAYER
    bias: Array | None = None


def values(rng: Random, n: int = N, k: int = K) -> Array:
    """Return random q [n, k]."""
    return rng.integers(0, 16, (n, k)).astype(np.uint8)


def halves(rng: Random, *shape: int) -> Array:
    """Return random scales in fp16, of both signs."""
    scales: Array = rng.uniform(0.001, 0.02, shape) * rng.choice([-1, 1], shape)
    return scales.astype(np.float16)


def bfloats(rng: Random, *shape: int) -> Array:
    """Return random scales in float32 that are bfloat16 values."""
    bits: Array = rng.uniform(0.001, 0.02, shape).astype(np.float32).view(np.uint32) & 0xFFFF0000
    return bits.view(np.float32)


def zeros_of(zero_points: Array, scales: Array) -> Array:
    """Return (8 - zero point) * scale in float64."""
    return (8 - zero_points.astype(np.float64)) * scales.astype(np.float64)
