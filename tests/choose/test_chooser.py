"""The order in which a choice asks overrides, tables and estimates, and what it makes of a table that it cannot use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fakes.devices import H100
from fakes.library import FakeLibrary

from w4a16gen import Problem, QuantMode
from w4a16gen.choose.chooser import ChoiceSource
from w4a16gen.choose.timing_table import TABLE, Measured, add_times, one_time
from w4a16gen.kernels.spaces import enumerate_space
from w4a16gen.weights.packed import TARGET_LAYOUTS, PackedWeight

MODE = QuantMode.FINEGRAINED_SCALE_ONLY
KERNELS = [config for config in enumerate_space("trtllm") if config.mode is MODE]
PROBLEM = Problem(16, 512, 1024, 128)
WEIGHT = PackedWeight(None, TARGET_LAYOUTS[KERNELS[0].target], 512, 1024, 128, MODE)


@pytest.fixture
def library(tmp_path: Path) -> FakeLibrary:
    """Return a library on a machine with an H100, whose folder may hold a table."""
    return FakeLibrary(enumerate_space("trtllm"), folder=tmp_path)


def test_calls_choose_by_the_table_of_the_build(library: FakeLibrary, tmp_path: Path) -> None:
    estimated = FakeLibrary(library.configs()).choose(PROBLEM, MODE).kernel
    slow = next(config for config in KERNELS if config != estimated)
    hashes = library.build.content_hashes
    for config, us in ((estimated, 9.0), (slow, 8.0)):
        add_times(tmp_path / TABLE, one_time(H100, PROBLEM, config, Measured(us, hashes[config])))
    choice = library.choose(PROBLEM, MODE)
    assert (choice.kernel, choice.microseconds, choice.source) == (slow, 8.0, ChoiceSource.TUNING_TABLE)
    assert library.kernel_for(WEIGHT, PROBLEM) == slow
    assert library.kernel_for(WEIGHT, PROBLEM, estimated) == estimated
    other = Problem(16, 512, 2048, 128)
    assert library.choose(other, MODE).source is ChoiceSource.RULE_OF_THUMB
    elsewhere = PackedWeight(None, WEIGHT.layout, 512, 2048, 128, MODE)
    assert library.kernel_for(elsewhere, other) == FakeLibrary(library.configs()).choose(other, MODE).kernel


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        ("{", "is no tuning table"),
        (
            json.dumps({"schema": 1, "gpu": "a GPU", "sm_count": 132, "times": []}),
            "is of a GPU with 132 SMs, not of NVIDIA H100 80GB HBM3 with 132",
        ),
    ],
)
def test_a_damaged_or_foreign_table_is_told_of_once_and_ignored(
    library: FakeLibrary, tmp_path: Path, text: str, warning: str
) -> None:
    (tmp_path / TABLE).write_text(text)
    with pytest.warns(RuntimeWarning, match=warning) as told:
        assert library.kernel_for(WEIGHT, PROBLEM) == FakeLibrary(library.configs()).choose(PROBLEM, MODE).kernel
    assert len(told) == 1
    assert library.choose(PROBLEM, MODE).microseconds is None
