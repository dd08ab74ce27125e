"""Packed words, read as those who write them say."""

from __future__ import annotations

from typing import Any

import pytest

torch: Any = pytest.importorskip("torch")


def unpacked(words: Any) -> Any:
    """Read int32 words along axis 0 as GPTQ's checkpoints are read."""
    nibbles = torch.stack([words >> 4 * place & 15 for place in range(8)], dim=1)
    return nibbles.reshape(-1, words.shape[1])
