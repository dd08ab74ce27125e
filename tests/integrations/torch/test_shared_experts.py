"""Shared experts behind the routed ones: the same sum as that of both apart, and what is refused."""

from __future__ import annotations

import doctest
from typing import Any

import numpy as np
import pytest

import w4a16gen
from w4a16gen import InvalidValueError, QuantizedWeight, QuantMode
from w4a16gen.weights.division import Axis, divide
from w4a16gen.weights.experts import pack_experts
from w4a16gen.weights.moe_reference import MoeExpectation
from w4a16gen.weights.reference import random_weight

torch = pytest.importorskip("torch")
from w4a16gen.integrations.torch import W4A16Experts, add_shared_experts, shared_experts  # noqa: E402

HIDDEN, INNER, EXPERTS, TOKENS, SLOTS = 96, 64, 4, 7, 2


def projections(rng: np.random.Generator, count: int, inner: int = INNER) -> list[list[QuantizedWeight]]:
    """Return gates, up and down projections of experts."""
    shapes = (inner, HIDDEN), (inner, HIDDEN), (HIDDEN, inner)
    mode = QuantMode.FINEGRAINED_SCALE_ONLY
    return [[random_weight(rng, *shape, 32, mode, size=0.04) for _ in range(count)] for shape in shapes]


def drawn(rng: np.random.Generator) -> tuple[Any, Any, Any]:
    """Return hidden states, ids and weights of a call."""
    ids = rng.integers(-1, EXPERTS, (TOKENS, SLOTS))
    return rng.standard_normal((TOKENS, HIDDEN)).astype(np.float16), ids, rng.random(ids.shape).astype(np.float32)


def exact(
    hidden: Any, parts: list[list[QuantizedWeight]], ids: Any, weights: Any, expert_map: Any = None
) -> MoeExpectation:
    gate, up, down = parts
    return MoeExpectation(hidden, gate, up, down, ids, weights, expert_map=expert_map)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("gate", [None, "tokens", "column"])
def test_the_sum_is_that_of_routed_and_shared_experts(count: int, gate: str | None, rng: np.random.Generator) -> None:
    routed, shared = projections(rng, EXPERTS), projections(rng, 1, count * INNER)
    axes = Axis.CHANNELS, Axis.CHANNELS, Axis.REDUCTION
    parts = [
        [divide(part[0], axis, count, rank) for rank in range(count)] for part, axis in zip(shared, axes, strict=True)
    ]
    hidden, ids, weights = drawn(rng)
    factor = np.ones(TOKENS, np.float32) if gate is None else rng.random(TOKENS).astype(np.float32)
    given = {None: 1.0, "tokens": torch.from_numpy(factor), "column": torch.from_numpy(factor)[:, None]}[gate]
    routes = add_shared_experts(torch.from_numpy(ids), torch.from_numpy(weights), EXPERTS, count=count, weight=given)
    every = [one + more for one, more in zip(routed, parts, strict=True)]
    together = exact(hidden, every, routes[0].numpy(), routes[1].numpy())
    apart = exact(hidden, shared, np.zeros((TOKENS, 1), np.int64), factor[:, None])
    np.testing.assert_allclose(together.result, exact(hidden, routed, ids, weights).result + apart.result, atol=1e-12)
    module = W4A16Experts.from_packed(pack_experts(every[0], every[1]), pack_experts(every[2]))
    assert together.error_over_bound(module(torch.from_numpy(hidden), *routes).numpy()) <= 1
    w13, w2 = pack_experts(every[0], every[1], gated=True), pack_experts(every[2])
    assert together.error_over_bound(w4a16gen.moe(torch.from_numpy(hidden), w13, w2, *routes).numpy()) <= 1


