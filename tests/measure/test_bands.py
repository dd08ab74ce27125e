"""What random cells say together, from times that are made up."""

from __future__ import annotations

from dataclasses import replace

import pytest
from json_shapes import RANDOM, check

from w4a16gen import Problem, QuantMode
from w4a16gen.measure.bands import bands_of
from w4a16gen.measure.results import Comparison, Timing
from w4a16gen.measure.rivals import CUBLAS

MODE = QuantMode.FINEGRAINED_SCALE_ONLY


def cell(m: int, call: float, **others: float) -> Comparison:
    """Return a cell in which a call takes so long; `best` is another kernel."""
    timings = [Timing("call", [call]), *(Timing(name, [microseconds]) for name, microseconds in others.items())]
    timings.sort(key=lambda timing: timing.median)
    return Comparison(Problem(m, 64, 128, 128), MODE, {}, 0, timings, {}, "call")


CELLS = [
    cell(1, 10.0, **{CUBLAS: 20.0, "humming": 12.0, "quack_bf16": 9.0}),
    cell(64, 10.0, best=8.0, **{CUBLAS: 9.8}),
    cell(65, 10.0, **{CUBLAS: 30.0, "turbomind": 8.0}),
]


def test_bands_say_what_is_won_lost_and_lost_by_the_choice() -> None:
    few, middle, every = bands_of([*CELLS, Comparison(Problem(1, 8, 8, 8), MODE, {}, 0, [])])
    assert [(band.tokens, band.cells) for band in (few, middle, every)] == [
        ("1 to 64", 2),
        ("65 to 256", 1),
        ("1 to 8192", 3),
    ]
    assert few.call is not None
    assert few.call.mean == pytest.approx((1.2 * 0.98) ** 0.5), "QuACK multiplies in bf16 and is apart"
    assert few.call.worst == pytest.approx(0.98)
    assert few.call.worst_cell == "64x64x128"
    assert (few.call.lost, few.call.lost_clearly) == (1, 0)
    assert middle.call is not None
    assert (middle.call.mean, middle.call.lost, middle.call.lost_clearly) == (0.8, 1, 1)
    assert few.best is not None
    assert few.best.worst == pytest.approx(1.2)
    assert few.choice is not None
    assert few.choice.worst == 0.8
    assert few.choice.mean == pytest.approx(0.8**0.5)
    assert list(few.rivals) == [CUBLAS, "humming", "quack_bf16"]
    assert (few.rivals["quack_bf16"].cells, few.rivals["quack_bf16"].lost) == (1, 1)
    assert every.rivals["turbomind"].worst == 0.8


def test_a_cell_in_which_no_call_was_timed_is_no_cell_of_a_band() -> None:
    uncalled = replace(cell(2, 10.0, **{CUBLAS: 20.0}), chosen=None)
    assert bands_of([uncalled]) == []
    assert [band.cells for band in bands_of([*CELLS, uncalled])] == [2, 1, 3]


def test_bands_are_described_in_json() -> None:
    check([band.as_json() for band in bands_of(CELLS)], RANDOM["bands"], "bands")


def test_without_rivals_only_the_choice_is_judged() -> None:
    (band,) = bands_of([cell(300, 10.0, best=9.0)])
    assert (band.call, band.best, band.rivals) == (None, None, {})
    assert band.choice is not None
    assert band.as_json()["call_beside_fastest_fp16_rival"] is None
    assert bands_of([]) == []
