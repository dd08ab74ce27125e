"""Files that lie are refused with a sentence: nothing is read past them, executed, or kept in memory."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.checkpoints import hostile_writers as hostile
from fakes.checkpoints.cases import CASES
from fakes.checkpoints.expected import LAYER
from fakes.checkpoints.files import write_folder
from fakes.checkpoints.hostile import HEAVY, HOSTILE
from fakes.checkpoints.hostile_writers import MARKER, SOUND_GGUF
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import w4a16gen
from w4a16gen import InvalidValueError

LONGEST_MESSAGE = 600
PEAK_BYTES = 200 * 10**6
PROGRAM = """
import json, pathlib, sys
import w4a16gen
for path in json.load(sys.stdin):
    try:
        w4a16gen.open_checkpoint(path)
    except w4a16gen.W4A16Error:
        continue
    raise SystemExit(path)
status = pathlib.Path("/proc/self/status").read_text()  # the peak of resource.getrusage includes the parent's
print(1024 * int(status.split("VmHWM:")[1].split()[0]))
"""


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_with_a_sentence(name: str, tmp_path: Path) -> None:
    path = HOSTILE[name](tmp_path)
    with pytest.raises(InvalidValueError) as caught:
        w4a16gen.open_checkpoint(path)
    text = str(caught.value).replace(str(tmp_path), "")
    assert 10 < len(text) < LONGEST_MESSAGE
    assert text.isprintable()
    assert "its tensors are not those of" not in text, "the file itself must be refused"
    assert not (tmp_path / MARKER).exists()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("last byte is missing", "the file is truncated"),
        ("offsets after the file", "the file is truncated"),
        ("overlap as large as the hole", "overlaps the tensor before it"),
        ("gguf of 2^60 tensors", "are more than"),
        ("gguf of 2^60 keys", "are more than"),
        ("gguf with 2^60 texts", "are more than"),
    ],
)
def test_the_sentence_names_the_reason(name: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match=reason):
        w4a16gen.open_checkpoint(HOSTILE[name](tmp_path))


def test_all_hostile_files_together_need_little_memory(tmp_path: Path) -> None:
    paths = []
    for number, write in enumerate(HOSTILE.values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        paths.append(str(write(folder)))
    assert len(paths) >= 40
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, input=json.dumps(paths), capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout) < PEAK_BYTES
    assert not list(tmp_path.rglob(MARKER))


@pytest.mark.parametrize("name", HEAVY)
def test_a_file_that_would_fill_the_memory_is_refused_before_it_does(name: str, tmp_path: Path) -> None:
    paths = [str(HEAVY[name](tmp_path))]
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, input=json.dumps(paths), capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout) < PEAK_BYTES


def test_the_sound_files_that_hostile_ones_start_from_are_opened(tmp_path: Path) -> None:
    assert len(w4a16gen.open_checkpoint(hostile.gptq_layer()(tmp_path))) == 1
    assert len(w4a16gen.open_checkpoint(hostile.gguf_file(SOUND_GGUF)(tmp_path))) == 1
    for number, write in enumerate((hostile.hqq((8, 64)), hostile.compressed((8, 64)))):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert len(w4a16gen.open_checkpoint(write(folder))) == 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("tensor", ["scales", "bias"])
def test_values_that_are_not_finite_are_refused_when_they_are_read(tensor: str, value: float, tmp_path: Path) -> None:
    parts = {"scales": np.ones((2, 16), np.float16), "bias": np.ones(16, np.float16)}
    parts[tensor].flat[3] = value
    layer = w4a16gen.open_checkpoint(hostile.gptq_layer(**parts)(tmp_path))[LAYER]
    with pytest.raises(InvalidValueError, match=f"{tensor}' must be finite"):
        _ = (layer.bias, layer.quantized())


def test_a_bias_beyond_fp16_is_refused(tmp_path: Path) -> None:
    layer = w4a16gen.open_checkpoint(hostile.gptq_layer(bias=np.full(16, 1e6, np.float32))(tmp_path))[LAYER]
    with pytest.raises(InvalidValueError, match="bias exceeds fp16's 65504"):
        _ = layer.bias


def test_a_file_that_becomes_shorter_is_refused_and_ends_no_process(tmp_path: Path) -> None:
    layer = w4a16gen.open_checkpoint(hostile.valid(tmp_path))[LAYER]
    os.truncate(tmp_path / "model.safetensors", 100)
    with pytest.raises(InvalidValueError, match="has become shorter since it was opened"):
        layer.quantized()


def test_links_into_the_blobs_of_a_hub_cache_are_followed(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "0123", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    hostile.valid(snapshot)
    for name in ("model.safetensors", "config.json"):
        (snapshot / name).rename(blobs / f"{name}-digest")
        (snapshot / name).symlink_to(f"../../blobs/{name}-digest")
    assert len(w4a16gen.open_checkpoint(snapshot)) == 1
    (tmp_path / "other").mkdir()
    (blobs / "config.json-digest").rename(tmp_path / "other" / "config.json-digest")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../other/config.json-digest")
    with pytest.raises(InvalidValueError, match="link out of its folder"):
        w4a16gen.open_checkpoint(snapshot)


def test_shards_of_an_index_are_one_checkpoint(tmp_path: Path, rng: np.random.Generator) -> None:
    parts: dict[str, Any] = {}
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        CASES["awq-gemm"](folder, rng)
        parts[f"model-{number}.safetensors"] = folder / "model.safetensors"
    whole = tmp_path / "whole"
    whole.mkdir()
    write_folder(whole, {"a": np.zeros(1, np.uint8)}, {"quant_method": "awq"})
    names = [f"{LAYER}.{part}" for part in ("qweight", "qzeros", "scales")]
    for number, (name, source) in enumerate(parts.items()):
        # Names of equal length keep the header's length.
        text = source.read_bytes().replace(LAYER.encode(), LAYER.replace("0", str(number)).encode())
        (whole / name).write_bytes(text)
    files = {name.replace("0", str(number)): f"model-{number}.safetensors" for number in range(2) for name in names}
    (whole / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    checkpoint = w4a16gen.open_checkpoint(whole)
    assert list(checkpoint) == [LAYER, LAYER.replace("0", "1")]
    assert checkpoint.dense == []


@pytest.mark.parametrize("path", ["", "a\0b", 5, None, "nowhere", "/dev/null", "x" * 5000, b"bytes"])
def test_a_path_that_is_none_is_refused(path: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidValueError):
        w4a16gen.open_checkpoint(path)


def read_everything(path: Path) -> None:
    """Open a file and read all of it; only the package's own error may be raised."""
    with contextlib.suppress(InvalidValueError):
        checkpoint = w4a16gen.open_checkpoint(path)
        for layer in checkpoint.values():
            assert layer.n * layer.k <= 10**7
            layer.quantized()
            _ = (layer.notes, layer.bias, layer.input_scale)
        for name in checkpoint.dense:
            checkpoint.tensor(name)


