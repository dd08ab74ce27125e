"""Which kernels of a space are built for some problems."""

from __future__ import annotations

import pytest

from w4a16gen import Problem, QuantMode
from w4a16gen.kernels.spaces import enumerate_space
from w4a16gen.measure.promising import MOST_FOR_PROBLEM, promising, to_build
from w4a16gen.measure.results import smallest_cover

MODE = QuantMode.FINEGRAINED_SCALE_ONLY
KERNELS = [config for config in enumerate_space("native") if config.mode is MODE]
OF_16 = [config for config in KERNELS if config.cta.tokens == 16]
PROBLEM = Problem(16, 4096, 4096, 128)


def test_kernels_near_the_best_estimate_are_promising_and_tiles_must_suit() -> None:
    far = next(config for config in KERNELS if config.cta.tokens == 128)
    estimates = [(OF_16[0], 12.1), (OF_16[1], 10.0), (OF_16[2], 11.9), (far, 1.0)]
    assert promising(estimates, PROBLEM) == [OF_16[1], OF_16[2]]
    assert promising([], PROBLEM) == []


def test_a_problem_has_so_many_promising_kernels_at_most() -> None:
    assert len(OF_16) > MOST_FOR_PROBLEM
    assert promising([(config, 10.0) for config in OF_16], PROBLEM) == sorted(OF_16)[:MOST_FOR_PROBLEM]


def test_the_best_of_each_problem_are_built_first() -> None:
    a, b, c, d, e = OF_16[:5]
    wanted = {1: [a, b, c], 2: [d, b], 3: [a, e]}
    assert to_build(wanted) == [a, d, b, e, c]
    assert to_build(wanted, 3) == [a, d, b]
    assert to_build(wanted, 0) == [a, d], "no problem is without a kernel"
    assert to_build({}) == []


def test_compiled_kernels_leave_the_limit_to_others() -> None:
    a, b, c, d, e = OF_16[:5]
    wanted = {1: [a, b, c], 2: [d, b], 3: [a, e]}
    assert to_build(wanted, 1, {a, d}) == [a, d, b]
    assert to_build(wanted, 2, {a, d, b}) == [a, d, b, e, c]
    assert to_build(wanted, 0, {c}) == [a, d, c], "the best of each problem, and what costs nothing"


@pytest.mark.parametrize(
    ("slack", "expected"),
    [(0.0, ["a", "b", "c"]), (0.01, ["a", "c"]), (0.5, ["a"])],
)
def test_a_cover_is_within_the_limit_on_every_problem(slack: float, expected: list[str]) -> None:
    times = {
        1: {"a": 100.0, "b": 103.0, "c": 140.0},
        2: {"a": 100.9, "b": 100.0, "c": 130.0},
        3: {"c": 50.0, "a": 51.0},
        4: {},
    }
    found = smallest_cover(times, slack)
    assert found == expected
    for of_problem in filter(None, times.values()):
        assert min(of_problem.get(name, float("inf")) for name in found) <= min(of_problem.values()) * (1 + slack)
    assert smallest_cover({}, slack) == []
