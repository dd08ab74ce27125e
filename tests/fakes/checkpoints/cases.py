"""One checkpoint of each format, with what a reader must find in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from fakes.checkpoints.byte_formats import gguf, hqq, mlx, modelopt, torchao
from fakes.checkpoints.expected import Expected, Random
from fakes.checkpoints.word_formats import autoround, awq_gemm, awq_gemv, compressed, gptq, marlin

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
