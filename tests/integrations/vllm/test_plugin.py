"""The plug-in's function: it raises nothing, whatever the engine looks like, and may be called twice."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points
from typing import Any

import pytest
from paths import ROOT

from w4a16gen.integrations.vllm import plugin

LOGGER = "vllm.w4a16gen"


def registered(caplog: pytest.LogCaptureFixture) -> str:
    """Call the function and return its line."""
    caplog.clear()
    with caplog.at_level("INFO", logger=LOGGER):
        plugin.register()
    assert len(caplog.records) == 1
    return caplog.records[0].message


def test_without_vllm_it_says_so(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("vllm.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert registered(caplog).startswith("w4a16gen leaves vLLM alone: ")


@pytest.mark.parametrize("value", ["off", "0", "no", "of"])
def test_the_switch_turns_it_off(value: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("W4A16GEN_PLUGINS", value)
    line = f"W4A16GEN_PLUGINS is {value!r}: unset it, or set it to on or float16, to use w4a16gen"
    assert registered(caplog) == f"w4a16gen leaves vLLM alone: {line}"


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Install the stand-in of vLLM."""
    pytest.importorskip("torch")
    from fakes.vllm_package.installed import install  # noqa: PLC0415  (imports torch)

    return install(monkeypatch)


LINEAR = "vllm.model_executor.kernels.linear"
QUANTIZATION = "vllm.model_executor.layers.quantization"


def test_it_is_first_and_can_be_called_twice(engine: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    first = registered(caplog)
    assert first == (
        "W4A16GenLinearKernel is first of vLLM's 2 mixed-precision linear kernels; GPTQ models with act-order, zero "
        "points or any group size are served; experts of GPTQ, AWQ and compressed-tensors are served"
    )
    assert registered(caplog) == first
    (kernels,) = engine[LINEAR]._POSSIBLE_KERNELS.values()  # noqa: SLF001
    assert [kernel.__name__ for kernel in kernels] == ["W4A16GenLinearKernel", "MacheteLinearKernel"]
    names = engine[QUANTIZATION]._CUSTOMIZED_METHOD_TO_QUANT_CONFIG  # noqa: SLF001
    assert {name: config.__name__ for name, config in names.items()} == {
        **dict.fromkeys(("auto_gptq", "gptq", "gptq_marlin"), "W4A16GenGPTQConfig"),
        **dict.fromkeys(("awq", "auto_awq"), "W4A16GenAWQConfig"),
        "compressed-tensors": "W4A16GenCompressedTensorsConfig",
    }


def test_a_plain_list_of_older_releases_is_known(engine: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    engine[LINEAR]._POSSIBLE_KERNELS = []  # noqa: SLF001
    assert "first of vLLM's 1 mixed" in registered(caplog)
    assert [kernel.__name__ for kernel in engine[LINEAR]._POSSIBLE_KERNELS] == ["W4A16GenLinearKernel"]  # noqa: SLF001


BROKEN: dict[str, tuple[str, str]] = {
    "no list": (LINEAR, "_POSSIBLE_KERNELS"),
    "no base class": (LINEAR, "MPLinearKernel"),
    "no platforms": ("vllm.platforms", "PlatformEnum"),
    "no configuration": (f"{QUANTIZATION}.auto_gptq", "AutoGPTQConfig"),
    "no registry": (QUANTIZATION, "register_quantization_config"),
    "no names": (QUANTIZATION, "QUANTIZATION_METHODS"),
    "no base of methods": ("vllm.model_executor.layers.linear", "LinearMethodBase"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_absent_parts_never_raise(name: str, engine: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    module, attribute = BROKEN[name]
    delattr(engine[module], attribute)
    line = registered(caplog)
    if module.startswith((LINEAR, "vllm.platforms")):
        assert line.startswith("w4a16gen leaves vLLM alone: ")
    else:  # the kernel is there without the configuration
        assert "first of vLLM's 2 mixed" in line
        assert "GPTQ models with act-order or zero points stay refused" in line


FUSED_MOE = "vllm.model_executor.layers.fused_moe"
WITHOUT_EXPERTS: dict[str, tuple[str, str]] = {
    "no method of GPTQ": (f"{QUANTIZATION}.auto_gptq", "AutoGPTQMoEMethod"),
    "no method of AWQ": (f"{QUANTIZATION}.auto_awq", "AutoAWQMoEMethod"),
    "no modular experts": (f"{FUSED_MOE}.modular_kernel", "FusedMoEExpertsModular"),
    "no dispatch": (f"{FUSED_MOE}.all2all_utils", "maybe_make_prepare_finalize"),
    "no configuration": (f"{FUSED_MOE}.config", "FUSED_MOE_UNQUANTIZED_CONFIG"),
    "no configuration of AWQ": (f"{QUANTIZATION}.auto_awq", "AutoAWQConfig"),
}


@pytest.mark.parametrize("name", WITHOUT_EXPERTS)
def test_absent_parts_of_experts_leave_the_rest(
    name: str, engine: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    module, attribute = WITHOUT_EXPERTS[name]
    delattr(engine[module], attribute)
    line = registered(caplog)
    assert "GPTQ models with act-order, zero points or any group size are served; experts are left to vLLM (" in line
    assert attribute in line
    names = engine[QUANTIZATION]._CUSTOMIZED_METHOD_TO_QUANT_CONFIG  # noqa: SLF001
    assert names["gptq"].__name__ == "W4A16GenGPTQConfig"


@pytest.mark.parametrize("name", [LINEAR, f"{QUANTIZATION}.auto_gptq", "vllm.model_executor.layers.linear"])
@pytest.mark.parametrize("error", [ImportError("moved"), RuntimeError("no device"), KeyError("x")], ids=repr)
def test_modules_that_break_on_import_never_raise(
    name: str, error: Exception, engine: dict[str, Any], caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    del engine
    monkeypatch.delitem(sys.modules, name)

    class Finder:
        @staticmethod
        def find_spec(wanted: str, _path: Any = None, _target: Any = None) -> None:
            if wanted == name:
                raise error

    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])
    registered(caplog)


def test_the_entry_points_name_functions() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert (
        '[project.entry-points."vllm.general_plugins"]\nw4a16gen = "w4a16gen.integrations.vllm.plugin:register"' in text
    )
    installed = [found for found in entry_points(group="vllm.general_plugins") if found.name == "w4a16gen"]
    assert all(found.load() is plugin.register for found in installed)
