"""Tuning tables: what is kept, merged and refused."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from fakes.devices import H100, H800
from fakes.library import chooser_of

from w4a16gen import KernelConfig, Problem, QuantMode
from w4a16gen.choose.timing_table import SCHEMA, TABLE, Measured, TuningTable, add_times, one_time, table_for
from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.spaces import enumerate_space

MODE = QuantMode.FINEGRAINED_SCALE_ONLY
KERNELS = [config for config in enumerate_space("trtllm") if config.mode is MODE]
PROBLEM = Problem(16, 512, 1024, 128)


def table_of(**microseconds: float) -> TuningTable:
    """Return a table of one problem; arguments are `k0`, `k1`, ... for the kernels."""
    times = {KERNELS[int(name[1:])]: Measured(us, "hash") for name, us in microseconds.items()}
    return TuningTable(H100.name, 132, {(MODE, PROBLEM): times})


def test_a_table_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "folder" / TABLE
    add_times(path, table_of(k3=4.25, k1=7.5))
    assert TuningTable.read(path) == table_of(k1=7.5, k3=4.25)
    text = path.read_text()
    add_times(path, table_of(k1=7.5))
    assert path.read_text() == text, "the same times leave the same bytes, in whatever order"


def test_newer_times_replace_older_ones_and_leave_the_rest(tmp_path: Path) -> None:
    path = tmp_path / TABLE
    add_times(path, table_of(k0=1.0, k1=2.0))
    add_times(path, table_of(k1=3.0, k2=4.0))
    assert TuningTable.read(path) == table_of(k0=1.0, k1=3.0, k2=4.0)


def test_a_table_says_what_its_last_times_were_measured_with(tmp_path: Path) -> None:
    path = tmp_path / TABLE
    for versions in ({"w4a16gen": "1", "driver": "CUDA 13.0"}, {"w4a16gen": "2"}):
        add_times(path, one_time(H100, PROBLEM, KERNELS[0], Measured(1.0, "hash"), versions))
    assert TuningTable.read(path).versions == {"w4a16gen": "2", "driver": "CUDA 13.0"}


def test_times_of_another_gpu_are_not_mixed_in(tmp_path: Path) -> None:
    path = tmp_path / TABLE
    add_times(path, table_of(k0=1.0))
    before = path.read_text()
    other = one_time(H800, PROBLEM, KERNELS[0], Measured(1.0, "hash"))
    with pytest.raises(
        InvalidValueError, match="times of NVIDIA H800 with 132 SMs do not go into a table of NVIDIA H100"
    ):
        add_times(path, other)
    assert path.read_text() == before


@pytest.mark.parametrize("dependent", [False, True])
def test_times_of_dependent_launches_stay_among_themselves(tmp_path: Path, dependent: bool) -> None:
    path = tmp_path / TABLE
    add_times(path, one_time(H100, PROBLEM, KERNELS[0], Measured(1.0, "hash"), dependent=dependent))
    add_times(path, one_time(H100, PROBLEM, KERNELS[1], Measured(2.0, "hash"), dependent=dependent))
    before = path.read_text()
    table = TuningTable.read(path)
    assert table.dependent is dependent
    assert len(table.times[MODE, PROBLEM]) == 2
    kinds = ["ordinary", "dependent"]
    message = f"times of {kinds[not dependent]} launches do not go into a table of {kinds[dependent]} launches"
    with pytest.raises(InvalidValueError, match=message):
        add_times(path, one_time(H100, PROBLEM, KERNELS[0], Measured(1.0, "hash"), dependent=not dependent))
    assert path.read_text() == before


def row(**changes: object) -> dict[str, object]:
    """Return a row of a table's file, with changes."""
    fine = {"m": 16, "n": 512, "k": 1024, "group_size": 128, "kernel": KERNELS[0].name}
    return {**fine, "microseconds": 1.0, "content_hash": "hash", **changes}


def file_of(*rows: object, **changes: object) -> str:
    """Return a table's file, with changes."""
    return json.dumps({"schema": SCHEMA, "gpu": "a GPU", "sm_count": 132, "times": rows, **changes})


WRONG_VALUES: tuple[object, ...] = (None, "", "132", [], {}, -1, 0, 1.5, True, float("nan"), float("inf"), 10**400)
"""Values that some field does not take."""


