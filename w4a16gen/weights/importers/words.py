"""Four-bit values in words: the steps that several formats share."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from w4a16gen.weights.quantized import Nibbles, unpack_nibbles

Words = npt.NDArray[Any]
VALUES_PER_BYTE = 2
SIGN_BIT = np.uint8(8)
"""Flips a two's complement value of 4 bits to the unsigned value plus 8, and back."""


def values_per_word(words: Words) -> int:
    """Return how many 4-bit values one word of an array holds."""
    return VALUES_PER_BYTE * words.dtype.itemsize


def nibbles(words: Words) -> Nibbles:
    """Return the 4-bit values of little-endian words, the lowest bits first.

    Args:
        words: integers of any width, [..., w].

    Returns:
        uint8 [..., w * values per word], 0 to 15.

    Example:
        >>> nibbles(np.array([0x76543210], np.uint32)).tolist()
        [0, 1, 2, 3, 4, 5, 6, 7]
    """
    little_endian = np.ascontiguousarray(words, words.dtype.newbyteorder("<"))
    return unpack_nibbles(little_endian.view(np.uint8))


def bfloat16_to_float32(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Return the float32 values of bfloat16 bits, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
