"""The kernel in a stand-in of vLLM's loop: layers of three formats are loaded, divided among ranks, fused, reloaded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from fakes.engine_layers import StoredWeight, activations, assert_is_product  # noqa: E402
from fakes.vllm_package import configs, kernels, layers, parameters  # noqa: E402
from fakes.vllm_package.installed import install  # noqa: E402

from w4a16gen.integrations.engines import limits  # noqa: E402
from w4a16gen.integrations.vllm import plugin  # noqa: E402
from w4a16gen.integrations.vllm.kernel import COUNT  # noqa: E402

K, N = 512, 64
CASES = [
    ("gptq", 128, True),
    ("gptq", 32, True),
    ("gptq", -1, True),
    ("awq", 64, False),
    ("compressed-tensors", 128, True),
    ("compressed-tensors", 64, False),
    ("compressed-tensors", -1, True),
    ("compressed-tensors", -1, False),
]
"""Format, group size, and whether it is symmetric."""


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Install the stand-in with the plug-in, on a machine whose build has every kernel."""
    install(monkeypatch)
    monkeypatch.setattr(limits, "why_no_kernel", lambda *_: None)
    monkeypatch.setattr("w4a16gen.integrations.vllm.kernel.COUNT", type(COUNT)(COUNT._logger))  # noqa: SLF001
    plugin.register()


