"""An engine's layer of experts, packed and called: within its bounds, and traced as one graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from fakes.engine_experts import StoredExperts, routing  # noqa: E402
from fakes.engine_layers import activations  # noqa: E402

from w4a16gen.integrations.engines import experts as engine_experts  # noqa: E402
from w4a16gen.integrations.engines.experts import gptq_expert, sum_of_experts, traced_sum_of_experts  # noqa: E402
from w4a16gen.integrations.engines.experts_store import PARTS, ExpertsStore  # noqa: E402
from w4a16gen.kernels.config import QuantMode  # noqa: E402
from w4a16gen.runtime import default  # noqa: E402

EXPERTS, HIDDEN, INNER, GROUP, SLOTS = 4, 128, 64, 32, 2


@pytest.fixture
def stored(rng: np.random.Generator) -> StoredExperts:
    return StoredExperts.random(rng, EXPERTS, HIDDEN, INNER, GROUP)


def packed(stored: StoredExperts) -> tuple[tuple[Any, Any], Any]:
    """Return packed weights, and the rest of their calls."""
    module, store = torch.nn.Module(), ExpertsStore(("qweight", "scales", "qzeros"))
    tensors: dict[str, Any] = {}
    for _, shard, each in stored.shards("gptq"):
        for name, tensor in each.items():
            tensors.setdefault(f"{shard}_{name}", []).append(tensor)
    for name in ("qweight", "scales"):
        gates, ups, downs = (torch.stack(tensors[f"{shard}_{name}"]) for shard in ("w1", "w3", "w2"))
        for part, tensor in zip(PARTS, (torch.cat((gates, ups), dim=2), downs), strict=True):
            module.register_parameter(f"{part}_{name}", torch.nn.Parameter(tensor, requires_grad=False))
    mode = QuantMode.FINEGRAINED_SCALE_ONLY
    assert not store.is_filled
    call = store.fill(module, gptq_expert, mode, has_zeros=False, name="experts")
    assert store.is_filled
    return store.weights(module), call


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_results_are_within_their_bounds(dtype: Any, stored: StoredExperts, rng: np.random.Generator) -> None:
    weights, call = packed(stored)
    x, (ids, factors) = activations(rng, 5, HIDDEN, dtype), routing(rng, 5, SLOTS, EXPERTS)
    ids[1] = -1
    got = traced_sum_of_experts(x, weights, call, ids, factors, activation="gelu")
    assert got.dtype == dtype
    stored.assert_is_sum(got, x, ids, factors, activation="gelu")
    assert not got[1].any()


def test_rows_that_do_not_follow_one_another_are_read(stored: StoredExperts, rng: np.random.Generator) -> None:
    weights, call = packed(stored)
    x, (ids, factors) = activations(rng, HIDDEN, 5).t(), routing(rng, 5, SLOTS, EXPERTS)
    assert not x.is_contiguous()
    got = traced_sum_of_experts(x, weights, call, ids, factors)
    stored.assert_is_sum(got, x, ids, factors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_layer_is_traced_as_one_graph(dtype: Any, stored: StoredExperts, rng: np.random.Generator) -> None:
    weights, call = packed(stored)
    x, (ids, factors) = activations(rng, 5, HIDDEN, dtype), routing(rng, 5, SLOTS, EXPERTS)

    def layer(*given: Any) -> Any:
        return traced_sum_of_experts(given[0], weights, call, *given[1:]) + 1

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, ids.short(), factors.bfloat16()), layer(x, ids, factors.bfloat16().float()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_kernels_get_arrays_that_they_can_read_and_write_in_place(
    dtype: Any, stored: StoredExperts, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, call = packed(stored)
    x, routes = activations(rng, HIDDEN, 5, dtype).t(), routing(rng, 5, SLOTS, EXPERTS)
    ids, factors = (part.t().contiguous().t() for part in (routes[0].short(), routes[1].to(dtype)))
    seen: dict[str, Any] = {}

    def moe(*arrays: Any, **options: Any) -> Any:
        hidden, _, _, numbers, shares = arrays
        assert all(array.is_contiguous() for array in (hidden, numbers, shares))
        assert (hidden.dtype, numbers.dtype, shares.dtype) == (torch.float16, torch.int64, torch.float32)
        seen.update(options)
        return default.moe(*arrays, **options)

    monkeypatch.setattr(engine_experts, "moe", moe)
    out = torch.full(x.shape, torch.nan, dtype=dtype)
    sum_of_experts(x, call.packed(*weights), ids, factors, out, activation="gelu")
    stored.assert_is_sum(out, x, ids, factors.float(), activation="gelu")
    assert seen["out"] is (out if dtype == torch.float16 else None), "nothing is copied that need not be"
    assert seen["dependent_launch"] == "auto"
