"""Layers of experts in SGLang's own code: its layers, loaders, dispatcher and reload, on a machine without a GPU.

It runs where SGLang can be imported, as `test_real_sglang.py` does.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from fakes.engine_code import importing

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore")  # of SGLang and what it imports
LAYERS = "sglang.srt.layers"
with importing("SGLang's experts"):
    importlib.import_module(f"{LAYERS}.quantization")
    hooks: Any = importlib.import_module("sglang.srt.plugins.hook_registry")
    context: Any = importlib.import_module("sglang.srt.runtime_context")
    gptq: Any = importlib.import_module(f"{LAYERS}.quantization.gptq.gptq")
    awq: Any = importlib.import_module(f"{LAYERS}.quantization.awq.awq")
    compressed: Any = importlib.import_module(f"{LAYERS}.quantization.compressed_tensors.compressed_tensors")
    fused: Any = importlib.import_module(f"{LAYERS}.moe.fused_moe_triton.layer")
    gptq_moe: Any = importlib.import_module(f"{LAYERS}.quantization.gptq.schemes.gptq_moe")
    compressed_moe: Any = importlib.import_module(
        f"{LAYERS}.quantization.compressed_tensors.schemes.compressed_tensors_wNa16_moe"
    )
    standard: Any = importlib.import_module(f"{LAYERS}.moe.token_dispatcher.standard")
    loader: Any = importlib.import_module("sglang.srt.model_loader.loader")
    topk: Any = importlib.import_module(f"{LAYERS}.moe.topk")
    moe_utils: Any = importlib.import_module(f"{LAYERS}.moe.utils")

from fakes.engine_experts import StoredExperts, routing  # noqa: E402
from fakes.engine_layers import activations  # noqa: E402

from w4a16gen.integrations.engines import limits  # noqa: E402
from w4a16gen.integrations.engines.count import ServedCount  # noqa: E402
from w4a16gen.integrations.sglang import experts as served  # noqa: E402
from w4a16gen.integrations.sglang import plugin, served_experts  # noqa: E402
from w4a16gen.integrations.sglang.kernels import LOGGER  # noqa: E402

EXPERTS, HIDDEN, INTERMEDIATE, SLOTS = 4, 256, 128, 2


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Apply the hooks once, on what is taken for a Hopper GPU whose build has every kernel."""
    monkeypatch.setattr(limits, "why_no_kernel", lambda *_: None)
    monkeypatch.setattr(limits, "why_no_grouped_kernels", lambda *_: None)
    monkeypatch.setattr(served_experts, "capability_of", lambda _: (9, 0))
    monkeypatch.setattr(served, "COUNT", ServedCount(LOGGER, "expert layer"))
    monkeypatch.setattr(awq, "verify_marlin_supported", lambda *_, **__: None)
    plugin.register()
    hooks.HookRegistry.apply_hooks()
    override = context.get_context().override_server_args()
    override.install()
    yield
    override.restore()


@dataclass(frozen=True)
class Ranks:
    """How a layer is divided, and the rank whose part it is."""

    tensor: tuple[int, int] = (0, 1)
    expert: tuple[int, int] = (0, 1)


def config_of(kind: str, group: int, *, is_symmetric: bool = True, **more: Any) -> Any:
    """Return SGLang's configuration of a model."""
    if kind == "gptq":
        raw = {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": False, "sym": is_symmetric}
        return gptq.GPTQMarlinConfig.from_config(raw | more)
    if kind == "awq":
        raw = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
        return awq.AWQMarlinConfig.from_config(raw | more)
    weights = {"num_bits": 4, "type": "int", "symmetric": is_symmetric}
    weights |= {"strategy": "channel"} if group == -1 else {"strategy": "group", "group_size": group}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights | more, "input_activations": None}}
    raw = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups, "ignore": []}
    return compressed.CompressedTensorsConfig.from_config(raw)


def layer_of(quant_config: Any, ranks: Ranks = Ranks(), dtype: Any = torch.float16, **options: Any) -> Any:
    """Return SGLang's experts of a layer; other arguments go to the module."""
    (tp_rank, tp_size), (ep_rank, ep_size) = ranks.tensor, ranks.expert
    facts: dict[str, Any] = {
        "num_experts": EXPERTS,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "top_k": SLOTS,
    }
    facts |= {"layer_id": 0, "params_dtype": dtype, "quant_config": quant_config, "prefix": "model.layers.0.experts"}
    places = {"moe_tp_rank": tp_rank, "moe_tp_size": tp_size, "moe_ep_rank": ep_rank, "moe_ep_size": ep_size}
    places |= {"tp_size": tp_size * ep_size, "attn_tp_size": tp_size * ep_size}
    with context.get_parallel().override(**places):
        return fused.FusedMoE(**facts | options)