CHANGES = st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), min_size=1, max_size=4)
FUZZ = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def changed(content: bytes, changes: list[tuple[int, int]], cut: int) -> bytes:
    result = bytearray(content)
    for place, value in changes:
        result[place % len(result)] = value
    return bytes(result[: len(result) - cut])


@pytest.mark.parametrize("case", ["gptq-act-order", "compressed-tensors-g_idx", "hqq", "torchao-plain", "modelopt"])
@FUZZ
@given(changes=CHANGES, cut=st.sampled_from([0, 0, 0, 1, 100]))
def test_any_change_of_a_header_is_read_or_refused(
    case: str, changes: list[tuple[int, int]], cut: int, tmp_path: Path
) -> None:
    CASES[case](tmp_path, np.random.default_rng(2))
    path = tmp_path / "model.safetensors"
    length = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    path.write_bytes(changed(path.read_bytes(), [(place % length, value) for place, value in changes], cut))
    read_everything(tmp_path)


@pytest.mark.parametrize("case", ["gguf-q4_0", "gguf-q4_k", "gguf-experts"])
@FUZZ
@given(changes=CHANGES, cut=st.sampled_from([0, 0, 0, 1, 100]))
def test_any_change_of_a_gguf_header_is_read_or_refused(
    case: str, changes: list[tuple[int, int]], cut: int, tmp_path: Path
) -> None:
    path = CASES[case](tmp_path, np.random.default_rng(2)).path
    path.write_bytes(changed(path.read_bytes(), [(place % 300, value) for place, value in changes], cut))
    read_everything(path)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["gptq", "awq", "hqq", "marlin", "gptq_v2"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
SETTINGS = st.dictionaries(
    st.sampled_from(["quant_method", "bits", "sym", "checkpoint_format", "meta", "version", "config_groups", "format"]),
    JSON,
)


@FUZZ
@given(quantization=SETTINGS)
def test_any_configuration_is_read_or_refused(quantization: dict[str, Any], tmp_path: Path) -> None:
    CASES["gptq-v1"](tmp_path, np.random.default_rng(3))
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    read_everything(tmp_path)
