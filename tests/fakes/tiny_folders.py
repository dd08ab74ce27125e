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


def folder_with(
    folder: Path, model: Any, layer_tensors: Any, quantization: dict[str, Any], *, dense: str = "lm_head"
) -> Path:
    """Write a folder of a model.

    Args:
        folder: the folder.
        model: the model.
        layer_tensors: returns the tensors of a linear layer, by the last parts of their names.
        quantization: the configuration of its quantization.
        dense: a part of the names of linear layers that stay dense.
    """
    folder.mkdir()
    tensors: dict[str, Any] = {}
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        module, _, part = name.rpartition(".")
        values = parameter.float().numpy()
        if part == "weight" and isinstance(modules[module], torch.nn.Linear) and dense not in name:
            tensors |= {f"{module}.{key}": value for key, value in layer_tensors(module, values).items()}
        else:
            tensors[name] = BFloat16(values) if parameter.dtype == torch.bfloat16 else parameter.numpy()
    write_safetensors(folder / "model.safetensors", tensors)
    config = {**model.config.to_dict(), "quantization_config": quantization}
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


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
