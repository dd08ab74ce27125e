"""Layers of experts in vLLM's own code: its layers, loaders, modular kernels and reload, on a machine without a GPU.

It runs where vLLM can be imported, as `test_real_vllm.py` does.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fakes.engine_code import importing

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore")  # of vLLM and what it imports
LAYERS = "vllm.model_executor.layers"
with importing("vLLM's experts"):
    importlib.import_module(f"{LAYERS}.quantization.compressed_tensors.compressed_tensors")
    quantization: Any = importlib.import_module(f"{LAYERS}.quantization")
    quantization.get_quantization_config("gptq")  # imports all methods, which ask for the real machine
    fused: Any = importlib.import_module(f"{LAYERS}.fused_moe")
    config: Any = importlib.import_module(f"{LAYERS}.fused_moe.config")
    maps: Any = importlib.import_module(f"{LAYERS}.fused_moe.expert_map_manager")
    activations_of: Any = importlib.import_module(f"{LAYERS}.fused_moe.activation")
    workspace: Any = importlib.import_module("vllm.v1.worker.workspace")
    reload: Any = importlib.import_module("vllm.model_executor.model_loader.reload")

from fakes.engine_experts import StoredExperts, routing  # noqa: E402
from fakes.engine_layers import activations  # noqa: E402
from fakes.real_vllm import config_of, register_on_hopper  # noqa: E402

from w4a16gen.integrations.engines import limits  # noqa: E402
from w4a16gen.integrations.vllm import experts as served  # noqa: E402

EXPERTS, HIDDEN, INTERMEDIATE, SLOTS = 4, 256, 128, 2


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the plug-in with vLLM on what it takes for a Hopper GPU, whose build has every kernel."""
    monkeypatch.setattr(limits, "why_no_grouped_kernels", lambda *_: None)
    monkeypatch.setattr(workspace, "_manager", workspace.WorkspaceManager(torch.device("cpu")))
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    register_on_hopper(monkeypatch)


@dataclass(frozen=True)
class Ranks:
    """How a layer is divided, and the rank whose part it is."""

    tensor: tuple[int, int] = (0, 1)
    expert: tuple[int, int] = (0, 1)


def layer_of(quant_config: Any, ranks: Ranks = Ranks(), dtype: Any = torch.float16, **more: Any) -> Any:
    """Return vLLM's experts of a layer; other arguments go to the configuration of the layer or to the module."""
    (tp_rank, tp_size), (ep_rank, ep_size) = ranks.tensor, ranks.expert
    parallel = config.FusedMoEParallelConfig(
        tp_size=tp_size,
        pcp_size=1,
        dp_size=1,
        ep_size=ep_size,
        tp_rank=tp_rank,
        pcp_rank=0,
        dp_rank=0,
        ep_rank=ep_rank,
        sp_size=1,
        use_ep=ep_size > 1,
        all2all_backend="allgather_reducescatter",
        enable_eplb=False,
    )
    manager = maps.ExpertMapManager(
        max_num_batched_tokens=64,
        top_k=SLOTS,
        global_num_experts=EXPERTS,
        num_redundant_experts=0,
        num_expert_group=None,
        moe_parallel_config=parallel,
        placement_strategy="linear",
        enable_eplb=False,
    )
    of_module = {name: more.pop(name) for name in ("apply_router_weight_on_input",) if name in more}
    facts = {
        "num_experts": EXPERTS,
        "experts_per_token": SLOTS,
        "hidden_dim": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_local_experts": manager.local_num_experts,
        "num_logical_experts": EXPERTS,
        "activation": activations_of.MoEActivation.SILU,
        "device": "cpu",
        "routing_method": config.RoutingMethodType.Renormalize,
        "moe_parallel_config": parallel,
        "in_dtype": dtype,
    }
    moe = config.FusedMoEConfig(**facts | more)
    return fused.RoutedExperts("model.layers.0.mlp.experts", dtype, moe, quant_config, manager, **of_module)


def load(layer: Any, stored: StoredExperts, kind: str) -> None:
    """Load the tensors of a checkpoint as vLLM's models do."""
    names = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    for expert, shard, tensors in stored.shards(kind):
        n, k = getattr(stored, {"w1": "gate", "w3": "up", "w2": "down"}[shard])[expert].q.shape
        shape = {"weight_shape": torch.tensor([n, k])} if kind == "compressed-tensors" else {}
        every = [(f"{expert}.{names[shard]}.{name}", tensor) for name, tensor in (tensors | shape).items()]
        list(layer.load_weights((name, tensor) for name, tensor in every if hasattr(layer, parameter_of(name))))


def parameter_of(name: str) -> str:
    _, projection, suffix = name.split(".")
    return f"{'w2' if projection == 'down_proj' else 'w13'}_{suffix}"


def call(layer: Any, x: Any, weights: Any, ids: Any) -> Any:
    return layer.forward_modular(x, weights.clone(), ids.clone())


CASES = [
    ("gptq", 128, True),
    ("gptq", 32, True),
    ("gptq", -1, True),
    ("gptq", 64, False),
    ("awq", 64, False),
    ("compressed-tensors", 128, True),
    ("compressed-tensors", 32, True),
    ("compressed-tensors", -1, True),
    ("compressed-tensors", 64, False),
]
"""Format, group size, whether it is symmetric."""


