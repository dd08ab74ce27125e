"""One checkpoint of each format, with what a reader must find in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fakes.checkpoints import packers
from fakes.checkpoints.files import BFloat16, gguf_bytes, write_folder

Array = npt.NDArray[Any]
Random = np.random.Generator
LAYER = "model.layers.0.mlp.up_proj"
N, K = 64, 256


@dataclass
class Expected:
    """What a reader must find: a weight is (q - 8) * scales + zeros, in float64."""

    path: Path
    format: str
    q: Array
    """[n, k], in the order of the file."""
    scales: Array
    """float64 [groups, n]."""
    zeros: Array | None = None
    """float64 [groups, n], before any rounding."""
    g_idx: Array | None = None
    name: str = LAYER
    bias: Array | None = None


def values(rng: Random, n: int = N, k: int = K) -> Array:
    """Return random q [n, k]."""
    return rng.integers(0, 16, (n, k)).astype(np.uint8)


def halves(rng: Random, *shape: int) -> Array:
    """Return random scales in fp16, of both signs."""
    scales: Array = rng.uniform(0.001, 0.02, shape) * rng.choice([-1, 1], shape)
    return scales.astype(np.float16)


def bfloats(rng: Random, *shape: int) -> Array:
    """Return random scales in float32 that are bfloat16 values."""
    bits: Array = rng.uniform(0.001, 0.02, shape).astype(np.float32).view(np.uint32) & 0xFFFF0000
    return bits.view(np.float32)


def zeros_of(zero_points: Array, scales: Array) -> Array:
    """Return (8 - zero point) * scale in float64."""
    return (8 - zero_points.astype(np.float64)) * scales.astype(np.float64)


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


def gguf(kind: str, experts: int = 0) -> Any:
    """Return a writer of GGUF files; of experts it expects the last."""

    def one(rng: Random) -> tuple[Array, Array, Array | None, bytes]:
        q, d = values(rng), halves(rng, N, K // 32)
        if kind == "Q4_0":
            return q, d.astype(np.float64), None, packers.q4_blocks(q, d)
        if kind == "Q4_1":
            m = halves(rng, N, K // 32)
            return q, d.astype(np.float64), m + 8 * d.astype(np.float64), packers.q4_blocks(q, d, m)
        d, minimum = halves(rng, N, K // 256), np.abs(halves(rng, N, K // 256))
        factors = rng.integers(0, 64, (2, N, K // 32))
        of_scales, of_minima = factors
        scales = np.repeat(d.astype(np.float64), 8, axis=1) * of_scales
        minima = np.repeat(minimum.astype(np.float64), 8, axis=1) * of_minima
        return q, scales, 8 * scales - minima, packers.q4_k_blocks(q, (of_scales, of_minima), d, minimum)

    def write(folder: Path, rng: Random) -> Expected:
        parts = [one(rng) for _ in range(max(1, experts))]
        shape = (experts, N, K) if experts else (N, K)
        tensors = {
            "output_norm.weight": ("F32", (N,), np.ones(N, np.float32).tobytes()),
            "blk.0.ffn_up.weight": (kind, shape, b"".join(part[3] for part in parts)),
        }
        path = folder / "model.gguf"
        path.write_bytes(gguf_bytes(tensors))
        q, scales, zeros, _ = parts[-1]
        name = f"blk.0.ffn_up.{experts - 1}" if experts else "blk.0.ffn_up"
        return Expected(path, "gguf", q, scales.T, None if zeros is None else zeros.T, name=name)

    return write


def hqq(*, as_float: bool = False) -> Any:
    """Return a writer of HQQ checkpoints of axis 1."""

    def write(folder: Path, rng: Random) -> Expected:
        q, scales = values(rng), halves(rng, N * 4, 1)
        points = rng.uniform(0, 15, (N * 4, 1)).astype(np.float16)
        words = packers.hqq_bytes(q, 64)
        tensors = {
            f"{LAYER}.W_q": words.view(np.float16) if as_float else words,
            f"{LAYER}.scale": scales,
            f"{LAYER}.zero": points,
            f"{LAYER}.shape": np.array([N, K], np.int64),
            f"{LAYER}.nbits": np.array(4, np.int32),
            f"{LAYER}.axis": np.array(1, np.int32),
            f"{LAYER}.packing": np.frombuffer(b"4bit_u8", np.uint8),
        }
        path = write_folder(folder, tensors, {"quant_method": "hqq"})
        by_group = [part.astype(np.float64).reshape(N, 4).T for part in (scales, points)]
        return Expected(path, "hqq", q, by_group[0], (8 - by_group[1]) * by_group[0])

    return write


def torchao(kind: str, shape: tuple[int, int] = (N, K)) -> Any:
    """Return a writer of torchao's checkpoints; the tile packed form is padded to 1024 values of K."""

    def write(folder: Path, rng: Random) -> Expected:
        n, k = shape
        q, scales, zeros = values(rng, n, k), bfloats(rng, k // 64, n), -bfloats(rng, k // 64, n)
        prefix = f"{LAYER}._weight_"
        if kind == "plain":
            name, parts = "Int4Tensor", {"qdata": packers.torchao_plain(q)}
            parts |= {"scale": BFloat16(scales), "zero_point": BFloat16(zeros)}  # type: ignore[dict-item]
        else:
            name, pad = "Int4TilePackedTo4dTensor", ((0, -n % 8), (0, -k % 1024))
            both = np.pad(np.stack([scales, zeros], axis=-1), ((0, pad[1][1] // 64), pad[0], (0, 0)))
            parts = {"qdata": packers.torchao_tile(np.pad(q, pad)), "scale_and_zero": BFloat16(both)}  # type: ignore[dict-item]
        facts = {"_type": name, "_data": {"block_size": [1, 64], "shape": [n, k]}}
        metadata = {f"{LAYER}.weight": json.dumps(facts), "tensor_names": json.dumps([f"{LAYER}.weight"])}
        tensors = {prefix + part: array for part, array in parts.items()}
        path = write_folder(folder, tensors, {"quant_method": "torchao"}, metadata=metadata)
        label = "torchao-plain" if kind == "plain" else "torchao-tile_packed"
        return Expected(path, label, q, scales.astype(np.float64), zeros.astype(np.float64))

    return write


def mlx(experts: int = 0) -> Any:
    """Return a writer of MLX checkpoints; of experts it expects the last."""

    def write(folder: Path, rng: Random) -> Expected:
        count = max(1, experts)
        q = rng.integers(0, 16, (count, N, K)).astype(np.uint8)
        scales = halves(rng, count, N, K // 64)
        biases = (-rng.integers(0, 16, scales.shape) * scales).astype(np.float16)
        words = np.stack([packers.along_columns(part).view(np.uint32) for part in q])
        parts = {"weight": words, "scales": scales, "biases": biases}
        parts["bias"] = halves(rng, count, N)
        tensors = {f"{LAYER}.{name}": part if experts else part[0] for name, part in parts.items()}
        config = {"group_size": 64, "bits": 4, "model.other": {"bits": 8}}
        path = write_folder(folder, tensors, config, key="quantization")
        last = scales[-1].T.astype(np.float64)
        name = f"{LAYER}.{experts - 1}" if experts else LAYER
        return Expected(path, "mlx", q[-1], last, biases[-1].T + 8 * last, name=name, bias=parts["bias"][-1])

    return write


def modelopt(folder: Path, rng: Random) -> Expected:
    """Write ModelOpt's int4_awq."""
    q, scales = values(rng, N, K), halves(rng, N, 2)
    tensors = {
        f"{LAYER}.weight": packers.modelopt_bytes(q),
        f"{LAYER}.weight_scale": scales,
        f"{LAYER}.pre_quant_scale": halves(rng, K),
        "lm_head.weight": halves(rng, 8, K),
    }
    config = {"quant_algo": "W4A16_AWQ", "group_size": 128, "quant_method": "modelopt"}
    return Expected(write_folder(folder, tensors, config), "modelopt-int4_awq", q, scales.T.astype(np.float64))


GPTQ_MARLIN = {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}
AWQ_MARLIN = {"quant_method": "awq", "bits": 4, "zero_point": False, "version": "marlin"}
CASES: dict[str, Callable[[Path, Random], Expected]] = {
    "gptq-v1-symmetric": gptq(version=1, symmetric=True),
    "gptq-v1": gptq(version=1, symmetric=False),
    "gptq-v2-symmetric": gptq(version=2, symmetric=True),
    "gptq-v2": gptq(version=2, symmetric=False),
    "gptq-act-order": gptq(version=1, symmetric=False, act_order=True),
    "gptq-channel": gptq(version=1, symmetric=True, groups=1),
    "gptq-channel-asymmetric": gptq(version=2, symmetric=False, groups=1),
    "gptq-words-of-64": gptq(version=1, symmetric=False, words=np.uint64),
    "gptq-words-of-8": gptq(version=2, symmetric=False, words=np.uint8),
    "gptq-marlin": marlin(GPTQ_MARLIN, ("B", "s"), "gptq-marlin", 2),
    "gptq-marlin-channel": marlin(GPTQ_MARLIN, ("qweight", "scales"), "gptq-marlin", 1),
    "awq-marlin": marlin(AWQ_MARLIN, ("qweight", "scales"), "awq-marlin", 2),
    "awq-gemm": awq_gemm,
    **{f"awq-gemv-{size}": awq_gemv("gemv", size) for size in (32, 64, 128)},
    **{f"awq-gemv_fast-{size}": awq_gemv("gemv_fast", size) for size in (32, 64, 128)},
    "compressed-tensors": compressed(groups=4, symmetric=True),
    "compressed-tensors-asymmetric": compressed(groups=4, symmetric=False),
    "compressed-tensors-channel": compressed(groups=1, symmetric=True),
    "compressed-tensors-g_idx": compressed(groups=4, symmetric=False, g_idx=True),
    "compressed-tensors-bfloat16": compressed(groups=8, symmetric=False, bfloat=True),
    "compressed-tensors-part-of-a-word": compressed(groups=3, symmetric=True, k=36),
    **{
        f"autoround-{packing}": autoround(f"auto_round:{packing}") for packing in ("auto_gptq", "gptqmodel", "auto_awq")
    },
    "gguf-q4_0": gguf("Q4_0"),
    "gguf-q4_1": gguf("Q4_1"),
    "gguf-q4_k": gguf("Q4_K"),
    "gguf-experts": gguf("Q4_1", experts=3),
    "hqq": hqq(),
    "hqq-as-float": hqq(as_float=True),
    "torchao-plain": torchao("plain"),
    "torchao-tile": torchao("tile", (16, 1024)),
    "torchao-tile-padded": torchao("tile", (13, 192)),
    "mlx": mlx(),
    "mlx-experts": mlx(experts=2),
    "modelopt": modelopt,
}
"""Writers of a checkpoint of each kind."""
