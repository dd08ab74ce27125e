"""GPTQ models that vLLM refuses, in a stand-in of vLLM: act-order, zero points, odd groups, groups across ranks."""

from __future__ import annotations

import inspect
import pickle
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from fakes.checkpoints import packers  # noqa: E402
from fakes.engine_layers import StoredWeight, activations, assert_is_product  # noqa: E402
from fakes.vllm_package import configs, kernels, layers, parameters  # noqa: E402
from fakes.vllm_package.installed import install  # noqa: E402

from w4a16gen import UnsupportedProblemError  # noqa: E402
from w4a16gen.integrations.engines import limits  # noqa: E402
from w4a16gen.integrations.engines.words import zero_point_rules  # noqa: E402
from w4a16gen.integrations.vllm import plugin, registration  # noqa: E402

N = 64


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Install the stand-in with the plug-in, on a machine whose build has every kernel."""
    install(monkeypatch)
    monkeypatch.setattr(limits, "why_no_kernel", lambda *_: None)
    plugin.register()


def config_of(group: int = 128, *, desc_act: bool = False, sym: bool = True, **more: Any) -> Any:
    """Return the configuration that vLLM finds for a GPTQ model."""
    raw = {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": desc_act, "sym": sym}
    return configs.get_quantization_config("auto_gptq").from_config(raw | more)


def on_rank(rank: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parameters.World, "rank", rank)
    monkeypatch.setattr(parameters.World, "size", size)


def method_of(layer: Any) -> str:
    return type(layer.quant_method).__name__


REFUSED_BY_VLLM = [
    {"group": 64, "desc_act": True},
    {"group": 128, "desc_act": True, "sym": False},
    {"group": 64, "sym": False},
    {"group": -1, "sym": False},
    {"group": 256},
    {"group": 96},
]
"""Configurations of models that vLLM has no kernel for."""


@pytest.mark.parametrize("options", REFUSED_BY_VLLM, ids=str)
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("is_row_parallel", [False, True], ids=["columns", "rows"])
def test_models_that_vllm_refuses_multiply_exactly_on_any_number_of_ranks(
    options: dict[str, Any], size: int, is_row_parallel: bool, rng: np.random.Generator, monkeypatch: Any
) -> None:
    k = 768
    is_symmetric, act_order = options.get("sym", True), options.get("desc_act", False)
    stored = StoredWeight.random(rng, N, k, options["group"], is_symmetric=is_symmetric, act_order=act_order)
    x, bias, results = activations(rng, 3, k), activations(rng, 1, N)[0], []
    for rank in range(size):
        on_rank(rank, size, monkeypatch)
        layer = layers.LinearBase(k, [N], config_of(**options), "layer", is_row_parallel=is_row_parallel)
        assert method_of(layer) == "W4A16GenGPTQLinearMethod"
        layer.load_parts([stored.gptq(with_order=act_order)])
        rows = slice(rank * k // size, (rank + 1) * k // size) if is_row_parallel else slice(None)
        columns = slice(None) if is_row_parallel else slice(rank * N // size, (rank + 1) * N // size)
        weight = stored.dequantized()[columns, rows]
        results.append(layer(x[:, rows], bias[columns]))
        assert_is_product(results[-1], x[:, rows], weight, bias[columns])
    if not is_row_parallel:
        assert_is_product(torch.cat(results, dim=1), x, stored.dequantized(), bias)


@pytest.mark.parametrize(
    ("k", "size", "group"),
    [(11008, 4, 64), (1376, 4, None), (1712, 2, None)],
    ids=["groups of 128 are divided", "groups are padded", "the share is a multiple of 8"],
)
def test_groups_that_straddle_ranks_are_divided_or_padded(
    k: int, size: int, group: int | None, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored_group = 128 if k % 128 == 0 else 16 if k == 1712 else 32
    stored = StoredWeight.random(rng, 16, k, stored_group)
    for rank in (0, 1, size - 1):
        on_rank(rank, size, monkeypatch)
        layer = layers.LinearBase(k, [16], config_of(stored_group), "down_proj", is_row_parallel=True)
        layer.load_parts([stored.gptq()])
        rows = slice(rank * k // size, (rank + 1) * k // size)
        x = activations(rng, 2, k // size)
        assert_is_product(layer(x), x, stored.dequantized()[:, rows])
        if group is not None:
            assert layer.quant_method._store._facts.call.group_size == group  # noqa: SLF001


def test_fused_layers_with_act_order_share_their_order(rng: np.random.Generator) -> None:
    first = StoredWeight.random(rng, 32, 256, 64, act_order=True)
    second = StoredWeight.random(rng, 64, 256, 64)
    second = StoredWeight(second.q, second.scales, None, first.g_idx)
    layer = layers.LinearBase(256, [32, 64], config_of(64, desc_act=True), "gate_up_proj")
    layer.load_parts([part.gptq(with_order=True) for part in (first, second)])
    x = activations(rng, 3, 256)
    assert_is_product(layer(x), x, np.concatenate([first.dequantized(), second.dequantized()]))


def test_fused_layers_whose_orders_differ_are_refused(rng: np.random.Generator) -> None:
    parts = [StoredWeight.random(rng, 32, 256, 64, act_order=True) for _ in range(2)]
    layer = layers.LinearBase(256, [32, 32], config_of(64, desc_act=True), "gate_up_proj")
    with pytest.raises(UnsupportedProblemError, match="parts of this fused layer have different g_idx"):
        layer.load_parts([part.gptq(with_order=True) for part in parts])


def test_the_order_of_a_fused_layer_is_copied_once(rng: np.random.Generator) -> None:
    layer = layers.LinearBase(256, [32, 32], config_of(64, desc_act=True), "gate_up_proj")
    order = torch.from_numpy(StoredWeight.random(rng, 32, 256, 64, act_order=True).g_idx)
    counted = torch.nn.Parameter(layer.g_idx.data.to("meta"), requires_grad=False)
    calls = []

    def loader(param: Any, _loaded: Any, part: int) -> None:
        calls.append((param.is_meta, part))

    load = layer.quant_method._loader_of_order(loader)  # noqa: SLF001
    layer.g_idx.data.copy_(order)
    for param in (counted, layer.g_idx):  # vLLM counts on the meta device first
        for part in (0, 1):
            load(param, order, part)
    assert calls == [(True, 0), (False, 0)]
    assert inspect.signature(layer.g_idx.weight_loader) == inspect.signature(layer.load)  # vLLM binds arguments by it


def test_a_reload_with_another_order_keeps_the_addresses(rng: np.random.Generator) -> None:
    layer = layers.LinearBase(256, [N], config_of(64, desc_act=True), "layer")
    x, addresses = activations(rng, 2, 256), set()
    for number in range(3):
        stored = StoredWeight.random(rng, N, 256, 64, act_order=True)
        if number:
            layer.create()
        layer.load_parts([stored.gptq(with_order=True)])
        assert_is_product(layer(x), x, stored.dequantized())
        addresses.add((layer.qweight.data_ptr(), layer.w4a16gen_index.data_ptr()))
    assert len(addresses) == 1


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("by_words", [False, True])
def test_zero_points_follow_the_version_and_the_writer(version: int, by_words: bool, rng: np.random.Generator) -> None:
    stored = StoredWeight.random(rng, N, 256, 64, is_symmetric=False, first_point=0 if version == 2 or by_words else 1)
    tensors = stored.gptq(version=version)
    more: dict[str, Any] = {"checkpoint_format": "gptq_v2" if version == 2 else "gptq"}
    if by_words:
        more["meta"] = {"quantizer": ["gptqmodel:5.0.0"]}
        if version == 1:
            assert stored.points is not None
            tensors["qzeros"] = torch.from_numpy(packers.gptqmodel_version_1(stored.points))
    layer = layers.LinearBase(256, [N], config_of(64, sym=False, **more), "layer")
    layer.load_parts([tensors])
    x = activations(rng, 2, 256)
    assert_is_product(layer(x), x, stored.dequantized())


def test_writers_may_be_named_by_one_text() -> None:
    assert zero_point_rules({"meta": {"quantizer": "gptqmodel:4"}}) == {"version": 1, "by_words": True}
    assert zero_point_rules({"meta": None}) == {"version": 1, "by_words": False}
    assert zero_point_rules({"checkpoint_format": "gptq_v2"}) == {"version": 2, "by_words": False}


def test_what_vllm_serves_goes_to_vllm() -> None:
    layer = layers.LinearBase(256, [N], config_of(64), "layer")
    assert method_of(layer) == "AutoGPTQLinearMethod"
    assert type(layer.quant_method.kernel).__name__ == "W4A16GenLinearKernel"


def test_dynamic_rules_keep_their_meaning() -> None:
    rules = {"-:.*dense": {}, "+:.*wide": {"group_size": 256}, ".*ordered": {"desc_act": True}}
    config = config_of(64, dynamic=rules)
    wide = config.get_quant_method(layer_without_method(), "model.wide")
    assert type(wide).__name__ == "W4A16GenGPTQLinearMethod"
    assert wide.quant_config.group_size == 256
    dense = config.get_quant_method(layer_without_method(), "model.dense")
    assert type(dense).__name__ == "UnquantizedLinearMethod"
    assert config.get_quant_method(layer_without_method(), "model.ordered").quant_config.desc_act
    assert config.get_checkpoint_weight_mapper().orig_to_new_suffix == {}
    assert config_of(64).get_checkpoint_weight_mapper().orig_to_new_suffix == {".g_idx": None}


def layer_without_method() -> Any:
    layer = layers.LinearBase.__new__(layers.LinearBase)
    layer.input_size = 512
    return layer


@pytest.mark.parametrize("options", [{"bits": 8, "sym": False}, {"bits": 8, "desc_act": True}], ids=str)
def test_eight_bits_are_vllms_business(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"Unsupported quantization config|no longer supported"):
        config_of(64, **options)


def test_configurations_reach_vllms_other_processes() -> None:
    config = config_of(64, desc_act=True, sym=False)
    pickled = pickle.dumps(config)
    del registration.W4A16GenGPTQConfig  # as in a process that has not loaded plug-ins yet
    copy = pickle.loads(pickled)  # noqa: S301  (it was written above)
    assert type(copy) is registration.W4A16GenGPTQConfig
    assert (copy.group_size, copy.desc_act, copy.is_sym) == (64, True, False)
    assert type(copy.get_quant_method(layer_without_method(), "layer")).__name__ == "W4A16GenGPTQLinearMethod"
    with pytest.raises(AttributeError, match="no attribute 'W4A16GenNothing'"):
        registration.W4A16GenNothing  # noqa: B018


def test_modules_of_another_kind_have_no_method() -> None:
    assert config_of(64).get_quant_method(torch.nn.Module(), "embedding") is None


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"desc_act": True, "bits": 4, "dynamic": {".*": {"bits": 8}}}, "weights of 8 bits in a model with act-order"),
        ({"sym": False, "group": 192}, "group size 192 must divide k = 256"),
    ],
)
def test_layers_that_nobody_serves_are_refused_with_both_reasons(options: dict[str, Any], part: str) -> None:
    with pytest.raises(UnsupportedProblemError, match="vLLM has no kernel for this GPTQ layer") as caught:
        layers.LinearBase(256, [N], config_of(**options), "layer")
    assert part in str(caught.value)


def test_other_gpus_are_refused_with_both_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.Platform, "capability", (8, 0))
    with pytest.raises(UnsupportedProblemError, match=r"w4a16gen does not serve it: compute capability 8\.0"):
        layers.LinearBase(256, [N], config_of(desc_act=True), "layer")


def test_a_layer_that_is_called_before_it_is_loaded_says_so() -> None:
    layer = layers.LinearBase(256, [N], config_of(sym=False), "layer")
    with pytest.raises(ValueError, match="has not been packed"):
        layer(torch.ones(1, 256, dtype=torch.float16))
