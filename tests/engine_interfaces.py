"""What the plug-ins use of the engines, read from the engines' sources without importing them.

Sources come from the folder that W4A16GEN_ENGINE_SOURCES names, which holds wheels or source archives, or from an
installed package. `python tests/engine_interfaces.py FOLDER` records them in integrations/interfaces.json.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

SOURCES_VARIABLE = "W4A16GEN_ENGINE_SOURCES"
RECORDED = Path(__file__).parent / "integrations" / "interfaces.json"
_GPTQ_KERNELS = "sglang/srt/hardware_backend/gpu/quantization/gptq_kernels.py"
_SGLANG_SCHEME = "sglang/srt/layers/quantization/compressed_tensors/schemes/compressed_tensors_wNa16.py"
_SGLANG_LAYERS = "sglang/srt/layers"
_SGLANG_EXPERTS = f"{_SGLANG_LAYERS}/quantization/compressed_tensors/schemes/compressed_tensors_wNa16_moe.py"
_VLLM_LAYERS = "vllm/model_executor/layers"
_VLLM_COMPRESSED_EXPERTS = (
    f"{_VLLM_LAYERS}/quantization/compressed_tensors/compressed_tensors_moe/compressed_tensors_moe_wna16.py"
)
WANTED: dict[str, dict[str, tuple[str, ...]]] = {
    "vllm": {
        "vllm/plugins/__init__.py": ("DEFAULT_PLUGINS_GROUP", "load_general_plugins"),
        "vllm/model_executor/kernels/linear/__init__.py": ("_POSSIBLE_KERNELS", "choose_mp_linear_kernel"),
        "vllm/model_executor/kernels/linear/mixed_precision/MPLinearKernel.py": (
            *("MPLinearLayerConfig", "MPLinearKernel.__init__", "MPLinearKernel.can_implement"),
            *("MPLinearKernel.get_min_capability", "MPLinearKernel.process_weights_after_loading"),
            "MPLinearKernel.apply_weights",
        ),
        "vllm/platforms/interface.py": ("PlatformEnum.CUDA", "Platform.is_cuda", "Platform.get_device_capability"),
        "vllm/scalar_type.py": ("scalar_types.uint4", "scalar_types.uint4b8"),
        "vllm/model_executor/parameter.py": (
            *("BasevLLMParameter.__init__", "RowvLLMParameter.__init__", "PackedvLLMParameter.__init__"),
            *("PackedColumnParameter.__init__", "GroupQuantScaleParameter", "ChannelQuantScaleParameter"),
            *("PackedvLLMParameter.packed_dim", "RowvLLMParameter.input_dim", "_ColumnvLLMParameter.output_dim"),
        ),
        f"{_VLLM_LAYERS}/linear.py": (
            *("LinearMethodBase.create_weights", "LinearMethodBase.apply"),
            *("WEIGHT_LOADER_V2_SUPPORTED", "register_weight_loader_v2_supported_method"),
        ),
        f"{_VLLM_LAYERS}/quantization/__init__.py": (
            *("QUANTIZATION_METHODS", "_CUSTOMIZED_METHOD_TO_QUANT_CONFIG", "register_quantization_config"),
        ),
        f"{_VLLM_LAYERS}/quantization/base_config.py": ("QuantizationConfig.get_checkpoint_weight_mapper",),
        f"{_VLLM_LAYERS}/quantization/auto_gptq.py": (
            *("AutoGPTQConfig.TYPE_MAP", "AutoGPTQConfig.__init__", "AutoGPTQConfig.get_quant_method"),
            *("AutoGPTQLinearMethod.create_weights", "AutoGPTQMoEMethod.create_weights", "AutoGPTQMoEMethod.apply"),
        ),
        f"{_VLLM_LAYERS}/quantization/auto_awq.py": ("AutoAWQConfig.get_quant_method", "AutoAWQMoEMethod.apply"),
        f"{_VLLM_LAYERS}/quantization/compressed_tensors/compressed_tensors.py": (
            "CompressedTensorsConfig.get_quant_method",
        ),
        _VLLM_COMPRESSED_EXPERTS: ("CompressedTensorsWNA16MoEMethod.__init__", "CompressedTensorsWNA16MoEMethod.apply"),
        f"{_VLLM_LAYERS}/fused_moe/fused_moe_method_base.py": (
            *("FusedMoEMethodBase.create_weights", "FusedMoEMethodBase.get_fused_moe_quant_config"),
        ),
        f"{_VLLM_LAYERS}/fused_moe/modular_kernel.py": (
            *("FusedMoEActivationFormat.Standard", "FusedMoEExperts.__init__", "FusedMoEExperts.is_supported_config"),
            "FusedMoEExpertsModular.moe_problem_size",
            *("FusedMoEExpertsModular.workspace_shapes", "FusedMoEExpertsModular.apply"),
            *("FusedMoEExpertsModular.finalize_weight_and_reduce_impl", "FusedMoEKernel.__init__"),
        ),
        f"{_VLLM_LAYERS}/fused_moe/config.py": (
            *("FusedMoEConfig", "FUSED_MOE_UNQUANTIZED_CONFIG", "FusedMoEParallelConfig.use_all2all_kernels"),
            *("FusedMoEParallelConfig.use_ag_rs_all2all_kernels", "FusedMoEParallelConfig.use_passthrough_all2all"),
        ),
        f"{_VLLM_LAYERS}/fused_moe/all2all_utils.py": ("maybe_make_prepare_finalize",),
        f"{_VLLM_LAYERS}/fused_moe/topk_weight_and_reduce.py": ("TopKWeightAndReduceNoOP",),
        f"{_VLLM_LAYERS}/fused_moe/routed_experts.py": ("RoutedExperts._expert_routing_tables",),
        f"{_VLLM_LAYERS}/quantization/utils/gptq_utils.py": ("get_linear_quant_method", "override_config"),
        "vllm/model_executor/models/utils.py": ("WeightsMapper.orig_to_new_suffix",),
    },
    "sglang": {
        "sglang/srt/plugins/__init__.py": ("GENERAL_PLUGINS_GROUP", "load_plugins"),
        "sglang/srt/plugins/hook_registry.py": (
            "HookType.REPLACE",
            "HookType.AROUND",
            "HookRegistry._hooks",
            "HookRegistry.register",
        ),
        _GPTQ_KERNELS: (
            *("MarlinLinearLayerConfig", "GPTQMarlinLinearKernel.__init__", "GPTQMarlinLinearKernel.apply"),
            "GPTQMarlinLinearKernel.process_weights_after_loading",
        ),
        "sglang/srt/hardware_backend/gpu/quantization/awq_kernels.py": (
            *("AWQMarlinLinearKernel.__init__", "AWQMarlinLinearKernel.apply"),
            "AWQMarlinLinearKernel.process_weights_after_loading",
        ),
        _SGLANG_SCHEME: (
            *("CompressedTensorsWNA16.create_weights", "CompressedTensorsWNA16.process_weights_after_loading"),
            "CompressedTensorsWNA16.apply_weights",
        ),
        f"{_SGLANG_LAYERS}/quantization/gptq/schemes/gptq_moe.py": (
            *("GPTQMarlinMoEScheme.__init__", "GPTQMarlinMoEScheme.create_weights"),
            *("GPTQMarlinMoEScheme.process_weights_after_loading", "GPTQMarlinMoEScheme.apply_weights"),
        ),
        f"{_SGLANG_LAYERS}/quantization/awq/schemes/awq_moe.py": (
            *("AWQMoEScheme.__init__", "AWQMoEScheme.create_weights"),
            *("AWQMoEScheme.process_weights_after_loading", "AWQMoEScheme.apply_weights"),
        ),
        _SGLANG_EXPERTS: (
            *("CompressedTensorsWNA16MoE.__init__", "CompressedTensorsWNA16MoE.create_weights"),
            "CompressedTensorsWNA16MoE.process_weights_after_loading",
            *("CompressedTensorsWNA16MoE.restore_weights_before_loading", "CompressedTensorsWNA16MoE.apply_weights"),
        ),
        f"{_SGLANG_LAYERS}/quantization/gptq/gptq.py": ("GPTQMarlinMoEMethod.apply",),
        f"{_SGLANG_LAYERS}/quantization/awq/awq.py": ("AWQMoEMethod.apply",),
        f"{_SGLANG_LAYERS}/quantization/compressed_tensors/compressed_tensors.py": (
            "CompressedTensorsFusedMoEMethod.apply",
        ),
        f"{_SGLANG_LAYERS}/moe/moe_runner/base.py": ("MoeRunnerConfig",),
        f"{_SGLANG_LAYERS}/moe/token_dispatcher/standard.py": (
            *("StandardDispatchOutput", "StandardCombineInput", "StandardDispatcher.dispatch"),
        ),
        f"{_SGLANG_LAYERS}/moe/topk.py": ("StandardTopKOutput",),
        f"{_SGLANG_LAYERS}/moe/utils.py": (
            *("get_moe_runner_backend", "get_moe_a2a_backend", "MoeRunnerBackend.AUTO", "MoeA2ABackend.NONE"),
        ),
        "sglang/srt/runtime_context.py": ("get_lora",),
    },
    "gptqmodel": {
        "gptqmodel/utils/importer.py": ("AUTO_BACKEND_KERNEL_MAPPING",),
        "gptqmodel/utils/backend.py": ("BACKEND.GPTQ_MACHETE", "BACKEND.AWQ_MACHETE"),
        "gptqmodel/quantization/config.py": (
            "METHOD.GPTQ",
            "METHOD.AWQ",
            "FORMAT.GPTQ",
            "FORMAT.GPTQ_V2",
            "FORMAT.GEMM",
        ),
        "gptqmodel/models/_const.py": ("DEVICE.CUDA", "PLATFORM.LINUX"),
        "gptqmodel/adapter/adapter.py": ("Lora.apply",),
        "gptqmodel/nn_modules/qlinear/__init__.py": (
            *("BaseQuantLinear", "BaseQuantLinear.post_init", "BaseQuantLinear.validate"),
            *(
                "BaseQuantLinear.validate_once",
                "BaseQuantLinear.validate_device",
                "BaseQuantLinear.empty_linear_output",
            ),
            *("GroupedQuantLinear", "GPTQQuantLinear.__init__", "AWQuantLinear.__init__"),
        ),
    },
}
"""The files of each engine, and the classes, methods, functions and variables in them that the plug-ins use."""


class Archive:
    """The sources of one engine: a wheel, a source archive, or an installed package."""

    def __init__(self, engine: str, path: Path) -> None:
        """Read from a path."""
        self._engine, self._path = engine, path
        found = re.match(rf"{engine}-([\w.]+?)(-|\.tar)", path.name)
        self.version = found[1] if found else "installed"

    def read(self, name: str) -> str:
        """Return the text of a file, by its name below the package's parent folder."""
        if self._path.is_dir():
            return (self._path / name).read_text()
        if self._path.suffix == ".whl":
            with zipfile.ZipFile(self._path) as wheel:
                return wheel.read(name).decode()
        with tarfile.open(self._path) as archive:
            member = archive.extractfile(f"{self._engine}-{self.version}/{name}")
            assert member is not None
            return member.read().decode()


