"""What every folder that is written takes over from its source: dense tensors, the configuration, the tokenizer."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from w4a16gen.errors import InvalidValueError
from w4a16gen.files import write_json, written_whole
from w4a16gen.weights.importers.folder import inside, read_json
from w4a16gen.weights.importers.tensors import BITS, Tensors
from w4a16gen.weights.writers.shards import Part, Unit

CONFIG = "config.json"
_SIDE_FILES = (
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt"),
    *("*.model", "*.tiktoken", "*.jinja", "generation_config.json", "preprocessor_config.json"),
    *("processor_config.json", "LICENSE*", "modules.json", "sentence_bert_config.json"),
)
"""Files beside the weights that a program needs to use the model; none of them is code."""
_MAX_SIDE_BYTES = 256 << 20
_OLD_KEYS = ("quantization_config", "compression_config", "quantization")


def dense_units(tensors: Tensors, names: Iterable[str]) -> list[Unit]:
    """Return units that copy tensors as they are. GGUF's blocks become bytes; the metadata says of what type."""
    units = []
    for name in names:
        info = tensors[name]
        if info.dtype in BITS:
            units.append(Unit(name, [Part(name, info.dtype, info.shape)], partial(_raw, tensors, name), {}))
        else:
            facts = {"gguf_blocks": {name: {"type": info.dtype, "shape": list(info.shape)}}}
            units.append(Unit(name, [Part(name, "U8", (info.size,))], partial(_raw, tensors, name), facts))
    return units


def _raw(tensors: Tensors, name: str) -> list[npt.NDArray[np.uint8]]:
    return [tensors.raw(name)]


def source_digest(tensors: Tensors, *settings: object) -> str:
    """Return a digest of the files' names, sizes and times, and of what else decides a result.

    A folder has one digest, however its path is written: relative, with `..`, or through a link.
    """
    files = sorted({path.parent.resolve() / path.name for path in (tensors[name].file.path for name in tensors)})
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps([stats, settings], default=str).encode()).hexdigest()


def copy_side_files(source: Path, folder: Path) -> list[str]:
    """Copy the tokenizer and what else belongs to the model.

    Args:
        source: the folder to copy from.
        folder: the folder to copy to.

    Returns:
        The files' names.

    Raises:
        InvalidValueError: if a file is a link out of its folder, no regular file, or too large.
        OSError: if a file cannot be written.
    """
    names = sorted({path.name for pattern in _SIDE_FILES for path in source.glob(pattern)})
    for name in names:
        path = inside(source, name)
        if not path.is_file() or path.stat().st_size > _MAX_SIDE_BYTES:
            raise InvalidValueError(f"{path} must be a regular file of at most {_MAX_SIDE_BYTES >> 20} MiB")
        with path.open("rb") as old, written_whole(folder / name) as new:
            shutil.copyfileobj(old, new)
    return names


def write_config(source: Path | None, folder: Path, members: Mapping[str, Any]) -> None:
    """Write the model's config.json with another configuration of its quantization.

    Args:
        source: the folder of the model, or None if there is no other config.json.
        folder: the folder to write to.
        members: what replaces and joins the members.

    Raises:
        InvalidValueError: if the model's config.json is broken.
        OSError: if the file cannot be written.
    """
    config = {} if source is None else read_json(source, CONFIG)
    inner = config.get("text_config")
    for part in (config, inner if isinstance(inner, dict) else {}):
        for key in _OLD_KEYS:
            part.pop(key, None)
    write_json(folder / CONFIG, {**config, **members})
