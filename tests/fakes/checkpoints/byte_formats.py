"""Checkpoints of the formats that pack two values in a byte, or in an order of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from fakes.checkpoints import packers
from fakes.checkpoints.expected import LAYER, Array, Expected, K, N, Random, bfloats, halves, values
from fakes.checkpoints.files import BFloat16, gguf_bytes, write_folder


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
