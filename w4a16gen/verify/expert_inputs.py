"""What proofs of grouped kernels draw: routings of every kind, and the weights of experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from w4a16gen.kernels.config import QuantMode
from w4a16gen.verify.guards import GuardedGpu, Window
from w4a16gen.weights.experts import PackedExperts, pack_experts
from w4a16gen.weights.quantized import QuantizedWeight
from w4a16gen.weights.reference import random_weight

NOBODY = (-1, 1 << 20)
"""Ids that no expert has."""


def draw_ids(rng: np.random.Generator, tokens: int, slots: int, experts: int) -> npt.NDArray[Any]:
    """Draw the ids of a routing, int32 or int64 [tokens, slots]: of all experts, of some, of one, or of nobody."""
    hit = rng.choice(experts, int(rng.integers(1, experts + 1)), replace=False)
    if rng.random() < 0.2:  # noqa: PLR2004  (a fifth of the routings: all rows to one expert)
        hit = hit[:1]
    ids = rng.choice(hit, (tokens, slots)).astype("i4" if rng.random() < 0.5 else "i8")  # noqa: PLR2004
    ids[rng.random(ids.shape) < rng.choice([0, 0.2, 1], p=[0.6, 0.3, 0.1])] = rng.choice(NOBODY)
    return ids


@dataclass(frozen=True)
class ExpertWeights:
    """The weights of all experts of one product, on the host and on the GPU."""

    weights: Sequence[QuantizedWeight]
    packed: Mapping[bool, PackedExperts]
    """By whether they are packed for gated activations."""

    @classmethod
    def draw(
        cls, gpu: GuardedGpu, rng: np.random.Generator, mode: QuantMode, shape: tuple[int, int, int], experts: int
    ) -> ExpertWeights:
        """Draw the weights of some experts for a mode, and move them to the GPU.

        Args:
            gpu: the loaded build on a GPU.
            rng: the random numbers.
            mode: the quantisation mode.
            shape: channels, K and group size of an expert.
            experts: number of experts.
        """
        n, k, group = shape
        size = group if mode.is_grouped else k
        weights = [random_weight(rng, n, k, size, mode) for _ in range(experts)]
        return cls(
            weights,
            {
                gated: gpu.library.to_device(pack_experts(weights, gate_up=True, gated=gated), gpu.device)
                for gated in ((False, True) if n % 16 == 0 else (False,))
            },
        )

    def first(self, count: int) -> ExpertWeights:
        """Return the weights of the first experts, which share the memory."""
        packed = {
            gated: replace(every, data=Window(every.data, (count, every.stride), "|u1", 0))
            for gated, every in self.packed.items()
        }
        return ExpertWeights(self.weights[:count], packed)
