"""Four-bit values in the int32 words of an engine's parameters, unpacked on the device that holds them."""

from __future__ import annotations

from typing import Any

import torch

from w4a16gen.integrations.torch.nibbles import PER_WORD, expand

__all__ = ["PER_WORD", "awq_points", "gptq_zero_points"]
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""The place in a word of AWQ that holds each of its eight columns."""
_ONES = 0x11111111
"""1 in each of a word's values."""


def awq_points(words: Any) -> Any:
    """Return the zero points of AWQ's words.

    Args:
        words: int32 [groups, n / 8].

    Returns:
        uint8 [groups, n], on the same device.

    Example:
        >>> awq_points(torch.tensor([[0x76543210]], dtype=torch.int32)).tolist()
        [[0, 4, 1, 5, 2, 6, 3, 7]]
    """
    order = torch.tensor(_AWQ_ORDER, device=words.device)
    return expand(words).view(len(words), -1, PER_WORD)[..., order].flatten(1)


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
        return expand(words + _ONES)
    fields = expand(words)
    return (fields + 1) & 15 if version == 1 else fields
