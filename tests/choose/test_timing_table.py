"""Tuning tables: what is kept, merged and refused."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fakes.devices import H100, H800

from w4a16gen import KernelConfig, Problem, QuantMode
from w4a16gen.choose.timing_table import TABLE, Measured, TuningTable, add_times, one_time
from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.spaces import enumerate_space

MODE = QuantMode.FINEGRAINED_SCALE_ONLY
KERNELS = [config for config in enumerate_space("trtllm") if config.mode is MODE]
PROBLEM = Problem(16, 512, 1024, 128)


def table_of(**microseconds: float) -> TuningTable:
    """Give a table of one problem; arguments are `k0`, `k1`, ... for the kernels."""
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
    """Give a row of a table's file, with changes."""
    fine = {"m": 16, "n": 512, "k": 1024, "group_size": 128, "kernel": KERNELS[0].name}
    return {**fine, "microseconds": 1.0, "content_hash": "hash", **changes}


def file_of(*rows: object, **changes: object) -> str:
    """Give a table's file, with changes."""
    return json.dumps({"schema": 1, "gpu": "a GPU", "sm_count": 132, "times": rows, **changes})


DAMAGED = {
    "empty": "",
    "truncated": file_of(row())[:-20],
    "a list": "[]",
    "schema": file_of(row(), schema=2),
    "no GPU": json.dumps({"schema": 1, "times": []}),
    "SMs": file_of(row(), sm_count="132"),
    "no rows": file_of(times=None),
    "versions": file_of(versions=[1]),
    "launches": file_of(dependent="yes"),
    "a row": file_of("row"),
    "unknown kernel": file_of(row(kernel="w4a16_sm90_native_fgs_cta64")),
    "no time": file_of(row(microseconds=None)),
    "negative time": file_of(row(microseconds=-1.0)),
    "no number": file_of(row(microseconds=float("nan"))),
    "no tokens": file_of(row(m=0)),
    "truth": file_of(row(k=True)),
    "no hash": file_of({name: value for name, value in row().items() if name != "content_hash"}),
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED.keys())
def test_what_is_no_table_is_refused_and_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / TABLE
    path.write_text(text)
    for use in (lambda: TuningTable.read(path), lambda: add_times(path, table_of(k0=1.0))):
        with pytest.raises(InvalidValueError, match=r"tuning\.json is no tuning table .*: remove it, or name another"):
            use()
    assert path.read_text() == text


def test_two_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / TABLE
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(add_times, path, table_of(**{f"k{i}": 1.0 + i})) for i in range(20)]:
            done.result()
    assert TuningTable.read(path) == table_of(**{f"k{i}": 1.0 + i for i in range(20)})


def test_the_fastest_built_kernel_counts_for_as_many_tokens_or_the_next_more() -> None:
    def measured(**microseconds: float) -> dict[KernelConfig, Measured]:
        return dict(table_of(**microseconds).times[MODE, PROBLEM])

    at = {m: Problem(m, 512, 1024, 128) for m in (8, 16, 24, 31, 32, 33, 64)}
    table = TuningTable(
        "a GPU", 132, {(MODE, at[16]): measured(k0=2.0, k1=1.0), (MODE, at[64]): measured(k2=5.0, k3=5.0)}
    )
    hashes = dict.fromkeys(KERNELS, "hash")
    assert table.best(MODE, at[16], hashes) == (KERNELS[1], 1.0)
    assert table.best(MODE, Problem(9, 512, 1024, 128), hashes) == (KERNELS[1], 1.0)
    assert table.best(MODE, at[8], hashes) is None, "twice the tokens is too far"
    assert table.best(MODE, at[33], hashes) == (min(KERNELS[2:4]), 5.0)
    assert table.best(MODE, at[32], hashes) is None
    assert table.best(MODE, Problem(65, 512, 1024, 128), hashes) is None, "fewer tokens say nothing"
    assert table.best(QuantMode.FINEGRAINED_SCALE_AND_ZEROS, at[16], hashes) is None
    assert table.best(MODE, Problem(16, 512, 1024, 64), hashes) is None
    assert table.best(MODE, at[16], {**hashes, KERNELS[1]: "built anew"}) == (KERNELS[0], 2.0)
    assert table.best(MODE, at[16], {KERNELS[0]: "hash"}) == (KERNELS[0], 2.0), "only built kernels"
    assert table.best(MODE, at[16], {}) is None
