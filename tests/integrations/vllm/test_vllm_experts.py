"""Layers of experts in a stand-in of vLLM: every format, expert parallelism, reloads, and what is left to vLLM."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from fakes.engine_experts import StoredExperts, routing  # noqa: E402
from fakes.engine_layers import StoredWeight, activations  # noqa: E402
from fakes.vllm_package import configs, kernels  # noqa: E402
from fakes.vllm_package.experts import (  # noqa: E402
    FusedMoEConfig,
    FusedMoEParallelConfig,
    MarlinExperts,
    MoEActivation,
    RoutedExperts,
)
from fakes.vllm_package.installed import install  # noqa: E402

from w4a16gen import InvalidValueError, UnsupportedProblemError  # noqa: E402
from w4a16gen.integrations.engines import limits  # noqa: E402
from w4a16gen.integrations.vllm import experts, plugin, registration  # noqa: E402

COUNT, HIDDEN, INNER, SLOTS = 4, 128, 64, 2


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Install the stand-in with the plug-in, on a machine whose build has every kernel."""
    install(monkeypatch)
    monkeypatch.setattr(limits, "why_no_grouped_kernels", lambda *_: None)
    monkeypatch.setattr(experts, "COUNT", type(experts.COUNT)(experts.COUNT._logger, "expert layer"))  # noqa: SLF001
    plugin.register()


def config_of(kind: str, group: int, *, is_symmetric: bool = True, **more: Any) -> Any:
    """Return the configuration that vLLM finds for a model."""
    found = configs.get_quantization_config(kind)
    if kind == "gptq":
        raw = {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": False, "sym": is_symmetric}
        return found.from_config(raw | more)
    return found(group) if kind == "awq" else found(group, is_sym=is_symmetric)


def layer_of(quant_config: Any, dtype: Any = torch.float16, *, facts: Any = None, **options: Any) -> Any:
    """Return a layer of experts; `facts` go to its configuration."""
    return RoutedExperts(quant_config, FusedMoEConfig(HIDDEN, INNER, **facts or {}), COUNT, dtype, **options)


def stored_of(rng: np.random.Generator, group: int, *, is_symmetric: bool = True) -> StoredExperts:
    return StoredExperts.random(rng, COUNT, HIDDEN, INNER, group, is_symmetric=is_symmetric)


def drawn(rng: np.random.Generator, tokens: int, dtype: Any = torch.float16) -> tuple[Any, Any, Any]:
    """Return activations, ids and weights of a call."""
    return activations(rng, tokens, HIDDEN, dtype), *routing(rng, tokens, SLOTS, COUNT)


CASES = [
    ("gptq", 32, True),
    ("gptq", 64, True),
    ("gptq", -1, True),
    ("gptq", 64, False),
    ("awq", 32, False),
    ("compressed-tensors", 32, True),
    ("compressed-tensors", -1, True),
    ("compressed-tensors", 32, False),
]
"""Format, group size, whether it is symmetric. Groups of 64 are all of k in the down projections."""


@pytest.mark.parametrize(("kind", "group", "is_symmetric"), CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_results_are_within_their_bounds(
    kind: str, group: int, is_symmetric: bool, dtype: Any, rng: np.random.Generator
) -> None:
    stored = stored_of(rng, group, is_symmetric=is_symmetric)
    if kind == "compressed-tensors":
        stored = StoredExperts(*([weight.with_bfloat_scales() for weight in part] for part in vars(stored).values()))
    layer = layer_of(config_of(kind, group, is_symmetric=is_symmetric), dtype)
    layer.load(stored, kind)
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.uint8}
    for tokens in (1, 7):
        x, ids, weights = drawn(rng, tokens, dtype)
        got = layer(x, weights, ids)
        assert got.dtype == dtype
        stored.assert_is_sum(got, x, ids, weights)
    assert layer.quant_method.get_fused_moe_quant_config(layer).quant_dtype is None


def test_gates_and_up_projections_lie_side_by_side_for_kernels_that_apply_the_gate(rng: np.random.Generator) -> None:
    layer = layer_of(config_of("gptq", 32))
    layer.load(stored_of(rng, 32), "gptq")
    call = layer.quant_method.moe_kernel.fused_experts.call
    assert (call.gate_up.layout, call.down.layout) == ("fragment_blocks_v2_gated", "fragment_blocks_v2")


@pytest.mark.parametrize("activation", [MoEActivation.GELU, MoEActivation.GELU_TANH], ids=str)
def test_every_function_of_the_gate_is_computed(activation: MoEActivation, rng: np.random.Generator) -> None:
    stored, layer = stored_of(rng, 32), layer_of(config_of("gptq", 32), facts={"activation": activation})
    layer.load(stored, "gptq")
    x, ids, weights = drawn(rng, 5)
    stored.assert_is_sum(layer(x, weights, ids), x, ids, weights, activation=activation.value)


def test_experts_of_other_gpus_are_skipped(rng: np.random.Generator) -> None:
    stored, x = stored_of(rng, 32), activations(rng, 5, HIDDEN)
    ids, weights = routing(rng, 5, SLOTS, COUNT)
    places = torch.tensor([-1, 1, -1, 0], dtype=torch.int32)
    layer = layer_of(config_of("gptq", 32), expert_map=places)
    layer.load(stored, "gptq")
    assert len(layer.w13_weight) == 2
    got = layer(x, weights, ids.long())
    stored.assert_is_sum(got, x, ids, weights, expert_map=places, experts=[3, 1])


def test_weights_that_vllm_puts_on_the_input_count_once(rng: np.random.Generator) -> None:
    stored, layer = stored_of(rng, 32), layer_of(config_of("gptq", 32), apply_router_weight_on_input=True)
    layer.load(stored, "gptq")
    x, (ids, _) = activations(rng, 3, HIDDEN), routing(rng, 3, 1, COUNT)
    weights = torch.tensor([[0.5], [2.0], [0.25]])
    stored.assert_is_sum(layer(x, weights, ids), x * weights.half(), ids, torch.ones(3, 1))


def test_a_reload_keeps_the_addresses(rng: np.random.Generator) -> None:
    layer, addresses = layer_of(config_of("awq", 32)), set()
    for number in range(3):
        if number:
            layer.create()
        stored = stored_of(rng, 32, is_symmetric=False)
        layer.load(stored, "awq")
        x, ids, weights = drawn(rng, 3)
        stored.assert_is_sum(layer(x, weights, ids), x, ids, weights)
        addresses.add((layer.w13_weight.data_ptr(), layer.w2_weight.data_ptr(), layer.w13_qweight.data_ptr()))
    assert len(addresses) == 1


def test_the_line_counts_layers_of_experts(rng: np.random.Generator, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="vllm.w4a16gen"):
        served = [layer_of(config_of("gptq", 32)) for _ in range(2)]
        layer_of(config_of("gptq", 32), facts={"has_bias": True})
        for layer in served:
            layer.load(stored_of(rng, 32), "gptq")
    assert [record.message for record in caplog.records] == [
        "w4a16gen leaves a 4-bit expert layer to other kernels: experts with biases are not served",
        "w4a16gen serves 2 of 3 4-bit expert layers",
    ]


ALL2ALL = FusedMoEParallelConfig(use_all2all_kernels=True)
LEFT: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"moe_backend": "marlin"}, {}, "moe_backend is marlin: leave it out to use w4a16gen"),
    ({"has_bias": True}, {}, "experts with biases are not served"),
    ({"swiglu_limit": 7.0}, {}, "experts with swiglu_limit are not served"),
    ({"swiglu_alpha": 1.7}, {}, "experts with swiglu_alpha are not served"),
    ({"swiglu_beta": 1.0}, {}, "experts with swiglu_beta are not served"),
    ({"activation": MoEActivation.SWIGLUOAI}, {}, "experts with activation swigluoai must have one of silu, gelu"),
    ({"is_lora_enabled": True}, {}, "kernel does not support LoRA"),
    ({"moe_parallel_config": ALL2ALL}, {}, "kernel does not support parallel config"),
    ({"moe_parallel_config": FusedMoEParallelConfig(enable_eplb=True)}, {}, "kernel does not support parallel config"),
    (
        {"moe_parallel_config": FusedMoEParallelConfig(use_passthrough_all2all=True)},
        {},
        "kernel does not support parallel config",
    ),
    ({}, {"unpadded": HIDDEN - 8}, "hidden size 120 must not be padded, but vLLM pads it to 128"),
    ({}, {"dtype": torch.float32}, "activations of dtype float32 must be float16 or bfloat16"),
]