def load(layer: Any, stored: StoredExperts, kind: str) -> None:
    """Load the tensors of a checkpoint as SGLang's models do, and process them."""
    for expert, shard, tensors in stored.shards(kind):
        for name, tensor in tensors.items():
            parameter = getattr(layer, f"{'w2' if shard == 'w2' else 'w13'}_{name}", None)
            if parameter is not None:
                parameter.weight_loader(parameter, tensor, f"experts.w_{name}", shard_id=shard, expert_id=expert)
    layer.quant_method.process_weights_after_loading(layer)


def call(layer: Any, x: Any, weights: Any, ids: Any) -> Any:
    """Return what SGLang's dispatcher, method and combination make of activations."""
    routes = topk.StandardTopKOutput(topk_weights=weights, topk_ids=ids, router_logits=torch.zeros(len(x), EXPERTS))
    dispatched = layer.dispatcher.dispatch(hidden_states=x, topk_output=routes)
    return layer.dispatcher.combine(combine_input=layer.run_moe_core(dispatched))


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Keep the lines of the plug-in."""
    caplog.set_level("INFO", logger="w4a16gen.sglang")
    return caplog


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the layers whose weights SGLang is about to repack, which needs its compiled kernels."""
    seen: list[Any] = []

    def process(scheme: Any, layer: Any) -> None:
        served.around_process(lambda _, left: seen.append(left), scheme, layer)

    for scheme in (gptq_moe.GPTQMarlinMoEScheme, compressed_moe.CompressedTensorsWNA16MoE):
        monkeypatch.setattr(scheme, "process_weights_after_loading", process)
    return seen


def served_gptq(rng: np.random.Generator, **options: Any) -> tuple[StoredExperts, Any]:
    """Return experts, and a layer that has loaded them."""
    stored, layer = (
        StoredExperts.random(rng, EXPERTS, HIDDEN, INTERMEDIATE, 32),
        layer_of(config_of("gptq", 32), **options),
    )
    load(layer, stored, "gptq")
    return stored, layer


CASES = [
    ("gptq", 128),
    ("gptq", 32),
    ("gptq", -1),
    ("awq", 64),
    ("compressed-tensors", 128),
    ("compressed-tensors", 32),
    ("compressed-tensors", -1),
]
"""Format and group size."""


