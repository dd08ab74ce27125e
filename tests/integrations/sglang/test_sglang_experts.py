"""Layers of experts in a stand-in of SGLang: every format, other ranks, reloads, and what is left to SGLang."""

from __future__ import annotations

from enum import Enum
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from fakes.engine_experts import StoredExperts, routing  # noqa: E402
from fakes.engine_layers import StoredWeight, activations  # noqa: E402
from fakes.sglang_package import engine as sglang  # noqa: E402
from fakes.sglang_package.experts import (  # noqa: E402
    AWQMoEScheme,
    Backend,
    FusedMoE,
    MoeRunnerConfig,
    QuantConfig,
    Settings,
)
from fakes.sglang_package.installed import EXPERTS, install  # noqa: E402

from w4a16gen import InvalidValueError, UnsupportedProblemError  # noqa: E402
from w4a16gen.integrations.engines import limits  # noqa: E402
from w4a16gen.integrations.engines.count import ServedCount  # noqa: E402
from w4a16gen.integrations.sglang import experts, kernels, plugin, served_experts  # noqa: E402

COUNT, HIDDEN, INNER, SLOTS = 4, 128, 64, 2
LOGGER = "w4a16gen.sglang"


class Order(Enum):
    """compressed-tensors' orders of columns."""

    GROUP = "group"
    DYNAMIC = "dynamic"


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Install the stand-in with the plug-in, on a Hopper GPU whose build has every kernel."""
    made = install(monkeypatch)
    monkeypatch.setattr(limits, "why_no_grouped_kernels", lambda *_: None)
    monkeypatch.setattr(served_experts, "capability_of", lambda _: (9, 0))
    monkeypatch.setattr(experts, "COUNT", ServedCount(kernels.LOGGER, "expert layer"))
    plugin.register()
    sglang.HookRegistry.apply_hooks(made)


def layer_of(kind: str, group: int, dtype: Any = torch.float16, *, of: Any = None, **options: Any) -> Any:
    """Return a layer of experts; `of` goes to the quantization, the rest to the layer."""
    to_module = {name: options.pop(name) for name in ("expert_map", "moe_tp_size", "with_bias") if name in options}
    here = COUNT if "expert_map" not in to_module else int((to_module["expert_map"] >= 0).sum())
    sizes = {"num_local_experts": here, "hidden_size": HIDDEN, "intermediate_size_per_partition": INNER}
    config: Any = MoeRunnerConfig
    return FusedMoE(QuantConfig(kind, group, **of or {}), config(**sizes | options, params_dtype=dtype), **to_module)


def stored_of(rng: np.random.Generator, kind: str, group: int) -> StoredExperts:
    """Return experts whose scales bf16 holds, since SGLang stores those of some formats in it."""
    stored = StoredExperts.random(rng, COUNT, HIDDEN, INNER, group, is_symmetric=kind != "awq")
    return StoredExperts(*([weight.with_bfloat_scales() for weight in part] for part in vars(stored).values()))


def drawn(rng: np.random.Generator, tokens: int, dtype: Any = torch.float16) -> tuple[Any, Any, Any]:
    """Return activations, ids and weights of a call."""
    return activations(rng, tokens, HIDDEN, dtype), *routing(rng, tokens, SLOTS, COUNT)


def served(rng: np.random.Generator, **options: Any) -> tuple[StoredExperts, Any]:
    """Return experts of GPTQ, and a layer that has loaded them."""
    stored, layer = stored_of(rng, "gptq", 32), layer_of("gptq", 32, **options)
    layer.load(stored, "gptq")
    return stored, layer


CASES = [
    ("gptq", 32),
    ("gptq", 64),
    ("gptq", -1),
    ("awq", 32),
    ("compressed-tensors", 32),
    ("compressed-tensors", -1),
]
"""Format and group size. Groups of 64 are all of k in the down projections."""


@pytest.mark.parametrize(("kind", "group"), CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_results_are_within_their_bounds(kind: str, group: int, dtype: Any, rng: np.random.Generator) -> None:
    stored, layer = stored_of(rng, kind, group), layer_of(kind, group, dtype)
    layer.load(stored, kind)
    assert [parameter.dtype for parameter in layer.parameters()] == [torch.uint8] * 2
    for tokens in (1, 7):
        x, ids, weights = drawn(rng, tokens, dtype)
        got = layer(x, weights, ids)
        assert got.dtype == dtype
        stored.assert_is_sum(got, x, ids, weights)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_every_function_of_the_gate_is_computed(activation: str, rng: np.random.Generator) -> None:
    stored, layer = served(rng, activation=activation)
    x, ids, weights = drawn(rng, 5)
    stored.assert_is_sum(layer(x, weights, ids), x, ids, weights, activation=activation)


def test_experts_of_other_gpus_are_skipped(rng: np.random.Generator) -> None:
    places = torch.tensor([-1, 1, -1, 0], dtype=torch.int32)
    stored, layer = served(rng, expert_map=places)
    x, ids, weights = drawn(rng, 5)
    stored.assert_is_sum(layer(x, weights, ids), x, ids, weights, expert_map=places, experts=[3, 1])


def test_room_for_the_scales_of_other_ranks_is_not_read(rng: np.random.Generator) -> None:
    stored, layer = served(rng, moe_tp_size=2)
    x, ids, weights = drawn(rng, 5)
    stored.assert_is_sum(layer(x, weights, ids), x, ids, weights)


def test_the_factor_of_routed_experts_multiplies_the_result(rng: np.random.Generator) -> None:
    stored, layer = served(rng, routed_scaling_factor=2.5)
    x, ids, weights = drawn(rng, 5)
    stored.assert_is_sum(layer(x, weights, ids), x, ids, weights * 2.5)
    rounded = weights.bfloat16()
    assert torch.equal(layer(x, rounded, ids), layer(x, rounded.float(), ids)), "the product of both is not rounded"


def test_weights_on_the_input_count_once(rng: np.random.Generator) -> None:
    stored, layer = served(rng, apply_router_weight_on_input=True, top_k=1, routed_scaling_factor=2.0)
    x, (ids, _) = activations(rng, 3, HIDDEN), routing(rng, 3, 1, COUNT)
    weights = torch.tensor([[0.5], [2.0], [0.25]])
    stored.assert_is_sum(layer(x, weights, ids), x * weights.half(), ids, torch.full((3, 1), 2.0))


def test_a_reload_keeps_the_addresses(rng: np.random.Generator) -> None:
    layer = layer_of("compressed-tensors", 32)
    addresses: set[tuple[int, int]] = set()
    for number in range(3):
        if number:
            layer.quant_method.restore_weights_before_loading(layer)
            scales = layer.w2_weight_scale
            layer.quant_method.restore_weights_before_loading(layer)
            assert layer.w2_weight_scale is scales  # which may be loaded already
            restored = layer.w13_weight_packed.data_ptr(), layer.w2_weight_packed.data_ptr()
            assert addresses == {restored}  # a model need not fit twice
        stored = stored_of(rng, "compressed-tensors", 32)
        layer.load(stored, "compressed-tensors")
        layer.quant_method.process_weights_after_loading(layer)  # nothing is left to do
        x, ids, weights = drawn(rng, 3)
        stored.assert_is_sum(layer(x, weights, ids), x, ids, weights)
        addresses.add((layer.w13_weight_packed.data_ptr(), layer.w2_weight_packed.data_ptr()))
    assert len(addresses) == 1


def test_the_line_counts_layers_of_experts(rng: np.random.Generator, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger=LOGGER):
        layers = [layer_of("gptq", 32), layer_of("gptq", 32), layer_of("gptq", 32, with_bias=True)]
        for layer in layers:
            layer.load(stored_of(rng, "gptq", 32), "gptq")
    assert [record.message for record in caplog.records] == [
        "w4a16gen leaves a 4-bit expert layer to other kernels: experts with biases are not served",
        "w4a16gen serves 2 of 3 4-bit expert layers",
    ]


LEFT: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"desc_act": True}, {}, "experts of models with act-order are not served: quantize them without it"),
    ({"weight_bits": 8}, {}, "weights of 8 bits must have 4"),
    ({}, {"with_bias": True}, "experts with biases are not served"),
    ({}, {"swiglu_limit": 7.0}, "experts with swiglu_limit are not served"),
    ({}, {"gemm1_alpha": 1.7}, "experts with gemm1_alpha are not served"),
    ({}, {"gemm1_beta": 1.0}, "experts with gemm1_beta are not served"),
    ({}, {"gemm1_clamp_limit": 7.0}, "experts with gemm1_clamp_limit are not served"),
    ({}, {"no_combine": True}, "experts whose results are not added are not served"),
    ({}, {"is_gated": False}, "experts without gates are not served"),
    ({}, {"activation": "situ"}, "experts with activation situ must have one of silu, gelu"),
    ({}, {"dtype": torch.float32}, "activations of dtype float32 must be float16 or bfloat16"),
    ({}, {"apply_router_weight_on_input": True}, "weights on the input of 2 experts for each token must be of 1"),
]


@pytest.mark.parametrize(("of", "options", "reason"), LEFT, ids=[reason[:40] for *_, reason in LEFT])
def test_what_is_not_served_is_left_to_sglang(
    of: dict[str, Any], options: dict[str, Any], reason: str, rng: np.random.Generator, caplog: Any
) -> None:
    layer = layer_of("gptq", 32, of=of, **options)
    with caplog.at_level("INFO", logger=LOGGER):
        layer.load(stored_of(rng, "gptq", 32), "gptq")
    assert reason in caplog.text
    assert layer.processed_by_sglang
    assert layer(*drawn(rng, 1)) == "SGLang"


@pytest.mark.parametrize(
    ("setting", "value", "reason"),
    [
        ("runner", Backend.MARLIN, "--moe-runner-backend is marlin: leave it out to use w4a16gen"),
        ("all_to_all", Backend.DEEPEP, "--moe-a2a-backend is deepep: leave it out to use w4a16gen"),
        ("lora", type("Lora", (), {"enable_lora": True, "lora_paths": None}), "experts with LoRA are not served"),
        ("lora", type("Lora", (), {"enable_lora": None, "lora_paths": ["one"]}), "experts with LoRA are not served"),
    ],
)
def test_settings_leave_experts_to_sglang(
    setting: str, value: Any, reason: str, rng: np.random.Generator, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Settings, setting, value)
    with caplog.at_level("INFO", logger=LOGGER):
        _, layer = served(rng)
    assert reason in caplog.text
    assert layer.processed_by_sglang


def test_other_gpus_and_the_switch_leave_experts_to_sglang(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served_experts, "capability_of", lambda _: (8, 0))
    assert served(rng)[1].processed_by_sglang
    monkeypatch.setattr(served_experts, "capability_of", lambda _: (9, 0))
    monkeypatch.setenv("W4A16GEN_PLUGINS", "float16")
    assert served(rng, dtype=torch.bfloat16)[1].processed_by_sglang
    assert not hasattr(served(rng)[1], "processed_by_sglang")


def test_methods_that_page_or_wrap_weights_keep_them(rng: np.random.Generator, caplog: Any) -> None:
    layer = layer_of("gptq", 32)
    layer.quant_method = type("PagedExpertsMoEMethod", (type(layer.quant_method),), {})()
    with caplog.at_level("INFO", logger=LOGGER):
        layer.load(stored_of(rng, "gptq", 32), "gptq")
    assert "experts under PagedExpertsMoEMethod are not served: it moves or wraps their weights" in caplog.text
    assert layer.processed_by_sglang


@pytest.mark.parametrize(
    ("of", "order", "reason"),
    [
        ({"is_sym": False}, None, "zero points of compressed-tensors experts are not served"),
        ({}, "group", "experts of models with act-order are not served"),
        ({}, Order.GROUP, "experts of models with act-order are not served"),
        ({}, Order.DYNAMIC, "experts of models with act-order are not served"),
        ({}, "weight", ""),
    ],
)
def test_compressed_tensors_that_sglang_misreads_are_left_to_it(
    of: dict[str, Any], order: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    layer = layer_of("compressed-tensors", 32, of=of)
    layer.scheme.actorder = order
    with caplog.at_level("INFO", logger=LOGGER):
        layer.quant_method.process_weights_after_loading(layer)
    assert reason in caplog.text
    assert hasattr(layer, "processed_by_sglang") is bool(reason)
    layer.quant_method.restore_weights_before_loading(layer)
    assert hasattr(layer, "restored_by_sglang") is bool(reason)


def test_schemes_that_inherit_are_sglangs(rng: np.random.Generator, caplog: pytest.LogCaptureFixture) -> None:
    layer = layer_of("triton", 32)
    with caplog.at_level("INFO", logger=LOGGER):
        layer.load(stored_of(rng, "compressed-tensors", 32), "compressed-tensors")
        assert layer.processed_by_sglang
        assert not caplog.records
        served(rng)
    assert caplog.records[-1].message == "w4a16gen serves 1 of 1 4-bit expert layers"


def test_other_forms_of_routes_are_refused_with_a_way_out(rng: np.random.Generator) -> None:
    _, layer = served(rng)
    dispatched = type("Dispatched", (), {"topk_output": type("PackedTopKOutput", (), {})()})
    with pytest.raises(
        UnsupportedProblemError, match=r"model\.experts: routes of type PackedTopKOutput are not served"
    ):
        layer.quant_method.apply(layer, dispatched)


def test_scales_beyond_fp16_are_refused_with_a_way_out(rng: np.random.Generator) -> None:
    stored, layer = stored_of(rng, "awq", 32), layer_of("awq", 32, torch.bfloat16)
    tiny = [StoredWeight(part.q, part.scales * np.float32(2.0**-24), part.points, part.g_idx) for part in stored.down]
    with pytest.raises(InvalidValueError, match=r"expert 0 of w2 of model\.experts cannot be packed: its scales do no"):
        layer.load(StoredExperts(stored.gate, stored.up, tiny), "awq")


@pytest.mark.parametrize("name", EXPERTS)
def test_absent_parts_leave_experts_to_sglang(
    name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = install(monkeypatch)
    delattr(made[name], EXPERTS[name][-1])
    with caplog.at_level("INFO", logger=LOGGER):
        plugin.register()
    line = "w4a16gen goes before SGLang's Marlin kernels for GPTQ, AWQ and compressed-tensors layers; their experts are"
    assert caplog.records[-1].message.startswith(f"{line} left to SGLang (")
    assert not any("MoE" in target for target in sglang.HookRegistry._hooks)  # noqa: SLF001


def test_a_scheme_without_a_known_method_leaves_experts_to_sglang(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch)
    for scheme in (AWQMoEScheme, *AWQMoEScheme.__bases__):
        monkeypatch.delattr(scheme, "apply_weights")
    with caplog.at_level("INFO", logger=LOGGER):
        plugin.register()
    assert "their experts are left to SGLang (AttributeError" in caplog.records[-1].message
    assert not any("MoE" in target for target in sglang.HookRegistry._hooks)  # noqa: SLF001
