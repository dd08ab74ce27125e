"""Four-bit values and their factors in torch tensors, on any device: the steps that several formats share.

Each function computes the same bits as its counterpart in `w4a16gen.weights.importers`, which works on numpy arrays.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import torch

from w4a16gen.weights.importers.rounding import LARGEST_HALF, LEAST_NORMAL_HALF
from w4a16gen.weights.quantized import MAX_Q, OFFSET

VALUES_PER_BYTE = 2
PER_WORD = 8
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
Tensor: TypeAlias = Any
"""A torch tensor. Type checkers read this package without torch."""


class Decoded(NamedTuple):
    """A weight in plain numbers, on one device: a weight is (q - 8) * scale + zero."""

    q: Tensor
    """uint8 [n, k], contiguous."""
    scales: Tensor
    """float64 [k / group_size, n]."""
    zeros: Tensor | None
    """float64 [k / group_size, n]; None for symmetric weights."""


def expand(words: Tensor) -> Tensor:
    """Return the 4-bit values of little-endian words along the last axis, the lowest bits first.

    Args:
        words: integers of any width, [rows, w].

    Returns:
        uint8 [rows, w * values per word], 0 to 15, contiguous.
    """
    return expand_bytes(_in_rows(words).view(torch.uint8))


def _in_rows(words: Tensor) -> Tensor:
    """Return a copy whose last axis has stride 1: torch calls one column contiguous whatever its stride is."""
    return (
        words if words.is_contiguous() and words.stride(-1) == 1 else words.clone(memory_format=torch.contiguous_format)
    )


def expand_bytes(packed: Tensor, run: int = 1) -> Tensor:
    """Return two values of each byte along the last axis: of each run of bytes the lower halves, then the upper ones.

    Args:
        packed: uint8 [..., b].
        run: bytes whose lower halves follow one another; it divides b.

    Returns:
        uint8 [..., 2 * b], contiguous.
    """
    runs = packed.reshape(*packed.shape[:-1], -1, run)
    values = torch.empty((*runs.shape[:-1], VALUES_PER_BYTE, run), dtype=torch.uint8, device=packed.device)
    torch.bitwise_and(runs, MAX_Q, out=values[..., 0, :])
    torch.bitwise_right_shift(runs, 4, out=values[..., 1, :])
    return values.view(*packed.shape[:-1], VALUES_PER_BYTE * packed.shape[-1])


def expand_awq(words: Tensor) -> Tensor:
    """Return the channels of AWQ's words, transposed: int32 [rows, n / 8] to uint8 [n, rows].

    The channels 0 2 4 6 1 3 5 7 of a word follow one another from its lowest bits. So half h of byte 2 c + a is channel
    4 a + 2 h + c.
    """
    rows, columns = words.shape
    planes = _in_rows(words.t()).view(torch.uint8).view(columns, rows, 4).transpose(1, 2).contiguous()
    of_channels = planes.view(columns, 2, 2, rows).transpose(1, 2)
    values = torch.empty((columns, 2, 2, 2, rows), dtype=torch.uint8, device=words.device)
    torch.bitwise_and(of_channels, MAX_Q, out=values[:, :, 0])
    torch.bitwise_right_shift(of_channels, 4, out=values[:, :, 1])
    return values.view(columns * PER_WORD, rows)


def zeros_of_points(points: Tensor, scales: Tensor) -> Tensor:
    """Return (8 - zero point) * scale in float64, exactly."""
    return (OFFSET - points.double()) * scales


class Halves(NamedTuple):
    """Factors in fp16, and whether that is all there is to say about them."""

    values: Tensor
    """fp16, each rounded once."""
    fit: bool
    """Whether fp16 holds all of them: finite, not too large, and none so small that bits are lost."""


def round_to_half(values: Tensor) -> Halves:
    """Round float64 values to fp16, and wait for the device once.

    Nearly all checkpoints have factors that fp32 holds exactly. Then rounding takes half as many operations, whose
    launches take most of the time of packing a weight.
    """
    single = values.float()
    halves = single.half()
    inexact = (single.double() != values).any()
    is_inexact, is_lost = torch.stack((inexact, do_not_fit(single, halves).any())).tolist()
    if is_inexact:
        halves = to_half(values)
        is_lost = bool(do_not_fit(values, halves).any())
    return Halves(halves, not is_lost)


def to_half(values: Tensor) -> Tensor:
    """Return float64 rounded once to fp16.

    Torch rounds to fp32 first, and two roundings to nearest may differ from one. Here the first rounds to odd, which
    keeps what the second needs to know.
    """
    single = values.float()
    lost = values - single.double()
    is_even = (single.view(torch.int32) & 1) == 0
    toward = torch.where(lost > 0, torch.inf, -torch.inf).to(single.dtype)
    return torch.where((lost != 0) & is_even, torch.nextafter(single, toward), single).half()


def do_not_fit(values: Tensor, halves: Tensor) -> Tensor:
    """Return which values fp16 cannot hold: not finite, too large, or so small that bits are lost."""
    size = values.abs()
    small = (size < LEAST_NORMAL_HALF) & (halves.to(values.dtype) != values)
    return ~(size <= LARGEST_HALF) | small
