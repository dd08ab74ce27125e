"""What goes wrong with GPTQ files in practice: each trap is decoded rightly, or named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from fakes.checkpoints import packers
from fakes.checkpoints.cases import CASES
from fakes.checkpoints.expected import LAYER, halves, values
from fakes.checkpoints.files import write_folder
from fakes.checkpoints.word_formats import gptq

import w4a16gen
from w4a16gen import InvalidValueError, QuantMode
from w4a16gen.weights.importers.layer import CheckpointLayer

Array = npt.NDArray[Any]
GROUPS, N, K = 4, 16, 128
CONFIG = {"quant_method": "gptq", "bits": 4, "sym": False}


class Folder:
    """A GPTQ folder with given zero points, as packed words."""

    def __init__(self, path: Path, rng: np.random.Generator) -> None:
        self.path = path
        self.q, self.scales = values(rng, N, K), halves(rng, GROUPS, N)

    def layer(self, qzeros: Array, config: dict[str, Any], **tensors: Any) -> CheckpointLayer:
        parts = {"qweight": packers.along_rows(self.q.T), "qzeros": qzeros, "scales": self.scales, **tensors}
        named = {f"{LAYER}.{name}": part for name, part in parts.items()}
        return w4a16gen.open_checkpoint(write_folder(self.path, named, {**CONFIG, **config}))[LAYER]

    def weight(self, zero_points: Array) -> Array:
        steps = np.repeat(self.scales.astype(np.float64), K // GROUPS, axis=0).T
        return (self.q - np.repeat(zero_points.astype(np.float64), K // GROUPS, axis=0).T) * steps

    def error_in_steps(self, layer: CheckpointLayer, zero_points: Array) -> float:
        steps = np.abs(np.repeat(self.scales.astype(np.float64), K // GROUPS, axis=0).T)
        return float((np.abs(layer.quantized().dequantize() - self.weight(zero_points)) / steps).max())


@pytest.fixture
def folder(tmp_path: Path, rng: np.random.Generator) -> Folder:
    return Folder(tmp_path, rng)


def points(rng: np.random.Generator, low: int) -> Array:
    return rng.integers(low, 16, (GROUPS, N)).astype(np.uint8)


def test_a_zero_point_of_0_in_version_1_destroys_those_after_it_and_is_reported(
    folder: Folder, rng: np.random.Generator
) -> None:
    stored = points(rng, 1)
    stored[2, 3] = 0
    layer = folder.layer(packers.gptq_version_1(stored), {})
    assert any("1 words of qzeros end in set bits" in note for note in layer.notes)
    readable = stored.copy()
    readable[2, 3:8] = 0  # what is left of channels 3 to 7
    assert folder.error_in_steps(layer, readable) < 0.004


def test_a_zero_point_of_0_in_the_last_place_destroys_nothing(folder: Folder, rng: np.random.Generator) -> None:
    stored = points(rng, 1)
    stored[1, 7] = 0
    layer = folder.layer(packers.gptq_version_1(stored), {})
    assert layer.notes == ()
    assert folder.error_in_steps(layer, stored) < 0.004


def test_version_1_of_gptqmodel_is_undone_with_its_carries(folder: Folder, rng: np.random.Generator) -> None:
    stored = points(rng, 1)
    stored[0, 2] = stored[3, 9] = 0
    words = packers.gptqmodel_version_1(stored)
    assert not np.array_equal(words, packers.gptq_version_1(stored))
    layer = folder.layer(words, {"meta": {"quantizer": ["gptqmodel:2.0.0"]}})
    assert folder.error_in_steps(layer, stored) < 0.004
    assert any("GPTQModel's carries" in note for note in layer.notes)
    others = folder.layer(words, {"meta": {"quantizer": "optimum:1.0"}})
    assert folder.error_in_steps(others, stored) > 0.9, "without carries the neighbours are off by a step"


def test_autoround_may_have_moved_a_zero_point_of_0(folder: Folder, rng: np.random.Generator) -> None:
    stored = points(rng, 1)
    stored[0, 0] = 1
    layer = folder.layer(packers.gptq_version_1(stored), {"meta": {"quantizer": "autoround:0.4"}})
    assert any("AutoRound stores zero point 0 as 1" in note for note in layer.notes)


@pytest.mark.parametrize(("label", "field"), [("gptq", 8), ("gptq_v2", 7)])
def test_a_symmetric_file_with_the_wrong_version_is_read_as_symmetric(folder: Folder, label: str, field: int) -> None:
    words = packers.along_columns(np.full((GROUPS, N), field, np.uint8))
    layer = folder.layer(words, {"sym": True, "checkpoint_format": label})
    assert layer.mode is QuantMode.FINEGRAINED_SCALE_ONLY
    assert folder.error_in_steps(layer, np.full((GROUPS, N), 8)) == 0
    assert any("the label of the file is wrong" in note for note in layer.notes)


@pytest.mark.parametrize(("label", "field", "point"), [("gptq", 8, 9), ("gptq_v2", 7, 7)])
def test_an_asymmetric_file_whose_zero_points_are_all_off_by_one_is_reported(
    folder: Folder, label: str, field: int, point: int
) -> None:
    words = packers.along_columns(np.full((GROUPS, N), field, np.uint8))
    layer = folder.layer(words, {"checkpoint_format": label})
    assert any(f"all zero points are {point}" in note for note in layer.notes)
    assert folder.error_in_steps(layer, np.full((GROUPS, N), point)) < 0.004


def test_version_2_labelled_as_version_1_is_reported_where_it_shows(folder: Folder, rng: np.random.Generator) -> None:
    stored = points(rng, 0)
    stored[0, :2] = 15, 3
    layer = folder.layer(packers.along_columns(stored), {"checkpoint_format": "gptq"})
    assert any("fits version 2" in note for note in layer.notes)


@pytest.mark.parametrize("config", [{"sym": True}, {"sym": None}])
def test_zero_points_of_the_file_win_over_the_word_symmetric(
    folder: Folder, rng: np.random.Generator, config: dict[str, Any]
) -> None:
    stored = points(rng, 1)
    layer = folder.layer(packers.gptq_version_1(stored), config)
    assert layer.mode is QuantMode.FINEGRAINED_SCALE_AND_ZEROS
    assert folder.error_in_steps(layer, stored) < 0.004
    assert any("says symmetric" in note for note in layer.notes)


def test_a_symmetric_layer_needs_no_zero_points(folder: Folder) -> None:
    folder.layer(np.zeros((GROUPS, N // 8), np.int32), {"sym": True})
    tensors = {f"{LAYER}.qweight": packers.along_rows(folder.q.T), f"{LAYER}.scales": folder.scales}
    layer = w4a16gen.open_checkpoint(write_folder(folder.path, tensors, {**CONFIG, "sym": True}))[LAYER]
    assert layer.mode is QuantMode.FINEGRAINED_SCALE_ONLY
    assert layer.notes == ("no qzeros: all zero points are 8",)
    with pytest.raises(InvalidValueError, match="qzeros' is missing"):
        w4a16gen.open_checkpoint(write_folder(folder.path, tensors, CONFIG))
    with pytest.raises(InvalidValueError, match="has 8 bits, not 4"):
        w4a16gen.open_checkpoint(write_folder(folder.path, tensors, {**CONFIG, "sym": True, "bits": 8}))


def test_groups_of_different_size_are_refused(folder: Folder) -> None:
    index = np.repeat(np.arange(GROUPS), K // GROUPS).astype(np.int32)
    index[0] = 1
    words = packers.along_columns(np.full((GROUPS, N), 7, np.uint8))
    with pytest.raises(InvalidValueError, match="each of 4 groups 32 times: groups of unequal size cannot be packed"):
        folder.layer(words, {}, g_idx=index).quantized()


@pytest.mark.parametrize("group", [-1, GROUPS, 2**31 - 1])
def test_groups_that_do_not_exist_are_refused(folder: Folder, group: int) -> None:
    index = np.repeat(np.arange(GROUPS), K // GROUPS).astype(np.int32)
    index[5] = group
    words = packers.along_columns(np.full((GROUPS, N), 7, np.uint8))
    with pytest.raises(InvalidValueError, match="g_idx must name each of 4 groups"):
        _ = folder.layer(words, {}, g_idx=index).permutation


def test_a_trivial_g_idx_needs_no_permutation(tmp_path: Path, rng: np.random.Generator) -> None:
    CASES["gptq-v1"](tmp_path, rng)
    assert w4a16gen.open_checkpoint(tmp_path)[LAYER].permutation is None


def test_the_configuration_of_old_files_lies_beside(tmp_path: Path, rng: np.random.Generator) -> None:
    expected = gptq(version=1, symmetric=True)(tmp_path, rng)
    (tmp_path / "config.json").unlink()
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 64, "desc_act": False}))
    layer = w4a16gen.open_checkpoint(tmp_path)[LAYER]
    np.testing.assert_array_equal(layer.quantized().q, expected.q)
    assert layer.mode is QuantMode.FINEGRAINED_SCALE_ONLY


def test_layers_of_8_bits_are_left_out_by_name(folder: Folder, rng: np.random.Generator) -> None:
    eight = rng.integers(-(2**31), 2**31, (K // 4, N)).astype(np.int32)
    other = "model.layers.0.mlp.down_proj"
    tensors = {
        f"{LAYER}.qweight": packers.along_rows(folder.q.T),
        f"{LAYER}.qzeros": packers.along_columns(np.full((GROUPS, N), 7, np.uint8)),
        f"{LAYER}.scales": folder.scales,
        f"{other}.qweight": eight,
        f"{other}.qzeros": np.zeros((GROUPS, N // 4), np.int32),
        f"{other}.scales": folder.scales,
    }
    config = {**CONFIG, "dynamic": {"+:.*down_proj": {"bits": 8}}}
    checkpoint = w4a16gen.open_checkpoint(write_folder(folder.path, tensors, config))
    assert list(checkpoint) == [LAYER]
    assert "has 8 bits, not 4" in checkpoint.unsupported[other]
    with pytest.raises(InvalidValueError, match="has 8 bits, not 4"):
        checkpoint[other]
