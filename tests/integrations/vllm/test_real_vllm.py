"""The plug-in in vLLM's own code: its layers, configurations, loaders and reload, on a machine without a GPU.

It runs where vLLM can be imported: its wheel, unpacked into a folder of PYTHONPATH, is enough beside what that imports.
What vLLM asks about the GPU and the ranks is answered by the test.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fakes.engine_code import importing

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore")  # of vLLM and what it imports
LAYERS = "vllm.model_executor.layers"
with importing("vLLM's linear layers"):
    linear: Any = importlib.import_module(f"{LAYERS}.linear")
    importlib.import_module(f"{LAYERS}.quantization.compressed_tensors.compressed_tensors")
    quantization: Any = importlib.import_module(f"{LAYERS}.quantization")
    quantization.get_quantization_config("gptq")  # imports all methods, which ask for the real machine
    parameter: Any = importlib.import_module("vllm.model_executor.parameter")
    reload: Any = importlib.import_module("vllm.model_executor.model_loader.reload")

from fakes.engine_layers import StoredWeight, activations, assert_is_product  # noqa: E402
from fakes.real_vllm import config_of, register_on_hopper  # noqa: E402

K, N = 512, 128


def on_rank(rank: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (linear, parameter):
        monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the plug-in with vLLM on what it takes for a Hopper GPU, whose build has every kernel."""
    on_rank(0, 1, monkeypatch)
    register_on_hopper(monkeypatch)


def load(layer: Any, parts: list[dict[str, Any]], ids: list[Any], shape: tuple[int, int]) -> None:
    """Load the tensors of a checkpoint with the loaders of the layer's parameters."""
    for tensors, part in zip(parts, ids, strict=True):
        known = dict(layer.named_parameters())
        for name, tensor in (tensors | {"weight_shape": torch.tensor(shape)}).items():
            if name in known:
                known[name].weight_loader(known[name], tensor, *([] if part is None else [part]))


CASES = [
    ("gptq", 128, True, False),
    ("gptq", -1, True, False),
    ("gptq", 64, False, False),
    ("gptq", 64, True, True),
    ("gptq", 256, True, False),
    ("awq", 64, False, False),
    ("compressed-tensors", 128, True, False),
    ("compressed-tensors", 64, False, False),
    ("compressed-tensors", -1, True, False),
    ("compressed-tensors", 256, True, False),
]
"""Format, group size, whether it is symmetric, whether it has act-order."""


def tensors_of(kind: str, stored: StoredWeight, *, desc_act: bool) -> dict[str, Any]:
    return stored.gptq(with_order=desc_act) if kind == "gptq" else stored.stored_as(kind)


