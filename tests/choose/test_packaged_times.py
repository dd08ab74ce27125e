"""The times that come with the package, and the order in which a choice asks for them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from random import Random

import choice_loss
import pytest
import recorded
from fakes.devices import H100, H100_PCIE, H200
from fakes.library import chooser_of
from hypothesis import given
from hypothesis import strategies as st

from w4a16gen import KernelConfig, Problem, QuantMode
from w4a16gen.choose import packaged_times
from w4a16gen.choose.cards import H100 as H100_CARD
from w4a16gen.choose.chooser import Choice, ChoiceSource
from w4a16gen.choose.cost_model import default_cost_model
from w4a16gen.choose.timing_table import Measured, TuningTable
from w4a16gen.errors import InvalidValueError
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
    table, model, reach = packaged_times.table(), default_cost_model(), packaged_times.default_reach()
    losses = sorted(choice_loss.losses_by_layer(table, model, reach).values())
    assert len(losses) == 601
    assert math.prod(losses) ** (1 / len(losses)) < 1.0042
    assert losses[int(0.995 * len(losses))] < 1.08
    assert losses[-1] < 1.11


def test_the_choice_for_tokens_that_were_not_measured_is_near_the_fastest() -> None:
    table, model, reach = packaged_times.table(), default_cost_model(), packaged_times.default_reach()
    losses = choice_loss.losses_by_tokens(table, model, reach)
    means = {way: math.prod(of.values()) ** (1 / len(of)) for way, of in losses.items()}
    assert means["estimate"] < 1.003
    assert max(losses["estimate"].values()) < 1.09
    assert means["next_tokens"] > 1.09, "the reason why times of more tokens do not choose"


def test_the_choice_in_ten_layers_that_had_no_part_in_any_constant() -> None:
    held_out: dict[Problem, dict[KernelConfig, float]] = {}
    for row in recorded.read([recorded.DATA_FOLDER / "h100_held_out.csv.xz"]):
        assert row.kernel is not None
        held_out.setdefault(row.problem, {})[row.kernel] = row.microseconds
    configs = [config for config in DEFAULT if config.mode is packaged_times.MEASURED_MODE]
    chooser = chooser_of(configs)
    losses = []
    for problem, times in held_out.items():
        assert all((problem.n, problem.k) != (known.n, known.k) for _, known in packaged_times.table().times)
        choice = chooser.choose(problem, packaged_times.MEASURED_MODE, device=H100)
        losses.append(times[choice.kernel] / min(times.values()))
    assert len(losses) == 100
    assert math.prod(losses) ** (1 / len(losses)) < 1.0025
    assert max(losses) < 1.04


def test_a_file_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    for text in ("", "{}", "[]", json.dumps({"schema": packaged_times.TIMES_SCHEMA, "gpu": "a GPU"})):
        path.write_text(text)
        with pytest.raises(InvalidValueError, match="is not a table of packaged times"):
            packaged_times.read_times(path)
    for text in ("", "{}", '{"schema": "w4a16gen.neighbours/1", "constants": {"layer_octaves": 0.7}}'):
        path.write_text(text)
        with pytest.raises(InvalidValueError, match="does not hold the reach of times"):
            packaged_times.Reach.read(path)


def test_the_table_comes_back_as_it_was_written(tmp_path: Path) -> None:
    text = packaged_times.TIMES_PATH.read_text()
    source = json.loads(text)["source"]
    assert packaged_times.times_as_text(packaged_times.table(), source) == text
    path = tmp_path / "times.json"
    path.write_text(text)
    assert packaged_times.read_times(path) == packaged_times.table()


def test_corrections_reach_similar_problems_only() -> None:
    mode, near, far = packaged_times.MEASURED_MODE, Problem(100, 4096, 4096, 128), Problem(100, 65536, 16384, 128)
    config = next(config for config in DEFAULT if config.mode is mode)
    plain = dict(default_cost_model().estimate([config], mode, near))[config]
    table = TuningTable("a GPU", 132, {(mode, near): {config: Measured(2 * plain, "")}})
    neighbours = packaged_times.Neighbours(table)
    assert neighbours.estimate([config], mode, near)[0][1] == pytest.approx(plain * 2**0.5), "one time, one prior"
    alone = default_cost_model().estimate([config], mode, far)[0][1]
    assert neighbours.estimate([config], mode, far)[0][1] == alone
    elsewhere = default_cost_model().estimate([config], mode, near, H100_CARD.resized(114))[0][1]
    assert neighbours.estimate([config], mode, near, H100_CARD.resized(114))[0][1] == elsewhere


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
