"""Tuning tables: what is kept, merged, refused and ignored, and what `tune` and calls make of them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from w4a16gen import KernelConfig, Library, Problem, QuantMode
from w4a16gen.choose.chooser import choose
from w4a16gen.choose.timing_table import TABLE, Measured, TuningTable, add_times, content_hashes, one_time
from w4a16gen.cli import main, timing, tuning
from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.spaces import enumerate_space
from w4a16gen.measure import compare as sweep
from w4a16gen.runtime.artifact import Build
from w4a16gen.weights.packed import TARGET_LAYOUTS, PackedWeight

GPU = {"index": 0, "name": "NVIDIA H100 80GB HBM3", "sm_count": 132, "compute_capability": (9, 0)}
MODE = QuantMode.FINEGRAINED_SCALE_ONLY
KERNELS = [config for config in enumerate_space("trtllm") if config.mode is MODE]
PROBLEM = Problem(16, 512, 1024, 128)


def table_of(**microseconds: float) -> TuningTable:
    """Give a table of one problem; arguments are `k0`, `k1`, ... for the kernels."""
    times = {KERNELS[int(name[1:])]: Measured(us, "hash") for name, us in microseconds.items()}
    return TuningTable(str(GPU["name"]), 132, {(MODE, PROBLEM): times})


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
        add_times(path, one_time(GPU, PROBLEM, KERNELS[0], Measured(1.0, "hash"), versions))
    assert TuningTable.read(path).versions == {"w4a16gen": "2", "driver": "CUDA 13.0"}


def test_times_of_another_gpu_are_not_mixed_in(tmp_path: Path) -> None:
    path = tmp_path / TABLE
    add_times(path, table_of(k0=1.0))
    before = path.read_text()
    other = one_time({"name": "NVIDIA H800", "sm_count": 132}, PROBLEM, KERNELS[0], Measured(1.0, "hash"))
    with pytest.raises(
        InvalidValueError, match="times of NVIDIA H800 with 132 SMs do not go into a table of NVIDIA H100"
    ):
        add_times(path, other)
    assert path.read_text() == before


@pytest.mark.parametrize("dependent", [False, True])
def test_times_of_dependent_launches_stay_among_themselves(tmp_path: Path, dependent: bool) -> None:
    path = tmp_path / TABLE
    add_times(path, one_time(GPU, PROBLEM, KERNELS[0], Measured(1.0, "hash"), dependent=dependent))
    add_times(path, one_time(GPU, PROBLEM, KERNELS[1], Measured(2.0, "hash"), dependent=dependent))
    before = path.read_text()
    table = TuningTable.read(path)
    assert table.dependent is dependent
    assert len(table.times[MODE, PROBLEM]) == 2
    kinds = ["ordinary", "dependent"]
    message = f"times of {kinds[not dependent]} launches do not go into a table of {kinds[dependent]} launches"
    with pytest.raises(InvalidValueError, match=message):
        add_times(path, one_time(GPU, PROBLEM, KERNELS[0], Measured(1.0, "hash"), dependent=not dependent))
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


@pytest.fixture
def build_of_its_own(fake_build: Build, tmp_path: Path) -> Build:
    """Give the fake build under another folder, which may hold a table."""
    folder = tmp_path / "build"
    folder.mkdir()
    (folder / "lib").symlink_to(fake_build.library.parent)
    return Build(folder, fake_build.manifest)


@pytest.fixture
def own_library(build_of_its_own: Build, monkeypatch: pytest.MonkeyPatch) -> Library:
    """Give its library, as on a machine with an H100."""
    library = Library(build_of_its_own)
    monkeypatch.setattr(library, "devices", lambda: [GPU])
    return library


def test_calls_choose_by_the_table_of_the_build(own_library: Library) -> None:
    weight = PackedWeight(None, TARGET_LAYOUTS[KERNELS[0].target], 512, 1024, 128, MODE)
    estimated = choose(own_library.configs(), MODE, PROBLEM)
    slow = next(config for config in KERNELS if config != estimated)
    hashes = content_hashes(own_library.build.manifest, KERNELS)
    for config, us in ((estimated, 9.0), (slow, 8.0)):
        add_times(own_library.build.folder / TABLE, one_time(GPU, PROBLEM, config, Measured(us, hashes[config])))
    assert own_library.choice(MODE, PROBLEM)[:2] == (slow, 8.0)
    assert own_library.kernel_for(weight, PROBLEM) == slow
    assert own_library.kernel_for(weight, PROBLEM, estimated) == estimated
    other = Problem(16, 512, 2048, 128)
    assert own_library.choice(MODE, other).source.startswith("a rule of thumb")
    elsewhere = PackedWeight(None, weight.layout, 512, 2048, 128, MODE)
    assert own_library.kernel_for(elsewhere, other) == choose(own_library.configs(), MODE, other)


@pytest.mark.parametrize(
    ("text", "warning"),
    [("{", "is no tuning table"), (file_of(row()), "is of a GPU with 132 SMs, not of NVIDIA H100 80GB HBM3 with 132")],
)
def test_a_damaged_or_foreign_table_is_told_of_once_and_ignored(own_library: Library, text: str, warning: str) -> None:
    (own_library.build.folder / TABLE).write_text(text)
    weight = PackedWeight(None, TARGET_LAYOUTS[KERNELS[0].target], 512, 1024, 128, MODE)
    with pytest.warns(RuntimeWarning, match=warning):
        assert own_library.kernel_for(weight, PROBLEM) == choose(own_library.configs(), MODE, PROBLEM)
    assert own_library.choice(MODE, PROBLEM).microseconds is None


class Stopwatch:
    """Stands in for measuring: a kernel takes as many microseconds as its number, and one may be interrupted."""

    def __init__(self) -> None:
        self.measured: list[KernelConfig] = []
        self.devices: set[int] = set()
        self.dependent: set[bool] = set()
        self.interrupt_after: int | None = None

    def measure(
        self,
        _library: Library,
        problem: Problem,
        _mode: QuantMode,
        configs: Sequence[KernelConfig],
        *,
        device: int,
        dependent: bool,
    ) -> Iterator[tuple[KernelConfig, float]]:
        self.dependent.add(dependent)
        for config in configs:
            if len(self.measured) == self.interrupt_after:
                raise KeyboardInterrupt
            self.measured.append(config)
            self.devices.add(device)
            yield config, 1.0 + KERNELS.index(config) + problem.m


@pytest.fixture
def stopwatch(own_library: Library, monkeypatch: pytest.MonkeyPatch) -> Stopwatch:
    """Make `tune` run on the library and measure with a stand-in."""
    watch = Stopwatch()
    for module in (timing, tuning):
        monkeypatch.setattr(module, "load", lambda _folder: own_library)
    monkeypatch.setattr(tuning, "hopper_gpu", lambda _library: GPU)
    monkeypatch.setattr(sweep, "measure", watch.measure)
    return watch


TUNE = ["tune", "--problem", "64x512x1024"]


def test_tuning_goes_on_where_it_was_interrupted(cli: CliRunner, own_library: Library, stopwatch: Stopwatch) -> None:
    stopwatch.interrupt_after = 3
    assert cli.invoke(main, TUNE).exit_code == 130
    path = own_library.build.folder / TABLE
    problem = Problem(64, 512, 1024, 128)
    assert len(TuningTable.read(path).times[MODE, problem]) == 3
    stopwatch.interrupt_after = None
    done = cli.invoke(main, TUNE)
    assert done.exit_code == 0, done.output
    assert set(TuningTable.read(path).versions) == {"w4a16gen", "compiler", "driver"}
    assert len(stopwatch.measured) == len(set(stopwatch.measured)), "nothing is measured twice"
    assert stopwatch.dependent == {False}
    assert f"{len(stopwatch.measured) - 3} measured, 3 known" in " ".join(done.stderr.split())
    fastest = min(stopwatch.measured, key=KERNELS.index)
    assert own_library.choice(MODE, problem)[:2] == (fastest, 65.0 + KERNELS.index(fastest))


def test_the_last_of_several_looks_at_a_kernel_counts(
    cli: CliRunner, own_library: Library, stopwatch: Stopwatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopwatch.interrupt_after = 3
    cli.invoke(main, TUNE)
    stopwatch.interrupt_after = None
    steps: list[tuple[int, int]] = []

    @contextmanager
    def show_progress(_title: str) -> Iterator[Callable[[int, int, str], None]]:
        yield lambda done, total, _name: steps.append((done, total))

    def measure(*which: Any, device: int, dependent: bool) -> Iterator[tuple[KernelConfig, float]]:
        yield from stopwatch.measure(*which, device=device, dependent=dependent)
        yield which[-1][-1], 0.5

    monkeypatch.setattr(sweep, "measure", measure)
    monkeypatch.setattr(tuning, "show_progress", show_progress)
    assert cli.invoke(main, TUNE).exit_code == 0
    problem = Problem(64, 512, 1024, 128)
    assert own_library.choice(MODE, problem)[:2] == (stopwatch.measured[-1], 0.5)
    count = len(stopwatch.measured) - 3
    assert steps == [*((done, count) for done in range(1, count + 1)), (count, count)]


def test_tuning_measures_again_what_is_asked_for_or_built_anew(
    cli: CliRunner, own_library: Library, stopwatch: Stopwatch, tmp_path: Path
) -> None:
    table = ["--table", str(tmp_path / "table.json"), "--json"]
    first = json.loads(cli.invoke(main, [*TUNE, *table]).stdout)
    count = first["problems"][0]["measured"]
    assert count == len(stopwatch.measured) > 3
    assert not (own_library.build.folder / TABLE).exists()
    second = json.loads(cli.invoke(main, [*TUNE, *table]).stdout)
    assert (second["problems"][0]["measured"], second["problems"][0]["known"]) == (0, count)
    assert second["problems"][0]["fastest"] == first["problems"][0]["fastest"]
    again = json.loads(cli.invoke(main, [*TUNE, *table, "--again"]).stdout)
    assert again["problems"][0]["measured"] == count
    changed = stopwatch.measured[0].name
    for kernel in own_library.build.manifest["kernels"]:
        if kernel["name"] == changed:
            old, kernel["content_hash"] = kernel["content_hash"], "built anew"
            try:
                anew = json.loads(cli.invoke(main, [*TUNE, *table]).stdout)
            finally:
                kernel["content_hash"] = old
    assert anew["problems"][0]["measured"] == 1


def test_tuning_refuses_another_gpus_table_and_nothing_to_do(
    cli: CliRunner, stopwatch: Stopwatch, tmp_path: Path
) -> None:
    path = tmp_path / "table.json"
    path.write_text(file_of(row()))
    refused = cli.invoke(main, [*TUNE, "--table", str(path)])
    assert refused.exit_code == 2
    assert "do not go into a table of a GPU with 132" in " ".join(refused.stderr.split())
    assert path.read_text() == file_of(row())
    assert "name what to time" in cli.invoke(main, ["tune"]).stderr
    assert stopwatch.measured == []


def test_tuning_for_chains_measures_dependent_launches_and_calls_choose_by_them(
    cli: CliRunner, own_library: Library, stopwatch: Stopwatch
) -> None:
    assert cli.invoke(main, [*TUNE, "--dependent"]).exit_code == 0
    assert stopwatch.dependent == {True}
    assert TuningTable.read(own_library.build.folder / TABLE).dependent
    explained = json.loads(cli.invoke(main, ["explain", "50", "512", "1024", "--json"]).stdout)
    assert explained["chosen"] == min(stopwatch.measured, key=KERNELS.index).name
    assert explained["source"] == "the build's tuning table, which is of dependent launches"
    count = len(stopwatch.measured)
    refused = cli.invoke(main, TUNE)
    assert refused.exit_code == 2
    assert "do not go into a table of dependent launches" in " ".join(refused.stderr.split())
    assert len(stopwatch.measured) == count


def test_explain_shows_what_was_measured(cli: CliRunner, own_library: Library, stopwatch: Stopwatch) -> None:
    assert cli.invoke(main, TUNE).exit_code == 0
    fastest = min(stopwatch.measured, key=KERNELS.index)
    shown = cli.invoke(main, ["explain", "50", "512", "1024", "--json"])
    explained = json.loads(shown.stdout)
    assert (explained["chosen"], explained["source"]) == (fastest.name, "the build's tuning table")
    assert own_library.choice(MODE, Problem(50, 512, 1024, 128)).kernel == fastest


def test_tuning_takes_as_many_gpus_of_one_kind_as_it_is_given(
    cli: CliRunner, own_library: Library, stopwatch: Stopwatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = [GPU, {**GPU, "index": 1}, {**GPU, "index": 2, "name": "NVIDIA H200"}]
    monkeypatch.setattr(own_library, "devices", lambda: two)
    problems = [argument for m in range(2, 10) for argument in ("--problem", f"{8 * m}x512x1024")]
    refused = cli.invoke(main, ["tune", *problems, "--gpus", "3"])
    assert refused.exit_code == 2
    assert "--gpus 3 is more than the 2 NVIDIA H100 80GB HBM3" in refused.stderr
    done = cli.invoke(main, ["tune", *problems, "--gpus", "2", "--json"])
    assert done.exit_code == 0, done.output
    assert len(json.loads(done.stdout)["problems"]) == 8
    assert stopwatch.devices <= {0, 1}
    table = TuningTable.read(own_library.build.folder / TABLE)
    assert len(table.times) == 8
    assert sum(map(len, table.times.values())) == len(stopwatch.measured)


def test_tuning_on_several_gpus_stops_where_it_is_interrupted(
    cli: CliRunner, own_library: Library, stopwatch: Stopwatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_library, "devices", lambda: [GPU, {**GPU, "index": 1}])
    other_began, interrupted = threading.Event(), threading.Event()

    def measure(
        _library: Library,
        problem: Problem,
        _mode: QuantMode,
        configs: Sequence[KernelConfig],
        *,
        device: int,
        **_: bool,
    ) -> Iterator[tuple[KernelConfig, float]]:
        for config in configs:
            stopwatch.measured.append(config)
            yield config, 1.0 + problem.m + device
            if problem.m == 64:
                other_began.wait(5)
                interrupted.set()
                raise KeyboardInterrupt
            other_began.set()
            interrupted.wait(5)
            time.sleep(0.2)  # until the others have been told

    monkeypatch.setattr(sweep, "measure", measure)
    problems = [argument for m in (64, 128, 256, 512) for argument in ("--problem", f"{m}x512x1024")]
    assert cli.invoke(main, ["tune", *problems, "--gpus", "2"]).exit_code == 130
    table = TuningTable.read(own_library.build.folder / TABLE)
    counts = {problem.m: len(times) for (_, problem), times in table.times.items()}
    assert counts.keys() == {64, 128}, "no other problem is begun"
    assert counts[64] == 1
    assert counts[128] in {1, 2}, "the other GPU ends with the kernel that it is at"
