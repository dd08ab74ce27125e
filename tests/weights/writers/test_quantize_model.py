"""`quantize` rounds a model's linear layers; this package and compressed-tensors read them back."""

from __future__ import annotations

import importlib
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from fakes.checkpoints.files import BFloat16, write_safetensors

import w4a16gen
from w4a16gen import InvalidValueError
from w4a16gen.weights.quantize import bfloat16_scale, round_to_nearest
from w4a16gen.weights.writers.quantize import COMPRESSED, FORMATS, Settings, quantize_model

Array = npt.NDArray[Any]
GROUP = Settings(group_size=64)
LAYERS = ["model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"]


def rounded_to(dtype: str, values: Array) -> Array:
    """Return float64 values of a dtype."""
    return bfloat16_scale(values) if dtype == "BF16" else values.astype({"F16": "f2", "F32": "f4"}[dtype]).astype("f8")


def stored(dtype: str, values: Array) -> Any:
    return BFloat16(values) if dtype == "BF16" else values.astype({"F16": "f2", "F32": "f4"}[dtype])


def weights(dtype: str = "F16") -> dict[str, Array]:
    rng = np.random.default_rng(7)
    shapes = {
        LAYERS[0] + ".weight": (24, 128),
        LAYERS[1] + ".weight": (128, 64),
        LAYERS[1] + ".bias": (128,),
        "model.layers.0.input_layernorm.weight": (64,),
        "model.layers.0.mlp.odd.weight": (16, 96),
        "model.embed_tokens.weight": (100, 64),
        "lm_head.weight": (100, 64),
    }
    return {name: rounded_to(dtype, rng.standard_normal(shape) * 0.02) for name, shape in shapes.items()}


def model(folder: Path, dtype: str = "F16", changes: dict[str, Any] | None = None) -> Path:
    """Write a small model."""
    folder.mkdir(exist_ok=True)
    tensors = {name: stored(dtype, values) for name, values in weights(dtype).items()} | (changes or {})
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 64}))
    return folder


def read_back(out: Path, form: str) -> dict[str, tuple[Array, float]]:
    """Return each layer's weight, and its alpha."""
    if form == COMPRESSED:
        checkpoint = w4a16gen.open_checkpoint(out)
        return {name: (layer.quantized().dequantize(), layer.alpha) for name, layer in checkpoint.items()}
    packed = w4a16gen.open_packed(out)
    return {name: (layer.weight.unpack().dequantize(), layer.alpha) for name, layer in packed.items()}


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_each_weight_is_within_half_a_step(dtype: str, form: str, zero_points: bool, tmp_path: Path) -> None:
    source = model(tmp_path / "model", dtype)
    settings = Settings(64, zero_points=zero_points, format=form)
    written = quantize_model(source, tmp_path / "out", settings)
    found = read_back(tmp_path / "out", form)
    assert sorted(found) == LAYERS
    assert written.layers == 2
    for name, (back, alpha) in found.items():
        weight = weights(dtype)[f"{name}.weight"]
        groups = weight.reshape(len(weight), -1, 64)
        if zero_points:
            span = np.maximum(groups.max(2), 0) - np.minimum(groups.min(2), 0)
            step = span / 15
        else:
            step = np.abs(groups).max(2) / 7
        # Half a step; a whole one where the zero point is rounded or the scale is rounded down.
        error = np.abs(back * alpha - weight).reshape(groups.shape).max(2)
        assert (error <= (1.03 if zero_points else 0.53) * step).all()


@pytest.mark.parametrize("form", FORMATS)
def test_the_values_are_those_of_quantize(form: str, tmp_path: Path) -> None:
    quantize_model(model(tmp_path / "model"), tmp_path / "out", Settings(64, format=form))
    for name, (back, _) in read_back(tmp_path / "out", form).items():
        expected = w4a16gen.quantize(weights()[f"{name}.weight"], group_size=64)
        np.testing.assert_array_equal(back, expected.dequantize())


