"""A comparison on random cells: what is timed, kept, left out and said, with a stand-in for the GPU."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fakes.devices import A100
from fakes.library import FakeLibrary
from fakes.runner import Runner
from json_shapes import RANDOM, SCHEMAS, check

from w4a16gen import Problem, QuantMode
from w4a16gen.choose.timing_table import TABLE
from w4a16gen.cli.services import Services
from w4a16gen.errors import MissingToolError, NotBuiltError
from w4a16gen.files import sole_writer
from w4a16gen.kernels.spaces import enumerate_space
from w4a16gen.measure import random_bench
from w4a16gen.measure.cell import Attempts, CellOptions
from w4a16gen.measure.cell_record import CELLS
from w4a16gen.measure.draw import draw_cells
from w4a16gen.measure.record import read_record
from w4a16gen.measure.results import Comparison, Timing
from w4a16gen.measure.rivals import CUBLAS

MODE = QuantMode.FINEGRAINED_SCALE_ONLY
KERNELS = [config for config in enumerate_space("default") if config.mode is MODE]
CALL, BEST = KERNELS[0].name, KERNELS[1].name
FOLDER = "bench-random-7"


def interrupt() -> None:
    raise KeyboardInterrupt


class Gpu:
    """Stands in for timing cells: it takes ten seconds of a clock that nobody waits for."""

    def __init__(self) -> None:
        self.timed: list[Problem] = []
        self.interrupt_after: int | None = None
        self.error = 0.5
        self.seconds: list[float] = []
        self.end: Callable[[], None] = interrupt
        self.clock = 0.0

    def measure(self, problem: Problem, attempts: Attempts) -> Comparison:
        attempts.begin(CUBLAS)
        assert not attempts.excluded, "nothing crashed"
        if len(self.timed) == self.interrupt_after:
            self.end()
        self.timed.append(problem)
        self.clock += self.seconds.pop(0) if self.seconds else 10.0
        timings = [Timing(BEST, [9.0]), Timing(CALL, [10.0]), Timing(CUBLAS, [12.0]), Timing("quack_bf16", [15.0])]
        errors = {CALL: self.error}
        return Comparison(problem, MODE, {CALL: 10.0}, 3, timings, errors, CALL, {"turbomind": "no module"})


@pytest.fixture
def gpu(cli: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """Let `bench --random` time with a stand-in."""
    (tmp_path / "build").mkdir()
    library = FakeLibrary(KERNELS, folder=tmp_path / "build")
    found = Gpu()

    def run(*arguments: Any, **options: Any) -> Any:
        return random_bench.run_random_bench(*arguments, **options, measure=found.measure)

    cli.services = Services(load=lambda _folder: library, random_bench=run)
    monkeypatch.setattr(random_bench, "time", SimpleNamespace(monotonic=lambda: found.clock))
    monkeypatch.setattr(random_bench, "tensor_peak", lambda *_: None)
    return found


def said(text: str) -> str:
    return " ".join(text.split())


def test_a_draw_is_timed_and_summed_up_by_bands(cli: Runner, gpu: Gpu) -> None:
    done = cli.run("bench --random 20 --seed 7 --wide")
    assert done.exit_code == 0, done.output
    assert gpu.timed == [problem for _, problem in draw_cells(20, 7, MODE)]
    assert "20 of 20 cells, about 0 s left" in done.stderr
    lines = done.stdout.splitlines()
    assert said(lines[1]).startswith("tokens cells rival / call worst lost by > 5 %")
    every = next(line for line in lines if line.startswith("1 to 8192"))
    assert said(every).startswith("1 to 8192 20 1.200 1.200 0 0")
    assert "1.111 1.111" in said(every), "what the choice loses"
    assert any(said(line).startswith("quack_bf16 1 to 8192 20 1.500") for line in lines)
    assert "turbomind was not timed in 20 of 20 cells: no module" in said(done.stderr)
    assert "3 kernels a cell, on average, were not timed" in said(done.stderr)
    _, rows = read_record(Path(FOLDER))
    assert [(row.m, row.microseconds, row.cublas_microseconds) for row in rows] == [
        (problem.m, 9.0, 12.0) for problem in gpu.timed
    ]
    assert (Path(FOLDER) / "report.html").exists()


def test_an_interrupted_run_goes_on_and_a_longer_draw_takes_what_is_there(cli: Runner, gpu: Gpu) -> None:
    gpu.interrupt_after = 3
    assert cli.run("bench --random 6 --seed 7").exit_code == 130
    gpu.interrupt_after = None
    again = cli.run("bench --random 6 --seed 7")
    assert again.exit_code == 0, again.output
    assert f"3 of 6 cells are in {FOLDER} already" in said(again.stderr)
    assert len(gpu.timed) == len(set(gpu.timed)) == 6
    assert cli.run("bench --random 8 --seed 7").exit_code == 0
    assert gpu.timed == [problem for _, problem in draw_cells(8, 7, MODE)]
    (Path("build") / TABLE).write_text("other times")
    assert "build of" in said(cli.run("bench --random 8 --seed 7").stderr), "calls may choose other kernels now"
    (Path("build") / TABLE).unlink()
    refused = cli.run(f"bench --random 6 --seed 8 --report {FOLDER}")
    assert refused.exit_code == 2
    assert "seed of 7, now 8" in said(refused.stderr)


def fill_the_disk() -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "cells.jsonl")


@pytest.mark.parametrize(("end", "exit_code"), [(interrupt, 130), (fill_the_disk, 1)], ids=["interrupted", "full disk"])
def test_other_ends_are_not_taken_for_crashes_of_a_rival(
    cli: Runner, gpu: Gpu, end: Callable[[], None], exit_code: int
) -> None:
    gpu.interrupt_after, gpu.end = 0, end
    for _ in range(3):
        assert cli.run("bench --random 1 --seed 7").exit_code == exit_code
    gpu.interrupt_after = None
    assert cli.run("bench --random 1 --seed 7").exit_code == 0
    assert len(gpu.timed) == 1


def test_a_budget_ends_the_run_in_time_and_says_what_is_left(cli: Runner, gpu: Gpu) -> None:
    done = cli.run("bench --random 20 --seed 7 --budget 1 --json")
    assert len(gpu.timed) == 6, "a seventh cell of ten seconds would not end within a minute"
    assert "14 of 20 cells are left out" in said(done.stderr)
    value = json.loads(done.stdout)
    assert value.pop("schema") == "w4a16gen.bench/1"
    check(value | {"peak_tflops": {"burst": 1, "sustained": 1}}, SCHEMAS["bench"], "bench")
    check(value["random"], RANDOM, "random")
    assert (value["random"]["timed"], value["random"]["left_out"]) == (6, 14)


def test_the_longest_cell_so_far_must_fit_into_the_budget(cli: Runner, gpu: Gpu) -> None:
    gpu.seconds = [20.0, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0]
    assert cli.run("bench --random 20 --seed 7 --budget 1").exit_code == 0
    assert len(gpu.timed) == 6, "after 45 s another cell of 20 s may come"


def test_wrong_results_end_with_a_failure(cli: Runner, gpu: Gpu) -> None:
    gpu.error = 1.5
    done = cli.run("bench --random 2 --seed 7")
    assert done.exit_code == 1
    assert f"wrong results: {CALL}" in said(done.stderr)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--random 5 --model llama-3-8b", "--random draws the problems: drop --model"),
        ("--random 5 --tokens 3", "--random draws the problems: drop --tokens"),
        ("--random 5 --smallest-set 3", "times the promising kernels only: drop --smallest-set"),
        ("--model llama-3-8b --budget 3", "only --random takes them: drop --budget"),
        ("--model llama-3-8b --seed 3", "only --random takes them: drop --seed"),
        ("--random 5 --choose-from trtllm", "no native kernel of mode fgs of space trtllm: name another one"),
        ("--random 5 --budget 0", "must be a number of minutes above 0"),
    ],
)
def test_options_that_do_not_go_together_are_refused(cli: Runner, gpu: Gpu, arguments: str, sentence: str) -> None:
    refused = cli.run(f"bench {arguments}")
    assert refused.exit_code in {2, NotBuiltError.exit_code}
    assert sentence in said(refused.stderr)
    assert gpu.timed == []


def test_a_call_of_a_space_that_is_not_all_built_is_said(cli: Runner, gpu: Gpu) -> None:
    kernels = sum(config.mode is MODE for config in enumerate_space("native"))
    done = cli.run("bench --random 1 --seed 7 --choose-from native")
    assert done.exit_code == 0, done.output
    assert f"{kernels - len(KERNELS)} of {kernels} kernels of mode fgs of space native are not in the" in said(
        done.stderr
    )
    assert "not in the build" not in said(cli.run("bench --random 1 --seed 8 --choose-from default").stderr)
    assert len(gpu.timed) == 2


def test_two_runs_in_one_folder_are_kept_apart(cli: Runner, gpu: Gpu) -> None:
    Path(FOLDER).mkdir()
    with sole_writer(Path(FOLDER)):
        refused = cli.run("bench --random 2 --seed 7")
    assert refused.exit_code == 2
    assert f"another process is measuring into {FOLDER}" in said(refused.stderr)
    assert gpu.timed == []


def test_a_draw_of_many_layers_has_plots_without_a_line_for_each(cli: Runner, gpu: Gpu) -> None:
    done = cli.run("bench --random 60 --seed 7")
    assert done.exit_code == 0, done.output
    layers = {(problem.n, problem.k) for problem in gpu.timed}
    plot = (Path(FOLDER) / "speedup.svg").read_text()
    assert f"{len(layers)} layers, larger ones darker" in plot
    assert "layer 8192x3584" not in plot


def test_rivals_kernels_are_compiled_within_a_share_of_the_budget(
    cli: Runner, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[int, float | None]] = []

    def compile_ahead(problems: Sequence[Problem], *_: Any, until: float | None, **__: Any) -> int:
        given.append((len(problems), until))
        return 2

    monkeypatch.setattr(random_bench, "compile_ahead", compile_ahead)
    monkeypatch.setattr(random_bench, "_gpu_measure", lambda *_: gpu.measure)
    cli.services = replace(cli.services, random_bench=random_bench.run_random_bench)
    gpu.clock = 1000.0
    done = cli.run("bench --random 6 --seed 7 --budget 10")
    assert done.exit_code == 0, done.output
    assert given == [(6, 1000.0 + 300.0)]
    assert gpu.timed == [problem for _, problem in draw_cells(6, 7, MODE)][:2], "the others would compile meanwhile"
    assert "4 of 6 cells are left out" in said(done.stderr)
    assert cli.run("bench --random 6 --seed 7").exit_code == 0
    assert given[1:] == [(4, None)]


def run_without_a_stand_in(library: FakeLibrary) -> Callable[[], Any]:
    draw = random_bench.RandomDraw(1, 0, MODE)
    options: dict[str, Any] = {"version": "0", "report": Path("out"), "tell": print, "show_progress": None}
    return lambda: random_bench.run_random_bench(library, draw, CellOptions(), **options)


def test_what_is_missing_is_said_before_anything_is_written(
    cli: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del cli  # its folder
    monkeypatch.setattr(random_bench, "find_torch", lambda: None)
    with pytest.raises(MissingToolError, match="pip install torch"):
        run_without_a_stand_in(FakeLibrary(KERNELS))()
    with pytest.raises(NotBuiltError, match="no plain native kernel of mode fgs"):
        run_without_a_stand_in(FakeLibrary(enumerate_space("trtllm")))()
    with pytest.raises(Exception, match="running needs an NVIDIA Hopper GPU"):
        run_without_a_stand_in(FakeLibrary(KERNELS, devices=[A100]))()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("", ["humming", "quack_bf16", "turbomind"]),  # tinygemm would take most of the time
        ("--rivals", ["humming", "quack_bf16", "turbomind"]),
        ("--no-rivals", []),
        ("--rival quack_bf16", ["quack_bf16"]),
        ("--rivals --rival tinygemm_bf16 --rival humming", ["humming", "tinygemm_bf16"]),
    ],
)
def test_rivals_take_part_unless_they_are_not_wanted(
    cli: Runner, gpu: Gpu, option: str, expected: Sequence[str]
) -> None:
    assert cli.run(f"bench --random 1 --seed 7 {option}").exit_code == 0
    head = json.loads((Path(FOLDER) / CELLS).read_text().splitlines()[0])
    assert head["rivals"] == expected
    assert gpu.timed


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--rival marlin", "--rival marlin must be one of humming, quack_bf16, turbomind, tinygemm_bf16"),
        ("--rival humming --no-rivals", "--rival times a rival, and --no-rivals none: pass one of them"),
    ],
)
def test_wrong_names_of_rivals_are_refused(cli: Runner, options: str, sentence: str) -> None:
    for what in ("--random 1", "--problem 1x64x64", "--step llama-3-8b"):
        done = cli.run(f"bench {what} {options}")
        assert done.exit_code == 2
        assert sentence in " ".join(done.output.split())
