"""Random layers of experts as checkpoints store them, and what engines must compute with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fakes.engine_layers import BFLOAT_ROUNDING, StoredWeight
from w4a16gen.weights.moe_reference import MoeExpectation

PROJECTIONS = {"w1": "gate", "w3": "up", "w2": "down"}
"""The shards that engines load, and the projection of each."""


@dataclass(frozen=True, eq=False)
class StoredExperts:
    """The experts of a layer: gates and up projections [intermediate, hidden], down projections [hidden, ...]."""

    gate: list[StoredWeight]
    up: list[StoredWeight]
    down: list[StoredWeight]

    @classmethod
    def random(
        cls,
        rng: np.random.Generator,
        experts: int,
        hidden: int,
        intermediate: int,
        group_size: int,
        *,
        is_symmetric: bool = True,
    ) -> StoredExperts:
        """Return random experts; group size -1 is one group."""

        def made(n: int, k: int) -> list[StoredWeight]:
            return [StoredWeight.random(rng, n, k, group_size, is_symmetric=is_symmetric) for _ in range(experts)]

        return cls(made(intermediate, hidden), made(intermediate, hidden), made(hidden, intermediate))

    def shards(self, kind: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
        """Yield expert, shard and tensors of a format, in the order of a checkpoint."""
        for expert in range(len(self.gate)):
            for shard, name in PROJECTIONS.items():
                yield expert, shard, getattr(self, name)[expert].stored_as(kind)

    def share(self, rank: int, ranks: int) -> StoredExperts:
        """Return what a rank holds when the intermediate channels are divided."""

        def rows(weight: StoredWeight) -> StoredWeight:
            part = slice(rank * len(weight.q) // ranks, (rank + 1) * len(weight.q) // ranks)
            points = None if weight.points is None else weight.points[:, part]
            return StoredWeight(weight.q[part], weight.scales[:, part], points, weight.g_idx)

        def columns(weight: StoredWeight) -> StoredWeight:
            k = weight.q.shape[1]
            part = slice(rank * k // ranks, (rank + 1) * k // ranks)
            index = weight.g_idx[part]
            groups = slice(int(index[0]), int(index[-1]) + 1)
            points = None if weight.points is None else weight.points[groups]
            return StoredWeight(weight.q[:, part], weight.scales[groups], points, index - index[0])

        return StoredExperts(list(map(rows, self.gate)), list(map(rows, self.up)), list(map(columns, self.down)))

    def assert_is_sum(
        self,
        got: Any,
        hidden: Any,
        ids: Any,
        weights: Any,
        *,
        activation: str = "silu",
        expert_map: Any = None,
        experts: Sequence[int] | None = None,
    ) -> None:
        """Fail unless a result is within the bound of the layer.

        Args:
            got: fp16 or bf16 [tokens, hidden].
            hidden: [tokens, hidden], in values that fp16 holds.
            ids: integers [tokens, slots].
            weights: [tokens, slots].
            activation: function of the gate.
            expert_map: the number among `experts` of each id, or -1; None if ids are those.
            experts: which experts are there; None for all.
        """
        gate, up, down = (
            [weight.quantized() for weight in (part if experts is None else [part[expert] for expert in experts])]
            for part in (self.gate, self.up, self.down)
        )
        expected = MoeExpectation(
            hidden.to(torch.float16).cpu().numpy(),
            gate,
            up,
            down,
            ids.cpu().numpy(),
            weights.float().cpu().numpy(),
            activation=activation,
            expert_map=None if expert_map is None else expert_map.cpu().numpy(),
        )
        bound = expected.bound + 1e-9
        if got.dtype == torch.bfloat16:
            bound = bound + BFLOAT_ROUNDING * (np.abs(expected.result) + bound)
        error = np.abs(got.double().cpu().numpy() - expected.result)
        assert got.shape == expected.result.shape
        assert np.abs(expected.result).max() > 0
        assert (error <= bound).all(), (error / bound).max()

    def assert_computed_by(self, layer: Callable[..., Any], hidden: Any, ids: Any, weights: Any) -> None:
        """Fail unless a layer of an engine gives the sums, and in BF16 the same ones rounded.

        Args:
            layer: takes activations, weights and ids.
            hidden: fp16 [tokens, hidden].
            ids: int32 [tokens, slots].
            weights: fp32 [tokens, slots].
        """
        got = layer(hidden, weights, ids)
        self.assert_is_sum(got, hidden, ids, weights)
        assert torch.equal(layer(hidden.bfloat16(), weights, ids), layer(hidden, weights, ids).bfloat16())


def routing(rng: np.random.Generator, tokens: int, slots: int, experts: int) -> tuple[Any, Any]:
    """Return ids int32 and weights fp32 [tokens, slots]; no token has an expert twice."""
    ids = np.stack([rng.permutation(experts)[:slots] for _ in range(tokens)]).astype(np.int32)
    return torch.from_numpy(ids), torch.from_numpy(rng.random((tokens, slots)).astype(np.float32))
