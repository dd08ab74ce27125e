"""The kernels of GPTQModel in a stand-in: registered at the front, checked, loaded, and exact."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from fakes.engine_layers import StoredWeight, activations, assert_is_product  # noqa: E402
from fakes.gptqmodel_package import package  # noqa: E402

from w4a16gen import InvalidValueError, MissingToolError  # noqa: E402
from w4a16gen.integrations.engines import limits  # noqa: E402
from w4a16gen.integrations.gptqmodel import kernels, register, registration  # noqa: E402

K, N = 256, 64
ALL = ["gptq: gptq", "gptq: gptq_v2", "awq: gemm"]


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Install the stand-in, on a Hopper GPU whose build has every kernel."""
    monkeypatch.setattr(limits, "why_no_kernel", lambda *_: None)
    monkeypatch.setattr(kernels, "capability_of", lambda _: (9, 0))
    monkeypatch.setattr(registration, "_classes", {})
    return package.install(monkeypatch)


def table(engine: dict[str, Any]) -> Any:
    return engine["gptqmodel.utils.importer"].AUTO_BACKEND_KERNEL_MAPPING


def gptq_class(engine: dict[str, Any]) -> Any:
    register()
    return next(iter(table(engine)[package.METHOD.GPTQ][package.FORMAT.GPTQ].values()))


def awq_class(engine: dict[str, Any]) -> Any:
    register()
    return next(iter(table(engine)[package.METHOD.AWQ][package.FORMAT.GEMM].values()))


def layer_of(kind: Any, group: int, tensors: dict[str, Any], **options: Any) -> Any:
    """Return a layer that is loaded and packed."""
    values = {"bits": 4, "group_size": group, "desc_act": False, "sym": True, "in_features": K, "out_features": N}
    layer = kind(**(values | options))
    for name, tensor in tensors.items():
        getattr(layer, name).copy_(tensor)
    layer.post_init()
    return layer


def test_the_kernels_are_first_and_register_can_be_called_twice(engine: dict[str, Any]) -> None:
    assert register() == ALL
    assert register() == ALL
    kinds = table(engine)
    for method, formats in kinds.items():
        for kind, found in formats.items():
            names = [kernel.__name__ for kernel in found.values()]
            ours = f"W4A16Gen{'AWQ' if method is package.METHOD.AWQ else 'GPTQ'}Linear"
            assert names == (["Machete"] if kind is package.FORMAT.GEMV else [ours, "Machete"])
    assert set(gptq_class(engine).SUPPORTS_FORMATS) == {package.FORMAT.GPTQ, package.FORMAT.GPTQ_V2}
    assert gptq_class(engine).REQUIRES_FORMAT_V2
    assert not awq_class(engine).REQUIRES_FORMAT_V2


@pytest.mark.parametrize("group", [32, 64, 128, 256, -1])
@pytest.mark.parametrize("is_symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act-order"])
def test_gptq_layers_multiply_exactly(
    group: int, is_symmetric: bool, act_order: bool, engine: dict[str, Any], rng: np.random.Generator
) -> None:
    stored = StoredWeight.random(rng, N, K, group, is_symmetric=is_symmetric, act_order=act_order)
    tensors = stored.gptq(version=2, with_order=True)
    layer = layer_of(gptq_class(engine), group, tensors, sym=is_symmetric, desc_act=act_order, bias=True)
    layer.bias.copy_(activations(rng, 1, N)[0])
    for dtype in (torch.float16, torch.bfloat16):
        x = activations(rng, 6, K, dtype)
        assert_is_product(layer(x), x, stored.dequantized(), layer.bias)
        assert torch.equal(layer(x.view(2, 3, K)), layer(x).view(2, 3, N))
    assert layer.was_initialised
    assert layer(x[:0]).shape == (0, N)
    assert {name for name, _ in layer.named_buffers()} <= {"qweight", "bias", "w4a16gen_index"}


@pytest.mark.parametrize("group", [32, 128, -1])
def test_awq_layers_multiply_exactly(group: int, engine: dict[str, Any], rng: np.random.Generator) -> None:
    stored = StoredWeight.random(rng, N, K, group, is_symmetric=False, first_point=0)
    layer = layer_of(awq_class(engine), group, stored.awq(), sym=False)
    x = activations(rng, 3, K)
    assert_is_product(layer(x), x, stored.dequantized())


def test_an_adapter_is_applied(engine: dict[str, Any], rng: np.random.Generator) -> None:
    stored = StoredWeight.random(rng, N, K, 64)
    x = activations(rng, 3, K)
    plain = layer_of(gptq_class(engine), 64, stored.gptq(version=2))
    adapted = layer_of(gptq_class(engine), 64, stored.gptq(version=2), adapter=package.Lora())
    assert torch.equal(adapted(x), plain(x) + 1)


@pytest.mark.parametrize(
    ("args", "part"),
    [
        ({"bits": 8}, "bits = 8"),
        ({"group_size": 48}, "group_size = 48"),
        ({"in_features": 250, "out_features": 64, "group_size": -1}, "k of 250 must be a positive multiple of 8"),
        ({"in_features": 256, "out_features": 64, "dtype": torch.float32}, "dtype float32 must be float16 or bfloat16"),
        ({"device": package.DEVICE.CPU}, "there is no CUDA GPU"),
        ({"device": torch.device("cuda:1")}, "compute capability 8.0 must be 9.0"),
    ],
    ids=str,
)
def test_refusals_are_sentences(
    args: dict[str, Any], part: str, engine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = gptq_class(engine)
    assert kind.validate(bits=4, group_size=64)[0]
    if "device" in args:
        found = None if args["device"] is package.DEVICE.CPU else (8, 0)
        monkeypatch.setattr(kernels, "capability_of", lambda _: found)
    is_valid, error = kind.validate(**({"bits": 4, "group_size": 64} | args))
    assert not is_valid
    assert part in str(error)


def test_a_machine_without_a_gpu_has_no_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert kernels.capability_of(package.DEVICE.CPU) is None
    assert kernels.capability_of(torch.device("cpu")) is None


def test_a_layer_that_is_called_before_it_is_packed_says_so(engine: dict[str, Any]) -> None:
    values = {"bits": 4, "group_size": 64, "desc_act": False, "sym": True, "in_features": K, "out_features": N}
    with pytest.raises(InvalidValueError, match=r"call post_init\(\) first"):
        gptq_class(engine)(**values)(torch.ones(1, K))


def test_the_switch_turns_them_off(engine: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    kind = gptq_class(engine)
    monkeypatch.setenv("W4A16GEN_PLUGINS", "off")
    assert register() == []
    assert "W4A16GEN_PLUGINS is 'off'" in str(kind.validate(bits=4, group_size=64)[1])


def test_without_gptqmodel_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(_name: str) -> None:
        raise ModuleNotFoundError("No module named 'gptqmodel'", name="gptqmodel")

    monkeypatch.setattr(importlib, "import_module", not_installed)
    with pytest.raises(MissingToolError, match=r"^gptqmodel is not installed: pip install gptqmodel$"):
        register()


@pytest.mark.parametrize("name", ["gptqmodel.utils.importer", "gptqmodel.quantization"])
def test_without_a_part_of_gptqmodel_it_says_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        MissingToolError, match=r"no table of kernels that is known .*`pip install gptqmodel`, or update"
    ):
        register()


def test_without_its_table_it_says_so(engine: dict[str, Any]) -> None:
    del engine["gptqmodel.utils.importer"].AUTO_BACKEND_KERNEL_MAPPING
    with pytest.raises(MissingToolError, match="AUTO_BACKEND_KERNEL_MAPPING"):
        register()
