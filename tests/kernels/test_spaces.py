"""The spaces: which kernels exist, and a reason for every one that does not."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from w4a16gen import ClusterShape, CtaShape, KernelConfig, QuantMode, Schedule, Scheduler, Target
from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.arrangement import BARRIER_BYTES, MAX_STAGES_BESIDE_EXPERTS, native_arrangement
from w4a16gen.kernels.config import Epilogue
from w4a16gen.kernels.legality import why_forbidden
from w4a16gen.kernels.spaces import (
    SPACES,
    Filter,
    ReasonKind,
    candidates,
    enumerate_space,
    select,
    select_kernels,
    why_not,
)

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


def test_the_spaces_are_the_whole_grid_less_what_has_a_reason() -> None:
    grid = list(candidates())
    assert grid == sorted(set(grid))
    legal = [config for config in grid if why_not(config) is None]
    assert enumerate_space("all") == legal, "the smaller grid that enumeration walks loses nothing"
    assert len(legal) == len(enumerate_space("native")) + 1440
    forbidden = {why_not(config) for config in set(grid) - set(legal)}
    assert all(reason is not None and len(reason.sentence.split()) > 4 for reason in forbidden)


@pytest.mark.parametrize("space", [name for name, space in SPACES.items() if not space.is_grouped])
def test_every_legal_kernel_that_a_space_leaves_out_has_a_reason(space: str) -> None:
    inside = set(enumerate_space(space))
    legal = enumerate_space("all")
    assert inside <= set(legal)
    for config in legal:
        reason = why_not(config, space)
        assert (reason is None) == (config in inside)
        assert reason is None or (reason.kind is ReasonKind.LEFT_OUT and len(reason.sentence.split()) > 4)


def test_a_schedule_of_the_other_family_is_forbidden() -> None:
    native, cutlass = enumerate_space("native")[0], enumerate_space("trtllm")[0]
    for config, other in ((native, cutlass), (cutlass, native)):
        assert "w4a16" not in str(why_not(replace(config, schedule=other.schedule)))
        assert str(why_not(replace(config, schedule=other.schedule))).startswith("forbidden: ")


def test_the_spaces_are_enumerated_once() -> None:
    first, second = enumerate_space("native"), enumerate_space("native")
    assert all(one is other for one, other in zip(first, second, strict=True))
    first.clear()
    assert len(enumerate_space("native")) == 5024, "a caller's list is its own"


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


def test_default_has_every_mode_with_the_same_tiles_of_8_to_200_tokens() -> None:
    by_mode = Counter(config.mode for config in enumerate_space("default"))
    assert set(by_mode) == set(QuantMode)
    for mode in QuantMode:
        tokens = {config.cta.tokens for config in select("default", Filter(modes=[mode]))}
        assert set(range(8, 201, 8)) == tokens
    shapes = [{c.shape_name for c in select("default", Filter(modes=[mode]))} for mode in QuantMode]
    assert shapes[0] == shapes[1] == shapes[2]


def test_a_shape_off_the_grid_has_a_reason() -> None:
    config = enumerate_space("trtllm")[0]
    odd = type(config)(
        config.target, config.mode, CtaShape(96, 16, 64), config.cluster, config.schedule, config.scheduler
    )
    assert str(why_not(odd)) == "forbidden: CTA channels of 96 must be one of 64, 128, 256"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cta64x32x128_cluster1x1x1_warps8_persistent", "CTA 64x32 needs 16 accumulators per thread"),
        ("cta64x8x64_cluster1x1x1_warps8_persistent", "CTA k of 64: a stage of a native warps8 kernel holds 128"),
        ("cta256x8x128_cluster1x1x4_warps8_persistent", "eight warps lack registers to reduce sums"),
        ("cta64x8x128_cluster1x1x2_warps8_streamk", "stream-K kernels split K among clusters, not within"),
    ],
)
def test_what_eight_warps_cannot_be_has_a_reason(name: str, reason: str) -> None:
    for mode in QuantMode:
        why = why_not(KernelConfig.parse(f"w4a16_sm90_native_{mode}_{name}"), "native")
        assert why is not None
        assert re.search(reason, str(why))


def test_two_ctas_of_eight_warps_share_an_sm() -> None:
    of_eight = [config for config in enumerate_space("native") if config.schedule is Schedule.EIGHT_WARPS]
    assert len(of_eight) == 147
    assert {native_arrangement(config).ctas_per_sm for config in of_eight} == {2}


def test_filters_combine_over_axes_and_repeat_within_one() -> None:
    found = select(
        "trtllm",
        Filter(ctas=[CtaShape(128, 128, 64), CtaShape(64, 16, 64)], clusters=[ClusterShape(1, 1, 1)]),
    )
    assert len(found) == 6
    assert len(select("trtllm", Filter(ctas=[CtaShape(128, 128, 64)], clusters=[ClusterShape(2, 1, 1)]))) == 3


CTA, CLUSTER = CtaShape.parse, ClusterShape.parse


@pytest.mark.parametrize(
    ("wanted", "space", "count"),
    [
        (Filter(), "default", 237),
        (Filter(modes=[QuantMode.PER_COLUMN_SCALE_ONLY]), "default", 79),
        (Filter([CTA("128x256x64")], [CLUSTER("2x1x1")]), "trtllm-native", 3),
        (Filter(targets=[Target.CUTLASS]), "trtllm", 63),
        (Filter([CTA("64x8x128")], [CLUSTER("1x2x1")]), "native", 18),
        (Filter([CTA("64x8x128"), CTA("128x128x64")]), "default", 27),
        (Filter([CTA("256x64x64")], [CLUSTER("4x1x1")]), "all", 9),
        (Filter(epilogues=[Epilogue.NONE]), "default", 237),
        (Filter(epilogues=[Epilogue.GATED]), "default", 237),
        (Filter(epilogues=[Epilogue.GATED, Epilogue.NONE, Epilogue.GATED]), "default", 474),
        (Filter([CTA("128x256x64")], [CLUSTER("2x1x1")], epilogues=list(Epilogue)), "trtllm-native", 9),
    ],
    ids=str,
)
def test_without_a_space_the_first_decides_that_has_a_kernel_for_every_value(
    wanted: Filter, space: str, count: int
) -> None:
    selection = select_kernels(wanted)
    assert (list(selection.spaces), len(selection.configs)) == ([space], count)
    assert list(selection.configs) == select(space, wanted)


def test_spaces_contain_kernels_without_an_epilogue_only() -> None:
    assert {config.epilogue for config in enumerate_space("all")} == {Epilogue.NONE}
    gated = replace(enumerate_space("default")[0], epilogue=Epilogue.GATED)
    assert str(why_not(gated)) == ("left out: spaces contain kernels without an epilogue: --epilogue adds one to them")
    assert select("default", Filter()) == enumerate_space("default")


@pytest.mark.parametrize("epilogue", [Epilogue.ELEMENTWISE, Epilogue.GATED], ids=str)
def test_each_kernel_of_a_union_gets_the_epilogue_if_it_is_native(epilogue: Epilogue) -> None:
    selection = select_kernels(Filter(epilogues=[epilogue]), ["trtllm", "default"])
    assert list(selection.configs) == [replace(config, epilogue=epilogue) for config in enumerate_space("default")]
    with_plain = select_kernels(Filter(epilogues=[Epilogue.NONE, epilogue]), ["trtllm", "default"])
    plain = [*enumerate_space("default"), *enumerate_space("trtllm")]
    assert list(with_plain.configs) == sorted([*plain, *selection.configs])


def test_several_spaces_are_their_union() -> None:
    selection = select_kernels(Filter(), ["trtllm", "default"])
    assert list(selection.configs) == sorted([*enumerate_space("default"), *enumerate_space("trtllm")])
    overlapping = select_kernels(Filter(), ["native", "default"])
    assert list(overlapping.configs) == enumerate_space("native")


@pytest.mark.parametrize(
    ("wanted", "spaces", "message"),
    [
        (
            Filter([CTA("128x256x64")], [CLUSTER("2x1x1")]),
            ["default"],
            "--cta 128x256x64, --cluster 2x1x1 is legal, but not in space default: use --space trtllm-native",
        ),
        (
            Filter([CTA("64x8x128"), CTA("128x128x64")]),
            ["trtllm", "trtllm-native"],
            r"--cta 64x8x128 is legal, but not in space trtllm \+ trtllm-native: use --space default",
        ),
        (
            Filter([CTA("128x8x64")], targets=[Target.CUTLASS]),
            ["all"],
            "no legal kernel matches --cta 128x8x64 --target cutlass: CTA tokens of 8: .* does not compile below 16",
        ),
        (
            Filter(targets=[Target.CUTLASS], epilogues=[Epilogue.GATED]),
            [],
            "--target cutlass --epilogue gated: epilogue gated: only native kernels have epilogues",
        ),
        (
            Filter(epilogues=[Epilogue.ELEMENTWISE]),
            ["trtllm"],
            "--epilogue elementwise is legal, but not in space trtllm: use --space default",
        ),
        (Filter([CTA("64x16x64"), CTA("96x16x64")]), [], "no legal kernel matches --cta 96x16x64: CTA channels of 96"),
        (
            Filter([CTA("64x8x128")], [CLUSTER("4x1x1")]),
            [],
            "--cta 64x8x128 --cluster 4x1x1: cutlass: CTA tokens of 8.*; native: cluster 4x1x1: .* at most 2 CTAs",
        ),
    ],
    ids=str,
)
def test_a_value_without_a_kernel_is_named_with_the_reason_and_the_way_out(
    wanted: Filter, spaces: list[str], message: str
) -> None:
    with pytest.raises(InvalidValueError, match=message) as raised:
        select_kernels(wanted, spaces)
    assert str(raised.value).count("no legal kernel") <= 1


def test_an_unknown_space_is_named() -> None:
    with pytest.raises(InvalidValueError, match="'fast' is not one of default, trtllm-native, trtllm, native, all"):
        enumerate_space("fast")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cta64x56x64_cluster1x1x1_warpgroups4_persistent", "four warpgroups lack registers for 56 tokens and k 64"),
        ("cta256x112x64_cluster1x1x2_warpgroups2_persistent", "to reduce 112 accumulators among 2 CTAs"),
        ("cta256x80x64_cluster1x1x4_warpgroups2_persistent", "to reduce 80 accumulators among 4 CTAs"),
        ("cta64x192x64_cluster1x1x1_warpgroups2_streamk", "lacks registers beside 96 accumulators"),
        ("cta64x84x64_cluster1x1x1_warpgroups2_persistent", "CTA tokens of 84 must be a multiple of 8 up to 256"),
        ("cta256x160x64_cluster1x1x1_warpgroups2_persistent", "needs 160 accumulators"),
    ],
)
def test_tiles_between_powers_of_two_have_limits_with_a_reason(name: str, reason: str) -> None:
    for mode in QuantMode:
        why = why_not(KernelConfig.parse(f"w4a16_sm90_native_{mode}_{name}"), "native")
        assert why is not None
        assert re.search(reason, str(why))


def test_cutlass_kernels_have_tiles_of_a_power_of_two_of_tokens() -> None:
    of_target = {target: {c.cta.tokens for c in enumerate_space("all") if c.target is target} for target in Target}
    assert of_target[Target.CUTLASS] == {16, 32, 64, 128, 256}
    assert of_target[Target.NATIVE] == set(range(8, 257, 8))


def test_a_tile_that_is_too_large_is_refused_for_its_accumulators() -> None:
    with pytest.raises(InvalidValueError, match="256x256 needs 256 accumulators per thread"):
        select_kernels(Filter(ctas=[CtaShape(256, 256, 64)]), ())


def test_grouped_kernels_are_in_a_space_of_their_own() -> None:
    found = enumerate_space("experts")
    assert len(found) == 72
    assert all(config.is_grouped and why_forbidden(config) is None for config in found)
    assert {config.mode for config in found} == set(QuantMode)
    assert not any(config.is_grouped for config in enumerate_space("all"))
    for name, space in SPACES.items():
        others = enumerate_space("default") if space.is_grouped else found
        reasons = {why_not(config, name) for config in others}
        assert all(reason is not None and reason.kind is ReasonKind.LEFT_OUT for reason in reasons)
    other = replace(found[0], cta=CtaShape(64, 24, 128), schedule=Schedule.TWO_WARPGROUPS)
    assert str(why_not(other, "experts")).startswith("left out: ")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"cluster": ClusterShape(1, 2, 1)}, "token tiles"),
        ({"epilogue": Epilogue.ELEMENTWISE}, "plain products"),
        ({"target": Target.CUTLASS, "schedule": Schedule.PINGPONG}, "only native kernels"),
    ],
)
def test_grouped_kernels_that_are_forbidden(change: dict[str, Any], reason: str) -> None:
    config = KernelConfig.parse("w4a16_sm90_native_fgs_cta128x64x128_cluster1x1x1_warpgroups2_grouped")
    assert why_forbidden(config) is None
    assert reason in str(why_forbidden(replace(config, **change)))


def test_stages_of_grouped_kernels_of_few_tokens_leave_room_for_experts() -> None:
    config = KernelConfig.parse("w4a16_sm90_native_cs_cta128x8x64_cluster1x1x1_warpgroups2_grouped")
    persistent = replace(config, scheduler=Scheduler.PERSISTENT)
    assert native_arrangement(persistent).stages > MAX_STAGES_BESIDE_EXPERTS
    stages = native_arrangement(config).stages
    room = BARRIER_BYTES - 64 * 2  # 16 bits for each of 64 experts
    assert 8 * (2 * stages + 3) <= room < 8 * (2 * (stages + 1) + 3), "three barriers beside those of the stages"
    larger = replace(config, cta=CtaShape(64, 16, 64))
    assert native_arrangement(larger) == native_arrangement(replace(larger, scheduler=Scheduler.PERSISTENT))


def test_grouped_kernels_store_from_registers() -> None:
    config = KernelConfig.parse("w4a16_sm90_native_fgs_cta128x128x64_cluster1x1x1_warpgroups2_persistent")
    assert native_arrangement(config).stores_through_shared
    assert not native_arrangement(replace(config, scheduler=Scheduler.GROUPED)).stores_through_shared
