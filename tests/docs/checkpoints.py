"""Layers of checkpoints, written by the rules of each format, with the parts that a reader must get back."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from fakes.checkpoints.files import write_folder, write_safetensors
from fakes.checkpoints.word_formats import gptq

from w4a16gen.weights.writers.convert import convert
from w4a16gen.weights.writers.quantize import Settings, quantize_model

N, K, GROUP_SIZE = 64, 256, 64
MODELS = ("llama-folder", "gguf-file", "packed-llama", "mixtral-folder")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The channel that each four bits of a word hold, lowest first."""


def _words(values: npt.NDArray[Any], order: tuple[int, ...] = tuple(range(8))) -> npt.NDArray[np.int32]:
    """Pack the last axis, eight values a word, value `order[i]` into the bits from 4 * i on."""
    eights = values.astype(np.uint32).reshape(*values.shape[:-1], -1, 8)
    words = np.zeros(eights.shape[:-1], np.uint32)
    for place, index in enumerate(order):
        words |= eights[..., index] << np.uint32(4 * place)
    return words.view(np.int32)


def parts() -> dict[str, npt.NDArray[Any]]:
    """Return what a layer means: q [n, k], scales and zero points [k / group size, n], activations, and g_idx."""
    rng = np.random.default_rng(5)
    groups = K // GROUP_SIZE
    return {
        "q": rng.integers(0, 16, (N, K)).astype(np.uint8),
        "scales": rng.uniform(0.01, 0.02, (groups, N)).astype(np.float16),
        "zero_points": rng.integers(1, 16, (groups, N)).astype(np.uint8),
        "a": rng.standard_normal((4, K)).astype(np.float16),
        "g_idx": rng.permutation(np.repeat(np.arange(groups), GROUP_SIZE)).astype(np.int32),
    }


def _new_folder(name: str) -> Path:
    folder = Path(name)
    folder.mkdir()
    return folder


def _write_model(name: str) -> None:
    """Write a tiny model of transformers as a page needs it."""
    tiny = importlib.import_module("fakes.tiny_models")  # which needs torch and transformers
    if name == "mixtral-folder":
        folders = importlib.import_module("fakes.tiny_folders")
        model = tiny.tiny_model("mixtral")
        folders.folder_with(Path("mixtral-int4"), model, folders.plain_gptq_tensors, folders.PLAIN_GPTQ)
        return
    model = tiny.tiny_model("llama")
    if name == "gguf-file":
        tiny.write_gguf("llama", model, Path("llama.gguf"), {"ffn_down": "Q5_0", "token_embd": "Q8_0"})
        return
    folder = Path("llama-int4" if name == "llama-folder" else "source")
    quantize_model(tiny.save(model, Path(f"{folder}-dense")), folder, Settings(group_size=32))
    if name == "packed-llama":
        convert(folder, "llama-packed")


def _write_mixture(folder: Path) -> None:
    """Write a layer of four experts in the form of GPTQ."""
    rng = np.random.default_rng(7)
    found: dict[str, Any] = {}
    for expert in range(4):
        for part, (n, k) in {"gate_proj": (64, 256), "up_proj": (64, 256), "down_proj": (256, 64)}.items():
            module = f"model.layers.0.mlp.experts.{expert}.{part}"
            found[f"{module}.qweight"] = _words(rng.integers(0, 16, (n, k))).T.copy()
            found[f"{module}.qzeros"] = _words(np.full((k // GROUP_SIZE, n), 8))
            found[f"{module}.scales"] = rng.uniform(0.01, 0.02, (k // GROUP_SIZE, n)).astype(np.float16)
    config = {"quant_method": "gptq", "bits": 4, "group_size": GROUP_SIZE, "checkpoint_format": "gptq_v2"}
    write_folder(folder, found, config)


def _write_fp16() -> None:
    """Write a layer and a head in FP16."""
    weight = np.random.default_rng(6).standard_normal((64, 256)).astype(np.float16)
    folder = _new_folder("model-fp16")
    found = {"model.layers.0.mlp.up_proj.weight": weight, "lm_head.weight": weight}
    write_safetensors(folder / "model.safetensors", found)
    (folder / "config.json").write_text('{"model_type": "llama"}')


def _write_gptq(folder: str, **options: bool) -> Path:
    """Write a layer of GPTQ, and return its folder."""
    written = gptq(version=1, symmetric=False, **options)(_new_folder(folder), np.random.default_rng(5))
    return Path(written.path)


FOLDERS: dict[str, Callable[[], object]] = {
    "gptq-folder": lambda: _write_gptq("model-gptq", act_order=True),
    "gptq-model": lambda: _write_gptq("model-gptq"),
    "packed-folder": lambda: convert(_write_gptq("source"), "model-packed"),
    "fp16-model": _write_fp16,
    "mixture": lambda: _write_mixture(_new_folder("model-moe")),
}
"""What writes each folder that pages read, where they run."""


def tensors(name: str) -> dict[str, Any]:
    """Return a layer's tensors as a format stores them, and its sizes; or write a folder where the page runs."""
    if name in FOLDERS:
        FOLDERS[name]()
        return {}
    if name in MODELS:
        _write_model(name)
        return {}
    part = parts()
    common = {"k": K, "n": N, "a": part["a"], "scales": part["scales"], "g_idx": part["g_idx"]}
    if name == "gptq":  # version 1: eight values of K in a word, zero points less 1
        stored = part["zero_points"] - 1
        return {**common, "qweight": _words(part["q"]).T.copy(), "qzeros": _words(stored)}
    if name == "awq":
        qweight = _words(part["q"].T.copy(), AWQ_ORDER)
        return {**common, "qweight": qweight, "qzeros": _words(part["zero_points"], AWQ_ORDER)}
    if name == "compressed-tensors":
        return {**common, "weight_packed": _words(part["q"]), "weight_scale": part["scales"].T.copy()}
    raise ValueError(name)


def expected_weight(*, zero_points: bool, g_idx: npt.NDArray[np.int32] | None = None) -> npt.NDArray[np.float64]:
    """Return (q - zero point) * scale in float64 [n, k]."""
    part = parts()
    group = np.arange(K) // GROUP_SIZE if g_idx is None else g_idx
    points = part["zero_points"].astype(np.float64)[group].T if zero_points else 8.0
    weight: npt.NDArray[np.float64] = (part["q"] - points) * part["scales"].astype(np.float64)[group].T
    return weight
