"""`convert` writes each format's layers packed; `open_packed` finds every one again, in a memory map."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.checkpoints.cases import CASES
from fakes.checkpoints.files import BFloat16, write_folder
from fakes.checkpoints.word_formats import gptq

import w4a16gen
from w4a16gen import InvalidValueError
from w4a16gen.files import sole_writer
from w4a16gen.weights.writers import shards
from w4a16gen.weights.writers.convert import Written, convert

UNPACKABLE = {"compressed-tensors-part-of-a-word": "group size 12 must be"}
"""Cases whose groups the native layout does not hold, and the reason."""


def converted(case: str, tmp_path: Path, **settings: Any) -> tuple[Path, Path]:
    """Return the path of a checkpoint, and the folder that it was converted to."""
    source = tmp_path / "source"
    source.mkdir()
    path = CASES[case](source, np.random.default_rng(1)).path
    convert(path, tmp_path / "out", **settings)
    return path, tmp_path / "out"


@pytest.mark.parametrize("case", [case for case in CASES if case not in UNPACKABLE])
def test_every_format_makes_a_round_trip(case: str, tmp_path: Path) -> None:
    path, out = converted(case, tmp_path)
    checkpoint, packed = w4a16gen.open_checkpoint(path), w4a16gen.open_packed(out)
    assert list(packed) == list(checkpoint)
    for name, layer in checkpoint.items():
        weight, found = layer.quantized(), packed[name]
        back = found.weight.unpack()
        np.testing.assert_array_equal(back.q, weight.q)
        np.testing.assert_array_equal(back.scales, weight.scales)
        assert (back.mode, back.group_size, found.alpha) == (weight.mode, weight.group_size, layer.alpha)
        np.testing.assert_array_equal(back.zeros, weight.zeros)
        for part in ("bias", "permutation", "input_scale"):
            assert (getattr(found, part) is None) == (getattr(layer, part) is None)
            if getattr(layer, part) is not None:
                np.testing.assert_array_equal(getattr(found, part), getattr(layer, part))
    assert packed.dense == checkpoint.dense
    for name in checkpoint.dense:
        np.testing.assert_array_equal(packed.tensor(name), checkpoint.tensor(name))
    assert packed.config["quantization_config"]["quant_method"] == "w4a16gen"


@pytest.mark.parametrize("case", UNPACKABLE)
def test_a_layer_that_the_layout_does_not_hold_is_named(case: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match=f"^layer '.*cannot be packed: {UNPACKABLE[case]}"):
        converted(case, tmp_path)
    assert not (tmp_path / "out").exists()


def test_the_weights_stay_in_the_file(tmp_path: Path) -> None:
    _, out = converted("gptq-v1", tmp_path)
    data = next(iter(w4a16gen.open_packed(out).values())).weight.data
    assert not data.flags.writeable
    while isinstance(data, np.ndarray):
        data = data.base
    assert isinstance(getattr(data, "obj", data), mmap.mmap)


def test_the_product_is_that_of_the_checkpoint(tmp_path: Path, rng: np.random.Generator) -> None:
    path, out = converted("gptq-act-order", tmp_path)
    (name, layer), packed = next(iter(w4a16gen.open_checkpoint(path).items())), w4a16gen.open_packed(out)
    found = packed[name]
    assert found.permutation is not None
    a = rng.standard_normal((3, layer.k)).astype(np.float16)[:, found.permutation]
    c = w4a16gen.gemm(np.ascontiguousarray(a), found.weight, bias=found.bias, alpha=found.alpha)
    expected = w4a16gen.pack_weight(layer.quantized())
    np.testing.assert_array_equal(
        c, w4a16gen.gemm(np.ascontiguousarray(a), expected, bias=layer.bias, alpha=layer.alpha)
    )


def test_files_of_the_tokenizer_come_along_and_code_does_not(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    CASES["awq-gemm"](source, np.random.default_rng(1))
    for name in ("tokenizer.json", "tokenizer.model", "generation_config.json", "modeling.py", "notes.md"):
        (source / name).write_text(name)
    convert(source, tmp_path / "out")
    found = {path.name for path in (tmp_path / "out").iterdir()}
    sides = {"tokenizer.json", "tokenizer.model", "generation_config.json"}
    assert found == {"config.json", "model.safetensors", "model.safetensors.index.json", *sides}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "llama"


def test_a_side_file_that_is_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    CASES["awq-gemm"](source, np.random.default_rng(1))
    (tmp_path / "secret").write_text("secret")
    (source / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(InvalidValueError, match="link out of its folder"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_a_pipe_in_place_of_a_side_file_is_refused_and_blocks_nothing(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    CASES["awq-gemm"](source, np.random.default_rng(1))
    os.mkfifo(source / "tokenizer.json")
    with pytest.raises(InvalidValueError, match=r"tokenizer\.json must be a regular file"):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"metadata": []}', b"\xff", b'{"schema": 5}'])
@pytest.mark.parametrize("name", ["model.safetensors.index.json", shards.STATE])
def test_a_broken_result_is_not_continued(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_bytes(content)
    with pytest.raises(InvalidValueError, match=r"holds other files|is not JSON"):
        convert(layers_of(tmp_path), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]


def test_dense_tensors_keep_their_dtype_and_bits(tmp_path: Path, rng: np.random.Generator) -> None:
    source = tmp_path / "source"
    source.mkdir()
    path = gptq(version=1, symmetric=True)(source, rng).path
    checkpoint = w4a16gen.open_checkpoint(path)
    tensors: dict[str, Any] = {name: np.array(checkpoint.tensor(name)) for name in checkpoint.tensors}
    tensors["norm"] = BFloat16(np.arange(7, dtype=np.float32))
    write_folder(path, tensors, {"quant_method": "gptq", "bits": 4, "group_size": 64})
    convert(path, tmp_path / "out")
    packed = w4a16gen.open_packed(tmp_path / "out")
    np.testing.assert_array_equal(packed.tensor("norm"), np.arange(7))
    assert packed._tensors["norm"].dtype == "BF16"  # noqa: SLF001


def layers_of(tmp_path: Path, count: int = 5) -> Path:
    """Write a compressed-tensors folder of several layers."""
    rng, tensors = np.random.default_rng(3), {}
    for i in range(count):
        tensors[f"layers.{i}.weight_packed"] = rng.integers(-(2**31), 2**31, (64, 32)).astype(np.int32)
        tensors[f"layers.{i}.weight_scale"] = rng.uniform(0.001, 0.02, (64, 4)).astype(np.float16)
        tensors[f"layers.{i}.weight_shape"] = np.array([64, 256])
    source = tmp_path / "layers"
    source.mkdir(exist_ok=True)
    return write_folder(source, tensors, {"quant_method": "compressed-tensors", "format": "pack-quantized"})


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def interrupt_at(step: int, error: type[BaseException]) -> Callable[[int, int, str], None]:
    def report(done: int, _total: int, _what: str) -> None:
        if done == step:
            raise error

    return report


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
def test_an_interrupted_conversion_continues(step: int, tmp_path: Path) -> None:
    source, out = layers_of(tmp_path), tmp_path / "out"
    convert(source, tmp_path / "whole", max_shard_bytes=20_000)
    with pytest.raises(KeyboardInterrupt):
        convert(source, out, progress=interrupt_at(step, KeyboardInterrupt), max_shard_bytes=20_000)
    assert not list(out.glob("*.tmp")) + list(out.glob(".*.tmp"))
    with pytest.raises(InvalidValueError, match="their conversion was interrupted: run `w4a16gen convert`"):
        w4a16gen.open_packed(out)
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    convert(source, out, max_shard_bytes=20_000)
    assert files_of(out) == files_of(tmp_path / "whole")
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    assert before.items() <= after.items(), "complete shards are not written again"
    assert len(before) == (step - 1) // 2
    assert len(after) == 3


def test_a_shard_that_was_damaged_meanwhile_is_written_again(tmp_path: Path) -> None:
    source, out = layers_of(tmp_path), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        convert(source, out, progress=interrupt_at(4, KeyboardInterrupt), max_shard_bytes=20_000)
    first = min(out.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-1] + b"x")
    convert(source, out, max_shard_bytes=20_000)
    assert len(w4a16gen.open_packed(out)) == 5


KILLED = """
import os, sys
from w4a16gen.weights.writers import shards
from w4a16gen.weights.writers.convert import convert
convert(*sys.argv[1:], progress=lambda done, *_: os._exit(9) if done == 3 else None, max_shard_bytes=20_000)
"""


def test_a_killed_conversion_continues(tmp_path: Path) -> None:
    source, out = layers_of(tmp_path), tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", KILLED, str(source), str(out)], check=False)  # noqa: S603
    assert done.returncode == 9
    assert list(out.glob(".*.tmp"))
    convert(source, out, max_shard_bytes=20_000)
    assert not list(out.glob(".*"))
    assert len(w4a16gen.open_packed(out)) == 5


def test_a_checkpoint_is_the_same_by_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = layers_of(tmp_path), tmp_path / "out"
    convert(source, out)
    (tmp_path / "link").symlink_to(source.parent, target_is_directory=True)
    monkeypatch.chdir(out)
    for path in (Path("..") / source.relative_to(tmp_path), tmp_path / "link" / source.name):
        assert convert(path, out).was_complete


def test_a_second_conversion_writes_nothing(tmp_path: Path) -> None:
    source, out = layers_of(tmp_path), tmp_path / "out"
    assert not convert(source, out).was_complete
    times = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert convert(source, out).was_complete
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == times


def test_a_result_that_was_damaged_is_mended(tmp_path: Path) -> None:
    source, out = layers_of(tmp_path), tmp_path / "out"
    convert(source, out, max_shard_bytes=20_000)
    before = files_of(out)
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    damaged = max(out.glob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert not convert(source, out, max_shard_bytes=20_000).was_complete
    assert files_of(out) == before
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    assert [name for name in times if times[name] != after[name]] == [damaged.name]


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    source, out = layers_of(tmp_path), tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("unique")
    with pytest.raises(InvalidValueError, match=r"holds other files, such as 'thesis\.txt': name a new folder"):
        convert(source, out)
    with pytest.raises(InvalidValueError, match="other files"):
        convert(source, source)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    with pytest.raises(InvalidValueError, match="is a file: name a new folder"):
        convert(source, out / "thesis.txt")


def test_a_folder_of_another_source_is_not_continued(tmp_path: Path) -> None:
    source, out = layers_of(tmp_path), tmp_path / "out"
    convert(source, out)
    os.utime(source / "model.safetensors", ns=(1, 1))
    with pytest.raises(InvalidValueError, match="result of another checkpoint, or of other options"):
        convert(source, out)


def test_too_little_space_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(InvalidValueError, match="has 0 MB free, and 17 MB are needed: use another disk"):
        convert(layers_of(tmp_path), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_what_was_written_is_told(tmp_path: Path) -> None:
    steps: list[tuple[int, int, str]] = []
    written = convert(layers_of(tmp_path), tmp_path / "out", progress=lambda *step: steps.append(step))
    assert isinstance(written, Written)
    assert (written.layers, written.dense, written.shards, written.skipped) == (5, 0, 1, {})
    assert [step[:2] for step in steps] == [(i, 5) for i in range(1, 6)]


def test_the_safetensors_package_reads_the_shards(tmp_path: Path) -> None:
    package = pytest.importorskip("safetensors.numpy")
    _, out = converted("gptq-act-order", tmp_path)
    packed = w4a16gen.open_packed(out)
    tensors = package.load_file(out / "model.safetensors")
    (name, layer), *_ = packed.items()
    np.testing.assert_array_equal(tensors[f"{name}.packed"], layer.weight.data)
    np.testing.assert_array_equal(tensors[f"{name}.permutation"], layer.permutation)


def test_a_gguf_file_takes_nothing_of_its_folder_along(tmp_path: Path) -> None:
    source = tmp_path / "downloads"
    source.mkdir()
    path = CASES["gguf-q4_0"](source, np.random.default_rng(1)).path
    file = path if path.is_file() else next(path.glob("*.gguf"))
    for name in ("tokenizer.json", "config.json"):
        (source / name).write_text('{"model_type": "another"}')
    convert(file, tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    config = w4a16gen.open_packed(tmp_path / "out").config
    assert "model_type" not in config
    assert config["gguf"]["general.architecture"] == "llama"


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    source = layers_of(tmp_path)
    checkpoint = w4a16gen.open_checkpoint(source)
    tensors = {name: np.array(checkpoint.tensor(name)) for name in checkpoint.tensors}
    tensors["layers.0.packed"] = np.zeros(3, np.uint8)
    write_folder(source, tensors, {"quant_method": "compressed-tensors", "format": "pack-quantized"})
    with pytest.raises(InvalidValueError, match=r"two tensors would have the name 'layers\.0\.packed'"):
        convert(source, tmp_path / "out")


def test_an_open_checkpoint_names_the_other_function(tmp_path: Path) -> None:
    _, out = converted("gptq-v1", tmp_path)
    with pytest.raises(InvalidValueError, match=r"open them with w4a16gen\.open_packed"):
        w4a16gen.open_checkpoint(out)


def test_one_process_at_a_time_writes_to_a_folder(tmp_path: Path) -> None:
    source, out = layers_of(tmp_path), tmp_path / "out"
    out.mkdir()
    with sole_writer(out), pytest.raises(InvalidValueError, match=r"another process is writing to .*out: wait for it"):
        convert(source, out)
    assert list(out.iterdir()) == []


def test_what_another_process_wrote_meanwhile_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = layers_of(tmp_path), tmp_path / "out"
    convert(source, out, max_shard_bytes=20_000)
    before = files_of(out)
    monkeypatch.setattr("w4a16gen.weights.writers.convert.is_finished", lambda _: False)
    with pytest.raises(InvalidValueError, match="result of another checkpoint, or of other options"):
        convert(source, out)
    assert files_of(out) == before


def test_a_run_that_completed_no_file_may_be_started_otherwise(tmp_path: Path) -> None:
    source, out = layers_of(tmp_path), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        convert(source, out, progress=interrupt_at(1, KeyboardInterrupt), max_shard_bytes=20_000)
    convert(source, out)
    assert [path.name for path in out.glob("*.safetensors")] == ["model.safetensors"]


def test_a_link_to_nothing_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("nothing")
    with pytest.raises(InvalidValueError, match="out is a link to nothing: name a new folder"):
        convert(layers_of(tmp_path), tmp_path / "out")
