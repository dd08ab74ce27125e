"""Packed folders and files that were damaged or forged are refused with a sentence, and need little memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fakes.checkpoints.damaged import DAMAGES, INDEX, LAYER, SHARD, facts, packed, values
from fakes.checkpoints.hostile_writers import MARKER
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import w4a16gen
from w4a16gen import InvalidValueError, PackedWeight

PEAK_BYTES = 200 * 10**6
PROGRAM = """
import json, pathlib, sys
import w4a16gen
for path in json.load(sys.stdin):
    for verify in (True, False):
        try:
            list(w4a16gen.open_packed(path, verify=verify).values())
        except w4a16gen.W4A16Error:
            continue
        if verify:
            raise SystemExit(path)
status = pathlib.Path("/proc/self/status").read_text()
print(1024 * int(status.split("VmHWM:")[1].split()[0]))
"""
SPARSE_PROGRAM = (
    PROGRAM.split("for path", maxsplit=1)[0]
    + """
try:
    w4a16gen.PackedWeight.load(json.load(sys.stdin))
    raise SystemExit("it was loaded")
except w4a16gen.W4A16Error as error:
    print(error)
status = pathlib.Path("/proc/self/status").read_text()
print(1024 * int(status.split("VmHWM:")[1].split()[0]))
"""
)


def read_all(folder: Path) -> None:
    for layer in w4a16gen.open_packed(folder).values():
        layer.weight.host_data()


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_refused_with_a_sentence(name: str, tmp_path: Path) -> None:
    folder = packed(tmp_path)
    DAMAGES[name](folder)
    with pytest.raises(InvalidValueError) as caught:
        read_all(folder)
    text = str(caught.value).replace(str(tmp_path), "")
    assert 10 < len(text) < 600
    assert text.isprintable()
    assert not list(tmp_path.rglob(MARKER))


def test_the_sound_folder_is_opened(tmp_path: Path) -> None:
    folder = packed(tmp_path)
    read_all(folder)
    facts()(folder)
    values("bias", lambda array: array.fill(1), "<f2")(folder)
    read_all(folder)
    bias = w4a16gen.open_packed(folder)[LAYER].bias
    assert bias is not None
    assert (bias == 1).all()


def test_all_damaged_folders_together_need_little_memory(tmp_path: Path) -> None:
    paths = []
    for number, damage in enumerate(DAMAGES.values()):
        (tmp_path / str(number)).mkdir()
        paths.append(str(packed(tmp_path / str(number))))
        damage(Path(paths[-1]))
    assert len(paths) >= 40
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, input=json.dumps(paths), capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout) < PEAK_BYTES
    assert not list(tmp_path.rglob(MARKER))


def test_a_folder_without_a_check_of_digests_still_has_checked_sizes(tmp_path: Path) -> None:
    folder = packed(tmp_path)
    content = bytearray((folder / SHARD).read_bytes())
    content[-1] ^= 1
    (folder / SHARD).write_bytes(content)
    assert len(w4a16gen.open_packed(folder, verify=False)) == 1
    (folder / SHARD).write_bytes(content[:-1])
    with pytest.raises(InvalidValueError, match="truncated or changed"):
        w4a16gen.open_packed(folder, verify=False)


def test_a_file_that_becomes_shorter_ends_no_process(tmp_path: Path) -> None:
    opened = w4a16gen.open_packed(packed(tmp_path))
    os.truncate(tmp_path / "packed" / SHARD, 100)
    with pytest.raises(InvalidValueError, match="has become shorter since it was opened"):
        opened.tensor(f"{LAYER}.alpha")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 20_000), value=st.integers(0, 255), cut=st.sampled_from([0, 0, 0, 1, 50]))
def test_any_changed_byte_is_noticed(place: int, value: int, cut: int, tmp_path: Path) -> None:
    folder = tmp_path / "packed" if (tmp_path / "packed").exists() else packed(tmp_path)
    before = {name: (folder / name).read_bytes() for name in (SHARD, INDEX)}
    for name, content in before.items():
        changed = bytearray(content)
        changed[place % len(content)] = value
        changed = changed[: len(changed) - cut]
        if bytes(changed) == content:
            continue
        (folder / name).write_bytes(changed)
        if name == SHARD or json.loads(content) != _loaded(bytes(changed)):
            with pytest.raises(InvalidValueError):
                read_all(folder)
        (folder / name).write_bytes(content)


def _loaded(content: bytes) -> object:
    try:
        return json.loads(content)
    except ValueError:
        return None


def sparse(path: Path, size: int, facts: dict[str, str]) -> None:
    """Write a file of a packed weight that claims and has many bytes, all of them holes."""
    header = {
        "__metadata__": {"format": "w4a16gen.packed_weight/1", "sha256": "0" * 64, **facts},
        "packed": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]},
    }
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + size)


@pytest.mark.parametrize(
    ("size", "k", "sentence"), [(1 << 40, 256, "bytes must be"), (1 << 30, 0, "do not have the digest")]
)
def test_a_large_file_of_holes_fills_no_memory(size: int, k: int, sentence: str, tmp_path: Path) -> None:
    known = w4a16gen.pack_weight(w4a16gen.quantize(np.eye(64, 256), group_size=128))
    facts = {"layout": known.layout, "n": "64", "k": str(k or 256), "group_size": "128", "mode": "fgs"}
    if not k:  # sizes that agree with the file
        columns = 128
        while PackedWeight(None, known.layout, 4096, columns * 2, 128, known.mode).nbytes < size:
            columns *= 2
        facts |= {"n": "4096", "k": str(columns)}
        size = PackedWeight(None, known.layout, 4096, columns, 128, known.mode).nbytes
    sparse(tmp_path / "a.safetensors", size, facts)
    command, path = [sys.executable, "-c", SPARSE_PROGRAM], str(tmp_path / "a.safetensors")
    done = subprocess.run(command, input=json.dumps(path), capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stdout + done.stderr
    message, peak = done.stdout.splitlines()
    assert sentence in message
    assert int(peak) < PEAK_BYTES
