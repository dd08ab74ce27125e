"""The plug-in of SGLang in a stand-in: hooks are applied, layers are served or left to SGLang, and nothing raises."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from fakes.engine_layers import StoredWeight, activations, assert_is_product  # noqa: E402
from fakes.sglang_package import engine as sglang  # noqa: E402
from fakes.sglang_package.installed import HOOKS, MODULES, install  # noqa: E402
from fakes.vllm_package.kernels import scalar_types  # noqa: E402
from paths import ROOT  # noqa: E402

from w4a16gen.integrations.engines import limits  # noqa: E402
from w4a16gen.integrations.engines.count import ServedCount  # noqa: E402
from w4a16gen.integrations.sglang import kernels, plugin, scheme  # noqa: E402

K, N = 256, 64
LOGGER = "w4a16gen.sglang"
GPU = "sglang.srt.hardware_backend.gpu.quantization"
GPTQ_DIMS = {
    "qweight": {"input_dim": 0, "output_dim": 1, "packed_dim": 0},
    "qzeros": {"input_dim": 0, "output_dim": 1, "packed_dim": 1},
    "scales": {"input_dim": 0, "output_dim": 1},
    "g_idx": {"input_dim": 0},
}
AWQ_DIMS = GPTQ_DIMS | {"qweight": {"input_dim": 0, "output_dim": 1, "packed_dim": 1}}
COMPRESSED_DIMS = {
    "weight_packed": {"input_dim": 1, "output_dim": 0, "packed_dim": 1},
    "weight_scale": {"input_dim": 1, "output_dim": 0},
    "weight_zero_point": {"input_dim": 1, "output_dim": 0, "packed_dim": 0},
    "weight_g_idx": {"input_dim": 0},
}


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Install the stand-in with the plug-in, on a Hopper GPU whose build has every kernel."""
    made = install(monkeypatch)
    monkeypatch.setattr(limits, "why_no_kernel", lambda *_: None)
    monkeypatch.setattr(kernels, "capability_of", lambda _: (9, 0))
    count = ServedCount(kernels.COUNT._logger)  # noqa: SLF001
    monkeypatch.setattr(kernels, "COUNT", count)
    monkeypatch.setattr(scheme, "COUNT", count)
    plugin.register()
    sglang.HookRegistry.apply_hooks(made)
    return made


def config(group: int, *, zero_points: bool = False, has_g_idx: bool = False, dtype: Any = torch.float16) -> Any:
    kind = scalar_types.uint4 if zero_points else scalar_types.uint4b8
    return sglang.MarlinLinearLayerConfig((K, N), (K, N), kind, dtype, group, zero_points, has_g_idx)


def gptq_kernel(made: dict[str, Any], **options: Any) -> Any:
    kernel = made[f"{GPU}.gptq_kernels"].GPTQMarlinLinearKernel("a config")
    kernel.kernel_config = config(**options)
    return kernel


def awq_kernel(made: dict[str, Any], group: int, layer: Any) -> Any:
    layer.input_size_per_partition, layer.output_size_per_partition = K, N
    quantization = SimpleNamespace(group_size=group, weight_bits=4)
    return made[f"{GPU}.awq_kernels"].AWQMarlinLinearKernel(quantization)


@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize("has_g_idx", [False, True], ids=["in order", "act-order"])
def test_gptq_layers_multiply_exactly_and_reload(
    group: int, has_g_idx: bool, engine: dict[str, Any], rng: np.random.Generator
) -> None:
    kernel, layer, addresses = gptq_kernel(engine, group=group, has_g_idx=has_g_idx), torch.nn.Module(), set()
    for _ in range(2):
        stored = StoredWeight.random(rng, N, K, group, act_order=has_g_idx)
        sglang.fill(layer, stored.gptq(with_order=True), GPTQ_DIMS)
        kernel.process_weights_after_loading(layer)
        x, bias = activations(rng, 3, K), activations(rng, 1, N)[0]
        assert_is_product(kernel.apply(layer, x, bias), x, stored.dequantized(), bias)
        addresses.add(layer.qweight.data_ptr())
    assert len(addresses) == 1
    assert [name for name, _ in layer.named_parameters()] == ["qweight"]


