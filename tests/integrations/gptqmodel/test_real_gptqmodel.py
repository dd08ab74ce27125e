"""The kernels in GPTQModel's own code: selected by it, made by it, and exact, on a machine without a GPU.

It runs where GPTQModel can be imported: its source archive, unpacked into a folder of PYTHONPATH, is enough beside what
that imports. The test answers for the GPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fakes.engine_code import importing

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore")  # of GPTQModel and what it imports
with importing("GPTQModel"):
    importer: Any = importlib.import_module("gptqmodel.utils.importer")
    quantization: Any = importlib.import_module("gptqmodel.quantization")
    places: Any = importlib.import_module("gptqmodel.models._const")
    backends: Any = importlib.import_module("gptqmodel.utils.backend")

from fakes.engine_layers import StoredWeight, activations, assert_is_product  # noqa: E402

from w4a16gen.integrations.engines import limits  # noqa: E402
from w4a16gen.integrations.gptqmodel import kernels, register  # noqa: E402

K, N = 256, 64


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Register the kernels on a Hopper GPU whose build has every kernel, and take them out again."""
    monkeypatch.setattr(limits, "why_no_kernel", lambda *_: None)
    monkeypatch.setattr(kernels, "capability_of", lambda _: (9, 0))
    importer.clear_validation_cache()
    assert register() == ["gptq: gptq", "gptq: gptq_v2", "awq: gemm"]
    yield
    importer.clear_validation_cache()
    for formats in importer.AUTO_BACKEND_KERNEL_MAPPING.values():
        for found in formats.values():
            found.pop("w4a16gen", None)


def selected(kind: str, form: str, group: int, *, desc_act: bool = False, sym: bool = True) -> Any:
    """Return the class that GPTQModel selects for a model on a CUDA GPU."""
    return importer.select_quant_linear(
        bits=4,
        group_size=group,
        desc_act=desc_act,
        sym=sym,
        device=places.DEVICE.CUDA,
        backend=backends.BACKEND.AUTO,
        format=quantization.FORMAT(form),
        quant_method=quantization.METHOD(kind),
        pack_dtype=torch.int32,
        dtype=torch.float16,
    )


def layer_of(kind: Any, group: int, tensors: dict[str, Any], *, desc_act: bool = False, sym: bool = True) -> Any:
    """Return a layer that is made, loaded and packed as GPTQModel does it."""
    layer = kind(
        bits=4,
        group_size=group,
        desc_act=desc_act,
        sym=sym,
        in_features=K,
        out_features=N,
        bias=True,
        pack_dtype=torch.int32,
        name="model.layers.0.up_proj",
        backend=backends.BACKEND.AUTO,
        adapter=None,
        register_buffers=True,
    )
    state = {**layer.state_dict(), **tensors}
    layer.load_state_dict(state)
    layer.post_init()
    return layer.eval()


@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("group", [32, 64, 256, -1])
@pytest.mark.parametrize(("sym", "desc_act"), [(True, False), (True, True), (False, True)])
def test_gptq_layers_are_selected_and_exact(
    form: str, group: int, sym: bool, desc_act: bool, rng: np.random.Generator
) -> None:
    kind = selected("gptq", form, group, desc_act=desc_act, sym=sym)
    assert kind.__name__ == "W4A16GenGPTQLinear"
    stored = StoredWeight.random(rng, N, K, group, is_symmetric=sym, act_order=desc_act)
    bias = activations(rng, 1, N)[0]
    tensors = stored.gptq(version=2, with_order=True) | {"bias": bias}
    layer = layer_of(kind, group, tensors, desc_act=desc_act, sym=sym)
    x = activations(rng, 4, K)
    assert_is_product(layer(x), x, stored.dequantized(), bias)
    assert layer(x[:0]).shape == (0, N)
    assert layer.runtime_device() == x.device
    assert {tensor.dtype for tensor in layer.list_buffers()} <= {torch.uint8, torch.float16, torch.int64}


@pytest.mark.parametrize("group", [32, 128, -1])
def test_awq_layers_are_selected_and_exact(group: int, rng: np.random.Generator) -> None:
    kind = selected("awq", "gemm", group, sym=False)
    assert kind.__name__ == "W4A16GenAWQLinear"
    stored = StoredWeight.random(rng, N, K, group, is_symmetric=False)
    bias = activations(rng, 1, N)[0]
    layer = layer_of(kind, group, stored.awq() | {"bias": bias}, sym=False)
    x = activations(rng, 4, K)
    assert_is_product(layer(x), x, stored.dequantized(), bias)


def test_what_is_refused_goes_to_another_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "capability_of", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    kind = next(iter(importer.AUTO_BACKEND_KERNEL_MAPPING[quantization.METHOD.GPTQ][quantization.FORMAT.GPTQ].values()))
    is_valid, error = importer.validate_quant_linear(
        kind, bits=4, group_size=64, desc_act=False, sym=True, pack_dtype=torch.int32, device=places.DEVICE.CUDA
    )
    assert not is_valid
    assert "does not support device" in str(error)


def test_the_selection_by_name_still_finds_one_class() -> None:
    found = importer.get_kernel_for_backend(
        backends.BACKEND.GPTQ_MACHETE, quantization.METHOD.GPTQ, quantization.FORMAT.GPTQ
    )
    assert found.__name__ == "MacheteLinear"
