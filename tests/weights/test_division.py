"""How layers divide among GPUs; parts with divided groups give the same product."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import w4a16gen
from w4a16gen import InvalidValueError, QuantMode
from w4a16gen.weights.division import Axis, Share, axis_of, divide, regroup, share
from w4a16gen.weights.reference import random_weight


@pytest.mark.parametrize(
    ("name", "axis"),
    [
        ("model.layers.0.self_attn.q_proj", Axis.CHANNELS),
        ("model.layers.0.mlp.down_proj", Axis.REDUCTION),
        ("blk.3.ffn_down_exps.17", Axis.REDUCTION),
        ("model.layers.1.mlp.experts.3.w1", Axis.CHANNELS),
        ("encoder.layer.0.intermediate.dense", Axis.CHANNELS),
        ("encoder.layer.0.output.dense", Axis.REDUCTION),
        ("lm_head", Axis.NONE),
        ("7", Axis.NONE),
    ],
)
def test_names_tell_the_axis(name: str, axis: Axis) -> None:
    assert axis_of(name) is axis


@pytest.mark.parametrize(
    ("whole", "gpus", "group_size"),
    [
        (Share(4096, 14336, 128), 8, 128),
        (Share(4096, 11008, 128), 4, 64),
        (Share(8192, 29568, 128), 4, 32),
        (Share(4096, 4096, 4096), 4, 1024),
        (Share(64, 256, 64), 2, 64),
    ],
)
def test_groups_are_divided_where_they_must_be(whole: Share, gpus: int, group_size: int) -> None:
    part = share(whole, Axis.REDUCTION, gpus)
    assert part == Share(whole.n, whole.k // gpus, group_size)


@pytest.mark.parametrize(
    ("whole", "axis", "gpus", "reason"),
    [
        (Share(8192, 29568, 128), Axis.REDUCTION, 8, "k = 29568 / 8 = 3696 has no group size that is a multiple of 32"),
        (Share(4096, 11008, 128), Axis.REDUCTION, 3, "k = 11008 is no multiple of 3"),
        (Share(100, 4096, 128), Axis.CHANNELS, 2, "n = 100 / 2 = 50 is no multiple of 8"),
    ],
)
def test_what_does_not_divide_is_told_with_the_numbers(whole: Share, axis: Axis, gpus: int, reason: str) -> None:
    assert share(whole, axis, gpus) == reason


def test_act_order_divides_channels_only() -> None:
    whole = Share(256, 256, 64)
    assert share(whole, Axis.CHANNELS, 2, act_order=True) == Share(128, 256, 64)
    assert share(whole, Axis.REDUCTION, 2, act_order=True) == "act-order spreads its groups over all of k"


def test_a_divided_layer_is_the_same_layer(rng: np.random.Generator) -> None:
    weight = w4a16gen.quantize(rng.standard_normal((16, 384)), group_size=128, zero_points=True)
    part = share(Share(16, 384, 128), Axis.REDUCTION, 4)
    assert part == Share(16, 96, 32)
    rows = 128 // 32
    assert weight.zeros is not None
    fine = w4a16gen.QuantizedWeight(
        weight.q, weight.scales.repeat(rows, axis=0), weight.zeros.repeat(rows, axis=0), 32, weight.mode
    )
    np.testing.assert_array_equal(fine.dequantize(), weight.dequantize())


MODES = pytest.mark.parametrize("mode", QuantMode, ids=str)


@MODES
@pytest.mark.parametrize(("k", "gpus", "group_size"), [(768, 4, 64), (1408, 4, 32), (1024, 2, 128), (704, 2, 32)])
def test_parts_along_k_are_the_columns_of_the_whole(
    k: int, gpus: int, group_size: int, mode: QuantMode, rng: np.random.Generator
) -> None:
    whole = random_weight(rng, 16, k, 128 if k % 128 == 0 else 64, mode)
    parts = [divide(whole, Axis.REDUCTION, gpus, rank) for rank in range(gpus)]
    assert {part.k for part in parts} == {k // gpus}
    assert {part.group_size for part in parts} == {group_size if mode.is_grouped else k // gpus}
    assert {part.mode for part in parts} == {mode}
    np.testing.assert_array_equal(np.concatenate([part.dequantize() for part in parts], axis=1), whole.dequantize())


@MODES
def test_parts_along_n_are_the_rows_of_the_whole(mode: QuantMode, rng: np.random.Generator) -> None:
    whole = random_weight(rng, 64, 128, 32, mode)
    parts = [divide(whole, Axis.CHANNELS, 4, rank) for rank in range(4)]
    np.testing.assert_array_equal(np.concatenate([part.dequantize() for part in parts]), whole.dequantize())
    assert divide(whole, Axis.NONE, 4, 2) is whole


def test_a_weight_without_such_a_part_is_refused(rng: np.random.Generator) -> None:
    whole = random_weight(rng, 16, 768, 128, QuantMode.FINEGRAINED_SCALE_ONLY)
    with pytest.raises(InvalidValueError, match="among 16 GPUs: k = 768 / 16 = 48 has no group size"):
        divide(whole, Axis.REDUCTION, 16, 0)
    with pytest.raises(InvalidValueError, match="rank of 4 must be 0 to 3, one of 4 GPUs"):
        divide(whole, Axis.REDUCTION, 4, 4)


@MODES
@pytest.mark.parametrize("target", QuantMode, ids=str)
def test_smaller_groups_and_richer_modes_change_no_value(
    mode: QuantMode, target: QuantMode, rng: np.random.Generator
) -> None:
    weight = random_weight(rng, 16, 256, 128, mode)
    poorer = (mode.has_zeros and not target.has_zeros) or (mode.is_grouped and not target.is_grouped)
    if poorer or not target.is_grouped:
        with pytest.raises(InvalidValueError, match=r"mode \w+ cannot hold|must be 256 \(= k\) in mode"):
            regroup(weight, 64, target)
    else:
        changed = regroup(weight, 64, target)
        assert (changed.group_size, changed.mode) == (64, target)
        np.testing.assert_array_equal(changed.dequantize(), weight.dequantize())
    assert regroup(weight, weight.group_size) is weight
    with pytest.raises(InvalidValueError, match="group size 96 must divide"):
        regroup(weight, 96)


def test_what_is_no_axis_mode_or_group_size_is_refused(rng: np.random.Generator) -> None:
    weight = random_weight(rng, 64, 256, 128, QuantMode.FINEGRAINED_SCALE_ONLY)
    wrong: Any = "n"
    with pytest.raises(InvalidValueError, match="axis of 'n' must be an Axis"):
        divide(weight, wrong, 2, 0)
    for group_size, message in (("64", "group_size of type str"), (64.0, "of type float"), (0, "group size 0 must")):
        wrong = group_size
        with pytest.raises(InvalidValueError, match=message):
            regroup(weight, wrong)
    wrong = "fgs"
    with pytest.raises(InvalidValueError, match="mode of type str must be a QuantMode"):
        regroup(weight, 64, wrong)


PACKED = w4a16gen.pack_weight(w4a16gen.quantize(np.eye(64, 256), group_size=128))


@pytest.mark.parametrize("weight", [None, "weight", PACKED])
def test_only_a_quantized_weight_is_divided(weight: Any) -> None:
    text = f"weight of type {type(weight).__name__} must be a QuantizedWeight"
    with pytest.raises(InvalidValueError, match=text):
        divide(weight, Axis.CHANNELS, 2, 0)
    with pytest.raises(InvalidValueError, match=text):
        regroup(weight, 64)
