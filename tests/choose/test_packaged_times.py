"""The times that come with the package, and the order in which a choice asks for them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from random import Random

import pytest
from fakes.devices import H100, H100_PCIE, H200
from fakes.library import chooser_of
from hypothesis import given
from hypothesis import strategies as st
from paths import DATA

from w4a16gen import KernelConfig, Problem, QuantMode
from w4a16gen.choose import packaged_times
from w4a16gen.choose.chooser import Choice, ChoiceSource
from w4a16gen.kernels.config import Target
from w4a16gen.kernels.device import Device
from w4a16gen.kernels.problem import runnable
from w4a16gen.kernels.spaces import enumerate_space

DEFAULT = enumerate_space("default")


def test_the_table_holds_every_kernel_of_the_default_set_near_its_tokens() -> None:
    measured = {config for of_problem in packaged_times.table().times.values() for config in of_problem}
    of_mode = {config for config in DEFAULT if config.mode is packaged_times.MEASURED_MODE}
    assert measured == of_mode
    layers = {(problem.n, problem.k) for _, problem in packaged_times.table().times}
    assert {(4096, 4096), (4096, 14336), (8192, 8192), (28672, 4096), (57344, 8192)} <= layers
    assert all(problem.group_size == packaged_times.MEASURED_GROUP_SIZE for _, problem in packaged_times.table().times)


@pytest.mark.parametrize("mode", QuantMode, ids=str)
@pytest.mark.parametrize("group_size", [32, 128, 4096])
def test_the_fastest_measured_kernel_is_the_choice_in_every_mode(mode: QuantMode, group_size: int) -> None:
    asked = Problem(16, 4096, 4096, group_size)
    times = packaged_times.table().times[packaged_times.MEASURED_MODE, Problem(16, 4096, 4096, 128)]
    best = min(times, key=lambda config: times[config].microseconds)
    found = packaged_times.fastest(DEFAULT, mode, asked, H100)
    assert found is not None
    config, microseconds = found
    assert (config.mode, config.cta, config.cluster) == (mode, best.cta, best.cluster)
    assert microseconds == times[best].microseconds
    without = [other for other in DEFAULT if other != config]
    second = packaged_times.fastest(without, mode, asked, H100)
    assert second is not None
    assert second[0] in without


def test_the_times_count_on_the_gpu_that_they_are_of() -> None:
    mode, problem = QuantMode.FINEGRAINED_SCALE_ONLY, Problem(16, 4096, 4096, 128)
    assert packaged_times.fastest(DEFAULT, mode, problem, H200) is None
    assert packaged_times.fastest(DEFAULT, mode, problem, H100_PCIE) is None
    assert packaged_times.fastest(DEFAULT, mode, problem, None) == packaged_times.fastest(DEFAULT, mode, problem, H100)
    assert packaged_times.fastest(enumerate_space("trtllm"), mode, problem, H100) is None
    chooser = chooser_of(DEFAULT)
    sources = [chooser.choose(problem, mode, device=device).source for device in (H100, H200)]
    assert sources == [ChoiceSource.PACKAGED_TIMES, ChoiceSource.ESTIMATE]
    other = chooser.choose(Problem(16, 4096, 4104, 4104), mode, device=H100)
    assert other.source is ChoiceSource.ESTIMATE
    cutlass = chooser_of(enumerate_space("trtllm")).choose(problem, mode, device=H100)
    assert (cutlass.kernel.target, cutlass.microseconds) == (Target.CUTLASS, None)
    assert cutlass.source is ChoiceSource.RULE_OF_THUMB


def test_the_choice_for_a_layer_that_was_not_measured_is_near_the_fastest() -> None:
    whole = packaged_times.table()
    mode = packaged_times.MEASURED_MODE
    losses = {}
    for layer in sorted({(problem.n, problem.k) for _, problem in whole.times}):
        others = {key: times for key, times in whole.times.items() if (key[1].n, key[1].k) != layer}
        neighbours = packaged_times.Neighbours(replace(whole, times=others))
        for (_, problem), times in whole.times.items():
            if (problem.n, problem.k) == layer:
                chosen = neighbours.estimate(times, mode, problem)[0][0]
                losses[problem] = times[chosen].microseconds / min(time.microseconds for time in times.values())
    assert len(losses) > 600
    assert math.prod(losses.values()) ** (1 / len(losses)) < 1.01
    assert sorted(losses.values())[int(0.995 * len(losses))] < 1.1
    assert max(losses.values()) < 1.15


def test_the_choice_in_ten_layers_that_had_no_part_in_any_constant() -> None:
    recorded = json.loads((DATA / "h100_other_layers.json").read_text())
    configs = [KernelConfig.parse(name) for name in recorded["kernels"]]
    assert set(configs) == {config for config in DEFAULT if config.mode is packaged_times.MEASURED_MODE}
    chooser = chooser_of(configs)
    losses = []
    for row in recorded["problems"]:
        problem = Problem(row["m"], row["n"], row["k"], recorded["group_size"])
        assert all((problem.n, problem.k) != (known.n, known.k) for _, known in packaged_times.table().times)
        choice = chooser.choose(problem, packaged_times.MEASURED_MODE, device=H100)
        taken = dict(zip(configs, row["microseconds"], strict=True))
        losses.append(taken[choice.kernel] / min(time for time in taken.values() if time is not None))
    assert len(losses) == 100
    assert math.prod(losses) ** (1 / len(losses)) < 1.005
    assert max(losses) < 1.07


@given(
    st.integers(0, 20000),
    st.integers(1, 8000),
    st.integers(1, 64),
    st.sampled_from([32, 64, 128, 256]),
    st.sampled_from(QuantMode),
    st.sampled_from([H100, H200, H100_PCIE, None]),
    st.lists(st.sampled_from(DEFAULT), min_size=1, unique=True),
    st.randoms(),
)
def test_a_choice_is_a_built_kernel_that_can_run_the_problem_and_always_the_same(
    m: int,
    n: int,
    groups: int,
    group_size: int,
    mode: QuantMode,
    device: Device | None,
    built: list[KernelConfig],
    random: Random,
) -> None:
    problem = Problem(m, 8 * n, groups * group_size, group_size if mode.is_grouped else groups * group_size)
    built = [*built, next(config for config in DEFAULT if config.mode is mode)]

    def choice() -> Choice:
        return chooser_of(built).choose(problem, mode, device=device)

    first = choice()
    assert first.kernel in runnable(built, mode, problem)
    random.shuffle(built)
    assert choice() == first
