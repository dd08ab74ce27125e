"""`inspect`, `convert` and `quantize`: what they print and write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from docs.checkpoints import FOLDERS
from fakes.checkpoints.cases import CASES
from fakes.checkpoints.files import write_folder, write_safetensors
from fakes.runner import Runner
from fakes.terminal import lines_of, run_on_terminal
from json_shapes import SCHEMAS, check

import w4a16gen
from w4a16gen.cli.output import SCHEMA_VERSIONS
from w4a16gen.runtime.artifact import Build

SIZES = {
    "self_attn.q_proj": (256, 256),
    "self_attn.o_proj": (256, 256),
    "mlp.up_proj": (384, 256),
    "mlp.down_proj": (256, 384),
}


def model(folder: Path, layers: int = 3, group_size: int = 128) -> Path:
    """Write a compressed-tensors folder with the layers of a small model."""
    rng, tensors = np.random.default_rng(2), {}
    for i in range(layers):
        for name, (n, k) in SIZES.items():
            module = f"model.layers.{i}.{name}"
            tensors[f"{module}.weight_packed"] = rng.integers(-(2**31), 2**31, (n, k // 8)).astype(np.int32)
            tensors[f"{module}.weight_scale"] = rng.uniform(0.001, 0.02, (n, k // group_size)).astype(np.float16)
            tensors[f"{module}.weight_shape"] = np.array([n, k])
        tensors[f"model.layers.{i}.input_layernorm.weight"] = np.ones(256, np.float16)
    tensors["model.embed_tokens.weight"] = np.ones((1000, 256), np.float16)
    tensors["lm_head.weight"] = np.ones((1000, 256), np.float16)
    folder.mkdir(exist_ok=True)
    write_folder(folder, tensors, {"quant_method": "compressed-tensors", "format": "pack-quantized"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
    return folder


def of(command: str, printed: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(printed)
    assert value.pop("schema") == f"w4a16gen.{command}/{SCHEMA_VERSIONS[command]}"
    check(value, SCHEMAS[command], command)
    return value


def test_inspect_sums_layers_up_by_kind(cli: Runner, tmp_path: Path) -> None:
    model(tmp_path / "model")
    done = cli.run("inspect model")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].startswith("model: compressed-tensors, 12 layers of 4 bits, 0.00 GB; packed")
    (row,) = [line.split() for line in lines if line.startswith("model.layers.*.mlp.down_proj ")]
    assert row[1:] == ["3", "compressed-tensors", "256", "384", "128", "fgs", "exact"]
    assert sum("_cta" in line for line in lines) >= 3
    assert any("lm_head.weight" in line and "not quantized in the checkpoint" in line for line in lines)
    assert any("embed_tokens" in line and "an embedding" in line for line in lines)
    assert "Pass --dtype float16" in done.stderr
    assert "No build is used" in done.stderr


def test_inspect_as_json(cli: Runner, tmp_path: Path) -> None:
    model(tmp_path / "model")
    value = of("inspect", cli.run("inspect model --tp 4 --json").stdout)
    assert [layer["name"] for layer in value["layers"]][:1] == ["model.layers.0.mlp.down_proj"] or value["layers"]
    by_name = {layer["name"]: layer for layer in value["layers"]}
    assert len(by_name) == value["totals"]["layers"] == 12
    down, up = by_name["model.layers.2.mlp.down_proj"], by_name["model.layers.2.mlp.up_proj"]
    assert (down["axis"], down["divided"]) == ("k", {"n": 256, "k": 96, "group_size": 32})
    assert down["verdict"] == "groups divided, exact"
    assert (up["axis"], up["divided"]) == ("n", {"n": 96, "k": 256, "group_size": 128})
    assert value["usable_gpus"] == [1, 2, 4]
    assert all(w4a16gen.KernelConfig.parse(name) for name in down["kernels"].values())


def test_the_kernels_are_those_of_explain(cli: Runner, tmp_path: Path) -> None:
    model(tmp_path / "model")
    value = of("inspect", cli.run("inspect model --json").stdout)
    layer = next(layer for layer in value["layers"] if layer["name"].endswith("up_proj"))
    for tokens, name in layer["kernels"].items():
        explained = json.loads(cli.run(f"explain {tokens} 384 256 --json").stdout)
        assert explained["kernel"] == name


def test_inspect_says_what_does_not_divide(cli: Runner, tmp_path: Path) -> None:
    model(tmp_path / "model")
    done = cli.run("inspect model --tp 3")
    assert done.exit_code == 0, done.output
    assert "k = 256 is no multiple of 3" in done.stdout
    assert "up to 64: 1, 2, 4" in done.stderr


@pytest.mark.parametrize("case", CASES)
def test_inspect_reads_every_format(case: str, cli: Runner, tmp_path: Path) -> None:
    path = CASES[case](tmp_path, np.random.default_rng(1)).path
    value = of("inspect", cli.invoke(args=["inspect", str(path), "--json"]).stdout)
    checkpoint = w4a16gen.open_checkpoint(path)
    assert [layer["name"] for layer in value["layers"]] == list(checkpoint)
    assert [layer["zeros_exact"] for layer in value["layers"]] == [
        layer.exactness.zeros_exact for layer in checkpoint.values()
    ]


def test_experts_that_share_a_tensor_share_its_bytes(cli: Runner, tmp_path: Path) -> None:
    path = CASES["gguf-experts"](tmp_path, np.random.default_rng(1)).path
    value = of("inspect", cli.invoke(args=["inspect", str(path), "--json"]).stdout)
    assert value["totals"]["layer_bytes"] + value["totals"]["dense_bytes"] <= path.stat().st_size


def test_inspect_names_the_build_that_experts_need(cli: Runner, tmp_path: Path) -> None:
    FOLDERS["mixture"]()
    (note,) = of("inspect", cli.run("inspect model-moe --json").stdout)["notes"]
    assert note.startswith("Grouped kernels compute the experts of 1 layer instead: `w4a16gen build --space default ")
    model(tmp_path / "model")
    assert of("inspect", cli.run("inspect model --json").stdout)["notes"] == []


def test_a_layer_without_a_kernel_says_why(cli: Runner, tmp_path: Path) -> None:
    path = CASES["compressed-tensors-part-of-a-word"](tmp_path, np.random.default_rng(1)).path
    done = cli.invoke(args=["inspect", str(path)])
    assert "k of 36 must be a positive multiple of 8" in done.stdout
    assert "No kernel runs these layers; keep them dense" in done.stderr
    assert "No kernel here" not in done.stderr


def test_a_layer_that_only_the_build_cannot_run_is_not_given_up(cli: Runner, fake_build: Build, tmp_path: Path) -> None:
    """A build of CUTLASS kernels alone has none that reads native weights."""
    model(tmp_path / "model")
    done = cli.invoke(args=["inspect", "model", "--build-dir", str(fake_build.folder)])
    assert "No kernel here runs these layers, but those of `w4a16gen build` do: model.layers.*" in done.stderr
    assert "keep them dense" not in done.stderr


@pytest.mark.parametrize("arguments", ["inspect model", "inspect model --tp 4", "inspect model --tp 3"])
def test_inspect_fits_80_columns(arguments: str, tmp_path: Path) -> None:
    model(tmp_path / "model")
    code, received = run_on_terminal(["-m", "w4a16gen", *arguments.split()], 80, tmp_path)
    assert code == 0
    assert max(map(len, lines_of(received))) <= 80


def test_convert_and_again(cli: Runner, tmp_path: Path) -> None:
    model(tmp_path / "model")
    done = cli.run("convert model out")
    assert done.exit_code == 0, done.output
    assert done.stdout == "out\n"
    assert "12 layers of 4 bits, 5 dense tensors, 0.00 GB in 1 file" in done.stderr
    assert len(w4a16gen.open_packed(tmp_path / "out")) == 12
    assert "was complete already: nothing was written" in cli.run("convert model out").stderr
    value = of("convert", cli.run("convert model other --json").stdout)
    assert (value["layers"], value["dense"], value["was_complete"]) == (12, 5, False)


def test_quantize_in_both_forms(cli: Runner, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    rng = np.random.default_rng(4)
    tensors = {"a.up_proj.weight": rng.standard_normal((64, 128)), "lm_head.weight": rng.standard_normal((64, 128))}
    write_safetensors(
        tmp_path / "model" / "model.safetensors", {name: array.astype("f2") for name, array in tensors.items()}
    )
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    done = cli.run("quantize model int4 --zeros")
    assert done.exit_code == 0, done.output
    assert "Dense, because it matches lm_head: lm_head" in done.stderr
    checkpoint = w4a16gen.open_checkpoint(tmp_path / "int4")
    assert str(checkpoint["a.up_proj"].mode) == "fgsz"
    value = of("quantize", cli.run("quantize model packed --format w4a16gen --group-size 64 --json").stdout)
    assert value["skipped"] == {"lm_head": "it matches lm_head"}
    assert w4a16gen.open_packed(tmp_path / "packed")["a.up_proj"].weight.group_size == 64


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("inspect nowhere", "does not exist"),
        ("inspect model --tp 0", "must be a whole number from 1"),
        ("convert model model", "holds other files"),
        ("quantize model out", "is quantized already"),
        ("quantize model out --group-size 100", "must be a multiple of 32"),
        ("quantize model out --format gguf", "'gguf' is not one of"),
    ],
)
def test_slips_are_told_in_a_sentence(arguments: str, sentence: str, cli: Runner, tmp_path: Path) -> None:
    model(tmp_path / "model")
    done = cli.run(arguments)
    assert done.exit_code == 2
    assert sentence in done.stderr
    assert not (tmp_path / "out").exists()
