"""The record of random cells: it comes back, goes on after every kind of end, and refuses what is not its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from w4a16gen import Problem, QuantMode
from w4a16gen.errors import InvalidValueError
from w4a16gen.measure.cell_record import CELLS, Cell, CellRecord
from w4a16gen.measure.results import Comparison, Timing

HEAD = {"seed": 1, "rivals": ["humming"]}
PROBLEMS = [Problem(m, 64, 128, 128) for m in (1, 2, 3)]


def cell(problem: Problem) -> Cell:
    timings = [Timing("a", (1.0, 2.5), (0.5,)), Timing("humming", (3.0,))]
    mode = QuantMode.FINEGRAINED_SCALE_ONLY
    found = Comparison(problem, mode, {"a": 1.0}, 4, timings, {"a": 0.25}, "a", {"quack_bf16": "broken"})
    return Cell("qkv", found, 1.5)


def test_cells_come_back_as_they_were_written(tmp_path: Path) -> None:
    record = CellRecord(tmp_path / "out", HEAD)
    for problem in PROBLEMS[:2]:
        record.add(cell(problem))
    again = CellRecord(tmp_path / "out", HEAD)
    assert again.cells == {problem: cell(problem) for problem in PROBLEMS[:2]}
    again.add(cell(PROBLEMS[2]))
    assert list(CellRecord(tmp_path / "out", HEAD).cells) == PROBLEMS


def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    CellRecord(tmp_path, HEAD).add(cell(PROBLEMS[0]))
    path = tmp_path / CELLS
    with path.open("a") as file:
        file.write(json.dumps(cell(PROBLEMS[1]).as_json())[:40])
    assert list(CellRecord(tmp_path, HEAD).cells) == PROBLEMS[:1]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_rival_that_twice_ends_the_process_is_left_out_of_that_cell(tmp_path: Path) -> None:
    first, second, _ = PROBLEMS
    for crashes in range(2):
        record = CellRecord(tmp_path, HEAD)
        assert record.excluded(first) == {}, crashes
        record.begin(first, "humming")
        record.begin(first, "turbomind")  # humming did not end it
    record = CellRecord(tmp_path, HEAD)
    assert record.excluded(first) == {"turbomind": "it ended the process 2 times"}
    assert record.excluded(second) == {}


def test_an_interruption_or_a_finished_cell_blames_nobody(tmp_path: Path) -> None:
    for _ in range(3):
        record = CellRecord(tmp_path, HEAD)
        record.begin(PROBLEMS[0], "humming")
        record.interrupted()
    for _ in range(3):
        record = CellRecord(tmp_path, HEAD)
        record.begin(PROBLEMS[0], "humming")
        record.add(cell(PROBLEMS[0]))
    assert CellRecord(tmp_path, HEAD).excluded(PROBLEMS[0]) == {}


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        (b'"isolated": [1.0, 2.5]', b'"isolated": []'),
        (b'"isolated": [1.0, 2.5]', b'"isolated": [1.0, -2.5]'),
        (b'"isolated": [1.0, 2.5]', b'"isolated": [1.0, NaN]'),
        (b'"isolated": [1.0, 2.5]', b'"isolated": ["fast"]'),
        (b'"dependent": [0.5]', b'"dependent": [0]'),
        (b'"error_over_bound": {"a": 0.25}', b'"error_over_bound": {"a": []}'),
        (b'"layer"', b'"lay\xff"'),
    ],
)
def test_a_cell_that_was_damaged_is_refused(tmp_path: Path, right: bytes, wrong: bytes) -> None:
    CellRecord(tmp_path, HEAD).add(cell(PROBLEMS[0]))
    path = tmp_path / CELLS
    whole = path.read_bytes()
    assert right in whole
    path.write_bytes(whole.replace(right, wrong))
    with pytest.raises(InvalidValueError, match=r"cells\.jsonl is no record of"):
        CellRecord(tmp_path, HEAD)


def test_cells_of_other_settings_are_refused_and_kept(tmp_path: Path) -> None:
    CellRecord(tmp_path, HEAD).add(cell(PROBLEMS[0]))
    before = (tmp_path / CELLS).read_text()
    with pytest.raises(InvalidValueError, match=r"seed of 1, now 2.*name another folder"):
        CellRecord(tmp_path, HEAD | {"seed": 2})
    assert (tmp_path / CELLS).read_text() == before


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": "other"}', '{"schema": "w4a16gen.random-cells/1"}\n1\n2'])
def test_what_is_no_record_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / CELLS).write_text(text)
    with pytest.raises(InvalidValueError, match=r"cells\.jsonl is no record of"):
        CellRecord(tmp_path, {})