@pytest.mark.parametrize(("facts", "options", "reason"), LEFT, ids=[reason[:30] for *_, reason in LEFT])
def test_what_is_not_served_is_left_to_vllm(
    facts: dict[str, Any], options: dict[str, Any], reason: str, rng: np.random.Generator, caplog: Any
) -> None:
    with caplog.at_level("INFO", logger="vllm.w4a16gen"):
        layer = layer_of(config_of("gptq", 32), facts=facts, **options)
    assert reason in caplog.text
    assert layer.quant_method.experts_cls is MarlinExperts
    layer.load(stored_of(rng, 32), "gptq")
    assert layer.w13_weight == "Marlin's"
    assert layer.quant_method.get_fused_moe_quant_config(layer) == "vLLM's"
    assert layer.w13_scales.dtype == options.get("dtype", torch.float16)


def test_a_gate_that_only_the_layer_changes_is_left_to_vllm(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(RoutedExperts, "swiglu_limit", 7.0, raising=False)
    with caplog.at_level("INFO", logger="vllm.w4a16gen"):
        assert layer_of(config_of("gptq", 32)).quant_method.experts_cls is MarlinExperts
    assert "experts with swiglu_limit are not served" in caplog.text


def test_tokens_that_vllm_gathers_and_scatters_are_served() -> None:
    parallel = FusedMoEParallelConfig(use_all2all_kernels=True, use_ag_rs_all2all_kernels=True)
    assert layer_of(config_of("gptq", 32), facts={"moe_parallel_config": parallel}).quant_method.serves


def test_scales_are_loaded_in_the_dtype_of_the_files() -> None:
    assert layer_of(config_of("awq", 32), torch.bfloat16).w2_scales.dtype == torch.float16
    left = layer_of(config_of("awq", 32), torch.bfloat16, facts={"has_bias": True})
    assert left.w2_scales.dtype == torch.bfloat16
    assert layer_of(config_of("compressed-tensors", 32), torch.bfloat16).w2_weight_scale.dtype == torch.bfloat16


def test_awq_without_zero_points_and_eight_bits_are_left_to_vllm(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="vllm.w4a16gen"):
        config = configs.get_quantization_config("awq")(32, zero_point=False)
        assert not layer_of(config).quant_method.serves
        eight = {"quant_method": "gptq", "bits": 8, "group_size": 32, "desc_act": False, "sym": True}
        assert not layer_of(configs.get_quantization_config("gptq").from_config(eight)).quant_method.serves
    assert "weights of type uint4 need zero points" in caplog.text
    assert "weights of type uint8b128 must be uint4b8 or uint4" in caplog.text


def test_other_gpus_and_the_switch_leave_experts_to_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.Platform, "capability", (8, 0))
    assert not layer_of(config_of("gptq", 32)).quant_method.serves
    monkeypatch.setattr(kernels.Platform, "capability", (9, 0))
    monkeypatch.setenv("W4A16GEN_PLUGINS", "float16")
    assert not layer_of(config_of("gptq", 32), torch.bfloat16).quant_method.serves
    assert layer_of(config_of("gptq", 32)).quant_method.serves


