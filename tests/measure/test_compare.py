"""Choosing from what was timed, and reading problems: all of `bench` that needs no GPU."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace
from typing import cast

import pytest
from click.testing import CliRunner
from fakes.library import FakeLibrary
from fakes.runner import Runner

from w4a16gen import KernelConfig, Library, Problem, QuantMode, Target
from w4a16gen.choose.cost_model import default_cost_model
from w4a16gen.choose.overrides import kernels_of_environment
from w4a16gen.cli import main
from w4a16gen.cli.problems import parse_problem
from w4a16gen.cli.services import Services
from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.spaces import enumerate_space
from w4a16gen.measure import compare as sweep
from w4a16gen.measure import timing as contender
from w4a16gen.measure.compare import tiles_suit
from w4a16gen.measure.results import Comparison, Timing, smallest_set
from w4a16gen.measure.rivals import CUBLAS
from w4a16gen.measure.workload import Workload


def screened(m: int, **microseconds: float) -> Comparison:
    """Return a comparison of kernels of these times."""
    return Comparison(Problem(m, 64, 64, 64), QuantMode.FINEGRAINED_SCALE_ONLY, microseconds, 0, [])


def test_the_smallest_set_serves_every_problem_within_the_slack() -> None:
    comparisons = [
        screened(1, a=10.0, b=10.2, c=20.0),
        screened(2, a=11.0, b=10.0, c=10.1),
        screened(3, a=30.0, b=30.0, c=10.0),
        screened(4),
    ]
    assert smallest_set(comparisons, 0.03) == ["a", "c"]
    assert smallest_set(comparisons, 0.0) == ["a", "b", "c"]
    assert len(smallest_set(comparisons, 2.0)) == 1
    assert smallest_set([], 0.03) == []


def test_what_others_make_superfluous_is_dropped() -> None:
    # a serves most, but b and c, needed for problems of their own, serve all of a's.
    comparisons = [
        screened(1, a=1.0, b=1.0),
        screened(2, a=1.0, b=1.0),
        screened(3, a=1.0, c=1.0),
        screened(4, a=1.0, c=1.0),
        screened(5, b=1.0),
        screened(6, c=1.0),
    ]
    assert smallest_set(comparisons, 0.03) == ["b", "c"]


def test_the_fastest_kernel_is_told_from_cublas() -> None:
    timings = [Timing(CUBLAS, [1.0, 2.0, 3.0]), Timing("a", [4.0, 6.0, 5.0], [3.0, 2.0])]
    found = Comparison(Problem(1, 64, 64, 64), QuantMode.FINEGRAINED_SCALE_ONLY, {"a": 4.0}, 0, timings)
    assert found.best.contender == "a"
    assert found.best.median == 5.0
    assert found.best.dependent_median == 2.5
    assert found.cublas is not None
    assert found.cublas.median == 2.0
    assert found.as_json()["timings"][1] == {"contender": "a", "isolated": [4.0, 6.0, 5.0], "dependent": [3.0, 2.0]}


def test_token_tiles_far_from_m_are_not_timed() -> None:
    suiting = {
        m: sorted(
            {config.cta.tokens for config in enumerate_space("native") if tiles_suit(config, Problem(m, 8, 8, 8))}
        )
        for m in (1, 8, 9, 64, 100, 8192)
    }
    assert suiting == {
        1: [8],
        8: [8],
        9: [8, 16],
        64: list(range(16, 121, 8)),
        100: list(range(32, 193, 8)),
        8192: list(range(64, 257, 8)),
    }


def test_problems_are_read_with_and_without_a_group() -> None:
    assert parse_problem("16x4096x8192") == Problem(16, 4096, 8192, 128)
    assert parse_problem("16x4096x8192,64") == Problem(16, 4096, 8192, 64)
    for text in ("16x4096", "16x4096x8192,", "0x8x8", "axbxc", "1x8x8,-1", ""):
        if text == "16x4096x8192,":
            assert parse_problem(text).group_size == 128
            continue
        with pytest.raises(InvalidValueError, match="must be MxNxK or MxNxK,GROUP"):
            parse_problem(text)


def test_bench_needs_a_problem_and_a_build(cli: CliRunner) -> None:
    nothing = cli.invoke(main, ["bench"])
    assert nothing.exit_code == 2
    assert "Specify at least one of --problem, --model, --file" in nothing.output
    result = cli.invoke(main, ["bench", "--problem", "1x4096x4096", "--build-dir", "nowhere"])
    assert result.exit_code == 3
    assert "No build found in nowhere" in result.output


def test_explain_names_the_choice_and_what_it_was_weighed_against(cli: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = enumerate_space("default")
    library = FakeLibrary(configs, devices=[])
    cli.services = Services(load=lambda _folder: library)
    found = json.loads(cli.invoke(main, ["explain", "16", "4096", "5120", "--json", "--top", "3"]).stdout)
    chosen = library.choose(Problem(16, 4096, 5120, 128), QuantMode.FINEGRAINED_SCALE_ONLY).kernel.name
    assert found["kernel"] == chosen == found["kernels"][0]["kernel"]
    assert (found["source"], found["microseconds"]) == ("estimate", found["kernels"][0]["microseconds"])
    assert [row["basis"] for row in found["kernels"]] == ["estimate"] * 3
    assert found["problem"] == {"m": 16, "n": 4096, "k": 5120, "group_size": 128}
    known = json.loads(cli.invoke(main, ["explain", "16", "4096", "4096", "--json"]).stdout)
    assert known["source"] == "estimate"
    assert 4 < known["microseconds"] < 9
    shown = cli.invoke(main, ["explain", "16", "4096", "4096", "--mode", "cs"])
    assert "bench --problem 16x4096x4096,4096 --mode cs" in shown.stderr
    assert "times as long" in shown.stderr
    cutlass = FakeLibrary(enumerate_space("trtllm"), devices=[])
    cli.services = Services(load=lambda _folder: cutlass)
    assert "cutlass" in cli.invoke(main, ["explain", "16", "4096", "4096"]).stdout
    monkeypatch.setenv("W4A16GEN_KERNELS", configs[0].name)
    kernels_of_environment.cache_clear()
    named_kernel = ["explain", "16", "4096", "4096", "--mode", str(configs[0].mode), "--json"]
    missing = cli.invoke(main, named_kernel)
    assert missing.exit_code == 3
    assert f"{configs[0].name}, which use_kernels or W4A16GEN_KERNELS names, is not in the build" in missing.stderr
    cli.services = Services(load=lambda _folder: library)
    named = cli.invoke(main, named_kernel)
    assert json.loads(named.stdout)["kernel"] == configs[0].name
    assert json.loads(named.stdout)["source"] == "override"
    wrong = cli.invoke(main, ["explain", "16", "4096", "4100"])
    assert wrong.exit_code == 2
    assert "k of 4100 must be a positive multiple of 8" in wrong.stderr


def test_explain_says_where_dense_fp16_is_faster(cli: Runner) -> None:
    slow = [config for config in enumerate_space("default") if config.cta.tokens == 8]
    cli.services = Services(load=lambda _folder: FakeLibrary(slow, devices=[]))
    shown = cli.invoke(main, ["explain", "4000", "4096", "5120"])
    assert "Dense FP16 would take about 2" in shown.stderr


def test_what_settles_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr(contender, "time", SimpleNamespace(monotonic=lambda: next(clock)))  # a second a look
    unsettled = iter([1.0, 1.0, 1.0, 1.0, 7.0, 8.0, 9.0, 8.0, 8.0, 8.0, 9.0, 7.0])
    assert contender.settled(lambda: next(unsettled), 5, 6) == 8.0
    few = iter([5.0, 9.0, 7.0])
    assert contender.settled(lambda: next(few), 0, 0) == 7.0, "three replays at least"


class Bench:
    """Stands in for a stage on which kernels take what a script says, look by look."""

    def __init__(self, m: int, looks: dict[KernelConfig, list[float]], *, dependent: bool) -> None:
        self.problem, self.looks = Problem(m, 4096, 4096, 128), {config: iter(times) for config, times in looks.items()}
        self.dependent = dependent
        self.warmed_up_by: list[KernelConfig] = []
        self.timed: list[KernelConfig] = []

    def record(self, config: KernelConfig, *, dependent: bool, brief: bool) -> contender.Contender:
        assert brief
        assert dependent is self.dependent
        self.warmed_up_by.append(config)
        return contender.Contender(lambda: None, lambda: 0.0, 1)

    def time_briefly(self, _stage: object, config: KernelConfig, *, dependent: bool) -> float:
        assert dependent is self.dependent
        self.timed.append(config)
        return next(self.looks[config])


@pytest.mark.parametrize("dependent", [False, True], ids=["ordinary", "dependent"])
@pytest.mark.parametrize("m", [1, 8192], ids=["short", "long"])
def test_kernels_near_the_fastest_get_another_look_at_long_problems(
    m: int, dependent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, slowed, slow = enumerate_space("default")[:3]
    # The second one's first look fell into the slow moment of a second, and in truth it is the fastest.
    looks = {first: [10.0, 10.1, 11.0], slowed: [14.0, 9.0, 8.5], slow: [17.0]}
    stage = Bench(m, looks, dependent=dependent)
    monkeypatch.setattr(sweep, "_time_briefly", stage.time_briefly)
    given = list(sweep.screen(cast("Workload", stage), [first, slowed, slow], dependent=dependent))
    assert given[:3] == [(first, 10.0), (slowed, 14.0), (slow, 17.0)]
    assert given[3:] == ([] if m == 1 else [(slowed, 9.0), (slowed, 8.5)])
    again = [] if m == 1 else [slowed, first, first, slowed]
    assert stage.timed == [first, slowed, slow, *again], "there and back"
    assert stage.warmed_up_by == ([] if m == 1 else [slow])
    assert list(sweep.screen(cast("Workload", stage), [])) == []
    monkeypatch.undo()
    assert list(sweep.screen(cast("Workload", stage), [first], dependent=dependent)) == [(first, 0.0)]


def test_long_problems_take_turns_in_blocks_and_without_the_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    configs = [config for config in enumerate_space("default") if config.mode is QuantMode.FINEGRAINED_SCALE_ONLY]
    took = {False: 5.0, True: 4.0}

    class Timed(contender.Contender):
        """Counts what is asked of it."""

        def __init__(self, milliseconds: float) -> None:
            super().__init__(lambda: None, lambda: milliseconds, 1)

        def time(self, pause: float = 0) -> None:
            del pause
            turns.append(("replay", self.timed_replay()))
            self.microseconds.append(self.timed_replay())

        def time_block(self, seconds: float = 0) -> None:
            del seconds
            turns.append(("block", self.timed_replay()))
            self.microseconds.append(self.timed_replay())

    stage = SimpleNamespace(
        problem=Problem(16, 4096, 4096, 128),
        check=lambda _config: 0.5,
        record=lambda config, *, dependent: Timed(10.0 + configs.index(config) + dependent),
        record_floor=lambda *, dependent: Timed(took[dependent]),
    )
    monkeypatch.setattr(sweep, "Workload", lambda *_drawn: stage)
    monkeypatch.setattr(
        sweep, "screen", lambda _stage, some: ((config, float(configs.index(config))) for config in some)
    )
    monkeypatch.setattr(sweep, "find_torch", lambda: None)
    library = FakeLibrary(configs)
    turns: list[tuple[str, float]] = []
    told: list[tuple[int, int]] = []
    for m, kinds in ((16, {"replay": 5 * 6}), (8192, {"replay": 5 * 2, "block": 2 * 2})):
        turns.clear()
        stage.problem = Problem(m, 4096, 4096, 128)
        found = sweep.compare(
            library,
            stage.problem,
            QuantMode.FINEGRAINED_SCALE_ONLY,
            finalists=1,
            rounds=5,
            progress=lambda done, total, _name: told.append((done, total)),
        )
        assert len([timing for timing in found.timings if "cta" in timing.contender]) == 2, (
            "the chosen one is among them"
        )
        assert found.floor is not None
        assert (found.floor.median, found.floor.dependent_median) == (5.0, 4.0)
        assert {kind: len([1 for was, _ in turns if was == kind]) for kind in kinds} == kinds
        assert len(turns) == sum(kinds.values())
        assert all(kind == "replay" for kind, took_ms in turns if took_ms < 10)
        assert told[-1][0] == told[-1][1]


@pytest.mark.parametrize("m", [1, 8192], ids=["short", "long"])
def test_launches_take_more_than_200_mb_of_weights_in_turn(m: int) -> None:
    library = cast("Library", SimpleNamespace(to_device=lambda value, _device: value))
    stage = Workload(library, 0, Problem(m, 4096, 2048, 128), QuantMode.FINEGRAINED_SCALE_ONLY, 0)
    assert default_cost_model().is_long(stage.problem) == (m > 1)
    briefly = stage.copies(Target.NATIVE, brief=True)
    copies = stage.copies(Target.NATIVE)
    assert sum(copy.nbytes for copy in copies) > 200e6
    assert stage.launches(len(copies)) == len(copies)
    assert stage.launches(1) == 20
    assert len(briefly) == stage.launches(len(briefly), brief=True) == (len(copies) if m == 1 else 6)


def test_copies_of_a_small_weight_are_limited() -> None:
    library = cast("Library", SimpleNamespace(to_device=lambda value, _device: value))
    stage = Workload(library, 0, Problem(3, 64, 128, 128), QuantMode.FINEGRAINED_SCALE_ONLY, 0)
    assert len(stage.copies(Target.NATIVE)) == 1000