def test_what_is_no_linear_layer_stays_dense(tmp_path: Path) -> None:
    written = quantize_model(model(tmp_path / "model"), tmp_path / "out", GROUP)
    assert written.skipped == {
        "lm_head": "it matches lm_head",
        "model.embed_tokens": "it matches *embed*",
        "model.layers.0.mlp.odd": "k = 96 is no multiple of the group size 64",
    }
    checkpoint = w4a16gen.open_checkpoint(tmp_path / "out")
    for name in ("lm_head.weight", "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"):
        np.testing.assert_array_equal(checkpoint.tensor(name), weights()[name])
    assert checkpoint[LAYERS[1]].bias is not None
    assert sorted(checkpoint.config["ignore"]) == sorted(written.skipped)


def test_patterns_keep_more_layers_dense(tmp_path: Path) -> None:
    settings = Settings(64, skip=["*.down_proj"])
    written = quantize_model(model(tmp_path / "model"), tmp_path / "out", settings)
    assert written.skipped["model.layers.0.mlp.down_proj"] == "it matches *.down_proj"
    assert list(w4a16gen.open_checkpoint(tmp_path / "out")) == LAYERS[1:]


@pytest.mark.parametrize("pattern", ["up_proj", "(up|down)", "", "model.layers.0", "*.up_proj.weight"])
def test_a_pattern_that_matches_nothing_is_refused(pattern: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match=r"^pattern '.*' matches none of 6 modules, such as .*: \* stands for"):
        quantize_model(model(tmp_path / "model"), tmp_path / "out", Settings(64, skip=["*.down_proj", pattern]))
    assert not (tmp_path / "out").exists()


def test_the_reason_is_told_if_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match=r"no layer can be quantized; '.*': it matches \*$"):
        quantize_model(model(tmp_path / "model"), tmp_path / "out", Settings(64, skip=["*"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": "128"}, "group_size of type str must be an integer"),
        ({"group_size": True}, "group_size of type bool must be an integer"),
        ({"zero_points": "no"}, "zero_points of type str must be True or False"),
        ({"skip": "*.down_proj"}, r"skip of '\*.down_proj' must be a sequence of patterns"),
        ({"skip": [3]}, r"skip of \[3\] must be a sequence of patterns"),
    ],
)
def test_settings_of_another_type_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        Settings(**settings)


def test_a_model_without_its_configuration_is_refused(tmp_path: Path) -> None:
    source = model(tmp_path / "model")
    (source / "config.json").unlink()
    with pytest.raises(InvalidValueError, match=r"model has no config\.json, which says of what kind the model is"):
        quantize_model(source, tmp_path / "out", GROUP)


def test_large_layers_are_rounded_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = model(tmp_path / "model")
    quantize_model(source, tmp_path / "whole", GROUP)
    monkeypatch.setattr("w4a16gen.weights.writers.quantize._ROWS", 1000)
    quantize_model(source, tmp_path / "parts", GROUP)
    files = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("whole", "parts")]
    assert files[0] == files[1]


def test_an_interrupted_run_continues(tmp_path: Path) -> None:
    source = model(tmp_path / "model")
    quantize_model(source, tmp_path / "whole", GROUP, max_shard_bytes=9000)

    def interrupt(done: int, total: int, _what: str) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_model(source, tmp_path / "out", GROUP, progress=interrupt, max_shard_bytes=9000)
    with pytest.raises(InvalidValueError, match="result of another checkpoint, or of other options"):
        quantize_model(source, tmp_path / "out", Settings(32), max_shard_bytes=9000)
    quantize_model(source, tmp_path / "out", GROUP, max_shard_bytes=9000)
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "out").iterdir())
    assert len(names) > 3
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert quantize_model(source, tmp_path / "out", GROUP, max_shard_bytes=9000).was_complete


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    weight = np.zeros((8, 64), np.float16)
    weight[3, 3] = value
    source = model(tmp_path / "model", changes={"model.layers.0.mlp.bad.weight": weight})
    with pytest.raises(InvalidValueError, match=r"^layer 'model\.layers\.0\.mlp\.bad': .* must be finite$"):
        quantize_model(source, tmp_path / "out", GROUP)
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_quantized_model_is_refused(tmp_path: Path) -> None:
    quantize_model(model(tmp_path / "model"), tmp_path / "out", GROUP)
    with pytest.raises(InvalidValueError, match="is quantized already: `w4a16gen convert`"):
        quantize_model(tmp_path / "out", tmp_path / "again", GROUP)


