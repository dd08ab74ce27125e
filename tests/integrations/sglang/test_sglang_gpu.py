"""Layers of experts on a Hopper GPU, in the stand-in of SGLang: within their bounds, captured, reloaded in place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from fakes.engine_experts import StoredExperts, routing  # noqa: E402
from fakes.engine_layers import activations  # noqa: E402
from fakes.sglang_package import engine as sglang  # noqa: E402
from fakes.sglang_package.experts import FusedMoE, MoeRunnerConfig, QuantConfig  # noqa: E402
from fakes.sglang_package.installed import install  # noqa: E402

from w4a16gen import Library  # noqa: E402
from w4a16gen.integrations.sglang import plugin  # noqa: E402
from w4a16gen.runtime import default  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
EXPERTS, HIDDEN, INNER, SLOTS = 8, 512, 256, 2
CASES = [("gptq", 128), ("gptq", -1), ("awq", 64), ("compressed-tensors", 32)]


@pytest.fixture(autouse=True)
def engine(gpu_library: Library, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Install the stand-in with the plug-in; layers are made on the GPU, as SGLang makes them."""
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    monkeypatch.setattr(default._InUse, "library", gpu_library)  # noqa: SLF001
    made = install(monkeypatch)
    plugin.register()
    sglang.HookRegistry.apply_hooks(made)
    with torch.device("cuda"):
        yield


def loaded(stored: StoredExperts, kind: str, group: int, expert_map: Any = None) -> Any:
    """Return a layer that has loaded experts, which this package serves."""
    here = EXPERTS if expert_map is None else int((expert_map >= 0).sum())
    config = MoeRunnerConfig(here, HIDDEN, INNER, torch.float16)
    layer = FusedMoE(QuantConfig(kind, group), config, expert_map=expert_map)
    layer.load(stored, kind)
    if hasattr(layer, "processed_by_sglang"):
        pytest.skip("the build that W4A16GEN_BUILD_DIR names holds no grouped kernels with and without the gate")
    return layer


def drawn(rng: np.random.Generator, tokens: int) -> tuple[Any, Any, Any]:
    """Return activations, ids and weights of a call."""
    ids, weights = (tensor.cuda() for tensor in routing(rng, tokens, SLOTS, EXPERTS))
    return activations(rng, tokens, HIDDEN).cuda(), ids, weights


@pytest.mark.parametrize(("kind", "group"), CASES)
def test_experts_are_within_their_bounds_and_captured(kind: str, group: int, rng: np.random.Generator) -> None:
    stored = StoredExperts.random(rng, EXPERTS, HIDDEN, INNER, group, is_symmetric=kind != "awq")
    layer = loaded(stored, kind, group)
    for tokens in (1, 16, 300):
        x, ids, weights = drawn(rng, tokens)
        stored.assert_computed_by(layer, x, ids, weights)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x, weights, ids)
    if kind == "compressed-tensors":
        stored = StoredExperts.random(rng, EXPERTS, HIDDEN, INNER, group)
        layer.quant_method.restore_weights_before_loading(layer)
        layer.load(stored, kind)
    x.copy_(activations(rng, 300, HIDDEN))
    graph.replay()
    torch.cuda.synchronize()
    stored.assert_is_sum(y, x, ids, weights)


def test_experts_of_other_gpus_are_skipped(rng: np.random.Generator) -> None:
    places = torch.tensor([-1, 1, -1, 0, 2, -1, 3, -1], dtype=torch.int32)
    stored = StoredExperts.random(rng, EXPERTS, HIDDEN, INNER, 128)
    layer = loaded(stored, "gptq", 128, places)
    x, ids, weights = drawn(rng, 16)
    stored.assert_is_sum(layer(x, weights, ids), x, ids, weights, expert_map=places, experts=[3, 1, 4, 6])