@pytest.mark.parametrize(("kind", "group", "is_symmetric", "desc_act"), CASES)
@pytest.mark.parametrize("size", [1, 2])
def test_fused_layers_of_vllm_hold_the_columns_of_the_whole(
    kind: str, group: int, is_symmetric: bool, desc_act: bool, size: int, rng: np.random.Generator, monkeypatch: Any
) -> None:
    widths, ids = [N, 64, 64], ["q", "k", "v"]
    parts = [
        StoredWeight.random(rng, width, K, group, is_symmetric=is_symmetric, act_order=desc_act) for width in widths
    ]
    parts = [StoredWeight(part.q, part.scales, part.points, parts[0].g_idx) for part in parts]
    config = config_of(kind, group, is_symmetric=is_symmetric, desc_act=desc_act)
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    x, shares = activations(rng, 3, K), [[], [], []]  # type: ignore[var-annotated]
    for rank in range(size):
        on_rank(rank, size, monkeypatch)
        layer = linear.QKVParallelLinear(
            K, 32, 4, 2, bias=False, params_dtype=torch.float16, quant_config=config, prefix="model.qkv_proj"
        )
        load(layer, [tensors_of(kind, part, desc_act=desc_act) for part in parts], ids, (N, K))
        layer.quant_method.process_weights_after_loading(layer)
        y, _ = layer(x)
        for share, result in zip(shares, y.split([width // size for width in widths], dim=1), strict=True):
            share.append(result)
    for share, part in zip(shares, parts, strict=True):
        assert_is_product(torch.cat(share, dim=1), x, part.dequantized())


@pytest.mark.parametrize(("kind", "group", "is_symmetric", "desc_act"), CASES)
@pytest.mark.parametrize("size", [1, 2])
def test_row_parallel_layers_of_vllm_hold_the_rows_of_the_whole(
    kind: str, group: int, is_symmetric: bool, desc_act: bool, size: int, rng: np.random.Generator, monkeypatch: Any
) -> None:
    stored = StoredWeight.random(rng, N, K, group, is_symmetric=is_symmetric, act_order=desc_act)
    config = config_of(kind, group, is_symmetric=is_symmetric, desc_act=desc_act)
    x = activations(rng, 3, K)
    for rank in range(size):
        on_rank(rank, size, monkeypatch)
        layer = linear.RowParallelLinear(
            *(K, N),
            bias=False,
            params_dtype=torch.float16,
            quant_config=config,
            prefix="model.down_proj",
            reduce_results=False,
        )
        load(layer, [tensors_of(kind, stored, desc_act=desc_act)], [None], (N, K))
        layer.quant_method.process_weights_after_loading(layer)
        share = slice(rank * K // size, (rank + 1) * K // size)
        y, _ = layer(x[:, share].contiguous())
        assert_is_product(y, x[:, share], stored.dequantized()[:, share])


@pytest.mark.parametrize(("kind", "group", "is_symmetric", "desc_act"), CASES)
def test_vllms_reload_keeps_addresses_and_takes_the_new_weight(
    kind: str, group: int, is_symmetric: bool, desc_act: bool, rng: np.random.Generator
) -> None:
    config = config_of(kind, group, is_symmetric=is_symmetric, desc_act=desc_act)
    config.packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}
    layer = linear.MergedColumnParallelLinear(
        K, [64, 64], bias=False, params_dtype=torch.float16, quant_config=config, prefix="model.gate_up_proj"
    )
    model = torch.nn.Sequential(layer)
    reload.record_metadata_for_reloading(model)
    x, addresses = activations(rng, 3, K), set()
    for number in range(3):
        parts = [StoredWeight.random(rng, 64, K, group, is_symmetric=is_symmetric, act_order=desc_act) for _ in "ab"]
        parts = [StoredWeight(part.q, part.scales, part.points, parts[0].g_idx) for part in parts]
        tensors = [tensors_of(kind, part, desc_act=desc_act) for part in parts]
        if number:
            reload.initialize_layerwise_reload(model)
        load(layer, tensors, [0, 1], (64, K))
        if number:
            reload.finalize_layerwise_reload(model, SimpleNamespace(dtype=torch.float16))
        else:
            layer.quant_method.process_weights_after_loading(layer)
        y, _ = layer(x)
        assert_is_product(y, x, np.concatenate([part.dequantized() for part in parts]))
        addresses.add(next(iter(layer.parameters())).data_ptr())
    assert len(addresses) == 1


def test_groups_that_straddle_vllms_ranks_are_divided(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = StoredWeight.random(rng, 16, 11008, 128)
    for rank in range(4):
        on_rank(rank, 4, monkeypatch)
        layer = linear.RowParallelLinear(
            *(11008, 16),
            bias=False,
            params_dtype=torch.float16,
            quant_config=config_of("gptq", 128),
            prefix="model.down_proj",
            reduce_results=False,
        )
        load(layer, [stored.gptq()], [None], (16, 11008))
        layer.quant_method.process_weights_after_loading(layer)
        rows = slice(rank * 2752, (rank + 1) * 2752)
        x = activations(rng, 2, 2752)
        assert_is_product(layer(x)[0], x, stored.dequantized()[:, rows])
