"""The command `tune`: what it measures, keeps and refuses, on one GPU and several."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from fakes.devices import H100, H200, numbered
from fakes.library import FakeLibrary
from fakes.runner import Runner

from w4a16gen import Epilogue, KernelConfig, Library, Problem, QuantMode
from w4a16gen.choose.chooser import ChoiceSource
from w4a16gen.choose.timing_table import SCHEMA, TABLE, TuningTable
from w4a16gen.cli import main
from w4a16gen.cli.services import Services
from w4a16gen.errors import NotBuiltError
from w4a16gen.kernels.epilogue import build_command
from w4a16gen.kernels.spaces import enumerate_space, with_epilogues
from w4a16gen.measure import tune

tuning = import_module("w4a16gen.cli.tuning")
MODE = QuantMode.FINEGRAINED_SCALE_ONLY
KERNELS = [config for config in enumerate_space("trtllm") if config.mode is MODE]
FOREIGN = json.dumps({"schema": SCHEMA, "gpu": "a GPU", "sm_count": 132, "times": []})


@pytest.fixture
def own_library(tmp_path: Path) -> FakeLibrary:
    """Return a library on a machine with an H100, whose folder may hold a table."""
    (tmp_path / "build").mkdir()
    return FakeLibrary(enumerate_space("trtllm"), folder=tmp_path / "build")


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
def stopwatch(cli: Runner, own_library: FakeLibrary, monkeypatch: pytest.MonkeyPatch) -> Stopwatch:
    """Make `tune` run on the library and measure with a stand-in."""
    watch = Stopwatch()
    cli.services = Services(load=lambda _folder: own_library)
    monkeypatch.setattr(tune, "measure", watch.measure)
    return watch


def chosen(library: Library, problem: Problem) -> tuple[KernelConfig, float | None]:
    """Return what a call gets by the table, and its time."""
    choice = library.choose(problem, MODE)
    assert choice.source is ChoiceSource.TUNING_TABLE
    return choice.kernel, choice.microseconds


TUNE = ["tune", "--problem", "64x512x1024"]


def test_tuning_goes_on_where_it_was_interrupted(
    cli: CliRunner, own_library: FakeLibrary, stopwatch: Stopwatch
) -> None:
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
    assert chosen(own_library, problem) == (fastest, 65.0 + KERNELS.index(fastest))


@pytest.mark.parametrize("asked", [[], ["gated"], ["elementwise", "none"]], ids=str)
def test_kernels_of_the_epilogues_that_are_asked_for_are_measured(
    asked: list[str], cli: CliRunner, own_library: FakeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_mode = [config for config in enumerate_space("default") if config.mode is MODE]
    kernels = with_epilogues(of_mode, list(Epilogue))
    library = FakeLibrary(kernels, folder=own_library.build.folder)

    def measure(_library: Library, problem: Problem, *arguments: Any, **_: Any) -> Iterator[tuple[KernelConfig, float]]:
        for config in arguments[1]:
            yield config, 1.0 + kernels.index(config) + problem.m

    monkeypatch.setattr(tune, "measure", measure)
    cli.services = Services(load=lambda _folder: library)  # type: ignore[attr-defined]
    problem, wanted = Problem(64, 512, 1024, 128), [Epilogue.parse(name) for name in asked or ["none"]]
    done = cli.invoke(main, [*TUNE, *(part for name in asked for part in ("--epilogue", name))])
    assert done.exit_code == 0, done.output
    measured = TuningTable.read(library.build.folder / TABLE).times[MODE, problem]
    assert {config.epilogue for config in measured} == set(wanted)
    fresh = FakeLibrary(kernels, folder=library.build.folder)
    for epilogue in Epilogue:
        choice = fresh.choose(problem, MODE, epilogue=epilogue)
        assert choice.kernel.epilogue is epilogue
        assert (choice.source is ChoiceSource.TUNING_TABLE) == (epilogue in wanted)


@pytest.mark.parametrize("command", ["tune", "bench"])
@pytest.mark.parametrize(("built", "asked"), [("none", "gated"), ("elementwise", "gated"), ("gated", "none")])
def test_epilogues_that_are_not_built_are_refused(command: str, built: str, asked: str, cli: CliRunner) -> None:
    library = FakeLibrary(with_epilogues(enumerate_space("default"), [Epilogue.parse(built)]))
    cli.services = Services(load=lambda _folder: library)  # type: ignore[attr-defined]
    refused = cli.invoke(main, [command, *TUNE[1:], "--epilogue", "none", "--epilogue", asked])
    assert refused.exit_code == NotBuiltError.exit_code, refused.output
    missing = asked if built == "none" else "none"
    assert f"run `{build_command(Epilogue.parse(missing))}`" in " ".join(refused.stderr.split())


def test_kernels_with_epilogues_are_not_built_by_tune(cli: CliRunner) -> None:
    refused = cli.invoke(main, [*TUNE, "--space", "native", "--epilogue", "gated"])
    assert refused.exit_code == 2
    assert "--epilogue does not go with --space" in " ".join(refused.stderr.split())


def test_the_last_of_several_looks_at_a_kernel_counts(
    cli: Runner, own_library: FakeLibrary, stopwatch: Stopwatch, monkeypatch: pytest.MonkeyPatch
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

    monkeypatch.setattr(tune, "measure", measure)
    cli.services = replace(cli.services, show_progress=show_progress)
    assert cli.invoke(main, TUNE).exit_code == 0
    problem = Problem(64, 512, 1024, 128)
    assert chosen(own_library, problem) == (stopwatch.measured[-1], 0.5)
    count = len(stopwatch.measured) - 3
    assert steps == [*((done, count) for done in range(1, count + 1)), (count, count)]


def test_a_budget_ends_tuning_in_time_and_says_what_is_left(
    cli: CliRunner, stopwatch: Stopwatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(monotonic=lambda: 10.0 * len(stopwatch.measured))
    monkeypatch.setattr(tune, "time", clock)
    monkeypatch.setattr(tuning, "time", clock)
    problems = [argument for m in (16, 32, 64, 128) for argument in ("--problem", f"{m}x512x1024")]
    done = cli.invoke(main, ["tune", *problems, "--budget", "1"])
    assert done.exit_code == 0, done.output
    assert "2 problems not measured: the same command goes on" in " ".join(done.stderr.split())


def test_tuning_measures_again_what_is_asked_for_or_built_anew(
    cli: CliRunner, own_library: FakeLibrary, stopwatch: Stopwatch, tmp_path: Path
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
    kernels = [
        replace(kernel, content_hash="built anew") if kernel.config.name == changed else kernel
        for kernel in own_library.build.manifest.kernels
    ]
    manifest = replace(own_library.build.manifest, kernels=tuple(kernels))
    own_library.build = replace(own_library.build, manifest=manifest)
    anew = json.loads(cli.invoke(main, [*TUNE, *table]).stdout)
    assert anew["problems"][0]["measured"] == 1


def test_tuning_refuses_another_gpus_table_and_nothing_to_do(
    cli: CliRunner, stopwatch: Stopwatch, tmp_path: Path
) -> None:
    path = tmp_path / "table.json"
    path.write_text(FOREIGN)
    refused = cli.invoke(main, [*TUNE, "--table", str(path)])
    assert refused.exit_code == 2
    assert "do not go into a table of a GPU with 132" in " ".join(refused.stderr.split())
    assert path.read_text() == FOREIGN
    assert "Specify at least one of" in cli.invoke(main, ["tune"]).stderr
    assert stopwatch.measured == []


def test_tuning_for_chains_measures_dependent_launches_and_calls_choose_by_them(
    cli: CliRunner, own_library: FakeLibrary, stopwatch: Stopwatch
) -> None:
    assert cli.invoke(main, [*TUNE, "--dependent"]).exit_code == 0
    assert stopwatch.dependent == {True}
    assert TuningTable.read(own_library.build.folder / TABLE).dependent
    explained = json.loads(cli.invoke(main, ["explain", "50", "512", "1024", "--json"]).stdout)
    assert explained["kernel"] == min(stopwatch.measured, key=KERNELS.index).name
    assert (explained["source"], explained["dependent"]) == ("tuning_table", True)
    shown = cli.invoke(main, ["explain", "50", "512", "1024"])
    assert "the build's tuning table, for dependent launches" in " ".join(shown.stderr.split())
    count = len(stopwatch.measured)
    refused = cli.invoke(main, TUNE)
    assert refused.exit_code == 2
    assert "do not go into a table of dependent launches" in " ".join(refused.stderr.split())
    assert len(stopwatch.measured) == count


def test_explain_shows_what_was_measured(cli: CliRunner, own_library: FakeLibrary, stopwatch: Stopwatch) -> None:
    assert cli.invoke(main, TUNE).exit_code == 0
    fastest = min(stopwatch.measured, key=KERNELS.index)
    shown = cli.invoke(main, ["explain", "50", "512", "1024", "--json"])
    explained = json.loads(shown.stdout)
    assert (explained["kernel"], explained["source"]) == (fastest.name, "tuning_table")
    assert chosen(own_library, Problem(50, 512, 1024, 128))[0] == fastest


def test_tuning_takes_as_many_gpus_of_one_kind_as_it_is_given(
    cli: CliRunner, own_library: FakeLibrary, stopwatch: Stopwatch
) -> None:
    own_library.module.found = numbered(H100, H100, H200)
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
    cli: CliRunner, own_library: FakeLibrary, stopwatch: Stopwatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_library.module.found = numbered(H100, H100)
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

    monkeypatch.setattr(tune, "measure", measure)
    problems = [argument for m in (64, 128, 256, 512) for argument in ("--problem", f"{m}x512x1024")]
    assert cli.invoke(main, ["tune", *problems, "--gpus", "2"]).exit_code == 130
    table = TuningTable.read(own_library.build.folder / TABLE)
    counts = {problem.m: len(times) for (_, problem), times in table.times.items()}
    assert counts.keys() == {64, 128}, "no other problem is begun"
    assert counts[64] == 1
    assert counts[128] in {1, 2}, "the other GPU ends with the kernel that it is at"