@pytest.mark.parametrize(("kind", "group", "is_symmetric"), CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_experts_of_vllm_are_within_their_bounds(
    kind: str, group: int, is_symmetric: bool, dtype: Any, rng: np.random.Generator
) -> None:
    stored = StoredExperts.random(rng, EXPERTS, HIDDEN, INTERMEDIATE, group, is_symmetric=is_symmetric)
    if kind == "compressed-tensors" and dtype == torch.bfloat16:
        stored = StoredExperts(*([weight.with_bfloat_scales() for weight in part] for part in vars(stored).values()))
    layer = layer_of(config_of(kind, group, is_symmetric=is_symmetric), dtype=dtype)
    load(layer, stored, kind)
    layer.quant_method.process_weights_after_loading(layer)
    assert layer.quant_method.serves
    kept = {name: parameter.dtype for name, parameter in layer.named_parameters() if "shape" not in name}
    assert set(kept.values()) == {torch.uint8}
    x, (ids, weights) = activations(rng, 7, HIDDEN, dtype), routing(rng, 7, SLOTS, EXPERTS)
    got = call(layer, x, weights, ids)
    assert got.dtype == dtype
    stored.assert_is_sum(got, x, ids, weights)


@pytest.mark.parametrize(("kind", "group", "is_symmetric"), [case for case in CASES if case[1] in (32, 64, -1)])
def test_ranks_of_vllm_add_up_to_the_layer(kind: str, group: int, is_symmetric: bool, rng: np.random.Generator) -> None:
    stored = StoredExperts.random(rng, EXPERTS, HIDDEN, INTERMEDIATE, group, is_symmetric=is_symmetric)
    x, (ids, weights) = activations(rng, 5, HIDDEN), routing(rng, 5, SLOTS, EXPERTS)
    for rank in range(2):
        layer = layer_of(config_of(kind, group, is_symmetric=is_symmetric), Ranks(tensor=(rank, 2)))
        load(layer, stored, kind)
        layer.quant_method.process_weights_after_loading(layer)
        assert layer.quant_method.serves
        stored.share(rank, 2).assert_is_sum(call(layer, x, weights, ids), x, ids, weights)
    for rank in range(2):
        layer = layer_of(config_of(kind, group, is_symmetric=is_symmetric), Ranks(expert=(rank, 2)))
        load(layer, stored, kind)
        layer.quant_method.process_weights_after_loading(layer)
        here = [2 * rank, 2 * rank + 1]
        stored.assert_is_sum(call(layer, x, weights, ids), x, ids, weights, expert_map=layer.expert_map, experts=here)


def test_weights_that_vllm_puts_on_the_input_count_once(rng: np.random.Generator) -> None:
    stored = StoredExperts.random(rng, EXPERTS, HIDDEN, INTERMEDIATE, 64)
    layer = layer_of(config_of("gptq", 64), apply_router_weight_on_input=True, experts_per_token=1)
    load(layer, stored, "gptq")
    layer.quant_method.process_weights_after_loading(layer)
    x, (ids, _) = activations(rng, 5, HIDDEN), routing(rng, 5, 1, EXPERTS)
    weights = torch.tensor([[0.5], [2.0], [1.0], [0.25], [0.5]])
    stored.assert_is_sum(call(layer, x, weights, ids), x * weights.half(), ids, torch.ones(5, 1))


@pytest.mark.parametrize(("kind", "group", "is_symmetric"), CASES)
def test_vllms_reload_keeps_addresses_and_takes_the_new_weights(
    kind: str, group: int, is_symmetric: bool, rng: np.random.Generator
) -> None:
    layer = layer_of(config_of(kind, group, is_symmetric=is_symmetric))
    model = torch.nn.Sequential(layer)
    reload.record_metadata_for_reloading(model)
    x, (ids, weights), addresses = activations(rng, 3, HIDDEN), routing(rng, 3, SLOTS, EXPERTS), set()
    for number in range(3):
        stored = StoredExperts.random(rng, EXPERTS, HIDDEN, INTERMEDIATE, group, is_symmetric=is_symmetric)
        if number:
            reload.initialize_layerwise_reload(model)
        load(layer, stored, kind)
        if number:
            reload.finalize_layerwise_reload(model, SimpleNamespace(dtype=torch.float16))
        else:
            layer.quant_method.process_weights_after_loading(layer)
        stored.assert_is_sum(call(layer, x, weights, ids), x, ids, weights)
        addresses.add((layer.w13_weight.data_ptr(), layer.w2_weight.data_ptr()))
    assert len(addresses) == 1


REASONS = [
    ({"moe_backend": "marlin"}, "moe_backend is marlin"),
    ({"has_bias": True}, "biases"),
    ({"swiglu_limit": 7.0}, "swiglu_limit"),
    ({"is_lora_enabled": True}, "LoRA"),
    ({"activation": "swigluoai"}, "activation swigluoai must have one of silu"),
]


@pytest.mark.parametrize(("facts", "part"), REASONS, ids=[part for _, part in REASONS])
def test_what_is_not_served_is_left_to_vllm(
    facts: dict[str, Any], part: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "COUNT", type(served.COUNT)(served.COUNT._logger, "expert layer"))  # noqa: SLF001
    if "activation" in facts:
        facts = {"activation": activations_of.MoEActivation.from_str(facts["activation"])}
    with caplog.at_level("INFO", logger="vllm.w4a16gen"):
        layer = layer_of(config_of("gptq", 64), **facts)
    assert not layer.quant_method.serves
    assert "Marlin" in layer.quant_method.experts_cls.__name__
    assert part in caplog.text
    assert layer.w13_scales.dtype == torch.float16


def test_experts_of_a_bf16_model_that_are_left_keep_vllms_dtypes() -> None:
    layer = layer_of(config_of("gptq", 64), dtype=torch.bfloat16, moe_backend="marlin")
    assert layer.w13_scales.dtype == torch.bfloat16
    assert layer_of(config_of("gptq", 64), dtype=torch.bfloat16).w13_scales.dtype == torch.float16
