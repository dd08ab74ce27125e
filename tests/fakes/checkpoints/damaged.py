"""Folders of packed weights that were damaged, or made by somebody who knows the format and means harm."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fakes.checkpoints.cases import CASES
from fakes.checkpoints.files import safetensors_bytes, write_safetensors
from fakes.checkpoints.hostile_writers import pickle_bytes
from w4a16gen.files import seal
from w4a16gen.weights.writers.convert import convert

Damage = Callable[[Path], Any]
SHARD = "model.safetensors"
INDEX = "model.safetensors.index.json"
LAYER = "model.layers.0.mlp.up_proj"


def packed(folder: Path) -> Path:
    """Write a sound folder with a layer that has a bias and a permutation."""
    source = folder / "source"
    source.mkdir()
    convert(CASES["gptq-act-order"](source, np.random.default_rng(1)).path, folder / "packed")
    return folder / "packed"


def index_of(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / INDEX).read_text())
    return value


def sealed(folder: Path, index: dict[str, Any]) -> None:
    """Write an index with a right seal."""
    (folder / INDEX).write_text(json.dumps(seal(index)))


def text(content: str | bytes) -> Damage:
    """Return a damage that replaces the index."""
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / INDEX).write_bytes(data)


def index(change: Callable[[dict[str, Any]], Any], *, resealed: bool = True) -> Damage:
    """Return a damage that changes the index."""

    def damage(folder: Path) -> None:
        value = index_of(folder)
        change(value)
        if resealed:
            sealed(folder, value)
        else:
            (folder / INDEX).write_text(json.dumps(value))

    return damage


def metadata(**changes: Any) -> Damage:
    """Return a damage that changes the index's metadata."""
    return index(lambda value: value["metadata"].update(changes))


def listed(name: Any, entry: Any = None) -> Damage:
    """Return a damage that lists a file of another name, or with another entry."""

    def change(value: dict[str, Any]) -> None:
        files = value["metadata"]["files"]
        old = files.pop(SHARD)
        files[name] = old if entry is None else entry

    return index(change)


def raw(change: Callable[[bytes], bytes]) -> Damage:
    """Return a damage of the shard's bytes that the index does not know of."""
    return lambda folder: (folder / SHARD).write_bytes(change((folder / SHARD).read_bytes()))


def shard(change: Callable[[dict[str, Any], bytearray], Any]) -> Damage:
    """Return a change of the shard's header and data that the index agrees with."""

    def damage(folder: Path) -> None:
        content = (folder / SHARD).read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        header, data = json.loads(content[8:end]), bytearray(content[end:])
        change(header, data)
        replace_shard(folder, safetensors_bytes(header, bytes(data)))
        value = index_of(folder)
        value["weight_map"] = {name: SHARD for name in header if name != "__metadata__"}
        sealed(folder, value)

    return damage


