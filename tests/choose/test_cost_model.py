"""The cost model: its data, and how estimates follow problem, kernel and card."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, asdict, replace
from pathlib import Path
from typing import Any

import pytest

from w4a16gen import KernelConfig, Problem, QuantMode
from w4a16gen.choose.cards import H100, Card
from w4a16gen.choose.cost_model import SCHEMA, Constants, CostModel, default_cost_model, in_preference
from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.arrangement import native_arrangement
from w4a16gen.kernels.spaces import enumerate_space

MODE = QuantMode.FINEGRAINED_SCALE_ONLY
NATIVE = [config for config in enumerate_space("native") if config.mode is MODE]
MODEL = default_cost_model()


def kernel(shape: str) -> KernelConfig:
    """Return a native kernel by its short name."""
    return KernelConfig.parse(f"w4a16_sm90_native_fgs_{shape}")


CONSTANTS = asdict(MODEL.constants)
SHAPE = "cta64x8x128_cluster1x1x1_warps8_persistent"


def test_constants_are_frozen_and_named() -> None:
    with pytest.raises(FrozenInstanceError):
        MODEL.constants.overlap_loss = 1.0  # type: ignore[misc]
    assert Constants.from_json(CONSTANTS) == MODEL.constants


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": "w4a16gen.cost_model/1"},
        {"constants": {}},
        {"constants": {**CONSTANTS, "more": 1.0}},
        {"constants": {**CONSTANTS, "overlap_loss": "4730"}},
        {"constants": {**CONSTANTS, "overlap_loss": -1.0}},
        {"constants": {**CONSTANTS, "overlap_loss": float("nan")}},
        {"constants": {**CONSTANTS, "overlap_loss": True}},
        {"constants": {**CONSTANTS, "cycles_per_microsecond": 0}},
        {"constants": {**CONSTANTS, "packed_bytes_per_cycle": 0.0}},
        {"constants": {**CONSTANTS, "dense_bytes_per_microsecond": 0}},
        {"constants": {**CONSTANTS, "dense_flops_per_microsecond": 0}},
        {"constants": {**CONSTANTS, "dense_long_flops_per_microsecond": 0}},
        {"constants": [1.0]},
        {"rates": [1.0]},
        {"rates": {SHAPE: [1.0]}},
        {"rates": {SHAPE: [1.0, 2.0, 3.0, 4.0, "5"]}},
        {"rates": {SHAPE: [1.0, 2.0, 3.0, -4.0, 5.0]}},
    ],
    ids=lambda changes: f"{changes!r:.60}",
)
def test_other_data_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "model.json"
    right = {"schema": SCHEMA, "constants": CONSTANTS, "rates": {SHAPE: list(MODEL.rates[SHAPE])}}
    path.write_text(json.dumps(right))
    assert CostModel.read(path).rates == {SHAPE: MODEL.rates[SHAPE]}
    path.write_text(json.dumps(right | changes))
    with pytest.raises(InvalidValueError, match="is not a cost model"):
        CostModel.read(path)


def test_a_file_that_is_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_text("[" * 100_000)
    with pytest.raises(InvalidValueError, match="is not a cost model"):
        CostModel.read(path)


def test_a_kernel_without_rates_is_named() -> None:
    with pytest.raises(InvalidValueError, match=f"fgs_{SHAPE} has no rates: run tools/fit_cost_model.py"):
        CostModel(MODEL.constants, {}).rates_of(kernel(SHAPE))


def test_all_modes_share_their_rates() -> None:
    config = kernel(SHAPE)
    for mode in QuantMode:
        assert MODEL.rates_of(replace(config, mode=mode)) is MODEL.rates_of(config)


@pytest.mark.parametrize("config", NATIVE[:: len(NATIVE) // 40], ids=str)
def test_more_work_takes_longer_and_more_sms_take_less(config: KernelConfig) -> None:
    times = [MODEL.microseconds(config, Problem(m, 8192, 8192, 128)) for m in (1, 64, 512, 4096, 32768)]
    assert times == sorted(times)
    large = Problem(4096, 8192, 8192, 128)
    by_sms = [MODEL.microseconds(config, large, H100.resized(sms)) for sms in (132, 114, 78, 60, 16)]
    assert by_sms == sorted(by_sms)
    assert by_sms[0] < by_sms[-1] / 4


def test_waves_of_tiles_are_counted_by_the_sms_of_the_card() -> None:
    config = kernel("cta128x128x64_cluster1x1x2_warpgroups2_persistent")
    problem = Problem(128, 128 * 66, 4096, 128)
    assert MODEL.work(config, problem).tiles == 1, "66 tiles, two CTAs each"
    assert MODEL.work(config, problem, H100.resized(131)).tiles == 2
    assert MODEL.work(config, Problem(128, 128 * 67, 4096, 128)).tiles == 2
    assert MODEL.work(config, problem, H100.resized(1)).tiles == 66


@pytest.mark.parametrize(("cluster", "share"), [("1x1x1", 0.25), ("1x1x2", 0.5), ("1x1x4", 0.5)])
def test_ctas_that_share_an_sm_take_turns_as_often_as_their_kind_does(cluster: str, share: float) -> None:
    model = CostModel(replace(MODEL.constants, paired_share=0.25, paired_share_of_clusters=0.5), MODEL.rates)
    config, at_once = (
        kernel(f"cta64x16x128_cluster{cluster}_warps8_persistent"),
        {"1": 132, "2": 66, "4": 30}[cluster[-1]],
    )

    def tiles(count: int, *, fills_sms_first: bool = True) -> float:
        problem = Problem(16, 64 * count, 4096, 128)
        return model.work_on_tiles(config, problem, 1, 1, fills_sms_first=fills_sms_first).tiles

    assert tiles(at_once) == 1, "an SM for each"
    assert tiles(at_once, fills_sms_first=False) == 1 + share
    assert [tiles(waves * at_once) for waves in (2, 3, 4)] == [2, 3 + share, 4], "pairs divide an even number of waves"
    assert tiles(2 * at_once + 1) == 3 + share


def test_stream_k_divides_the_last_waves_only() -> None:
    config = kernel("cta128x128x128_cluster2x1x1_warpgroups2_streamk")
    tile, clusters = 256, 66
    few = MODEL.work(config, Problem(128, tile * 22, 4096, 128))
    assert (few.tiles, few.blocks, few.clusters_per_split_tile) == pytest.approx((1.0, 32 / 3, 3.0))
    full = MODEL.work(config, Problem(128, tile * 2 * clusters, 4096, 128))
    assert (full.tiles, full.blocks, full.clusters_per_split_tile) == (2.0, 64.0, 0.0)
    more = MODEL.work(config, Problem(128, tile * (2 * clusters + 33), 4096, 128))
    assert (more.tiles, more.blocks, more.clusters_per_split_tile) == (2.5, 80.0, 2.0)


@pytest.mark.parametrize(
    ("shape", "m", "n", "tiles", "split", "head_blocks"),
    [
        ("cta128x144x128_cluster1x1x1_warpgroups2_streamk", 2880, 896, 20 * 7, 132 + 8, 0),  # too many for a head
        ("cta128x144x128_cluster2x1x1_warpgroups2_streamk", 3195, 1408, 23 * 6, 6, 24),
        ("cta128x144x128_cluster1x1x1_warpgroups2_streamk", 3195, 1408, 23 * 11, 121, 235),
        ("cta128x128x128_cluster1x2x1_warpgroups2_streamk", 2700, 1408, 11 * 11, 55, 214),
        ("cta64x8x128_cluster1x1x1_warps8_streamk", 1024, 192, 128 * 3, 120, 117),  # two CTAs share an SM
        ("cta128x144x128_cluster1x1x1_warpgroups2_streamk", 3195, 384, 23 * 3, 69, 134),
    ],
)
def test_stream_k_reads_again_what_l2_does_not_keep(
    shape: str, m: int, n: int, tiles: int, split: int, head_blocks: int
) -> None:
    config, whole = kernel(shape), 32384
    k = whole - 128 * head_blocks
    activations, weight, l2_bytes = 2 * m * k, n * k / 2, MODEL.constants.l2_bytes
    tokens, channels = config.cta.tokens * config.cluster.tokens, config.cta.channels * config.cluster.channels
    again = tiles * 2 * tokens * k - activations, tiles * channels * k / 2 - weight
    missed = max(0, 1 - l2_bytes / activations), max(0, 1 - l2_bytes / (activations + weight))
    work = MODEL.work(config, Problem(m, n, whole, 128))
    assert work.read_apart_bytes == pytest.approx((missed[0] * again[0] + missed[1] * again[1]) * split / tiles)
    assert (work.read_apart_bytes == 0) == (activations + weight < l2_bytes)
    if head_blocks:
        per_sm = native_arrangement(config).ctas_per_sm
        waves = tiles // (132 // (config.cluster.channels * config.cluster.tokens) * per_sm)
        assert work.blocks == per_sm * (waves * 253 + head_blocks), "of the clusters with a head"
    without = MODEL.cycles(MODEL.rates_of(config), work._replace(read_apart_bytes=0.0))
    assert (MODEL.cycles(MODEL.rates_of(config), work) > without) == (work.read_apart_bytes > 0)


def test_without_heads_more_operands_are_read_apart() -> None:
    config, problem = kernel("cta128x144x128_cluster1x1x1_warpgroups2_streamk"), Problem(3195, 1408, 32384, 128)
    without = CostModel(MODEL.constants, MODEL.rates, stream_k_has_heads=False).work(config, problem)
    with_heads = MODEL.work(config, problem)
    assert without.clusters_per_split_tile == 2 > with_heads.clusters_per_split_tile
    assert without.read_apart_bytes > with_heads.read_apart_bytes


def test_nothing_is_read_again_where_l2_keeps_it_or_tiles_are_whole() -> None:
    stream_k, persistent = (
        kernel(f"cta128x144x128_cluster1x1x1_warpgroups2_{scheduler}") for scheduler in ("streamk", "persistent")
    )
    long = Problem(3195, 1408, 32384, 128)
    assert MODEL.work(persistent, long).read_apart_bytes == 0
    assert MODEL.work(stream_k, Problem(3195, 1408, 4096, 128)).read_apart_bytes == 0, "26 and 3 MB"
    full = Problem(144 * 12, 128 * 11, 32384, 128)
    assert MODEL.work(stream_k, full).read_apart_bytes == 0, "a whole wave of whole tiles"


def test_clusters_of_four_fit_less_well() -> None:
    config = kernel("cta64x16x128_cluster1x1x4_warps8_persistent")
    assert MODEL.work(config, Problem(16, 64 * 30, 4096, 128)).tiles == 1
    assert MODEL.work(config, Problem(16, 64 * 31, 4096, 128)).tiles == 2


def test_no_tokens_and_the_smallest_problems_have_an_estimate() -> None:
    for config in NATIVE:
        for problem in (Problem(0, 64, 128, 128), Problem(1, 8, 32, 32), Problem(0, 8, 8, 8)):
            assert MODEL.microseconds(config, problem) >= MODEL.rates_of(config).launch_cycles / 1755


def test_memory_and_tensor_cores_of_the_card_count() -> None:
    reading, multiplying = Problem(1, 28672, 8192, 128), Problem(8192, 8192, 8192, 128)
    few = kernel("cta64x8x128_cluster1x1x1_warps8_persistent")
    many = kernel("cta256x128x64_cluster1x1x1_warpgroups2_persistent")
    quick, slow = Card("quick memory", 132, 6.7, 989.0 / 132), Card("slow tensor cores", 132, 3.35, 148.0 / 132)
    assert MODEL.microseconds(few, reading, quick) < 0.8 * MODEL.microseconds(few, reading)
    assert MODEL.microseconds(few, reading, slow) < 1.5 * MODEL.microseconds(few, reading)
    assert MODEL.microseconds(many, multiplying, slow) > 4 * MODEL.microseconds(many, multiplying)
    assert MODEL.dense_microseconds(reading, quick) < 0.7 * MODEL.dense_microseconds(reading)
    assert MODEL.dense_microseconds(multiplying, slow) > 4 * MODEL.dense_microseconds(multiplying)


def test_the_power_limit_lengthens_the_work_of_long_problems_only() -> None:
    config = kernel("cta256x128x64_cluster1x1x1_warpgroups2_persistent")
    hot = CostModel(replace(MODEL.constants, sustained_factor=2 * MODEL.constants.sustained_factor), MODEL.rates)
    short, long = Problem(512, 8192, 8192, 128), Problem(8192, 8192, 8192, 128)
    assert hot.microseconds(config, short) == MODEL.microseconds(config, short)
    assert 1.9 < hot.microseconds(config, long) / MODEL.microseconds(config, long) < 2


def test_a_tile_that_tokens_fill_to_a_half_comes_last() -> None:
    small, large = kernel(SHAPE), kernel(SHAPE.replace("64x8x", "64x16x"))
    estimated = [(large, 1.0), (small, 9.0)]
    assert in_preference(estimated, Problem(8, 4096, 4096, 128)) == [(small, 9.0), (large, 1.0)]
    assert in_preference(estimated, Problem(9, 4096, 4096, 128)) == estimated
    assert in_preference(estimated, Problem(0, 4096, 4096, 128)) == [(small, 9.0), (large, 1.0)]


def test_problems_are_long_from_the_power_limit_on() -> None:
    assert not MODEL.is_long(Problem(512, 8192, 8192, 128))
    assert MODEL.is_long(Problem(1024, 8192, 8192, 128))
