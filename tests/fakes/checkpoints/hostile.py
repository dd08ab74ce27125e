"""Folders and files that lie: about sizes, names, types and places. Each writer returns the path to open."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fakes.checkpoints.cases import CASES, LAYER
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


MANY = "9" * 5000
HOSTILE: dict[str, Writer] = {
    "no bytes": file_of(b""),
    "seven bytes": file_of(bytes(7)),
    "header of 2^63 bytes": file_of(struct.pack("<Q", 1 << 63) + DATA),
    "header of 2^40 bytes": file_of(struct.pack("<Q", 1 << 40) + DATA),
    "header longer than the file": file_of(struct.pack("<Q", 1000) + b"{}"),
    "header that is no JSON": header(b"{nonsense"),
    "header that is not UTF-8": header(b'{"\xff\xfe": 1}'),
    "header that is a list": header([1, 2]),
    "header of deep lists": header(b"[" * 200_000),
    "header of deep objects": header(b'{"a":' * 200_000),
    "tensor named twice": header(
        b'{"a":{"dtype":"U8","shape":[64],"data_offsets":[0,64]},"a":{"dtype":"U8","shape":[64],"data_offsets":[0,64]}}'
    ),
    "key of an entry twice": header(b'{"a":{"dtype":"U8","dtype":"U8","shape":[64],"data_offsets":[0,64]}}'),
    "entry that is a number": header({"a": 5}),
    "entry without dtype": header({"a": {"shape": [64], "data_offsets": [0, 64]}}),
    "entry with one key more": entry(more=1),
    "unknown dtype": entry(dtype="U7"),
    "dtype that is a list": entry(dtype=["U8"]),
    "negative size": entry(shape=[-64]),
    "size that is a fraction": entry(shape=[64.0]),
    "size that is true": entry(shape=[True, 64]),
    "size that is text": entry(shape="64"),
    "2^60 elements": entry(shape=[1 << 60]),
    "sizes whose product passes 2^64": entry(shape=[1 << 40, 1 << 40]),
    "product that wraps to 64": entry(shape=[(1 << 61) + 8, 8]),
    "size of 5000 digits": header(f'{{"a":{{"dtype":"U8","shape":[{MANY}],"data_offsets":[0,64]}}}}'.encode()),
    "size that is NaN": header(b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,64]}}'),
    "a thousand dimensions": entry(shape=[64, *[1] * 1000]),
    "offsets in reverse": entry(data_offsets=[64, 0]),
    "negative offset": entry(data_offsets=[-64, 0]),
    "three offsets": entry(data_offsets=[0, 32, 64]),
    "offsets after the file": entry(shape=[128], data_offsets=[0, 128]),
    "offsets of another size": entry(shape=[32]),
    "half a byte": entry(dtype="F4", shape=[127], data_offsets=[0, 64]),
    "overlapping tensors": pair((0, 40), (24, 64)),
    "equal places": pair((0, 64), (0, 64)),
    "hole between tensors": pair((0, 16), (48, 64)),
    "bytes after the last tensor": pair((0, 16), (16, 32)),
    "bytes before the first tensor": pair((8, 16), (16, 64)),
    "metadata that is no text": header({"__metadata__": {"a": 1}}, b""),
    "metadata that is a list": header({"__metadata__": []}, b""),
    "last byte is missing": truncated,
    "index to the folder above": index({"a": "../model.safetensors"}),
    "index to a folder below": index({"a": "sub/model.safetensors"}),
    "index to an absolute path": index({"a": "/etc/passwd"}),
    "index with a backslash": index({"a": "..\\model.safetensors"}),
    "index with a null character": index({"a": "model\0.safetensors"}),
    "index with a dot": index({"a": "."}),
    "index with no name": index({"a": ""}),
    "index with a number": index({"a": 5}),
    "index that is a list": index(["model.safetensors"]),
    "index that is empty": index({}),
    "index to a missing file": index({"a": "model-00001-of-00002.safetensors"}),
    "index with a missing tensor": index({"a": "model.safetensors"}),
    "index with 20000 files": index({str(i): f"{i}.safetensors" for i in range(20_000)}),
    "index that is no JSON": config("{", "model.safetensors.index.json"),
    "tensor in two files": two_shards,
    "link out of the folder": link_out("model.safetensors"),
    "configuration that is a link out of the folder": link_out("config.json"),
    "link to itself": link_to_itself,
    "pipe": pipe,
    "folder in place of a file": folder_as_file,
    "configuration that is a list": config("[]"),
    "configuration of deep lists": config("[" * 200_000),
    "configuration with a key twice": config('{"a": 1, "a": 2}'),
    "configuration of text": config('{"quantization_config": "gptq"}'),
    "method that is a number": config('{"quantization_config": {"quant_method": 5}}'),
    "version that is a list": config('{"quantization_config": {"quant_method": "gptq", "checkpoint_format": []}}'),
    "sym that is text": config('{"quantization_config": {"quant_method": "gptq", "sym": "yes"}}'),
    "no configuration": named("alone.safetensors"),
    "pickle in a folder": pickle_folder,
    **{f"pickle named {name}": pickle_file(name) for name in ("a.bin", "a.pt", "qmodel.pt", "a.safetensors", "a.gguf")},
    "words of three dimensions": gptq_layer(qweight=np.zeros((2, 4, 16), np.int32)),
    "words that are floats": gptq_layer(qweight=np.zeros((8, 16), np.float32)),
    "no words": gptq_layer(qweight=np.zeros((0, 16), np.int32)),
    "no channels": gptq_layer(qweight=np.zeros((8, 0), np.int32)),
    "scales of other channels": gptq_layer(scales=np.ones((2, 8), np.float16)),
    "scales that are integers": gptq_layer(scales=np.ones((2, 16), np.int32)),
    "no scales": gptq_layer(scales=np.ones((0, 16), np.float16)),
    "more groups than values": gptq_layer(scales=np.ones((65, 16), np.float16), qzeros=np.zeros((65, 2), np.int32)),
    "zero points of other groups": gptq_layer(qzeros=np.zeros((3, 2), np.int32)),
    "g_idx of another length": gptq_layer(g_idx=np.zeros(63, np.int32)),
    "hqq shape of 2^60": hqq((1 << 30, 1 << 30)),
    "hqq shape below 0": hqq((-8, -64)),
    "compressed-tensors shape of 2^60": compressed((8, 1 << 60)),
    "compressed-tensors shape below 0": compressed((8, -64)),
    "compressed-tensors shape of other rows": compressed((9, 64)),
    "torchao metadata that is no JSON": torchao("{"),
    "torchao shape larger than the data": torchao(
        json.dumps({"_type": "Int4TilePackedTo4dTensor", "_data": {"shape": [1 << 60, 64]}})
    ),
    "torchao shape of text": torchao(json.dumps({"_type": "Int4TilePackedTo4dTensor", "_data": {"shape": "big"}})),
    "mlx with 2^40 experts of no size": mlx_of_no_size,
    "gguf without magic": gguf_file(b"GGML" + SOUND_GGUF[4:]),
    "gguf of four bytes": gguf_file(b"GGUF"),
    "gguf of version 1": gguf_file(gguf_head(version=1)),
    "gguf of the other byte order": gguf_file(b"GGUF" + struct.pack(">IQQ", 3, 0, 0)),
    "gguf of 2^60 tensors": gguf_file(gguf_head(tensors=1 << 60)),
    "gguf of 2^60 keys": gguf_file(gguf_head(keys=1 << 60)),
    "gguf with a name of 2^60 bytes": gguf_file(gguf_head(keys=1) + struct.pack("<Q", 1 << 60)),
    "gguf with a name that is not UTF-8": gguf_file(gguf_head(keys=1) + struct.pack("<Q", 2) + b"\xff\xfe"),
    "gguf with a text of 2^60 bytes": gguf_file(gguf_head(keys=1) + gguf_key("a", 8, struct.pack("<Q", 1 << 60))),
    "gguf with 2^60 texts": gguf_file(gguf_head(keys=1) + gguf_key("a", 9, struct.pack("<IQ", 8, 1 << 60))),
    "gguf with 2^62 numbers": gguf_file(gguf_head(keys=1) + gguf_key("a", 9, struct.pack("<IQ", 10, 1 << 62))),
    "gguf with arrays of arrays": gguf_file(gguf_head(keys=1) + gguf_key("a", 9, struct.pack("<IQ", 9, 1))),
    "gguf with an unknown type of value": gguf_file(gguf_head(keys=1) + gguf_key("a", 99, DATA)),
    "gguf with a key twice": gguf_file(gguf_head(keys=2) + 2 * gguf_key("a", 0, b"1") + DATA),
    "gguf with a tensor twice": gguf_file(gguf_head(tensors=2) + 2 * gguf_entry() + DATA),
    "gguf with overlapping tensors": gguf_file(gguf_head(tensors=2) + gguf_entry() + gguf_entry(name="b") + DATA),
    "gguf with 2^31 dimensions": gguf_file(gguf_head(tensors=1) + gguf_entry(rank=1 << 31) + DATA),
    "gguf with no dimensions": gguf_file(gguf_head(tensors=1) + gguf_entry(rank=0) + DATA),
    "gguf with a size of 0": gguf_file(gguf_head(tensors=1) + gguf_entry((32, 0)) + DATA),
    "gguf with 2^63 elements": gguf_file(gguf_head(tensors=1) + gguf_entry((1 << 63,)) + DATA),
    "gguf with 2^60 elements": gguf_file(gguf_head(tensors=1) + gguf_entry((32, 1 << 55)) + DATA),
    "gguf with part of a block": gguf_file(gguf_head(tensors=1) + gguf_entry((31,)) + DATA),
    "gguf with an unknown type of tensor": gguf_file(gguf_head(tensors=1) + gguf_entry(kind=77) + DATA),
    "gguf with an offset after the file": gguf_file(gguf_head(tensors=1) + gguf_entry(offset=1 << 50) + DATA),
    "gguf with alignment 0": gguf_file(gguf_head(keys=1) + gguf_key("general.alignment", 4, bytes(4))),
    "gguf with alignment 3": gguf_file(gguf_head(keys=1) + gguf_key("general.alignment", 4, b"\3\0\0\0")),
    "gguf with alignment of text": gguf_file(gguf_head(keys=1) + gguf_key("general.alignment", 8, gguf_text("x"))),
    "gguf that is one of two": gguf_file(gguf_head(keys=1) + gguf_key("split.count", 2, b"\2\0")),
    "gguf without its last byte": gguf_file(SOUND_GGUF[:-1]),
    "gguf without its data": gguf_file(SOUND_GGUF[:-36]),
}
"""Writers of what must be refused when it is opened."""


def many_tensors(folder: Path) -> Path:
    """Write a header of as many tensors as its limits allow, none of a layer."""
    entries = {f"{i}": {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i in range(90_000)}
    return header(entries, bytes(90_000))(folder)


def late(make: Callable[[], Writer]) -> Writer:
    """Return a writer that is made when it is called, so that its content fills no memory before."""

    def write(folder: Path) -> Path:
        return make()(folder)

    return write


SIZE = 23 << 20
HEAVY: dict[str, Writer] = {
    "lists": late(lambda: header(b'{"a": [' + b"[]," * (SIZE // 3) + b"[]]}")),
    "numbers": late(lambda: header(b'{"a": [' + b"999," * (SIZE // 4) + b"9]}")),
    "wide letters": late(lambda: header(b'{"a": "' + b"a" * SIZE + "\U0001f600".encode() + b'"}')),
    "escaped wide letters": late(lambda: header(b'{"a": "' + b"a" * SIZE + rb"\ud83d\ude00" + b'"}')),
    "keys": late(lambda: header(b"{" + b",".join(b'"%d":0' % i for i in range(SIZE // 10)) + b"}")),
    "tensors": many_tensors,
    "configuration": late(lambda: config('{"a": [' + "{}," * (SIZE // 3) + "{}]}")),
    "gguf keys": late(
        lambda: gguf_file(gguf_head(keys=1 << 22) + b"".join(gguf_key(f"{i}", 0, b"1") for i in range(1 << 20)))
    ),
    "gguf keys below the limit": late(
        lambda: gguf_file(
            gguf_head(keys=1 << 14) + b"".join(gguf_key("k" * 1000 + f"{i}", 0, b"1") for i in range(1 << 14))
        )
    ),
    "gguf experts": late(lambda: gguf_file(gguf_head(tensors=1) + gguf_entry((32, 1, 1 << 20)) + bytes(19 << 20))),
    "gguf texts": late(
        lambda: gguf_file(
            gguf_head(keys=1 << 11) + b"".join(gguf_key(f"{i}", 8, gguf_text("a" * 50_000)) for i in range(1 << 10))
        )
    ),
}
"""Writers of files whose headers would fill the memory."""