@pytest.mark.parametrize(("kind", "group"), CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_experts_of_sglang_are_within_their_bounds(kind: str, group: int, dtype: Any, rng: np.random.Generator) -> None:
    stored = StoredExperts.random(rng, EXPERTS, HIDDEN, INTERMEDIATE, group, is_symmetric=kind != "awq")
    if kind != "gptq":
        stored = StoredExperts(*([weight.with_bfloat_scales() for weight in part] for part in vars(stored).values()))
    layer = layer_of(config_of(kind, group), dtype=dtype)
    load(layer, stored, kind)
    kept = {name: parameter.dtype for name, parameter in layer.named_parameters()}
    assert set(kept.values()) == {torch.uint8}
    assert len(kept) == 2
    x, (ids, weights) = activations(rng, 7, HIDDEN, dtype), routing(rng, 7, SLOTS, EXPERTS)
    got = call(layer, x, weights, ids)
    assert got.dtype == dtype
    stored.assert_is_sum(got, x, ids, weights)


@pytest.mark.parametrize(("kind", "group"), [("gptq", 32), ("gptq", -1), ("awq", 32), ("compressed-tensors", 32)])
def test_ranks_of_sglang_add_up_to_the_layer(
    kind: str, group: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standard, "get_device", lambda: "cpu")
    stored = StoredExperts.random(rng, EXPERTS, HIDDEN, INTERMEDIATE, group, is_symmetric=kind != "awq")
    x, (ids, weights) = activations(rng, 5, HIDDEN), routing(rng, 5, SLOTS, EXPERTS)
    for rank in range(2):
        layer = layer_of(config_of(kind, group), Ranks(tensor=(rank, 2)))
        load(layer, stored, kind)
        stored.share(rank, 2).assert_is_sum(call(layer, x, weights, ids), x, ids, weights)
    for rank in range(2):
        layer = layer_of(config_of(kind, group), Ranks(expert=(rank, 2)))
        load(layer, stored, kind)
        here = [2 * rank, 2 * rank + 1]
        places = torch.tensor([here.index(expert) if expert in here else -1 for expert in range(EXPERTS)])
        stored.assert_is_sum(call(layer, x, weights, ids), x, ids, weights, expert_map=places, experts=here)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_gates_that_sglangs_own_kernel_lacks_are_served(activation: str, rng: np.random.Generator) -> None:
    stored, layer = served_gptq(rng, activation=activation)
    x, (ids, weights) = activations(rng, 5, HIDDEN), routing(rng, 5, SLOTS, EXPERTS)
    stored.assert_is_sum(call(layer, x, weights, ids), x, ids, weights, activation=activation)


def test_the_factor_of_routed_experts_is_applied_once(rng: np.random.Generator) -> None:
    stored, layer = served_gptq(rng, routed_scaling_factor=2.5)
    x, (ids, weights) = activations(rng, 5, HIDDEN), routing(rng, 5, SLOTS, EXPERTS)
    assert not layer.should_fuse_routed_scaling_factor_in_topk
    stored.assert_is_sum(call(layer, x, weights, ids), x, ids, weights * 2.5)


def test_weights_on_the_input_count_once(rng: np.random.Generator) -> None:
    stored, layer = served_gptq(rng, apply_router_weight_on_input=True, top_k=1, routed_scaling_factor=2.0)
    x, (ids, _) = activations(rng, 5, HIDDEN), routing(rng, 5, 1, EXPERTS)
    weights = torch.tensor([[0.5], [2.0], [1.0], [0.25], [0.5]])
    stored.assert_is_sum(call(layer, x, weights, ids), x * weights.half(), ids, torch.full((5, 1), 2.0))


def test_no_tokens_are_no_result(rng: np.random.Generator) -> None:
    _, layer = served_gptq(rng)
    ids, weights = torch.zeros(0, SLOTS, dtype=torch.int32), torch.zeros(0, SLOTS)
    assert call(layer, torch.zeros(0, HIDDEN, dtype=torch.float16), weights, ids).shape == (0, HIDDEN)


def test_experts_that_sglang_moves_to_other_places_stay_right(rng: np.random.Generator) -> None:
    stored, layer = served_gptq(rng)
    x, (ids, weights) = activations(rng, 5, HIDDEN), routing(rng, 5, SLOTS, EXPERTS)
    order = torch.tensor([2, 0, 3, 1])
    for _, parameter in layer.named_parameters():
        assert moe_utils.filter_moe_weight_param_global_expert("", parameter, layer.num_local_experts)
        parameter.data.copy_(parameter.data[order].clone())
    stored.assert_is_sum(call(layer, x, weights, torch.argsort(order)[ids.long()]), x, ids, weights)


@pytest.mark.parametrize("group", [32, -1])
def test_sglangs_reload_keeps_addresses_and_takes_the_new_weights(group: int, rng: np.random.Generator) -> None:
    kind, addresses = "compressed-tensors", set()
    layer = layer_of(config_of(kind, group), Ranks(tensor=(0, 2)))
    x, (ids, weights) = activations(rng, 3, HIDDEN), routing(rng, 3, SLOTS, EXPERTS)
    for number in range(3):
        stored = StoredExperts.random(rng, EXPERTS, HIDDEN, INTERMEDIATE, group)
        if number:
            loader.DefaultModelLoader.restore_weights_before_loading(torch.nn.Sequential(layer), torch.device("cpu"))
        load(layer, stored, kind)
        layer.quant_method.process_weights_after_loading(layer)  # nothing is left to do
        stored.share(0, 2).assert_is_sum(call(layer, x, weights, ids), x, ids, weights)
        addresses.add((layer.w13_weight_packed.data_ptr(), layer.w2_weight_packed.data_ptr()))
    assert len(addresses) == 1


LEFT: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"desc_act": True}, {}, "experts of models with act-order are not served"),
    ({"bits": 8}, {}, "weights of 8 bits must have 4"),
    ({}, {"with_bias": True}, "experts with biases are not served"),
    ({}, {"swiglu_limit": 7.0}, "experts with swiglu_limit are not served"),
    ({}, {"gemm1_alpha": 1.7}, "experts with gemm1_alpha are not served"),
    ({}, {"no_combine": True}, "experts whose results are not added are not served"),
    ({}, {"is_gated": False}, "experts without gates are not served"),
    ({}, {"activation": "situ"}, "experts with activation situ must have one of silu"),
    ({}, {"dtype": torch.float32}, "activations of dtype float32 must be float16 or bfloat16"),
    ({}, {"apply_router_weight_on_input": True}, "weights on the input of 2 experts for each token must be of 1"),
]