def test_zero_points_of_gptq_that_are_not_served_are_refused() -> None:
    with pytest.raises(
        UnsupportedProblemError,
        match="vLLM has no kernel for experts of GPTQ with zero points, and w4a16gen does not serve them: experts with",
    ):
        layer_of(config_of("gptq", 32, is_symmetric=False), facts={"has_bias": True})


def test_act_order_is_refused_with_a_way_out() -> None:
    for options in ({"desc_act": True}, {"dynamic": {".*": {"desc_act": True}}}):
        with pytest.raises(UnsupportedProblemError, match="experts of models with act-order: quantize them with desc_"):
            layer_of(config_of("gptq", 32, **options))


def test_group_sizes_that_vllm_reads_in_another_way_are_left_to_it() -> None:
    layer = RoutedExperts.__new__(RoutedExperts)
    torch.nn.Module.__init__(layer)
    layer.moe_config = FusedMoEConfig(HIDDEN, INNER)
    assert config_of("gptq", 256).get_quant_method(layer, "experts") == "MoeWNA16Method"


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_biases_that_the_model_does_not_name_must_be_0(value: float, rng: np.random.Generator) -> None:
    layer = layer_of(config_of("gptq", 32))
    layer.w2_bias.data[1] = value
    layer._loaded_expert_biases.add("w2_bias")  # noqa: SLF001
    if not value:
        layer.load(stored_of(rng, 32), "gptq")
        assert layer.w2_bias is None
        return
    with pytest.raises(InvalidValueError, match=r"model\.experts: experts with biases are not served; to use the engi"):
        layer.load(stored_of(rng, 32), "gptq")


def test_scales_beyond_fp16_are_refused_with_a_way_out(rng: np.random.Generator) -> None:
    stored = stored_of(rng, 32)
    tiny = [StoredWeight(part.q, part.scales * np.float32(2.0**-24), None, part.g_idx) for part in stored.down]
    layer = layer_of(config_of("compressed-tensors", 32), torch.bfloat16)
    with pytest.raises(InvalidValueError, match=r"expert 0 of w2 of model\.experts cannot be packed: its scales do no"):
        layer.load(StoredExperts(stored.gate, stored.up, tiny), "compressed-tensors")


def test_what_models_compute_before_the_sum_is_refused(rng: np.random.Generator) -> None:
    layer = layer_of(config_of("gptq", 32))
    layer.load(stored_of(rng, 32), "gptq")
    layer.quant_method.moe_kernel.fused_experts.post_gemm2_hook = print
    x, ids, weights = drawn(rng, 2)
    with pytest.raises(UnsupportedProblemError, match="this model computes something between the down projections"):
        layer(x, weights, ids)


@pytest.mark.parametrize(
    ("kind", "name"), [("awq", "W4A16GenAWQConfig"), ("compressed-tensors", "W4A16GenCompressedTensorsConfig")]
)
def test_configurations_reach_vllms_other_processes(kind: str, name: str) -> None:
    pickled = pickle.dumps(config_of(kind, 32))
    delattr(registration, name)  # as in a process that has not loaded plug-ins yet
    copy = pickle.loads(pickled)  # noqa: S301  (it was written above)
    assert type(copy) is getattr(registration, name)
    assert layer_of(copy).quant_method.serves
