"""Four-bit values in the int32 words of an engine's parameters, unpacked on the device that holds them."""

from __future__ import annotations

from typing import Any

import torch

from w4a16gen.integrations.torch.nibbles import PER_WORD, expand, expand_awq

__all__ = ["PER_WORD", "awq_points", "awq_values", "gptq_zero_points", "nibbles"]
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""The place in a word of AWQ that holds each of its eight columns."""
_ONES = 0x11111111
"""1 in each of a word's values."""


def nibbles(words: Any) -> Any:
    """Return the 4-bit values of words [rows, w], the lowest bits first: uint8 [rows, 8 * w], on the same device.

    Args:
        words: int32 [rows, w].

    Example:
        >>> nibbles(torch.tensor([[0x76543210]], dtype=torch.int32)).tolist()
        [[0, 1, 2, 3, 4, 5, 6, 7]]
    """
    return expand(words)


def awq_values(words: Any) -> Any:
    """Return q of AWQ's words.

    Args:
        words: int32 [k, n / 8].

    Returns:
        uint8 [n, k], on the same device.
    """
    return expand_awq(words)


def awq_points(words: Any) -> Any:
    """Return the zero points of AWQ's words.

    Args:
        words: int32 [groups, n / 8].

    Returns:
        uint8 [groups, n], on the same device.
    """
    order = torch.tensor(_AWQ_ORDER, device=words.device)
    return nibbles(words).view(len(words), -1, PER_WORD)[..., order].flatten(1)


def gptq_zero_points(words: Any, *, version: int, by_words: bool = False) -> Any:
    """Return the zero points of GPTQ's qzeros.

    Args:
        words: int32 [groups, n / 8].
        version: 1 if files store each zero point less 1, 2 if they store it.
        by_words: whether the writer subtracted 1 from whole words, with borrows, as GPTQModel does.

    Returns:
        uint8 [groups, n], 0 to 15, on the same device.
    """
    if version == 1 and by_words:
        return nibbles(words + _ONES)
    fields = nibbles(words)
    return (fields + 1) & 15 if version == 1 else fields