def damaged_files() -> dict[str, bytes]:
    """Return files that are no tables, by what was done to them."""
    whole = file_of(row(), row(m=32, kernel=KERNELS[1].name)).encode()
    files = {f"cut at {place}": whole[:place] for place in range(0, len(whole) - 1, len(whole) // 25)}
    files |= {
        "no JSON": b"{",
        "a list": b"[]",
        "a number": b"1",
        "not UTF-8": b"\xff\xfe" + whole,
        "zeros": bytes(len(whole)),
        "deep": b"[" * 200_000,
        "schema of before": file_of(row(), schema=1).encode(),
        "rows by name": file_of(times={"m": 1}).encode(),
        "a row of text": file_of("row").encode(),
        "unknown kernel": file_of(row(kernel="w4a16_sm90_native_fgs_cta64")).encode(),
        "versions": file_of(versions=[1]).encode(),
    }
    for name in ("schema", "gpu", "sm_count", "times"):
        value = json.loads(file_of(row()))
        del value[name]
        files[f"without {name}"] = json.dumps(value).encode()
    for name in row():
        files[f"row without {name}"] = file_of({key: value for key, value in row().items() if key != name}).encode()
    for name, wrong in (("m", WRONG_VALUES[:-1]), ("sm_count", WRONG_VALUES[:-1]), ("kernel", WRONG_VALUES)):
        for value in wrong:
            damaged = file_of(row(), sm_count=value) if name == "sm_count" else file_of(row(**{name: value}))
            files[f"{name} of {value!r:.9}"] = damaged.encode()
    for value in (None, "", [], {}, -1, 0, float("nan"), float("inf"), 10**400):
        files[f"time of {value!r:.9}"] = file_of(row(microseconds=value)).encode()
    return files


DAMAGED = damaged_files()


def test_there_are_more_than_80_kinds_of_damage() -> None:
    assert len(DAMAGED) >= 83


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_table_is_refused_and_left_alone(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / TABLE
    path.write_bytes(data)
    for use in (lambda: TuningTable.read(path), lambda: add_times(path, table_of(k0=1.0))):
        with pytest.raises(
            InvalidValueError, match=r"tuning\.json is not a tuning table .*: remove it, or name another"
        ):
            use()
    assert path.read_bytes() == data


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED.keys())
def test_calls_ignore_a_damaged_table_with_one_warning(tmp_path: Path, data: bytes) -> None:
    (tmp_path / TABLE).write_bytes(data)
    chooser = chooser_of(KERNELS, tmp_path)
    with pytest.warns(RuntimeWarning, match="is not a tuning table") as warned:
        choices = {chooser.choose(PROBLEM, MODE, device=H100) for _ in range(2)}
    assert len(warned) == 1
    assert choices == {chooser_of(KERNELS).choose(PROBLEM, MODE, device=H100)}


def test_a_table_that_cannot_be_read_is_ignored_with_one_warning(tmp_path: Path) -> None:
    (tmp_path / TABLE).mkdir()
    with pytest.warns(RuntimeWarning, match="cannot be read") as warned:
        assert table_for(tmp_path / TABLE, H100) is None
    assert len(warned) == 1
    assert table_for(tmp_path / "nothing", H100) is None


def test_a_table_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / TABLE)
    with pytest.warns(RuntimeWarning, match=r"cannot be read \(Not a regular file\)"):
        assert table_for(tmp_path / TABLE, H100) is None


def test_16_writers_at_once_keep_all_times(tmp_path: Path) -> None:
    path = tmp_path / TABLE
    with ThreadPoolExecutor(16) as pool:
        for done in [pool.submit(add_times, path, table_of(**{f"k{i}": 1.0 + i})) for i in range(20)]:
            done.result()
    assert TuningTable.read(path) == table_of(**{f"k{i}": 1.0 + i for i in range(20)})


def measured(**microseconds: float) -> dict[KernelConfig, Measured]:
    return dict(table_of(**microseconds).times[MODE, PROBLEM])


AT = {m: Problem(m, 512, 1024, 128) for m in (0, 8, 9, 15, 16, 17, 24, 31, 32, 33, 64, 65)}
TWO_PROBLEMS = TuningTable(
    "a GPU", 132, {(MODE, AT[16]): measured(k0=2.0, k1=1.0), (MODE, AT[64]): measured(k2=5.0, k3=5.0)}
)
HASHES = dict.fromkeys(KERNELS, "hash")


def test_the_fastest_built_kernel_of_as_many_tiles_is_found() -> None:
    fastest = TWO_PROBLEMS.fastest
    for m in (9, 15, 16):
        assert fastest(MODE, AT[m], HASHES) == (KERNELS[1], 1.0)
    for m in (0, 8, 17, 33, 65):
        assert fastest(MODE, AT[m], HASHES) is None, "other tokens have other waves of tiles"
    assert fastest(MODE, AT[64], HASHES) == (min(KERNELS[2:4]), 5.0)
    assert fastest(QuantMode.FINEGRAINED_SCALE_AND_ZEROS, AT[16], HASHES) is None
    assert fastest(MODE, Problem(16, 512, 1024, 64), HASHES) is None
    assert fastest(MODE, AT[16], {**HASHES, KERNELS[1]: "built anew"}) == (KERNELS[0], 2.0)
    assert fastest(MODE, AT[16], {KERNELS[0]: "hash"}) == (KERNELS[0], 2.0), "only built kernels"
    assert fastest(MODE, AT[16], {}) is None


def test_of_as_many_tiles_the_nearest_tokens_count() -> None:
    table = TuningTable("a GPU", 132, {(MODE, AT[9]): measured(k0=1.0), (MODE, AT[15]): measured(k1=2.0)})
    problem = Problem(11, 512, 1024, 128)
    assert table.fastest(MODE, problem, HASHES) == (KERNELS[0], 1.0)
    assert table.fastest(MODE, replace(problem, m=12), HASHES) == (KERNELS[1], 2.0), "the larger of two as near"
    assert table.fastest(MODE, problem, {KERNELS[1]: "hash"}) == (KERNELS[1], 2.0), "the next without a valid time"


def test_the_next_more_tokens_are_fewer_than_twice_as_many() -> None:
    following = TWO_PROBLEMS.fastest_at_more_tokens
    assert following(MODE, AT[16], HASHES) == (KERNELS[1], 1.0)
    assert following(MODE, AT[9], HASHES) == (KERNELS[1], 1.0)
    assert following(MODE, AT[8], HASHES) is None, "twice the tokens is too far"
    assert following(MODE, AT[33], HASHES) == (min(KERNELS[2:4]), 5.0)
    assert following(MODE, AT[32], HASHES) is None
    assert following(MODE, AT[65], HASHES) is None, "fewer tokens say nothing"
