"""Four-bit values in the int32 words of an engine's parameters, unpacked on the device that holds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from w4a16gen.integrations.torch.nibbles import PER_WORD, expand

__all__ = ["PER_WORD", "awq_points", "gptq_zero_points", "zero_point_rules"]
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


def zero_point_rules(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return how a GPTQ model stores zero points, as arguments of `gptq_zero_points`.

    Args:
        config: the model's quantization configuration.

    Example:
        >>> zero_point_rules({"checkpoint_format": "gptq", "meta": {"quantizer": ["gptqmodel:5.0"]}})
        {'version': 1, 'by_words': True}
    """
    version = 2 if config.get("checkpoint_format") in ("gptq_v2", "gptq_p") else 1
    meta = config.get("meta")
    writers = meta.get("quantizer", ()) if isinstance(meta, Mapping) else ()
    names = [writers] if isinstance(writers, str) else list(writers)
    return {"version": version, "by_words": any(str(name).startswith("gptqmodel") for name in names)}