def test_a_model_with_transposed_layers_is_refused(tmp_path: Path) -> None:
    source = model(tmp_path / "model")
    (source / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(InvalidValueError, match="model type 'gpt2', whose layers are stored as"):
        quantize_model(source, tmp_path / "out", GROUP)


def test_a_group_size_that_no_layer_has_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match=r"no layer can be quantized; '.*': k = .* the group size 4096"):
        quantize_model(model(tmp_path / "model"), tmp_path / "out", Settings(4096))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [0, -1, 16, 100])
def test_a_group_size_that_kernels_do_not_take_is_refused(size: int) -> None:
    with pytest.raises(InvalidValueError, match="must be a multiple of 32"):
        Settings(size)


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_compressed_tensors_unpacks_it(dtype: str, zero_points: bool, tmp_path: Path) -> None:
    torch, helpers = (
        pytest.importorskip("torch"),
        imported("compressed_tensors.compressors.pack_quantized.helpers"),
    )
    package = pytest.importorskip("safetensors.torch")
    source = model(tmp_path / "model", dtype)
    quantize_model(source, tmp_path / "out", Settings(64, zero_points=zero_points))
    tensors = package.load_file(tmp_path / "out" / "model.safetensors")
    for name in LAYERS:
        shape = torch.Size(tensors[f"{name}.weight_shape"].tolist())
        signed = helpers.unpack_from_int32(tensors[f"{name}.weight_packed"], 4, shape).double().numpy()
        scales = tensors[f"{name}.weight_scale"]
        assert scales.dtype == {"F16": torch.float16, "BF16": torch.bfloat16}[dtype]
        if zero_points:
            sizes = torch.Size([shape[0], shape[1] // 64])
            points = helpers.unpack_from_int32(tensors[f"{name}.weight_zero_point"], 4, sizes, packed_dim=0)
            signed = signed - np.repeat(points.double().numpy(), 64, axis=1)
        weight = signed * np.repeat(scales.double().numpy(), 64, axis=1)
        rounding = bfloat16_scale if dtype == "BF16" else None
        own = round_to_nearest(weights(dtype)[f"{name}.weight"], 64, zero_points=zero_points, round_scale=rounding)
        q = own.q - np.repeat(own.zero_points.astype(np.float64), 64, axis=1)
        np.testing.assert_array_equal(weight, q * np.repeat(own.scales, 64, axis=1))


def imported(name: str) -> Any:
    """Import a module of another project, or skip the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except ImportError as error:
            pytest.skip(f"{name} is not installed: {error}")


def test_transformers_loads_it(tmp_path: Path) -> None:
    torch, transformers = pytest.importorskip("torch"), imported("transformers")
    imported("compressed_tensors")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=100, num_hidden_layers=2, **sizes)
    torch.manual_seed(1)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        made = transformers.LlamaForCausalLM(config).half()
        made.save_pretrained(tmp_path / "model")
        quantize_model(tmp_path / "model", tmp_path / "out", GROUP)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        found = loaded(torch.arange(5)[None]).logits
        made = made.float()
        for name, layer in w4a16gen.open_checkpoint(tmp_path / "out").items():
            dequantized = torch.from_numpy(layer.quantized().dequantize().astype(np.float32))
            made.get_submodule(name).weight.data = dequantized
        expected = made(torch.arange(5)[None]).logits
    assert float((found - expected).abs().max()) < 1e-5
