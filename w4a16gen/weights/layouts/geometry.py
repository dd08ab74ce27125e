"""The facts about a weight by which a layout places its bytes."""

from __future__ import annotations

from typing import NamedTuple

from w4a16gen.kernels.config import QuantMode

ALIGNMENT = 128
"""Alignment of a packed weight and of every section in it, in bytes."""


class WeightGeometry(NamedTuple):
    """The sizes and the mode that decide where each byte of a packed weight lies."""

    n: int
    """Output channels."""
    k: int
    """Reduction length."""
    group_size: int
    """Values of K per scale; k itself in per-column mode."""
    mode: QuantMode


def align(count: int, multiple: int = ALIGNMENT) -> int:
    """Round a count up to a multiple."""
    return -(-count // multiple) * multiple
