"""The engines' interfaces: the record agrees with their sources, with what the plug-ins use, and with the fakes."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import engine_interfaces as interfaces
import pytest

ENGINES = list(interfaces.WANTED)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_sources_are_as_recorded(engine: str) -> None:
    archive = interfaces.archive_of(engine)
    if archive is None:
        pytest.skip(f"{interfaces.SOURCES_VARIABLE} names no folder with a wheel of {engine}, and it is not installed")
    assert interfaces.read_interface(archive, engine) == interfaces.recorded()[engine]["files"]


@pytest.mark.parametrize("engine", ENGINES)
def test_everything_that_is_used_is_recorded(engine: str) -> None:
    files = interfaces.recorded()[engine]["files"]
    assert {path: set(names) for path, names in files.items()} == {
        path: set(names) for path, names in interfaces.WANTED[engine].items()
    }
    assert [name for names in files.values() for name, found in names.items() if found is None] == []


def recorded(engine: str, name: str) -> Any:
    """Return what is recorded of a name of an engine."""
    (found,) = [names[name] for names in interfaces.recorded()[engine]["files"].values() if name in names]
    return found


def arguments(function: Any) -> list[str]:
    """Return the names of a function's arguments, without those that take all others."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = inspect.signature(getattr(function, "__func__", function)).parameters.values()
    return [parameter.name for parameter in found if parameter.kind in named]


VLLM, SGLANG = "w4a16gen.integrations.vllm", "w4a16gen.integrations.sglang"
GPTQMODEL = "w4a16gen.integrations.gptqmodel.kernels"
OVERRIDES = [
    ("vllm", "MPLinearKernel.can_implement", f"{VLLM}.kernel", "LinearKernel.can_implement"),
    ("vllm", "MPLinearKernel.get_min_capability", f"{VLLM}.kernel", "LinearKernel.get_min_capability"),
    (
        "vllm",
        "MPLinearKernel.process_weights_after_loading",
        f"{VLLM}.kernel",
        "LinearKernel.process_weights_after_loading",
    ),
    ("vllm", "MPLinearKernel.apply_weights", f"{VLLM}.kernel", "LinearKernel.apply_weights"),
    ("vllm", "AutoGPTQConfig.__init__", f"{VLLM}.gptq", "ConfigOverride.__init__"),
    ("vllm", "AutoGPTQConfig.get_quant_method", f"{VLLM}.gptq", "ConfigOverride.get_quant_method"),
    ("vllm", "LinearMethodBase.create_weights", f"{VLLM}.gptq", "LinearMethod.create_weights"),
    ("vllm", "AutoGPTQLinearMethod.create_weights", f"{VLLM}.gptq", "LinearMethod.create_weights"),
    ("vllm", "LinearMethodBase.apply", f"{VLLM}.gptq", "LinearMethod.apply"),
    ("vllm", "AutoAWQConfig.get_quant_method", f"{VLLM}.experts", "ExpertsOverride.get_quant_method"),
    ("vllm", "CompressedTensorsConfig.get_quant_method", f"{VLLM}.experts", "ExpertsOverride.get_quant_method"),
    ("vllm", "FusedMoEMethodBase.create_weights", f"{VLLM}.experts", "ExpertsMethod.create_weights"),
    ("vllm", "AutoGPTQMoEMethod.create_weights", f"{VLLM}.experts", "ExpertsMethod.create_weights"),
    (
        "vllm",
        "FusedMoEMethodBase.get_fused_moe_quant_config",
        f"{VLLM}.experts",
        "ExpertsMethod.get_fused_moe_quant_config",
    ),
    *(
        ("vllm", f"FusedMoEExpertsModular.{name}", f"{VLLM}.modular_experts", f"ModularExperts.{name}")
        for name in ("moe_problem_size", "workspace_shapes", "apply", "finalize_weight_and_reduce_impl")
    ),
    ("sglang", "GPTQMarlinLinearKernel.__init__", f"{SGLANG}.kernels", "GPTQKernel.__init__"),
    ("sglang", "GPTQMarlinLinearKernel.apply", f"{SGLANG}.kernels", "GPTQKernel.apply"),
    ("sglang", "AWQMarlinLinearKernel.__init__", f"{SGLANG}.kernels", "AWQKernel.__init__"),
    ("sglang", "AWQMarlinLinearKernel.apply", f"{SGLANG}.kernels", "AWQKernel.apply"),
    ("gptqmodel", "BaseQuantLinear.validate_once", GPTQMODEL, "GPTQLinear.validate_once"),
    ("gptqmodel", "BaseQuantLinear.validate_device", GPTQMODEL, "AWQLinear.validate_device"),
    ("gptqmodel", "BaseQuantLinear.post_init", GPTQMODEL, "GPTQLinear.post_init"),
]
"""An engine's method, and the one of this package that stands before it with the same arguments."""


@pytest.mark.parametrize(("engine", "theirs", "module", "ours"), OVERRIDES, ids=[row[1] for row in OVERRIDES])
def test_methods_have_the_engines_arguments(engine: str, theirs: str, module: str, ours: str) -> None:
    pytest.importorskip("torch")
    name, _, method = ours.partition(".")
    function = getattr(getattr(importlib.import_module(module), name), method)
    assert arguments(function) == recorded(engine, theirs)


