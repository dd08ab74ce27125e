"""How layers divide among GPUs; parts with divided groups give the same product."""

from __future__ import annotations

import numpy as np
import pytest

import w4a16gen
from w4a16gen.weights.division import Axis, Share, axis_of, share


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
