"""Checkpoints of the formats that pack eight values in a word: GPTQ, AWQ, Marlin, compressed-tensors, AutoRound."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from fakes.checkpoints import packers
from fakes.checkpoints.expected import LAYER, Expected, K, N, Random, bfloats, halves, values, zeros_of
from fakes.checkpoints.files import BFloat16, write_folder


def gptq(*, version: int, symmetric: bool, act_order: bool = False, groups: int = 4, words: Any = np.uint32) -> Any:
    """Return a writer of GPTQ checkpoints."""

    def write(folder: Path, rng: Random) -> Expected:
        q, scales = values(rng), halves(rng, groups, N)
        points = np.full((groups, N), 8, np.uint8) if symmetric else rng.integers(1, 16, (groups, N)).astype(np.uint8)
        stored = points - 1 if version == 1 else points
        g_idx = np.repeat(np.arange(groups), K // groups).astype(np.int32)
        if act_order:
            g_idx = rng.permutation(g_idx)
        bias = halves(rng, N)
        tensors = {
            f"{LAYER}.qweight": packers.along_rows(q.T, words),
            f"{LAYER}.qzeros": packers.along_columns(stored, words),
            f"{LAYER}.scales": scales,
            f"{LAYER}.g_idx": g_idx,
            f"{LAYER}.bias": bias,
            "model.norm.weight": np.ones(N, np.float16),
        }
        label = "gptq" if version == 1 else "gptq_v2"
        config = {"quant_method": "gptq", "bits": 4, "sym": symmetric, "checkpoint_format": label}
        zeros = None if symmetric else zeros_of(points, scales)
        path = write_folder(folder, tensors, config)
        return Expected(path, "gptq", q, scales, zeros, g_idx if act_order else None, bias=bias)

    return write


def marlin(config: dict[str, Any], names: tuple[str, str], name: str, groups: int) -> Any:
    """Return a writer of checkpoints in Marlin's form."""

    def write(folder: Path, rng: Random) -> Expected:
        q, scales = values(rng, 256, 256), halves(rng, groups, 256)
        tensors = {
            f"{LAYER}.{names[0]}": packers.marlin_words(q),
            f"{LAYER}.{names[1]}": packers.marlin_scales(scales),
        }
        return Expected(write_folder(folder, tensors, config), name, q, scales)

    return write


def awq_gemm(folder: Path, rng: Random, method: dict[str, Any] | None = None) -> Expected:
    """Write AWQ's version gemm."""
    q, scales, points = values(rng), halves(rng, 4, N), rng.integers(0, 16, (4, N)).astype(np.uint8)
    tensors = {
        f"{LAYER}.qweight": packers.awq_gemm_words(np.ascontiguousarray(q.T)),
        f"{LAYER}.qzeros": packers.awq_gemm_words(points),
        f"{LAYER}.scales": scales,
    }
    config = method or {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "GEMM"}
    return Expected(write_folder(folder, tensors, config), "awq-gemm", q, scales, zeros_of(points, scales))


def awq_gemv(version: str, group_size: int) -> Any:
    """Return a writer of AWQ's versions gemv and gemv_fast."""

    def write(folder: Path, rng: Random) -> Expected:
        groups = K // group_size
        stored = 8 * {128: 1, 64: 2, 32: 4}[group_size]
        q, scales, points = values(rng), halves(rng, groups, N), rng.integers(0, 16, (groups, N)).astype(np.uint8)
        more = ((0, stored - groups), (0, 0))
        all_scales, all_points = np.pad(scales, more), np.pad(points, more)
        if version == "gemv":
            tensors = {
                f"{LAYER}.qweight": packers.along_columns(q),
                f"{LAYER}.scales": np.ascontiguousarray(all_scales.T),
                f"{LAYER}.qzeros": packers.along_columns(all_points.T),
            }
        else:
            tensors = {
                f"{LAYER}.qweight": packers.awq_fast_words(q),
                f"{LAYER}.scales": all_scales,
                f"{LAYER}.qzeros": -(all_scales * all_points.astype(np.float16)),
            }
        config = {"quant_method": "awq", "w_bit": 4, "q_group_size": group_size, "version": version}
        path = write_folder(folder, tensors, config)
        return Expected(path, f"awq-{version}", q, scales, zeros_of(points, scales))

    return write


def compressed(*, groups: int, symmetric: bool, g_idx: bool = False, bfloat: bool = False, k: int = K) -> Any:
    """Return a writer of compressed-tensors checkpoints, of an expert."""
    name = "model.layers.3.mlp.experts.17.down_proj"

    def write(folder: Path, rng: Random) -> Expected:
        q, points = values(rng, N, k), rng.integers(0, 16, (groups, N)).astype(np.uint8)
        scales = bfloats(rng, groups, N) if bfloat else halves(rng, groups, N)
        stored = np.ascontiguousarray(scales.T)
        tensors: dict[str, Any] = {
            f"{name}.weight_packed": packers.along_columns(q),
            f"{name}.weight_scale": BFloat16(stored) if bfloat else stored,
            f"{name}.weight_shape": np.array([N, k], np.int64),
        }
        if not symmetric:
            tensors[f"{name}.weight_zero_point"] = packers.along_rows(points.T)
        index = rng.permutation(np.repeat(np.arange(groups), k // groups)).astype(np.int32) if g_idx else None
        if index is not None:
            tensors[f"{name}.weight_g_idx"] = index
        weights = {
            "num_bits": 4,
            "type": "int",
            "symmetric": symmetric,
            "strategy": "channel" if groups == 1 else "group",
        }
        config = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        }
        zeros = None if symmetric else zeros_of(points, scales)
        path = write_folder(folder, tensors, config)
        return Expected(path, "compressed-tensors", q, scales.astype(np.float64), zeros, index, name)

    return write


def autoround(packing: str) -> Any:
    """Return a writer of AutoRound's checkpoints."""

    def write(folder: Path, rng: Random) -> Expected:
        config = {"quant_method": "auto-round", "bits": 4, "sym": False, "packing_format": packing}
        if packing.endswith("awq"):
            return awq_gemm(folder, rng, config)
        found: Expected = gptq(version=1 if packing.endswith("auto_gptq") else 2, symmetric=False)(folder, rng)
        (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
        return found

    return write
