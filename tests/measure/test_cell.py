"""Timing one random cell: which kernels, which rivals, how often."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
from fakes.devices import H100
from fakes.library import FakeLibrary

from w4a16gen import KernelConfig, Problem, QuantMode
from w4a16gen.kernels.spaces import enumerate_space
from w4a16gen.measure import cell as cells
from w4a16gen.measure.cell import Attempts, CellOptions, promising, time_cell
from w4a16gen.measure.rivals import CUBLAS, Rival
from w4a16gen.measure.timing import Contender

MODE = QuantMode.FINEGRAINED_SCALE_ONLY
KERNELS = [config for config in enumerate_space("default") if config.mode is MODE]
ORDER = list(dict.fromkeys([*KERNELS, *enumerate_space("native")]))
SHORT, LONG = Problem(16, 4096, 4096, 128), Problem(8192, 4096, 4096, 128)


class Timed(Contender):
    """A contender that always takes the same, or fails when it is timed."""

    def __init__(self, microseconds: float, failure: Exception | None = None) -> None:
        super().__init__(lambda: None, lambda: microseconds / 1000, 1)
        self.failure = failure
        self.blocks: list[float] = []

    def time(self, pause: float = 0) -> None:
        del pause
        if self.failure:
            raise self.failure
        self.microseconds.append(self.timed_replay() * 1000)

    def time_block(self, seconds: float = 0) -> None:
        self.blocks.append(seconds)
        self.time()


class Table:
    """Stands in for a stage on which kernels take as many microseconds as their place in a list."""

    def __init__(self, problem: Problem, rivals: dict[str, Timed | Exception]) -> None:
        self.problem, self.mode, self.rivals = problem, MODE, rivals
        self.recorded: dict[str, Timed] = {}
        self.checked: list[KernelConfig] = []

    def check(self, config: KernelConfig) -> float:
        self.checked.append(config)
        return 0.5

    def record(self, config: KernelConfig, *, dependent: bool) -> Timed:
        assert not dependent
        self.recorded[config.name] = Timed(100.0 + ORDER.index(config))
        return self.recorded[config.name]

    def record_cublas(self, _torch: Any) -> Timed:
        outcome = self.rivals[CUBLAS]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def record_rival(self, _torch: Any, rival: Rival) -> tuple[Timed, float]:
        outcome = self.rivals[rival.name]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome, 0.25


def source() -> random.Random:
    return random.Random(1)  # noqa: S311  (nothing secret)


def rival(name: str) -> Rival:
    return Rival(name, f"{name}-kernels", "float16", 0.01, lambda *_: [])


@pytest.fixture
def screened(monkeypatch: pytest.MonkeyPatch) -> list[KernelConfig]:
    """Screen by place in the list; return the kernels that were screened."""
    seen: list[KernelConfig] = []

    def screen(_stage: object, some: list[KernelConfig]) -> Any:
        seen.extend(some)
        return ((config, float(ORDER.index(config))) for config in some)

    monkeypatch.setattr(cells, "screen", screen)
    return seen


def timed(stage: Table, options: CellOptions, attempts: Attempts | None = None) -> Any:
    return time_cell(stage, SimpleNamespace(), FakeLibrary(KERNELS), H100, options, attempts)  # type: ignore[arg-type]


def test_kernels_near_the_best_estimate_and_a_few_surprises_are_timed() -> None:
    suitable = [config for config in KERNELS if config.cta.tokens in {8, 16}]
    far = max(KERNELS, key=lambda config: config.cta.tokens)
    assert far.cta.tokens > 32
    fast, near, slow = suitable[0], suitable[1], suitable[2:]
    assert len(slow) >= 3
    estimates = [(fast, 10.0), (near, 12.9), *((config, 14.0) for config in slow), (far, 1.0)]
    picked = promising(estimates, SHORT, slow[0], source())
    assert picked[:3] == [slow[0], fast, near]
    assert set(picked[3:]) <= set(slow)
    assert len(set(picked)) == len(picked) <= 6
    assert promising(estimates, SHORT, slow[0], source()) == picked
    assert promising([], SHORT, far, source()) == [far]


def test_a_cell_times_forty_near_kernels_and_three_surprises_at_most() -> None:
    suitable = [config for config in ORDER if config.mode is MODE and config.cta.tokens in {8, 16}]
    assert len(suitable) > 60
    call = min(suitable[:50])
    near = [(config, 10.0) for config in suitable[:50]]
    far = [(config, 20.0) for config in suitable[50:60]]
    picked = promising(near + far, SHORT, call, source())
    assert picked[:40] == sorted(suitable[:50])[:40]
    assert len(set(picked)) == 43
    few = promising(near[:2] + far, SHORT, suitable[0], source())
    assert len(few) == 5
    assert len({config for config, _ in far} & set(few)) == 3


def test_the_call_the_fastest_cublas_and_rivals_take_turns(screened: list[KernelConfig]) -> None:
    stage = Table(SHORT, {CUBLAS: Timed(300.0), "right": Timed(200.0), "broken": RuntimeError("no\nkernel")})
    begun: list[str] = []
    found = timed(stage, CellOptions(1, 4, [rival("right"), rival("broken")]), Attempts(begin=begun.append))
    fastest = min(screened, key=KERNELS.index)
    assert {timing.contender for timing in found.timings} == {found.chosen, fastest.name, CUBLAS, "right"}
    assert [timing.median for timing in found.timings] == sorted(timing.median for timing in found.timings)
    assert {len(timing.isolated) for timing in found.timings} == {4}
    assert set(stage.checked) == {fastest, KernelConfig.parse(found.chosen)}
    assert found.error_over_bound.keys() == {found.chosen, fastest.name, "right"}
    assert found.rivals_left_out == {"broken": "RuntimeError: no kernel"}
    assert begun == [CUBLAS, "right", "broken"]
    assert found.left_out == len(KERNELS) - len(screened) > 0


def test_a_rival_that_fails_late_or_ended_earlier_runs_is_left_out(screened: list[KernelConfig]) -> None:
    late = Timed(1.0, RuntimeError("late"))
    stage = Table(SHORT, {CUBLAS: MemoryError("large"), "late": late})
    attempts = Attempts({"earlier": "it ended the process 2 times"})
    found = timed(stage, CellOptions(1, 2, [rival("late"), rival("earlier")]), attempts)
    assert found.rivals_left_out == {
        CUBLAS: "MemoryError: large",
        "late": "RuntimeError: late",
        "earlier": "it ended the process 2 times",
    }
    assert all("w4a16" in timing.contender for timing in found.timings)
    assert screened


def test_a_failure_of_our_own_kernel_is_not_passed_over(
    screened: list[KernelConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Table(SHORT, {CUBLAS: Timed(1.0)})
    monkeypatch.setattr(stage, "record", lambda *_, **__: Timed(1.0, RuntimeError("ours")))
    with pytest.raises(RuntimeError, match="ours"):
        timed(stage, CellOptions())
    assert screened


def test_long_problems_run_in_blocks_and_slow_contenders_get_one(screened: list[KernelConfig]) -> None:
    slow, near = Timed(200.0), Timed(101.0)
    stage = Table(LONG, {CUBLAS: slow, "near": near})
    found = timed(stage, CellOptions(2, 9, [rival("near")]))
    assert (len(slow.blocks), len(near.blocks)) == (1, 2)
    assert {seconds for contender in (slow, near) for seconds in contender.blocks} == {0.5}
    assert len(stage.recorded[found.chosen].blocks) == 2, "the call always runs to the end"
    assert screened


def test_the_call_can_be_that_of_a_smaller_build(screened: list[KernelConfig]) -> None:
    whole = [config for config in enumerate_space("native") if config.mode is MODE]
    stage = Table(SHORT, {CUBLAS: Timed(300.0)})
    library = FakeLibrary(whole)
    options = CellOptions(1, 2, space="default")
    found = time_cell(stage, SimpleNamespace(), library, H100, options)  # type: ignore[arg-type]
    assert found.chosen == FakeLibrary(KERNELS).choose(SHORT, MODE).kernel.name
    assert len(screened) <= 1 + 40 + 3
    assert set(screened) - set(KERNELS), "the fastest is sought in the whole build"


def test_without_a_kernel_there_are_no_times() -> None:
    stage = Table(Problem(16, 4096, 4096, 24), {})
    assert timed(stage, CellOptions()).timings == []