def replace_shard(folder: Path, content: bytes) -> None:
    """Write a shard, with its size and its digest in the index."""
    (folder / SHARD).write_bytes(content)
    value = index_of(folder)
    value["metadata"]["files"] = {SHARD: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
    sealed(folder, value)


def facts(**changes: Any) -> Damage:
    """Return a damage of the layer's facts; a value of ... removes one."""

    def change(header: dict[str, Any], _data: bytearray) -> None:
        layers = json.loads(header["__metadata__"]["layers"])
        layers[LAYER].update(changes)
        layers[LAYER] = {name: value for name, value in layers[LAYER].items() if value is not ...}
        header["__metadata__"]["layers"] = json.dumps(layers)

    return shard(change)


def layers(content: str) -> Damage:
    """Return a damage that replaces the list of layers."""
    return shard(lambda header, _: header["__metadata__"].update(layers=content))


def values(part: str, change: Callable[[np.ndarray[Any, Any]], Any], dtype: str) -> Damage:
    """Return a damage of the values of a small tensor."""

    def damage(header: dict[str, Any], data: bytearray) -> None:
        begin, end = header[f"{LAYER}.{part}"]["data_offsets"]
        array = np.frombuffer(bytes(data[begin:end]), dtype).copy()
        change(array)
        data[begin:end] = array.tobytes()

    return shard(damage)


def entry(part: str, **changes: Any) -> Damage:
    """Return a damage of a tensor's entry."""
    return shard(lambda header, _: header[f"{LAYER}.{part}"].update(changes))


def renamed(part: str) -> Damage:
    """Return a damage that gives a tensor another name."""
    return shard(lambda header, _: header.update({"other": header.pop(f"{LAYER}.{part}")}))


def other_file(make: Callable[[Path], Any]) -> Damage:
    """Return a damage that replaces the shard by something that is no file of its own."""

    def damage(folder: Path) -> None:
        (folder / SHARD).unlink()
        make(folder / SHARD)

    return damage


def link_out(path: Path) -> None:
    """Make a link to a file outside the folder."""
    (path.parent.parent / "outside").write_bytes(b"secret")
    path.symlink_to(path.parent.parent / "outside")


def pickled(folder: Path) -> None:
    """Write a pickle in place of the shard, with the right digest."""
    replace_shard(folder, pickle_bytes(folder))


def foreign(folder: Path) -> None:
    """Write another project's file in place of the shard, with the right digest."""
    write_safetensors(folder / "other", {"a": np.zeros(4, np.uint8)})
    content = (folder / "other").read_bytes()
    (folder / "other").unlink()
    replace_shard(folder, content)


def interrupted(folder: Path) -> None:
    """Leave what an interrupted conversion leaves."""
    (folder / INDEX).unlink()


DAMAGES: dict[str, Damage] = {
    "interrupted": interrupted,
    "index that is no JSON": text("{"),
    "index that is a list": text("[]"),
    "index that is empty": text(""),
    "index of deep lists": text("[" * 100_000),
    "index of 30 MB": text(b'{"a": "' + b"a" * (30 << 20) + b'"}'),
    "index of a million lists": text('{"a": [' + "[]," * (1 << 21) + "[]]}"),
    "index with a key twice": text('{"metadata": {}, "metadata": {}}'),
    "index that is not UTF-8": text(b"\xff\xfe"),
    "no metadata": index(lambda value: value.pop("metadata")),
    "metadata that is a list": index(lambda value: value.update(metadata=[])),
    "format that is a number": metadata(format=1),
    "another version": metadata(format="w4a16gen.packed_checkpoint/2"),
    "another layout": metadata(layout="fragment_blocks_v9"),
    "layout that is a list": metadata(layout=[]),
    "no seal": index(lambda value: value.pop("sha256"), resealed=False),
    "a changed index": index(lambda value: value["metadata"].update(total_size=1), resealed=False),
    "no files": index(lambda value: value["metadata"].pop("files")),
    "files that are a list": metadata(files=[SHARD]),
    "files that are empty": metadata(files={}),
    "a file above": listed("../packed/model.safetensors"),
    "an absolute path": listed("/etc/passwd"),
    "a hidden file": listed(".model.safetensors"),
    "a backslash": listed("a\\b"),
    "a null character": listed("a\0b"),
    "a missing file": listed("missing.safetensors"),
    "an entry that is a number": listed(SHARD, 5),
    "an entry without a digest": listed(SHARD, {"bytes": 5}),
    "2^60 bytes": listed(SHARD, {"bytes": 1 << 60, "sha256": ""}),
    "negative bytes": listed(SHARD, {"bytes": -1, "sha256": ""}),
    "bytes that are text": listed(SHARD, {"bytes": "5", "sha256": ""}),
    "a digest that is a list": index(lambda value: value["metadata"]["files"][SHARD].update(sha256=[])),
    "no tensors in the index": index(lambda value: value.update(weight_map={})),
    "tensors that are a list": index(lambda value: value.update(weight_map=[])),
    "a tensor in another file": index(lambda value: value["weight_map"].update({f"{LAYER}.packed": "other"})),
    "last byte is missing": raw(lambda content: content[:-1]),
    "one byte more": raw(lambda content: content + b"\0"),
    "a flipped bit of the data": raw(lambda content: content[:-1] + bytes([content[-1] ^ 1])),
    "a flipped bit of the header": raw(lambda content: content[:40] + bytes([content[40] ^ 1]) + content[41:]),
    "nothing": raw(lambda _: b""),
    "a link out of the folder": other_file(link_out),
    "a link to itself": other_file(lambda path: path.symlink_to(path.name)),
    "a pipe": other_file(os.mkfifo),
    "a folder": other_file(Path.mkdir),
    "a pickle": pickled,
    "another project's file": foreign,
    "header of 2^62 bytes": lambda folder: replace_shard(folder, (1 << 62).to_bytes(8, "little") + bytes(100)),
    "tensor of 2^60 elements": entry("packed", shape=[1 << 60]),
    "offsets after the file": entry("packed", data_offsets=[0, 1 << 40], shape=[1 << 40]),
    "negative offsets": entry("packed", data_offsets=[-8, 8]),
    "overlapping tensors": entry("alpha", data_offsets=[0, 4]),
    "packed of another dtype": entry("packed", dtype="I8"),
    "alpha of another dtype": entry("alpha", dtype="I32"),
    "alpha of no dimension": entry("alpha", shape=[]),
    "bias of two dimensions": entry("bias", shape=[1, 64]),
    "no packed tensor": renamed("packed"),
    "no alpha": renamed("alpha"),
    "layers that are no JSON": layers("{"),
    "layers that are a list": layers("[]"),
    "layers of deep lists": layers("[" * 100_000),
    "a layer twice": layers(f'{{"{LAYER}": {{}}, "{LAYER}": {{}}}}'),
    "a layer without tensors": layers('{"x": {"n": 64, "k": 256, "group_size": 64, "mode": "fgs"}}'),
    "facts that are a list": layers(f'{{"{LAYER}": []}}'),
    "no mode": facts(mode=...),
    "one fact more": facts(extra=1),
    "mode that is a list": facts(mode=[]),
    "unknown mode": facts(mode="fgsx"),
    "n of 2^60": facts(n=1 << 60),
    "n of 10^4000": facts(n=10**4000),
    "negative n": facts(n=-64),
    "n of 0": facts(n=0),
    "n that is true": facts(n=True),
    "n that is text": facts(n="64"),
    "k that is a fraction": facts(k=256.5),
    "another k": facts(k=512),
    "group size of 0": facts(group_size=0),
    "group size that does not divide": facts(group_size=96),
    "alpha that is not a number": values("alpha", lambda array: array.fill(np.nan), "<f4"),
    "alpha that is infinite": values("alpha", lambda array: array.fill(np.inf), "<f4"),
    "alpha of 0": values("alpha", lambda array: array.fill(0), "<f4"),
    "alpha of 3": values("alpha", lambda array: array.fill(3), "<f4"),
    "negative alpha": values("alpha", lambda array: array.fill(-1), "<f4"),
    "bias that is not a number": values("bias", lambda array: array.fill(np.nan), "<f2"),
    "permutation that repeats": values("permutation", lambda array: array.fill(1), "<i4"),
    "permutation past the end": values("permutation", lambda array: array.__setitem__(0, 1 << 30), "<i4"),
    "negative permutation": values("permutation", lambda array: array.__setitem__(0, -1), "<i4"),
}
"""What may be wrong with a folder; each must be refused by `open_packed`, or when the layer is taken."""
