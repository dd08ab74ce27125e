"""The spaces: which kernels exist, and a reason for every one that does not."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from w4a16gen import ClusterShape, CtaShape, KernelConfig, QuantMode, Schedule, Scheduler, Target
from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.arrangement import native_arrangement
from w4a16gen.kernels.spaces import SPACES, Filter, ReasonKind, candidates, enumerate_space, select, why_not

# TensorRT-LLM's 21 shapes per quantisation mode, written out: CTA, then its clusters.
TRTLLM_SHAPES = {
    "64x16x64": ["1x1x1"],
    "64x32x64": ["1x1x1"],
    "64x64x64": ["1x1x1"],
    "64x128x64": ["1x1x1", "1x2x1"],
    "64x256x64": ["1x1x1", "1x2x1"],
    "128x16x64": ["1x1x1", "2x1x1"],
    "128x32x64": ["1x1x1", "2x1x1"],
    "128x64x64": ["1x1x1", "2x1x1"],
    "128x128x64": ["1x1x1", "1x2x1", "2x1x1", "2x2x1"],
    "128x256x64": ["1x1x1", "1x2x1", "2x1x1", "2x2x1"],
}


def test_trtllm_is_exactly_the_63() -> None:
    expected = {
        (mode, cta, cluster) for mode in QuantMode for cta, clusters in TRTLLM_SHAPES.items() for cluster in clusters
    }
    found = enumerate_space("trtllm")
    assert len(found) == len(expected) == 63
    assert {(config.mode, str(config.cta), str(config.cluster)) for config in found} == expected
    for config in found:
        if config.cta.channels == 64:
            assert (config.schedule, config.scheduler) == (Schedule.PINGPONG, Scheduler.PERSISTENT)
        else:
            assert (config.schedule, config.scheduler) == (Schedule.COOPERATIVE, Scheduler.STREAM_K)


def test_every_space_lies_in_all_and_the_grid_has_a_reason_for_the_rest() -> None:
    every = set(enumerate_space("all"))
    assert len(every) == len(enumerate_space("native")) + 1440
    for space in SPACES:
        inside = set(enumerate_space(space))
        assert inside <= every
        reasons = {config: why_not(config, space) for config in candidates()}
        assert {config for config, reason in reasons.items() if reason is None} == inside
        for reason in filter(None, reasons.values()):
            assert len(reason.sentence.split()) > 4


def test_native_kernels_are_a_space_of_their_own() -> None:
    found = enumerate_space("native")
    assert {config.target for config in found} == {Target.NATIVE}
    for config in found:
        arrangement = native_arrangement(config)
        assert arrangement.along_channels * arrangement.along_k in (2, 4)
        assert config.cta.channels % (64 * arrangement.along_channels) == 0
        assert arrangement.stages % arrangement.along_k == 0


def test_every_shape_of_trtllm_exists_as_a_native_kernel() -> None:
    shapes = {(config.mode, config.cta, config.cluster) for config in enumerate_space("trtllm")}
    found = enumerate_space("trtllm-native")
    assert len(found) == len(shapes) == 63
    assert {(config.mode, config.cta, config.cluster) for config in found} == shapes
    assert {config.target for config in found} == {Target.NATIVE}


def test_forbidden_and_left_out_are_told_apart() -> None:
    legal = set(enumerate_space("all"))
    for config in candidates():
        reason = why_not(config, "trtllm")
        if reason is not None:
            assert (reason.kind is ReasonKind.LEFT_OUT) == (config in legal)


def test_default_has_every_mode_and_every_tile_of_8_to_128_tokens() -> None:
    by_mode = Counter(config.mode for config in enumerate_space("default"))
    assert set(by_mode) == set(QuantMode)
    for mode in QuantMode:
        tokens = {config.cta.tokens for config in select("default", Filter(modes=[mode]))}
        assert {8, 16, 32, 64, 128} == tokens


def test_a_shape_off_the_grid_has_a_reason() -> None:
    config = enumerate_space("trtllm")[0]
    odd = type(config)(
        config.target, config.mode, CtaShape(96, 16, 64), config.cluster, config.schedule, config.scheduler
    )
    assert str(why_not(odd)) == "forbidden: CTA channels of 96 is not one of 64, 128, 256"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cta64x32x128_cluster1x1x1_warps8_persistent", "CTA 64x32 needs 16 accumulators per thread"),
        ("cta64x8x64_cluster1x1x1_warps8_persistent", "CTA k of 64: .* but of eight warps"),
        ("cta256x8x128_cluster1x1x4_warps8_persistent", "eight warps lack registers to exchange sums"),
        ("cta64x8x128_cluster1x1x2_warps8_streamk", "stream-K, which divides K among CTAs, has no clusters"),
    ],
)
def test_what_eight_warps_cannot_be_has_a_reason(name: str, reason: str) -> None:
    for mode in QuantMode:
        why = why_not(KernelConfig.parse(f"w4a16_sm90_native_{mode}_{name}"), "native")
        assert why is not None
        assert re.search(reason, str(why))


def test_two_ctas_of_eight_warps_share_an_sm() -> None:
    of_eight = [config for config in enumerate_space("native") if config.schedule is Schedule.EIGHT_WARPS]
    assert len(of_eight) == 102
    assert {native_arrangement(config).ctas_per_sm for config in of_eight} == {2}


def test_filters_combine_over_axes_and_repeat_within_one() -> None:
    found = select(
        "trtllm",
        Filter(ctas=[CtaShape(128, 128, 64), CtaShape(64, 16, 64)], clusters=[ClusterShape(1, 1, 1)]),
    )
    assert len(found) == 6
    assert len(select("trtllm", Filter(ctas=[CtaShape(128, 128, 64)], clusters=[ClusterShape(2, 1, 1)]))) == 3


def test_selecting_nothing_says_why_and_where_to_look() -> None:
    with pytest.raises(InvalidValueError, match="--space all"):
        select("trtllm", Filter(ctas=[CtaShape(256, 128, 64)]))
    with pytest.raises(InvalidValueError, match="does not compile below 16"):
        select("all", Filter(ctas=[CtaShape(128, 8, 64)], targets=[Target.CUTLASS]))


def test_an_unknown_space_is_named() -> None:
    with pytest.raises(InvalidValueError, match="'fast' is not one of default, trtllm, trtllm-native, native, all"):
        enumerate_space("fast")
