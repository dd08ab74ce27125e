"""Merging times into the packaged table: the stated rule, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import merge_times
import pytest
import recorded
from fakes.devices import H100, H200, H800

from w4a16gen import KernelConfig, Problem, QuantMode
from w4a16gen.choose.packaged_times import MEASURED_MODE, TIMES_PATH, read_times, times_as_text
from w4a16gen.choose.timing_table import Measured, TuningTable, add_times, one_time
from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.device import Device
from w4a16gen.kernels.spaces import enumerate_space

A, B, C = [config for config in enumerate_space("default") if config.mode is MEASURED_MODE][:3]
OTHER_MODE = next(config for config in enumerate_space("default") if config.mode is not MEASURED_MODE)
CUTLASS = next(config for config in enumerate_space("trtllm") if config.mode is MEASURED_MODE)
PROBLEM, NEW = Problem(1, 512, 1024, 128), Problem(2, 512, 1024, 128)


def tuning_table(
    path: Path,
    times: Mapping[KernelConfig, float],
    device: Device = H100,
    problem: Problem = PROBLEM,
    *,
    dependent: bool = False,
) -> Path:
    """Write a tuning table and return its path."""
    for config, microseconds in times.items():
        add_times(path, one_time(device, problem, config, Measured(microseconds, "hash"), dependent=dependent))
    return path


@pytest.fixture
def packaged(tmp_path: Path) -> Path:
    """Return a packaged table of two kernels in one problem."""
    times = {(MEASURED_MODE, PROBLEM): {A: Measured(1.0, ""), B: Measured(2.0, "")}}
    path = tmp_path / "packaged.json"
    path.write_text(times_as_text(TuningTable(H100.name, 132, times), "Two times."))
    return path


def merged(packaged: Path, *runs: Path, replace: bool = False) -> dict[Problem, dict[KernelConfig, float]]:
    """Merge files into a packaged table and return its times."""
    options = ["--table", str(packaged), *(["--replace"] if replace else [])]
    merge_times.main([*options, *map(str, runs)])
    table = read_times(packaged)
    return {
        problem: {config: time.microseconds for config, time in times.items()}
        for (_, problem), times in table.times.items()
    }


def test_times_are_geometric_means_over_runs(packaged: Path, tmp_path: Path) -> None:
    run = tuning_table(tmp_path / "run.json", {A: 4.0, B: 2.0})
    assert merged(packaged, run) == {PROBLEM: {A: 2.0, B: 2.0}}
    assert json.loads(packaged.read_text())["source"] == "Two times. Merged with run.json."


def test_a_run_with_some_of_the_kernels_is_scaled_to_the_others(packaged: Path, tmp_path: Path) -> None:
    run = tuning_table(tmp_path / "run.json", {A: 4.0, C: 12.0})
    times = merged(packaged, run)[PROBLEM]
    assert times[C] / times[A] == pytest.approx(3.0, rel=0.01), "as in the run that holds both"
    assert times[B] / times[A] == pytest.approx(2.0, rel=0.01)
    assert times[A] == 2.0


def test_packaged_times_can_be_replaced(packaged: Path, tmp_path: Path) -> None:
    run = tuning_table(tmp_path / "run.json", {A: 4.0})
    assert merged(packaged, run, replace=True) == {PROBLEM: {A: 4.0}}
    assert json.loads(packaged.read_text())["source"] == "Two times. Replaced by run.json."


def test_new_problems_are_added_and_others_stay(packaged: Path, tmp_path: Path) -> None:
    run = tuning_table(tmp_path / "run.json", {C: 4.0}, H800, NEW)
    assert merged(packaged, run) == {PROBLEM: {A: 1.0, B: 2.0}, NEW: {C: 4.0}}


def test_only_native_times_of_the_tables_mode_and_group_size_count(packaged: Path, tmp_path: Path) -> None:
    run = tuning_table(tmp_path / "run.json", {OTHER_MODE: 1.0, CUTLASS: 1.0})
    tuning_table(run, {A: 1.0}, problem=Problem(1, 512, 1024, 64))
    before = read_times(packaged)
    merged(packaged, run)
    assert read_times(packaged) == before


def test_recordings_are_runs_too(packaged: Path, tmp_path: Path) -> None:
    row = recorded.Recorded(A, PROBLEM, MEASURED_MODE, 4.0, H100.name, 132, "2026-11-28", "a test")
    lines = [recorded.COLUMNS, row.as_row(), (recorded.CUBLAS, *row.as_row()[1:])]
    path = tmp_path / "times.csv"
    path.write_text("".join(",".join(map(str, line)) + "\n" for line in lines))
    assert merged(packaged, path, replace=True) == {PROBLEM: {A: 4.0}}


def test_the_order_of_runs_does_not_matter() -> None:
    runs = [{A: 1.0, B: 2.5}, {A: 1.1, C: 3.0}, {B: 2.0, C: 2.2}]
    assert merge_times.merged_times(runs) == merge_times.merged_times(runs[::-1])


@pytest.mark.parametrize(
    ("device", "dependent", "message"),
    [(H200, False, "holds times of NVIDIA H200"), (H100, True, "holds times of dependent launches")],
)
def test_other_times_are_refused(packaged: Path, tmp_path: Path, device: Device, dependent: bool, message: str) -> None:
    before = packaged.read_text()
    run = tuning_table(tmp_path / "run.json", {A: 4.0}, device, dependent=dependent)
    with pytest.raises(InvalidValueError, match=message):
        merge_times.main(["--table", str(packaged), str(run)])
    assert packaged.read_text() == before


def test_merging_nothing_leaves_the_packaged_table() -> None:
    table = read_times(TIMES_PATH)
    assert merge_times.merge(table, []) == table
    assert all(mode is QuantMode.FINEGRAINED_SCALE_ONLY for mode, _ in table.times)