def archive_of(engine: str, folder: str | None = None) -> Archive | None:
    """Return an engine's sources if they can be had."""
    place = folder or os.environ.get(SOURCES_VARIABLE)
    if place:
        found = sorted(path for path in Path(place).glob(f"{engine}-*") if path.suffix in (".whl", ".gz"))
        if found:
            return Archive(engine, found[-1])
    spec = importlib.util.find_spec(engine)
    return None if spec is None or spec.origin is None else Archive(engine, Path(spec.origin).parents[1])


def interface_of(source: str, name: str) -> Any:
    """Return what a source says about a name: arguments, fields, or the kind of a variable; None if it is not there.

    Args:
        source: the text of a module.
        name: a class, a function, a variable, or `Class.method`.
    """
    owner, _, member = name.rpartition(".")
    body = ast.parse(source).body
    if owner:
        classes = [node for node in body if isinstance(node, ast.ClassDef) and node.name == owner]
        body = classes[0].body if classes else []
    for node in body:
        if isinstance(node, ast.FunctionDef) and node.name == member:
            arguments = node.args
            return [argument.arg for argument in (*arguments.args, *arguments.kwonlyargs)]
        if isinstance(node, ast.ClassDef) and node.name == member:
            return sorted(field for part in node.body for field in _assigned(part))
        if member in _assigned(node):
            value = getattr(node, "value", None)
            return value.value if isinstance(value, ast.Constant) else type(value).__name__
    return None


def _assigned(node: ast.stmt) -> list[str]:
    """Return the names that a statement assigns."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    names = [part for target in targets for part in (target.elts if isinstance(target, ast.Tuple) else [target])]
    return [name.id for name in names if isinstance(name, ast.Name)]


def read_interface(archive: Archive, engine: str) -> dict[str, dict[str, Any]]:
    """Return everything that is wanted of an engine, by file and name."""
    return {
        path: {name: interface_of(archive.read(path), name) for name in names} for path, names in WANTED[engine].items()
    }


def recorded() -> dict[str, Any]:
    """Return what was recorded, by engine."""
    loaded: dict[str, Any] = json.loads(RECORDED.read_text())
    return loaded


def record(folder: str) -> None:
    """Record the engines in a folder; those that are not there keep what was recorded."""
    found = recorded() if RECORDED.exists() else {}
    for engine in WANTED:
        archive = archive_of(engine, folder)
        if archive is not None:
            found[engine] = {"version": archive.version, "files": read_interface(archive, engine)}
    RECORDED.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    record(sys.argv[1])