def config_of(kind: str, group: int, *, is_symmetric: bool) -> Any:
    """Return vLLM's configuration of a model."""
    if kind != "gptq":
        return configs.OtherConfig(kind, group, is_sym=is_symmetric)
    raw = {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": False, "sym": is_symmetric}
    return configs.get_quantization_config("gptq").from_config(raw)


def on_rank(rank: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parameters.World, "rank", rank)
    monkeypatch.setattr(parameters.World, "size", size)


@pytest.mark.parametrize(("kind", "group", "is_symmetric"), CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_layer_multiplies_exactly(
    kind: str, group: int, is_symmetric: bool, dtype: Any, rng: np.random.Generator
) -> None:
    stored = StoredWeight.random(rng, N, K, group, is_symmetric=is_symmetric)
    if dtype == torch.bfloat16:  # the scales that vLLM keeps in the dtype of activations
        stored = stored.with_bfloat_scales()
    layer = layers.LinearBase(K, [N], config_of(kind, group, is_symmetric=is_symmetric), "layer", params_dtype=dtype)
    layer.load_parts([stored.stored_as(kind)])
    assert type(layer.quant_method.kernel).__name__ == "W4A16GenLinearKernel"
    bias = activations(rng, 1, N, dtype)[0]
    for m in (1, 5):
        x = activations(rng, m, K, dtype)
        assert_is_product(layer(x), x, stored.dequantized())
        assert_is_product(layer(x, bias), x, stored.dequantized(), bias)
    x = activations(rng, 6, K, dtype)
    assert torch.equal(layer(x.view(2, 3, K)), layer(x).view(2, 3, N))


@pytest.mark.parametrize(("kind", "group", "is_symmetric"), CASES)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_of_a_fused_layer_hold_the_columns_of_the_whole(
    kind: str, group: int, is_symmetric: bool, size: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths = [64, 32, 32]
    parts = [StoredWeight.random(rng, width, K, group, is_symmetric=is_symmetric) for width in widths]
    config = config_of(kind, group, is_symmetric=is_symmetric)
    x = activations(rng, 3, K)
    shares: list[list[Any]] = [[] for _ in widths]
    for rank in range(size):
        on_rank(rank, size, monkeypatch)
        layer = layers.LinearBase(K, widths, config, "qkv_proj")
        layer.load_parts([part.stored_as(kind) for part in parts])
        for share, result in zip(shares, layer(x).split([width // size for width in widths], dim=1), strict=True):
            share.append(result)
    for share, part in zip(shares, parts, strict=True):
        assert_is_product(torch.cat(share, dim=1), x, part.dequantized())


@pytest.mark.parametrize(("kind", "group", "is_symmetric"), CASES)
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_of_a_row_parallel_layer_hold_the_rows_of_the_whole(
    kind: str, group: int, is_symmetric: bool, size: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = StoredWeight.random(rng, N, K, group, is_symmetric=is_symmetric)
    x = activations(rng, 3, K)
    for rank in range(size):
        on_rank(rank, size, monkeypatch)
        config = config_of(kind, group, is_symmetric=is_symmetric)
        layer = layers.LinearBase(K, [N], config, "down_proj", is_row_parallel=True)
        layer.load_parts([stored.stored_as(kind)])
        share = slice(rank * K // size, (rank + 1) * K // size)
        assert_is_product(layer(x[:, share]), x[:, share], stored.dequantized()[:, share])


@pytest.mark.parametrize(("kind", "group", "is_symmetric"), CASES)
def test_a_reload_keeps_the_address_and_takes_the_new_weight(
    kind: str, group: int, is_symmetric: bool, rng: np.random.Generator
) -> None:
    layer = layers.LinearBase(K, [N], config_of(kind, group, is_symmetric=is_symmetric), "layer")
    x, addresses = activations(rng, 2, K), set()
    for number in range(3):
        stored = StoredWeight.random(rng, N, K, group, is_symmetric=is_symmetric)
        if number:
            for name in list(layer._parameters):  # noqa: SLF001  (as vLLM puts the recorded parameters back)
                delattr(layer, name)
            layer.create()
        layer.load_parts([stored.stored_as(kind)])
        assert_is_product(layer(x), x, stored.dequantized())
        packed = next(iter(layer.parameters()))
        addresses.add(packed.data_ptr())
    assert len(addresses) == 1
    assert [parameter.dtype for parameter in layer.parameters()] == [torch.uint8]  # nothing else stays in memory


def test_the_log_says_how_many_layers_are_served(rng: np.random.Generator, caplog: pytest.LogCaptureFixture) -> None:
    config = config_of("compressed-tensors", 128, is_symmetric=True)
    refused = config_of("compressed-tensors", 48, is_symmetric=True)
    with caplog.at_level("INFO", logger="vllm.w4a16gen"):
        served = [layers.LinearBase(K, [N], config, "layer") for _ in range(2)]
        layers.LinearBase(96, [N], refused, "other")
        layers.LinearBase(96, [N], refused, "another")
        for layer in served:
            layer.load_parts([StoredWeight.random(rng, N, K, 128).compressed()])
    assert [record.message for record in caplog.records] == [
        "w4a16gen leaves a 4-bit linear layer to other kernels: group size 48 must be -1, 96 (= k) or a multiple of 32",
        "w4a16gen serves 2 of 4 4-bit linear layers",
    ]


def test_calls_compile_to_one_graph(rng: np.random.Generator) -> None:
    layer = layers.LinearBase(K, [N], config_of("awq", 64, is_symmetric=False), "layer")
    layer.load_parts([StoredWeight.random(rng, N, K, 64, is_symmetric=False).awq()])
    x = activations(rng, 2, K, torch.bfloat16)
    compiled = torch.compile(layer.quant_method.kernel.apply_weights, fullgraph=True, backend="eager")
    assert torch.equal(compiled(layer, x), layer(x))


def request(**changes: Any) -> Any:
    """Return vLLM's configuration of a layer that is served, changed."""
    values = {
        "full_weight_shape": (K, N),
        "partition_weight_shape": (K, N),
        "weight_type": kernels.scalar_types.uint4b8,
        "act_type": torch.float16,
        "group_size": 128,
        "zero_points": False,
    }
    return kernels.MPLinearLayerConfig(**(values | changes))


REFUSALS = {
    "activations of dtype float32 must be float16 or bfloat16: pass --dtype float16": {"act_type": torch.float32},
    "activations of dtype float8_e4m3fn must be": {"act_type": torch.float8_e4m3fn},
    "weights of type uint8b128 must be uint4b8 or uint4": {"weight_type": kernels.scalar_types.uint8b128},
    "weights of type uint4b8 take no zero points": {"zero_points": True},
    "weights of type uint4 need zero points": {"weight_type": kernels.scalar_types.uint4},
    "group size 48 must be -1, 96 (= k) or a multiple of 32": {"group_size": 48, "partition_weight_shape": (96, N)},
    "k of 2752 on this rank is no multiple of group size 128": {"partition_weight_shape": (2752, N)},
    "n of 63 must be a positive multiple of 8": {"partition_weight_shape": (K, 63)},
    "k of 516 must be a positive multiple of 8": {"partition_weight_shape": (516, N), "group_size": -1},
    "output of dtype torch.float32 must be that of the activations": {"out_type": torch.float32},
}


@pytest.mark.parametrize("sentence", REFUSALS)
def test_refusals_are_sentences(sentence: str) -> None:
    can, reason = kernel().can_implement(request(**REFUSALS[sentence]))
    assert not can
    assert reason is not None
    assert sentence in reason


def kernel() -> Any:
    return kernels._POSSIBLE_KERNELS[kernels.PlatformEnum.CUDA][0]  # noqa: SLF001


def test_a_layer_that_fits_is_not_refused() -> None:
    assert kernel().can_implement(request()) == (True, None)
    assert kernel().get_min_capability() == 90


@pytest.mark.parametrize(("capability", "part"), [((8, 0), "8.0 must be 9.0"), ((10, 0), "10.0 must be 9.0")])
def test_other_gpus_are_refused(capability: tuple[int, int], part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.Platform, "capability", capability)
    assert part in str(kernel().can_implement(request())[1])


def test_machines_without_a_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.Platform, "_enum", kernels.PlatformEnum.CPU)
    assert "there is no CUDA GPU" in str(kernel().can_implement(request())[1])


def test_releases_with_act_order_are_refused_and_their_constructor_is_known() -> None:
    config = request()
    config.has_g_idx = True
    assert "update vLLM" in str(kernel().can_implement(config)[1])
    old = kernel()(request(), w_q_param_name="q", w_s_param_name="s", w_zp_param_name="zp", w_gidx_param_name="g_idx")
    assert (old.w_q_name, old.w_gidx_name) == ("q", "g_idx")


def test_the_switch_refuses_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("W4A16GEN_PLUGINS", "float16")
    assert "W4A16GEN_PLUGINS is float16" in str(kernel().can_implement(request(act_type=torch.bfloat16))[1])
    assert kernel().can_implement(request()) == (True, None)
    monkeypatch.setenv("W4A16GEN_PLUGINS", "0")
    assert "W4A16GEN_PLUGINS is '0'" in str(kernel().can_implement(request())[1])