@pytest.mark.parametrize(("config", "facts", "reason"), LEFT, ids=[reason[:40] for *_, reason in LEFT])
def test_what_is_not_served_is_left_to_sglang(
    config: dict[str, Any], facts: dict[str, Any], reason: str, log: Any, left: list[Any]
) -> None:
    layer = layer_of(config_of("gptq", 64, **config), **facts)
    layer.quant_method.process_weights_after_loading(layer)
    assert log.text.count(reason) == 1
    assert left == [layer]
    assert "w4a16gen serves 0 of 1 4-bit expert layers" in log.text


def test_act_order_of_compressed_tensors_is_left_to_sglang(log: Any, left: list[Any]) -> None:
    layer = layer_of(config_of("compressed-tensors", 64))
    layer.scheme.actorder = "group"
    layer.quant_method.process_weights_after_loading(layer)
    assert "experts of models with act-order are not served" in log.text
    assert left == [layer]


def test_settings_of_sglang_leave_experts_to_it(log: Any, left: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = []
    for setting in ({"enable_lora": True}, {"lora_paths": ["an adapter"]}):
        with context.get_lora().override(**setting):
            layer = layer_of(config_of("gptq", 64))
            layer.quant_method.process_weights_after_loading(layer)
        reasons.append("experts with LoRA are not served")
    with context.get_flags().moe.override(runner_backend=moe_utils.MoeRunnerBackend.MARLIN):
        layer = layer_of(config_of("compressed-tensors", 64))
        layer.quant_method.process_weights_after_loading(layer)
    reasons.append("--moe-runner-backend is marlin: leave it out to use w4a16gen")
    layer = layer_of(config_of("gptq", 64))
    with context.get_flags().moe.override(a2a_backend=moe_utils.MoeA2ABackend.DEEPEP):
        layer.quant_method.process_weights_after_loading(layer)
    reasons.append("--moe-a2a-backend is deepep: leave it out to use w4a16gen")
    monkeypatch.setenv("W4A16GEN_PLUGINS", "off")
    layer = layer_of(config_of("gptq", 64))
    layer.quant_method.process_weights_after_loading(layer)
    reasons.append("W4A16GEN_PLUGINS is 'off'")
    assert all(reason in log.text for reason in reasons)
    assert len(left) == len(reasons)


def test_methods_that_page_or_wrap_weights_get_sglangs(log: Any, left: list[Any]) -> None:
    layer = layer_of(config_of("gptq", 64))
    method, layer.quant_method = layer.quant_method, type("KTEPWrapperMethod", (), {})()
    method.process_weights_after_loading(layer)
    assert left == [layer]
    assert "experts under KTEPWrapperMethod are not served: it moves or wraps their weights" in log.text


def test_sglang_misreads_zero_points_of_compressed_tensors(rng: np.random.Generator, log: Any, left: list[Any]) -> None:
    stored = StoredExperts.random(rng, EXPERTS, HIDDEN, INTERMEDIATE, 64, is_symmetric=False)
    layer = layer_of(config_of("compressed-tensors", 64, is_symmetric=False))
    with pytest.raises(RuntimeError, match="must match the size"):
        load(layer, stored, "compressed-tensors")
    layer.quant_method.process_weights_after_loading(layer)
    assert left == [layer]
    assert "zero points of compressed-tensors experts are not served" in log.text


def test_schemes_of_other_kernels_are_sglangs(left: list[Any]) -> None:
    with context.get_flags().moe.override(runner_backend=moe_utils.MoeRunnerBackend.TRITON):
        layer = layer_of(config_of("compressed-tensors", 128))
        layer.quant_method.process_weights_after_loading(layer)
    assert type(layer.scheme).__name__ == "CompressedTensorsWNA16TritonMoE"
    assert layer.w13_weight_packed.shape == (EXPERTS, 2 * INTERMEDIATE, HIDDEN // 2)
    assert not left
