"""Every format, written by its published description: the importer finds each value, scale and zero."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from fakes.checkpoints.cases import CASES
from fakes.checkpoints.expected import Expected
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import w4a16gen
from w4a16gen import QuantMode
from w4a16gen.weights.importers.layer import CheckpointLayer

LARGEST_ZERO_ERROR = 0.0040
"""In steps. For |zero| up to 8 steps, half a unit in the last place of fp16 is at most 2^-11 * 8 steps."""


def layer_of(expected: Expected) -> CheckpointLayer:
    checkpoint = w4a16gen.open_checkpoint(expected.path)
    assert expected.name in checkpoint
    return checkpoint[expected.name]


def check(expected: Expected) -> None:
    layer = layer_of(expected)
    n, k = expected.q.shape
    groups = len(expected.scales)
    assert (layer.n, layer.k, layer.group_size, layer.format) == (n, k, k // groups, expected.format)
    weight = layer.quantized()
    order = np.arange(k) if expected.g_idx is None else np.argsort(expected.g_idx, kind="stable")
    np.testing.assert_array_equal(order, np.arange(k) if layer.permutation is None else layer.permutation)
    np.testing.assert_array_equal(weight.q, expected.q[:, order])
    assert weight.mode is layer.mode
    np.testing.assert_array_equal(layer.bias, expected.bias)
    assert layer.alpha == 1
    exact = layer.exactness
    scales = np.atleast_2d(weight.scales).astype(np.float64)
    np.testing.assert_array_equal(scales, expected.scales.astype(np.float16))
    assert exact.scales_exact == np.array_equal(scales, expected.scales)
    if expected.zeros is None:
        assert weight.mode is (QuantMode.PER_COLUMN_SCALE_ONLY if groups == 1 else QuantMode.FINEGRAINED_SCALE_ONLY)
        assert exact.zeros_exact
    else:
        assert weight.mode is QuantMode.FINEGRAINED_SCALE_AND_ZEROS
        assert weight.zeros is not None
        np.testing.assert_array_equal(weight.zeros, expected.zeros.astype(np.float16))
        with np.errstate(invalid="ignore", divide="ignore"):
            errors = np.abs(weight.zeros.astype(np.float64) - expected.zeros)
            steps = np.where(errors == 0, 0, errors / np.abs(expected.scales.astype(np.float64)))
        assert exact.max_zero_error_steps == steps.max()
        assert exact.zeros_exact == (not errors.any())


@pytest.mark.parametrize("name", CASES)
def test_every_value_scale_and_zero_is_that_of_the_format(name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    check(CASES[name](tmp_path, rng))


@pytest.mark.parametrize("name", [name for name in CASES if "marlin" not in name and "tile" not in name])
@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1))
def test_random_weights_make_a_round_trip(name: str, seed: int, tmp_path: Path) -> None:
    check(CASES[name](tmp_path, np.random.default_rng(seed)))


@pytest.mark.parametrize("name", ["gptq-v1", "awq-gemm", "awq-gemv_fast-64", "compressed-tensors-asymmetric"])
def test_zeros_of_integer_zero_points_are_off_by_a_small_part_of_a_step(
    name: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    exact = layer_of(CASES[name](tmp_path, rng)).exactness
    assert 0 < exact.max_zero_error_steps < LARGEST_ZERO_ERROR
    assert exact.scales_exact
    assert not exact.is_exact


@pytest.mark.parametrize(
    "name", ["gptq-v1-symmetric", "gguf-q4_0", "compressed-tensors-bfloat16", "torchao-plain", "modelopt", "awq-marlin"]
)
def test_these_formats_are_exact(name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    assert layer_of(CASES[name](tmp_path, rng)).exactness.is_exact


def test_the_product_with_permuted_activations_is_that_of_the_checkpoint(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    expected = CASES["gptq-act-order"](tmp_path, rng)
    layer = layer_of(expected)
    a = rng.standard_normal((3, layer.k)).astype(np.float16)
    assert layer.permutation is not None
    packed = w4a16gen.pack_weight(layer.quantized())
    c = w4a16gen.gemm(np.ascontiguousarray(a[:, layer.permutation]), packed, bias=layer.bias, alpha=layer.alpha)
    assert expected.g_idx is not None
    assert expected.zeros is not None
    assert expected.bias is not None
    weight = (expected.q - 8.0) * expected.scales[expected.g_idx].T + expected.zeros[expected.g_idx].T
    exact = a.astype(np.float64) @ weight.T + expected.bias
    np.testing.assert_allclose(c.astype(np.float64), exact, atol=0.02)
    assert any("act-order" in note for note in layer.notes)


def test_activations_have_the_factors_of_modelopt(tmp_path: Path, rng: np.random.Generator) -> None:
    layer = layer_of(CASES["modelopt"](tmp_path, rng))
    stored = w4a16gen.open_checkpoint(tmp_path).tensor(f"{layer.name}.pre_quant_scale")
    assert layer.input_scale is not None
    assert layer.notes == ("multiply the activations by input_scale",)
    np.testing.assert_array_equal(layer.input_scale, stored)


def test_layers_are_a_mapping_and_the_rest_is_dense(tmp_path: Path, rng: np.random.Generator) -> None:
    expected = CASES["gptq-v1"](tmp_path, rng)
    checkpoint = w4a16gen.open_checkpoint(tmp_path)
    assert list(checkpoint) == [expected.name]
    assert len(checkpoint) == 1
    assert checkpoint.get("other") is None
    assert "other" not in checkpoint
    with pytest.raises(w4a16gen.InvalidValueError, match="has no 4-bit layer 'other'; it has 1, such as 'model"):
        checkpoint["other"]
    assert checkpoint.dense == ["model.norm.weight"]
    np.testing.assert_array_equal(checkpoint.tensor("model.norm.weight"), np.ones(64, np.float16))
    assert checkpoint[expected.name].bias is not None
    np.testing.assert_array_equal(checkpoint[expected.name].bias, expected.bias)


@pytest.mark.parametrize("name", CASES)
def test_only_what_belongs_to_no_layer_is_dense(name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    checkpoint = w4a16gen.open_checkpoint(CASES[name](tmp_path, rng).path)
    assert checkpoint.dense == [name for name in checkpoint.dense if "norm" in name or "lm_head" in name]


def test_a_configuration_of_mlx_may_stand_under_both_names(tmp_path: Path, rng: np.random.Generator) -> None:
    CASES["mlx"](tmp_path, rng)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": config["quantization"]}))
    assert w4a16gen.open_checkpoint(tmp_path).method == "mlx"


def test_older_files_of_compressed_tensors_have_a_compression_config(tmp_path: Path, rng: np.random.Generator) -> None:
    CASES["compressed-tensors"](tmp_path, rng)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"compression_config": config["quantization_config"]}))
    assert len(w4a16gen.open_checkpoint(tmp_path)) == 1


@pytest.mark.parametrize(
    ("file", "config", "case"),
    [
        ("quant_config.json", {"zero_point": True, "q_group_size": 64, "version": "GEMM"}, "awq-gemm"),
        ("hf_quant_config.json", {"quantization": {"quant_algo": "W4A16_AWQ", "group_size": 128}}, "modelopt"),
    ],
)
def test_configurations_in_files_of_their_own(
    file: str, config: dict[str, object], case: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    expected = CASES[case](tmp_path, rng)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).write_text(json.dumps(config))
    check(expected)
