"""Configurations as values: names, parsing, order."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from w4a16gen import ClusterShape, CtaShape, KernelConfig, QuantMode, Schedule, Scheduler, Target
from w4a16gen.cli.options import parse_kernel
from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.config import PREFIX, Epilogue, why_not_of_target
from w4a16gen.kernels.spaces import SPACES, enumerate_space

counts = st.integers(1, 1024)
configs = st.builds(
    KernelConfig,
    st.sampled_from(Target),
    st.sampled_from(QuantMode),
    st.builds(CtaShape, counts, counts, counts),
    st.builds(ClusterShape, counts, counts, counts),
    st.sampled_from(Schedule),
    st.sampled_from(Scheduler),
    st.sampled_from(Epilogue),
).filter(lambda config: why_not_of_target(config) is None)


@given(configs)
def test_a_name_parses_back_to_its_configuration(config: KernelConfig) -> None:
    assert KernelConfig.parse(config.name) == config
    assert config.name == PREFIX + config.short_name
    assert re.fullmatch(r"[a-z][a-z0-9_]*", config.name), "the name is a C++ identifier and a file stem"


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ("persistent_gated", "epilogue gated: only native kernels have epilogues"),
        ("streamk_elementwise", "epilogue elementwise: only native kernels have epilogues"),
        ("grouped", "scheduler grouped: only native kernels compute the products of several experts"),
    ],
)
def test_names_of_kernels_that_no_target_has_do_not_parse(end: str, reason: str) -> None:
    start = "cutlass_fgs_cta128x16x64_cluster1x1x1_cooperative_"
    name = f"{PREFIX}{start}{end}"
    for parse, text in ((KernelConfig.parse, name), (parse_kernel, name), (parse_kernel, f"{start}{end}")):
        with pytest.raises(InvalidValueError, match=f"'{name}' is no kernel: {reason}"):
            parse(text)


@pytest.mark.parametrize("space", SPACES)
def test_every_name_of_a_space_is_unique_and_parses_back(space: str) -> None:
    found = enumerate_space(space)
    assert [KernelConfig.parse(config.name) for config in found] == found
    assert len({config.name for config in found}) == len(found)


@given(st.text(max_size=80))
def test_only_names_parse(text: str) -> None:
    try:
        config = KernelConfig.parse(text)
    except InvalidValueError as error:
        assert repr(text) in str(error)  # noqa: PT017
    else:
        assert config.name == text


@pytest.mark.parametrize(
    "text",
    ["", "128x64", "128x64x64x1", "0x1x1", "-1x1x1", "128X64X64", " 128x64x64", "128x64x64\n", "01x1x1", "axbxc"],
)
def test_only_three_positive_integers_are_a_shape(text: str) -> None:
    with pytest.raises(InvalidValueError, match="CHANNELSxTOKENSxK"):
        CtaShape.parse(text)


@given(counts, counts, counts)
def test_a_shape_parses_back(channels: int, tokens: int, k: int) -> None:
    shape = ClusterShape(channels, tokens, k)
    assert ClusterShape.parse(str(shape)) == shape
    assert shape.as_list() == [channels, tokens, k]


def test_order_is_by_number_not_by_spelling() -> None:
    assert CtaShape(64, 16, 64) < CtaShape(128, 16, 64)
    assert QuantMode.PER_COLUMN_SCALE_ONLY < QuantMode.FINEGRAINED_SCALE_ONLY