@pytest.mark.parametrize("group", [32, 128, -1])
def test_awq_layers_multiply_exactly(group: int, engine: dict[str, Any], rng: np.random.Generator) -> None:
    stored = StoredWeight.random(rng, N, K, group, is_symmetric=False, first_point=0)
    stored = stored.with_bfloat_scales()
    tensors = stored.awq()
    layer = sglang.layer_of(tensors | {"scales": tensors["scales"].bfloat16()}, AWQ_DIMS)
    kernel = awq_kernel(engine, group, layer)
    kernel.process_weights_after_loading(layer)
    x = activations(rng, 3, K, torch.bfloat16)
    assert_is_product(kernel.apply(layer, x), x, stored.dequantized())


@pytest.mark.parametrize(("group", "is_symmetric"), [(32, True), (128, False), (-1, True)])
def test_compressed_tensors_layers_multiply_exactly(group: int, is_symmetric: bool, rng: np.random.Generator) -> None:
    stored = StoredWeight.random(rng, N, K, group, is_symmetric=is_symmetric)
    layer = sglang.layer_of(stored.compressed(), COMPRESSED_DIMS)
    made = sglang.CompressedTensorsWNA16()
    made.create_weights(layer, config(group, zero_points=not is_symmetric))
    x = activations(rng, 3, K)
    for _ in range(2):
        made.process_weights_after_loading(layer)
        assert_is_product(made.apply_weights(layer, x, None), x, stored.dequantized())
        sglang.fill(layer, stored.compressed(), COMPRESSED_DIMS)


def test_what_is_not_served_goes_to_sglang(engine: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    kernel = gptq_kernel(engine, group=128, dtype=torch.float32)
    layer = sglang.layer_of({"qweight": torch.zeros(K // 8, N, dtype=torch.int32)}, GPTQ_DIMS)
    made = sglang.CompressedTensorsWNA16()
    made.create_weights(layer, config(48))
    layer.weight_packed = torch.zeros(1, dtype=torch.int32)
    with caplog.at_level("INFO", logger=LOGGER):
        kernel.process_weights_after_loading(layer)
        assert layer.processed_by_sglang
        made.process_weights_after_loading(layer)
    assert kernel.apply(layer, torch.ones(1, K)) == "SGLang"
    assert made.apply_weights(layer, torch.ones(1, K), None) == "SGLang"
    left = "w4a16gen leaves a 4-bit linear layer to other kernels: "
    assert [record.message.removeprefix(left) for record in caplog.records] == [
        "activations of dtype float32 must be float16 or bfloat16: pass --dtype float16",
        "group size 48 must be -1, 256 (= k) or a multiple of 32",
        "w4a16gen serves 0 of 2 4-bit linear layers",
    ]


def test_the_classes_are_sglangs_own(engine: dict[str, Any]) -> None:
    kernel = gptq_kernel(engine, group=128)
    assert isinstance(kernel, sglang.GPTQMarlinLinearKernel)
    assert type(kernel).__name__ == "W4A16GenGPTQMarlinLinearKernel"
    assert kernel.quant_config == "a config"


def test_the_function_can_be_called_twice(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger=LOGGER):
        plugin.register()
    assert "goes before SGLang's Marlin kernels" in caplog.records[0].message
    assert [len(hooks) for hooks in sglang.HookRegistry._hooks.values()] == [1] * 15  # noqa: SLF001


@pytest.mark.parametrize("name", [name for name in MODULES if "schemes" not in name])
def test_absent_parts_never_raise(name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    made = install(monkeypatch)
    for member in MODULES[name]:
        delattr(made[name], member)
    with caplog.at_level("INFO", logger=LOGGER):
        plugin.register()
    assert caplog.records[-1].message.startswith("w4a16gen leaves SGLang alone: ")


def test_without_sglang_it_says_so(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, HOOKS, None)
    with caplog.at_level("INFO", logger=LOGGER):
        plugin.register()
    assert caplog.records[-1].message.startswith("w4a16gen leaves SGLang alone: ")


def test_the_entry_point_names_the_function() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    line = 'w4a16gen = "w4a16gen.integrations.sglang.plugin:register"'
    assert f'[project.entry-points."sglang.srt.plugins"]\n{line}' in text
