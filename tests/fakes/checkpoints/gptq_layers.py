"""Checkpoints of GPTQ with several layers, all with act-order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import w4a16gen
from fakes.checkpoints import packers
from fakes.checkpoints.expected import Random
from fakes.checkpoints.files import write_folder
from w4a16gen.weights.importers.checkpoint import Checkpoint

GPTQ = {"quant_method": "gptq", "bits": 4, "sym": True, "checkpoint_format": "gptq_v2"}


def write_checkpoint(folder: Path, rng: Random, *sizes: tuple[str, int, int, int]) -> Checkpoint:
    """Write layers of a name, n, k and a number of groups, and open the folder."""
    tensors: dict[str, Any] = {"embedding.weight": np.ones((4, 4), np.float16)}
    for name, n, k, groups in sizes:
        q = rng.integers(0, 16, (k, n)).astype(np.uint8)
        tensors[f"{name}.qweight"] = packers.along_rows(q)
        tensors[f"{name}.qzeros"] = packers.along_columns(np.full((groups, n), 8, np.uint8))
        tensors[f"{name}.scales"] = rng.uniform(0.001, 0.01, (groups, n)).astype(np.float16)
        tensors[f"{name}.g_idx"] = rng.permutation(np.repeat(np.arange(groups), k // groups)).astype(np.int32)
    return w4a16gen.open_checkpoint(write_folder(folder, tensors, GPTQ))
