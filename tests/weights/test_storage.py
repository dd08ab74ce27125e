"""Files of packed weights: read back bit for bit, readable by safetensors, and refused when they are anything else."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from w4a16gen import InvalidValueError, PackedWeight, QuantMode, Target, pack_weight
from w4a16gen.weights.reference import random_weight


@pytest.fixture
def packed(rng: np.random.Generator) -> PackedWeight:
    """Return a packed weight with zeros."""
    return pack_weight(random_weight(rng, 24, 256, 64, QuantMode.FINEGRAINED_SCALE_AND_ZEROS))


@pytest.mark.parametrize("mode", QuantMode, ids=str)
@pytest.mark.parametrize("target", Target, ids=str)
def test_a_saved_weight_is_read_back_bit_for_bit(
    tmp_path: Path, rng: np.random.Generator, mode: QuantMode, target: Target
) -> None:
    weight = pack_weight(random_weight(rng, 24, 256, 64 if mode.is_grouped else 256, mode), target=target)
    weight.save(tmp_path / "layers" / "a.safetensors")
    found = PackedWeight.load(str(tmp_path / "layers" / "a.safetensors"))
    assert (found.layout, found.geometry) == (weight.layout, weight.geometry)
    assert found.data.tobytes() == weight.data.tobytes()
    assert found.data.flags.writeable
    with safe_open(tmp_path / "layers" / "a.safetensors", "numpy") as file:
        assert file.get_tensor("packed").tobytes() == weight.data.tobytes()
        assert file.metadata()["layout"] == weight.layout
        assert int(file.metadata()["k"]) == 256


def replaced(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    """Return a damage that changes text in the header; both are of one length."""
    assert len(old) == len(new)
    return lambda content: content.replace(old, new)


DAMAGES: list[tuple[str, Callable[[bytes], bytes], str]] = [
    ("empty", lambda _: b"", "is not a file of a packed weight"),
    ("text", lambda _: b"not a weight, but longer than a header's length", "is not a file of a packed weight"),
    ("cut short", lambda content: content[:-1], "header does not describe its"),
    ("longer", lambda content: content + b"\0", "header does not describe its"),
    ("a flipped byte", lambda content: content[:-1] + bytes([content[-1] ^ 1]), "is damaged: its bytes do not have"),
    ("another version", replaced(b"packed_weight/1", b"packed_weight/2"), "this version reads 'w4a16gen.packed_wei"),
    ("another layout", replaced(b"fragment_blocks_v2", b"fragment_blocks_v9"), "which is not one of"),
    ("another mode", replaced(b'"fgsz"', b'"fgxx"'), "is not one of cs, fgs, fgsz"),
    ("another k", replaced(b'"k": "256"', b'"k": "512"'), "bytes must be"),
    ("no number", replaced(b'"k": "256"', b'"k": "2x6"'), "does not hold a packed weight"),
    ("a fact left out", replaced(b'"k": "256"', b'"j": "256"'), "'k' is missing"),
    ("deep", lambda _: (2000).to_bytes(8, "little") + b"[" * 2000, "is not a file of a packed weight"),
]


@pytest.mark.parametrize(("damage", "text"), [row[1:] for row in DAMAGES], ids=[row[0] for row in DAMAGES])
def test_any_other_file_is_refused(
    tmp_path: Path, packed: PackedWeight, damage: Callable[[bytes], bytes], text: str
) -> None:
    path = tmp_path / "a.safetensors"
    packed.save(path)
    content = path.read_bytes()
    assert damage(content) != content
    path.write_bytes(damage(content))
    with pytest.raises(InvalidValueError, match=text):
        PackedWeight.load(path)


def test_what_is_no_file_is_refused(tmp_path: Path, packed: PackedWeight) -> None:
    for path in (tmp_path, "/dev/null", "/dev/zero"):
        with pytest.raises(InvalidValueError, match="is not a file of a packed weight"):
            PackedWeight.load(path)
    with pytest.raises(FileNotFoundError):
        PackedWeight.load(tmp_path / "nowhere")
    with pytest.raises(InvalidValueError, match="path of type int must be text or a path"):
        packed.save(3)  # type: ignore[arg-type]


def test_the_header_names_the_version_of_the_format(tmp_path: Path, packed: PackedWeight) -> None:
    packed.save(tmp_path / "a")
    content = (tmp_path / "a").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert header["__metadata__"]["format"] == "w4a16gen.packed_weight/1"
    assert (8 + int.from_bytes(content[:8], "little")) % 8 == 0


def test_strided_data_is_read_and_saved_as_what_it_holds(tmp_path: Path, packed: PackedWeight) -> None:
    for weight in (packed, pack_weight(packed.unpack(), target="cutlass")):
        strided = dataclasses.replace(weight, data=np.repeat(weight.data, 2)[::2])
        assert np.array_equal(strided.unpack().dequantize(), weight.unpack().dequantize())
        strided.save(tmp_path / "a")
        assert np.array_equal(PackedWeight.load(tmp_path / "a").data, weight.data)