def test_constructors_take_what_the_engines_pass() -> None:
    pytest.importorskip("torch")
    kernel = importlib.import_module(f"{VLLM}.kernel").LinearKernel
    assert arguments(kernel.__init__)[:-1] == recorded("vllm", "MPLinearKernel.__init__")
    linear = importlib.import_module(GPTQMODEL).GPTQLinear
    known = {"backend", "name", "dtype", "format", "register_buffers_in_features", "register_buffers_out_features"}
    assert set(arguments(linear.__init__)) == set(recorded("gptqmodel", "GPTQQuantLinear.__init__")) - known


def test_hooks_take_the_arguments_of_the_methods_that_they_go_around() -> None:
    pytest.importorskip("torch")
    scheme = importlib.import_module(f"{SGLANG}.scheme")
    for method, hook in (("process_weights_after_loading", "around_process"), ("apply_weights", "around_apply")):
        theirs = recorded("sglang", f"CompressedTensorsWNA16.{method}")
        assert arguments(getattr(scheme, hook))[2:] == theirs[1:]


def test_fields_and_groups_are_those_that_are_used() -> None:
    fields = {"partition_weight_shape", "weight_type", "act_type", "group_size", "zero_points"}
    assert fields <= set(recorded("vllm", "MPLinearLayerConfig"))
    assert fields | {"has_g_idx"} <= set(recorded("sglang", "MarlinLinearLayerConfig"))
    of_experts = {"moe_backend", "has_bias", "activation", "swiglu_limit", "swiglu_alpha", "swiglu_beta"}
    assert of_experts | {"hidden_dim", "intermediate_size_per_partition"} <= set(recorded("vllm", "FusedMoEConfig"))
    assert recorded("vllm", "DEFAULT_PLUGINS_GROUP") == "vllm.general_plugins"
    assert recorded("sglang", "GENERAL_PLUGINS_GROUP") == "sglang.srt.plugins"


FAKES = {
    "vllm": (
        *("MPLinearLayerConfig", "MPLinearKernel.__init__", "MPLinearKernel.can_implement", "choose_mp_linear_kernel"),
        *("MPLinearKernel.process_weights_after_loading", "MPLinearKernel.apply_weights", "AutoGPTQConfig.__init__"),
        *("AutoGPTQConfig.get_quant_method", "get_linear_quant_method", "register_quantization_config"),
        *("BasevLLMParameter.__init__", "RowvLLMParameter.__init__", "register_weight_loader_v2_supported_method"),
        *("LinearMethodBase.apply", "FusedMoEMethodBase.create_weights", "CompressedTensorsWNA16MoEMethod.__init__"),
        *("FusedMoEKernel.__init__", "maybe_make_prepare_finalize", "AutoAWQConfig.get_quant_method"),
        "FusedMoEMethodBase.get_fused_moe_quant_config",
    ),
    "sglang": (
        *("MarlinLinearLayerConfig", "HookRegistry.register", "CompressedTensorsWNA16.process_weights_after_loading"),
        *("CompressedTensorsWNA16.apply_weights", "GPTQMarlinLinearKernel.__init__", "AWQMarlinLinearKernel.apply"),
    ),
    "gptqmodel": ("Lora.apply", "BaseQuantLinear.validate_once", "BaseQuantLinear.validate_device"),
}
"""What the stand-ins must have as it is recorded."""
FAKE_MODULES = {
    "vllm": [f"fakes.vllm_package.{name}" for name in ("kernels", "parameters", "layers", "configs", "experts")],
    "sglang": ["fakes.sglang_package.engine"],
    "gptqmodel": ["fakes.gptqmodel_package.package"],
}


@pytest.mark.parametrize(("engine", "name"), [(engine, name) for engine, names in FAKES.items() for name in names])
def test_the_stand_ins_have_the_engines_interface(engine: str, name: str) -> None:
    pytest.importorskip("torch")
    texts = [Path(str(importlib.import_module(module).__file__)).read_text() for module in FAKE_MODULES[engine]]
    found = [interface for text in texts if (interface := interfaces.interface_of(text, name)) is not None]
    inherited = name.rpartition(".")[0] in ("GPTQMarlinLinearKernel", "AWQMarlinLinearKernel")
    if inherited:
        found = [interfaces.interface_of(texts[0], f"_Marlin.{name.rpartition('.')[2]}")]
    assert found == [recorded(engine, name)]


def test_the_required_attributes_of_gptqmodel_are_those_of_the_stand_in() -> None:
    pytest.importorskip("torch")
    package = importlib.import_module("fakes.gptqmodel_package.package")
    needed = {*recorded("gptqmodel", "BaseQuantLinear"), *recorded("gptqmodel", "GroupedQuantLinear")}
    optional = {"SUPPORTS_BACKEND_SELECTION", "SUPPORTS_SHARDED_LOAD", "SUPPORTS_TRAINING_USE_TORCH_KERNEL"}
    names = {name for name in needed if name.startswith("SUPPORTS_")} - optional
    assert names == {f"SUPPORTS_{name}" for name in package.REQUIRED}


def test_importing_the_package_or_the_plug_in_imports_no_engine_and_no_torch() -> None:
    command = (
        "import sys, w4a16gen, w4a16gen.integrations.vllm.plugin, w4a16gen.integrations.sglang.plugin; w4a16gen.gemm; "
        "import w4a16gen.integrations.gptqmodel; "
        "print([name for name in sys.modules if name.split('.')[0] in ('torch', 'vllm', 'sglang', 'gptqmodel')])"
    )
    printed = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)  # noqa: S603
    assert printed.stdout.strip() == "[]"
