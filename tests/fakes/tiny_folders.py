"""Folders of GPTQ and AWQ that hold tiny models of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fakes.checkpoints import packers
from fakes.checkpoints.files import BFloat16, write_safetensors
from w4a16gen.weights.quantize import quantize

torch = pytest.importorskip("torch")
PLAIN_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "checkpoint_format": "gptq_v2"}
"""The configuration that goes with `plain_gptq_tensors`."""


def folder_with(
    folder: Path,
    model: Any,
    layer_tensors: Any,
    quantization: dict[str, Any],
    *,
    dense: str | tuple[str, ...] = "lm_head",
    shards: int = 1,
) -> Path:
    """Write a folder of a model.

    Args:
        folder: the folder.
        model: the model.
        layer_tensors: returns the tensors of a linear layer, by the last parts of their names.
        quantization: the configuration of its quantization.
        dense: a part of the names of linear layers and experts that stay dense, or several.
        shards: number of files.
    """
    folder.mkdir()
    left = (dense,) if isinstance(dense, str) else dense
    tensors: dict[str, Any] = {}
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        module, _, part = name.rpartition(".")
        matrices = experts_of(model, name, parameter) if ".experts." in name else {module: parameter}
        is_linear = ".experts." in name or (part == "weight" and isinstance(modules[module], torch.nn.Linear))
        for one, matrix in matrices.items():
            values = matrix.float().numpy()
            if is_linear and not any(part in one for part in left) and len(values) % 8 == 0:
                tensors |= {f"{one}.{key}": value for key, value in layer_tensors(one, values).items()}
            else:
                own = f"{name_in_file(model, module)}.{part}" if one == module else f"{one}.weight"
                tensors[own] = BFloat16(values) if matrix.dtype == torch.bfloat16 else matrix.numpy()
    write_shards(folder, tensors, shards)
    config = {**model.config.to_dict(), "quantization_config": quantization}
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_shards(folder: Path, tensors: dict[str, Any], shards: int) -> None:
    """Write tensors to several files in turn, so that those of one layer lie in different ones, and their index."""
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return
    places = {name: f"model-{number % shards}.safetensors" for number, name in enumerate(tensors)}
    for file in set(places.values()):
        write_safetensors(folder / file, {name: tensors[name] for name, place in places.items() if place == file})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def name_in_file(model: Any, module: str) -> str:
    """Return the name that published checkpoints give a module."""
    is_mixtral = model.config.model_type == "mixtral"
    return module.replace(".mlp", ".block_sparse_moe") if is_mixtral else module


def experts_of(model: Any, name: str, parameter: Any) -> dict[str, Any]:
    """Return the matrices of a parameter of all experts, by the names that published checkpoints give them."""
    module, _, part = name.rpartition(".")
    gate, up, down = (
        ("w1", "w3", "w2") if model.config.model_type == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    )
    found: dict[str, Any] = {}
    for number, matrix in enumerate(parameter):
        parts = {down: matrix} if part == "down_proj" else dict(zip((gate, up), matrix.chunk(2), strict=True))
        found |= {f"{name_in_file(model, module)}.{number}.{key}": value for key, value in parts.items()}
    return found


def gptq_tensors(_module: str, values: Any) -> dict[str, Any]:
    """Return GPTQ's tensors of a weight, version 1, with act-order."""
    weight = quantize(values, group_size=32)
    order = np.random.default_rng(len(values)).permutation(values.shape[1])
    q = np.empty_like(weight.q)
    q[:, order] = weight.q
    g_idx = np.empty(len(order), np.int32)
    g_idx[order] = np.arange(len(order)) // 32
    points = np.full(weight.scales.shape, 7, np.uint8)
    return {
        "qweight": packers.along_rows(q.T),
        "qzeros": packers.along_columns(points),
        "scales": weight.scales,
        "g_idx": g_idx,
    }


def plain_gptq_tensors(_module: str, values: Any) -> dict[str, Any]:
    """Return GPTQ's tensors of a weight, version 2, without act-order and with zero points of 8."""
    weight = quantize(values, group_size=32)
    return {
        "qweight": packers.along_rows(weight.q.T),
        "qzeros": packers.along_columns(np.full(weight.scales.shape, 8, np.uint8)),
        "scales": weight.scales,
        "g_idx": (np.arange(values.shape[1]) // 32).astype(np.int32),
    }


def awq_tensors(_module: str, values: Any) -> dict[str, Any]:
    """Return AWQ's tensors of a weight, without zero points."""
    weight = quantize(values, group_size=32)
    return awq_tensors_of(weight, np.full(weight.scales.shape, 8, np.uint8))


def awq_tensors_of(weight: Any, points: Any) -> dict[str, Any]:
    """Return AWQ's tensors of a rounded weight, with its zero points, uint8 [groups, n]."""
    return {
        "qweight": packers.awq_gemm_words(np.ascontiguousarray(weight.q.T)),
        "qzeros": packers.awq_gemm_words(points),
        "scales": weight.scales,
    }
