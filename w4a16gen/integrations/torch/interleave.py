"""Interleave the packed bytes of gates and of their factors, on the device that holds them.

Layout `fragment_blocks_v2` has two channels, 8 apart, in the two nibbles of a byte, and their scales side by side. Runs
of 8 channels of gates become lower channels, those of factors upper ones. So nibbles move within bytes and between
blocks, and their order along K stays. See w4a16gen/cuda/native/layout.h.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import torch

from w4a16gen.kernels.config import Target
from w4a16gen.weights.layouts.fragments import factors_start
from w4a16gen.weights.packed import TARGET_LAYOUTS, PackedWeight

_NIBBLE_BYTES = 4096
"""Of a block of 64 channels x 128 k, after its rows of scales and zeros."""
_BLOCK_K = 128
_LOWER = 0x78787878
"""The lower channels' nibbles in a word, which is rotated left by 3 bits."""
_UNITS = 16.0
"""The unit of an upper channel's nibbles over that of a lower one's; scales make up for it."""
_WHOLE_RUNS = 32
"""Gates of a multiple of this fill whole blocks together with their factors."""


def interleave(*weights: PackedWeight) -> Any | None:
    """Return the packed bytes of gates and factors as layout `fragment_blocks_v2_gated` has them.

    Args:
        weights: the gates, and the factors of the same sizes, mode and layout, on the same device; or one weight of
            both, the gates first. Their data are torch tensors.

    Returns:
        uint8 [bytes]; or None if the bytes cannot be interleaved without unpacking them: in another layout, with gates
        of no multiple of 32, or where a scale would lose bits. Waits for the device.
    """
    first, gates_n = weights[0], sum(weight.n for weight in weights) // 2
    if first.layout != TARGET_LAYOUTS[Target.NATIVE] or gates_n % _WHOLE_RUNS != 0:
        return None
    parts = [_Parts(weight) for weight in weights]
    gates, factors = parts if len(parts) > 1 else parts[0].halves()
    rows = [_rescaled(gates, becomes_upper=False), _rescaled(factors, becomes_upper=True)]
    if any(row is None for row in rows):
        return None
    header = torch.stack(rows, dim=-1)  # [runs, k blocks, rows, 8, lower or upper]
    blocks = torch.cat([_as_blocks(header), _as_blocks(_joined_words(gates.words, factors.words))], dim=-1)
    of_channels = torch.stack([_placed(gates, becomes_upper=False), _placed(factors, becomes_upper=True)], dim=1)
    return torch.cat([blocks.reshape(-1), of_channels.reshape(-1).view(torch.uint8)])


class _Parts:
    """The nibbles, scales and factors of a weight, by runs of channels."""

    def __init__(self, weight: PackedWeight) -> None:
        """Read a weight whose n is a multiple of 32."""
        start, self.is_grouped = factors_start(weight.geometry), weight.mode.is_grouped
        k_blocks = -(-weight.k // _BLOCK_K)
        n_blocks = -(-weight.n // 64)
        blocks = weight.data[:start].reshape(n_blocks, k_blocks, -1)
        header = blocks.shape[-1] - _NIBBLE_BYTES
        words = blocks[..., header:].clone().view(torch.int32).reshape(n_blocks, k_blocks, 2, 4, 32, 4)
        self.words = words.permute(0, 3, 1, 2, 4, 5).reshape(4 * n_blocks, k_blocks, 2, 32, 4)[: weight.n // 16]
        """int32 [runs of 16 channels, k blocks, half, lane, step]."""
        rows = blocks[..., :header].clone().view(torch.float16).reshape(n_blocks, k_blocks, header // 128, 4, 8, 2)
        self.rows = rows.permute(0, 3, 5, 1, 2, 4).reshape(8 * n_blocks, k_blocks, -1, 8)[: weight.n // 8]
        """fp16 [runs of 8 channels, k blocks, rows of scales and then of zeros, 8]."""
        self.scale_rows = header // 128 // (2 if weight.mode.has_zeros else 1)
        self.factors = weight.data[start:].clone().view(torch.float32).reshape(-1, 8)[: weight.n // 8]
        """fp32 [runs of 8 channels, 8]."""

    def halves(self) -> tuple[_Parts, _Parts]:
        """Return the first and the second half of the channels, each a multiple of 32."""
        first, second = copy(self), copy(self)
        for name in ("words", "rows", "factors"):
            halves = getattr(self, name).chunk(2)
            setattr(first, name, halves[0])
            setattr(second, name, halves[1])
        return first, second


def _change_of_unit(runs: int, device: Any, *, becomes_upper: bool) -> Any:
    """Return what scales are multiplied by, [runs]: even runs of 8 channels were lower ones, odd runs upper ones."""
    was_upper = torch.arange(runs, device=device) % 2 == 1
    changes = was_upper != becomes_upper
    factor = 1 / _UNITS if becomes_upper else _UNITS
    return torch.where(changes, factor, 1.0)


def _rescaled(parts: _Parts, *, becomes_upper: bool) -> Any | None:
    """Return the rows with scales for their new places, or None if one would lose bits."""
    rows = parts.rows.clone()
    change = _change_of_unit(len(rows), rows.device, becomes_upper=becomes_upper)[:, None, None, None]
    exact = rows[:, :, : parts.scale_rows].float() * change
    rows[:, :, : parts.scale_rows] = exact.half()
    return rows if torch.equal(rows[:, :, : parts.scale_rows].float(), exact) else None


def _placed(parts: _Parts, *, becomes_upper: bool) -> Any:
    """Return the factors of channels for their new places. Without groups they hold the scales."""
    if parts.is_grouped:
        return parts.factors
    return (
        parts.factors * _change_of_unit(len(parts.factors), parts.factors.device, becomes_upper=becomes_upper)[:, None]
    )


def _joined_words(gates: Any, factors: Any) -> Any:
    """Return the words of gates as lower and of factors as upper channels, by runs of 16 channels of both."""
    lower_runs = gates & _LOWER | _rotated_by_4(factors & _LOWER)
    upper_runs = _rotated_back_by_4(gates & ~_LOWER) | factors & ~_LOWER
    return torch.stack([lower_runs, upper_runs], dim=1).flatten(0, 1)


def _rotated_by_4(words: Any) -> Any:
    return words << 4 | words >> 28 & 0xF


def _rotated_back_by_4(words: Any) -> Any:
    return words >> 4 & 0x0FFFFFFF | words << 28


def _as_blocks(runs: Any) -> Any:
    """Return values by runs of 16 channels, [runs, k blocks, ...], as the blocks hold them: uint8 [blocks, ...]."""
    shaped = runs.reshape(len(runs) // 4, 4, *runs.shape[1:])
    ordered = shaped.permute(0, 2, 3, 1, *range(4, shaped.dim())).contiguous()
    return ordered.flatten(2).view(torch.uint8)
