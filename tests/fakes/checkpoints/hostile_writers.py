"""Writers of folders and files that lie about sizes, names, types and places. Each returns the path to open."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fakes.checkpoints.cases import CASES
from fakes.checkpoints.expected import LAYER
from fakes.checkpoints.files import gguf_bytes, gguf_text, safetensors_bytes, write_folder, write_safetensors

Writer = Callable[[Path], Path]
MARKER = "executed"
"""A file that appears if a pickle is read."""
DATA = bytes(64)


def valid(folder: Path, case: str = "gptq-v1") -> Path:
    """Write a sound checkpoint."""
    return CASES[case](folder, np.random.default_rng(1)).path


def file_of(content: bytes) -> Writer:
    """Return a writer of a sound folder whose safetensors file has other content."""

    def write(folder: Path) -> Path:
        valid(folder)
        (folder / "model.safetensors").write_bytes(content)
        return folder

    return write


def header(entries: Any, data: bytes = DATA) -> Writer:
    """Return a writer of a folder whose safetensors file has a given header."""
    return file_of(safetensors_bytes(entries, data))


def entry(**changes: Any) -> Writer:
    """Return a writer of a folder whose only tensor has a sound entry with changes."""
    return header({"a": {"dtype": "U8", "shape": [64], "data_offsets": [0, 64], **changes}})


def pair(first: tuple[int, int], second: tuple[int, int]) -> Writer:
    """Return a writer of a folder with two tensors at given offsets of 64 bytes."""
    places = {"a": first, "b": second}
    return header({n: {"dtype": "U8", "shape": [e - b], "data_offsets": [b, e]} for n, (b, e) in places.items()})


def index(files: Any) -> Writer:
    """Return a writer of a folder with an index."""

    def write(folder: Path) -> Path:
        valid(folder)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        return folder

    return write


def config(text: str, name: str = "config.json") -> Writer:
    """Return a writer of a folder with other text in its configuration."""

    def write(folder: Path) -> Path:
        valid(folder)
        (folder / name).write_text(text)
        return folder

    return write


def layer(method: dict[str, Any], **tensors: Any) -> Writer:
    """Return a writer of a folder with one layer of given tensors."""
    return lambda folder: write_folder(folder, {f"{LAYER}.{name}": part for name, part in tensors.items()}, method)


def gptq_layer(**changes: Any) -> Writer:
    """Return a writer of a GPTQ layer with n = 16 and k = 64, with changes."""
    parts = {
        "qweight": np.zeros((8, 16), np.int32),
        "qzeros": np.zeros((2, 2), np.int32),
        "scales": np.ones((2, 16), np.float16),
    }
    return layer({"quant_method": "gptq", "sym": False}, **{**parts, **changes})


def two_shards(folder: Path) -> Path:
    """Write two files that hold the same tensor."""
    valid(folder)
    (folder / "model.safetensors").rename(folder / "b.safetensors")
    (folder / "a.safetensors").write_bytes((folder / "b.safetensors").read_bytes())
    return folder


def truncated(folder: Path) -> Path:
    """Write a file that lost its last byte."""
    path = valid(folder) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    return folder


def link_out(name: str) -> Writer:
    """Return a writer of a folder in which a file is a link to one outside."""

    def write(folder: Path) -> Path:
        inner = folder / "inner"
        inner.mkdir()
        valid(inner)
        (inner / name).rename(folder / name)
        (inner / name).symlink_to(folder / name)
        return inner

    return write


def link_to_itself(folder: Path) -> Path:
    """Write a link that leads to itself."""
    valid(folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("model.safetensors")
    return folder


def pipe(folder: Path) -> Path:
    """Write a pipe in place of a file."""
    valid(folder)
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    return folder


def folder_as_file(folder: Path) -> Path:
    """Write a folder in place of a file."""
    valid(folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    return folder


def pickle_bytes(folder: Path) -> bytes:
    """Return a pickle that makes a file when it is loaded."""
    return f"cposix\nsystem\n(S'touch {folder / MARKER}'\ntR.".encode()


def pickle_folder(folder: Path) -> Path:
    """Write a folder with nothing but a pickle."""
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    (folder / "pytorch_model.bin").write_bytes(pickle_bytes(folder))
    return folder


def pickle_file(name: str) -> Writer:
    """Return a writer of a pickle of some name, to be opened itself."""

    def write(folder: Path) -> Path:
        (folder / name).write_bytes(pickle_bytes(folder))
        return folder / name

    return write


def gguf_file(content: bytes) -> Writer:
    """Return a writer of a GGUF file."""

    def write(folder: Path) -> Path:
        (folder / "model.gguf").write_bytes(content)
        return folder / "model.gguf"

    return write


def gguf_head(tensors: int = 0, keys: int = 0, version: int = 3) -> bytes:
    """Return the first bytes of a GGUF file."""
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def gguf_entry(
    shape: tuple[int, ...] = (32,), kind: int = 2, offset: int = 0, name: str = "a.weight", rank: int | None = None
) -> bytes:
    """Return the entry of a tensor."""
    sizes = b"".join(struct.pack("<Q", size) for size in shape)
    return (
        gguf_text(name)
        + struct.pack("<I", len(shape) if rank is None else rank)
        + sizes
        + struct.pack("<IQ", kind, offset)
    )


def gguf_key(name: str, kind: int, content: bytes) -> bytes:
    """Return a key and its value."""
    return gguf_text(name) + struct.pack("<I", kind) + content


SOUND_GGUF = gguf_bytes({"a.weight": ("Q4_0", (2, 32), bytes(36))})
TORCHAO = {f"{LAYER}._weight_qdata": np.zeros((1, 1, 32, 4), np.int32)}
TORCHAO |= {f"{LAYER}._weight_scale_and_zero": np.ones((2, 8, 2), np.float16)}


def torchao(text: str) -> Writer:
    """Return a writer of a torchao folder with given metadata of its layer."""
    metadata = {f"{LAYER}.weight": text}
    return lambda folder: write_folder(folder, TORCHAO, {"quant_method": "torchao"}, metadata=metadata)


def hqq(shape: tuple[int, int]) -> Writer:
    """Return a writer of an HQQ layer that lies about its shape."""
    parts = {"W_q": np.zeros((4, 64), np.uint8), "shape": np.array(shape, np.int64)}
    factors = {"scale": np.ones((8, 1), np.float16), "zero": np.ones((8, 1), np.float16)}
    return layer({"quant_method": "hqq"}, **parts, **factors)


def compressed(shape: tuple[int, int]) -> Writer:
    """Return a writer of a compressed-tensors layer that lies about its shape."""
    parts = {"weight_packed": np.zeros((8, 8), np.int32), "weight_scale": np.ones((8, 2), np.float16)}
    return layer({"quant_method": "compressed-tensors"}, **parts, weight_shape=np.array(shape, np.int64))


def named(name: str, **settings: Any) -> Writer:
    """Return a writer of one file beside a sound folder."""

    def write(folder: Path) -> Path:
        write_safetensors(folder / name, {"a": np.zeros(1, np.uint8)}, **settings)
        return folder / name

    return write


def mlx_of_no_size(folder: Path) -> Path:
    """Write an MLX layer of many experts that take no bytes."""
    entry = {"dtype": "F16", "shape": [1 << 40, 0, 0], "data_offsets": [0, 0]}
    header({"a.scales": entry, "a.weight": entry, "a.biases": entry}, b"")(folder)
    (folder / "config.json").write_text('{"quantization": {"bits": 4, "group_size": 64}}')
    return folder


def many_tensors(folder: Path) -> Path:
    """Write a header of as many tensors as its limits allow, none of a layer."""
    entries = {f"{i}": {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i in range(90_000)}
    return header(entries, bytes(90_000))(folder)


def late(make: Callable[[], Writer]) -> Writer:
    """Return a writer that is made when it is called, so that its content fills no memory before."""

    def write(folder: Path) -> Path:
        return make()(folder)

    return write