def test_maps_of_experts_leave_shared_experts_to_one_gpu(rng: np.random.Generator) -> None:
    routed, shared = projections(rng, EXPERTS), projections(rng, 1)
    hidden, ids, weights = drawn(rng)
    routes = [part.numpy() for part in add_shared_experts(torch.from_numpy(ids), torch.from_numpy(weights), EXPERTS)]
    every = [one + more for one, more in zip(routed, shared, strict=True)]
    total = np.zeros((TOKENS, HIDDEN))
    for here, place in (([0, 1, 4], [0, 1, -1, -1, 2]), ([2, 3], [-1, -1, 0, 1, -1])):
        parts = [[part[expert] for expert in here] for part in every]
        total += exact(hidden, parts, routes[0], routes[1], np.array(place, np.int32)).result
    np.testing.assert_allclose(total, exact(hidden, every, routes[0], routes[1]).result, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("of_weights", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_are_kept_and_calls_can_be_exported(dtype: Any, of_weights: Any) -> None:
    ids, weights = torch.tensor([[1, 0], [2, 3]], dtype=dtype), torch.ones(2, 2, dtype=of_weights)
    gate = torch.tensor([0.25, 0.5])
    got = add_shared_experts(ids, weights, 4, count=2, weight=gate)
    assert [part.dtype for part in got] == [dtype, of_weights]
    assert got[0].tolist() == [[1, 0, 4, 5], [2, 3, 4, 5]]
    assert got[1].tolist() == [[1, 1, 0.25, 0.25], [1, 1, 0.5, 0.5]]

    class Model(torch.nn.Module):  # type: ignore[misc, name-defined]
        def forward(self, ids: Any, weights: Any, gate: Any) -> Any:
            return add_shared_experts(ids, weights, 4, count=2, weight=gate)

    exported = torch.export.export(Model(), (ids, weights, gate)).module()(ids, weights, gate)
    assert all(torch.equal(one, other) for one, other in zip(exported, got, strict=True))
    assert add_shared_experts(ids[:0], weights[:0], 4)[0].shape == (0, 3)


def test_wrong_calls_are_refused() -> None:
    ids, weights = torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2)
    cases: tuple[tuple[tuple[Any, ...], dict[str, Any], str], ...] = (
        ((ids.numpy(), weights, 4), {}, "topk_ids of type ndarray must be a tensor of integers"),
        ((ids[0], weights, 4), {}, r"must be a tensor of integers, \[tokens, slots\]"),
        ((ids, ids, 4), {}, "topk_weights of dtype int64 must be a floating point tensor"),
        ((ids, weights[:2], 4), {}, r"topk_weights of shape \[2, 2\] must be \[3, 2\], as topk_ids are"),
        ((ids, weights.to("meta"), 4), {}, "topk_weights are on meta, but topk_ids on cpu"),
        ((ids, weights, -1), {}, "first of -1 must be 0 or more"),
        ((ids, weights, 4), {"count": 0}, "count of 0 1 or more"),
        ((ids, weights, 4.5), {}, "first"),
        ((ids.to(torch.uint8), weights, 255), {"count": 2}, "expert 256 must be at most 255"),
        ((ids, weights, 4), {"weight": float("nan")}, "weight of nan must be a finite number"),
        ((ids, weights, 4), {"weight": "1"}, "weight of type str must be a finite number"),
        ((ids, weights, 4), {"weight": True}, "weight of type bool must be a finite number"),
        ((ids, weights, 4), {"weight": torch.ones(3, 2)}, r"shape \[3, 2\] must be floating point, \[3\] or \[3, 1\]"),
        ((ids, weights, 4), {"weight": torch.ones(3, dtype=torch.int64)}, "weight of dtype int64"),
        ((ids, weights, 4), {"weight": torch.ones(3, device="meta")}, "weight is on meta, but topk_ids on cpu"),
    )
    for arguments, options, message in cases:
        with pytest.raises(InvalidValueError, match=message):
            add_shared_experts(*arguments, **options)


def test_the_example_prints_what_it_shows() -> None:
    results = doctest.testmod(shared_experts)
    assert (results.attempted > 0, results.failed) == (True, 0)
