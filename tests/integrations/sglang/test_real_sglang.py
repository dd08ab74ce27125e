"""The plug-in in SGLang's own code: its registry, schemes and parameters, on a machine without a GPU.

It runs where SGLang can be imported: its wheel, unpacked into a folder of PYTHONPATH, is enough beside what that
imports. The test answers for the GPU.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from fakes.engine_code import importing

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore")  # of SGLang and what it imports
QUANTIZATION = "sglang.srt.layers.quantization"
with importing("SGLang's linear layers"):
    importlib.import_module(QUANTIZATION)
    hooks: Any = importlib.import_module("sglang.srt.plugins.hook_registry")
    gptq: Any = importlib.import_module(f"{QUANTIZATION}.gptq")
    awq_config: Any = importlib.import_module(f"{QUANTIZATION}.awq.awq")
    gptq_scheme: Any = importlib.import_module(f"{QUANTIZATION}.gptq.schemes.gptq_marlin")
    awq_scheme: Any = importlib.import_module(f"{QUANTIZATION}.awq.schemes.awq_marlin")
    compressed: Any = importlib.import_module(f"{QUANTIZATION}.compressed_tensors.schemes.compressed_tensors_wNa16")
    marlin: Any = importlib.import_module(f"{QUANTIZATION}.marlin_utils")

from fakes.engine_layers import StoredWeight, activations, assert_is_product  # noqa: E402
from fakes.vllm_package.kernels import scalar_types  # noqa: E402

from w4a16gen.integrations.engines import limits  # noqa: E402
from w4a16gen.integrations.sglang import kernels, plugin  # noqa: E402

K, N = 512, 128


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Apply the hooks once, on what is taken for a Hopper GPU whose build has every kernel."""
    monkeypatch.setattr(limits, "why_no_kernel", lambda *_: None)
    monkeypatch.setattr(kernels, "capability_of", lambda _: (9, 0))
    for module in (gptq_scheme, awq_scheme, awq_config, marlin):
        for name in ("verify_marlin_supported", "verify_marlin_supports_shape"):
            monkeypatch.setattr(module, name, lambda *_, **__: None, raising=False)
    plugin.register()
    hooks.HookRegistry.apply_hooks()


def load(layer: Any, tensors: dict[str, Any]) -> None:
    """Copy the tensors of a checkpoint into a layer's parameters."""
    for name, tensor in tensors.items():
        if name in dict(layer.named_parameters()):
            getattr(layer, name).data.copy_(tensor)


def created(scheme: Any, k: int, rows: int | None = None, dtype: Any = torch.float16) -> Any:
    """Return a layer with the parameters that a scheme registers."""
    layer = torch.nn.Module()
    scheme.create_weights(
        layer=layer,
        input_size_per_partition=k,
        output_partition_sizes=[N],
        input_size=rows or k,
        output_size=N,
        params_dtype=dtype,
        weight_loader=lambda *_: None,
    )
    return layer


def gptq_config(group: int, *, desc_act: bool) -> Any:
    raw = {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": desc_act, "sym": True, "lm_head": False}
    config = gptq.GPTQMarlinConfig.from_config(raw)
    config.quant_type = scalar_types.uint4b8  # SGLang's own types come with its compiled kernels
    return config


@pytest.mark.parametrize("group", [32, 128, -1])
@pytest.mark.parametrize("desc_act", [False, True], ids=["in order", "act-order"])
def test_gptq_schemes_are_served(group: int, desc_act: bool, rng: np.random.Generator) -> None:
    scheme = gptq_scheme.GPTQMarlinLinearScheme(gptq_config(group, desc_act=desc_act))
    assert type(scheme.kernel).__name__ == "W4A16GenGPTQMarlinLinearKernel"
    stored = StoredWeight.random(rng, N, K, group, act_order=desc_act)
    layer = created(scheme, K)
    load(layer, stored.gptq(with_order=True))
    scheme.process_weights_after_loading(layer)
    x, bias = activations(rng, 3, K), activations(rng, 1, N)[0]
    assert_is_product(scheme.apply_weights(layer, x, bias), x, stored.dequantized(), bias)
    assert [name for name, _ in layer.named_parameters()] == ["qweight"]


def test_the_rows_of_a_rank_with_act_order_are_served(rng: np.random.Generator) -> None:
    stored = StoredWeight.random(rng, N, K, 64, act_order=True)
    tensors = stored.gptq(with_order=True)
    for rank in range(2):
        scheme = gptq_scheme.GPTQMarlinLinearScheme(gptq_config(64, desc_act=True))
        layer = created(scheme, K // 2, rows=K)
        rows = slice(rank * K // 2, (rank + 1) * K // 2)
        words = slice(rank * K // 16, (rank + 1) * K // 16)
        load(layer, tensors | {"qweight": tensors["qweight"][words], "g_idx": tensors["g_idx"][rows]})
        scheme.process_weights_after_loading(layer)
        x = activations(rng, 3, K // 2)
        assert_is_product(scheme.apply_weights(layer, x, None), x, stored.dequantized()[:, rows])


@pytest.mark.parametrize("group", [32, 128])
def test_awq_schemes_are_served(group: int, rng: np.random.Generator) -> None:
    raw = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    scheme = awq_scheme.AWQMarlinLinearScheme(awq_config.AWQMarlinConfig.from_config(raw))
    stored = StoredWeight.random(rng, N, K, group, is_symmetric=False, first_point=0)
    layer = created(scheme, K)
    load(layer, stored.awq())
    scheme.process_weights_after_loading(layer)
    x = activations(rng, 3, K)
    assert_is_product(scheme.apply_weights(layer, x, None), x, stored.dequantized())


@pytest.mark.parametrize(("group", "is_symmetric"), [(32, True), (128, False), (-1, True)])
def test_compressed_tensors_schemes_are_served(group: int, is_symmetric: bool, rng: np.random.Generator) -> None:
    strategy = "channel" if group == -1 else "group"
    scheme = compressed.CompressedTensorsWNA16(strategy, 4, None if group == -1 else group, is_symmetric)
    scheme.quant_type = scalar_types.uint4b8 if is_symmetric else scalar_types.uint4
    stored = StoredWeight.random(rng, N, K, group, is_symmetric=is_symmetric)
    layer = created(scheme, K)
    load(layer, stored.compressed())
    scheme.process_weights_after_loading(layer)
    x = activations(rng, 3, K, torch.bfloat16)
    assert_is_product(scheme.apply_weights(layer, x, None), x, stored.dequantized())


def test_the_function_works_before_anything_of_sglang_is_imported() -> None:
    command = (
        "import logging, sys; logging.basicConfig(level='INFO'); import sglang.srt.plugins.hook_registry; "
        "from w4a16gen.integrations.sglang import plugin; plugin.register()"
    )
    environment = {"PYTHONPATH": ":".join(path for path in sys.path if path), "PATH": "/usr/bin:/bin"}
    printed = subprocess.run(  # noqa: S603
        [sys.executable, "-c", command], capture_output=True, text=True, check=True, env=environment
    )
    if "torchvision" in printed.stderr:
        pytest.skip("SGLang needs torchvision in a process of its own")
    assert "goes before SGLang's Marlin kernels" in printed.stderr
