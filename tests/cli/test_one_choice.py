"""One choice: `run`, `bench`, `explain`, `tune` and `gemm` pick the same kernel, each by its own code."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import recorded
from fakes.arrays import GpuArray
from fakes.devices import H100, H200
from fakes.library import FakeLibrary, record
from fakes.runner import Runner

from w4a16gen import KernelConfig, Library, Problem, QuantMode, use_kernels
from w4a16gen.choose.timing_table import TABLE, Measured, add_times, one_time
from w4a16gen.cli.services import Services
from w4a16gen.kernels.device import Device
from w4a16gen.kernels.spaces import enumerate_space
from w4a16gen.measure import bench, compare, tune
from w4a16gen.measure.single import Outcome, Plan
from w4a16gen.measure.timing import Contender
from w4a16gen.weights.packed import LAYOUTS, TARGET_LAYOUTS, PackedWeight

DEFAULT = enumerate_space("default")
MODE = QuantMode.FINEGRAINED_SCALE_ONLY
RECORDED = sorted(
    {row.problem for row in recorded.read([recorded.DATA_FOLDER / "h100_times.csv.xz"]) if row.kernel is not None},
    key=lambda problem: (problem.n, problem.k, problem.m),
)


def drawn(count: int) -> list[tuple[QuantMode, Problem]]:
    """Return random problems of all modes, of sizes that nobody recorded too."""
    random = Random(20)  # noqa: S311  (nothing secret)
    problems = []
    for _ in range(count):
        mode = random.choice(list(QuantMode))
        group = random.choice([32, 64, 128, 256])
        n, k = 8 * random.randint(1, 4000), group * random.randint(1, 100)
        m = round(2 ** random.uniform(0, 13))
        problems.append((mode, Problem(m, n, k, group if mode.is_grouped else k)))
    return problems


class Commands:
    """The commands on one library; each method returns the kernels that one of them picks."""

    def __init__(self, cli: Runner, library: FakeLibrary, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cli, self.library, self.folder = cli, library, folder
        cli.services = Services(load=lambda _folder: library, run_one=run_one)
        monkeypatch.setattr(bench, "tensor_peak", lambda *_: None)
        monkeypatch.setattr(compare, "Workload", Workload)
        monkeypatch.setattr(compare, "screen", screen)
        monkeypatch.setattr(compare, "find_torch", lambda: None)
        monkeypatch.setattr(tune, "measure", measure)

    def json(self, *arguments: str) -> Any:
        done = self.cli.invoke(args=[*arguments, "--json"])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    def one(self, command: str, mode: QuantMode, problem: Problem) -> str:
        """Return the kernel that `run` or `explain` picks."""
        numbers = map(str, (problem.m, problem.n, problem.k))
        found = self.json(command, *numbers, "--group-size", str(problem.group_size), "--mode", str(mode))
        return str(found["kernel"])

    def bench(self, mode: QuantMode, problems: Sequence[Problem]) -> list[str]:
        found = self.json("bench", "--file", self.file(problems), "--mode", str(mode), "--rounds", "1")
        return [row["chosen"] for row in found["comparisons"]]

    def tune(self, mode: QuantMode, problems: Sequence[Problem]) -> list[str]:
        found = self.json("tune", "--file", self.file(problems), "--mode", str(mode))
        return [row["fastest"] for row in found["problems"]]

    def gemm(self, mode: QuantMode, problem: Problem) -> str:
        layout = TARGET_LAYOUTS[self.library.choose(problem, mode).kernel.target]
        weight = PackedWeight(None, layout, problem.n, problem.k, problem.group_size, mode)
        data = GpuArray((LAYOUTS[layout].packed_bytes(weight.geometry),), "|u1")
        weight = PackedWeight(data, layout, problem.n, problem.k, problem.group_size, mode)
        self.library.gemm(GpuArray((problem.m, problem.k)), weight, out=GpuArray((problem.m, problem.n)))
        launched = self.library.module.launches[-1]
        assert launched.problem == problem
        return launched.config.name

    def file(self, problems: Sequence[Problem]) -> str:
        path = self.folder / "problems.txt"
        path.write_text("".join(f"{p.m}x{p.n}x{p.k},{p.group_size}\n" for p in problems))
        return str(path)


def run_one(library: Library, plan: Plan) -> Outcome:
    """Stand in for running: the plan says which kernel."""
    assert plan.config in plan.candidates
    return Outcome(library.hopper_device(), 0, 1, 0.5, [1.0], 20)


class Timed(Contender):
    """A contender that is not waited for."""

    def time(self, pause: float = 0) -> None:
        del pause
        self.microseconds.append(1.0)

    def time_block(self, seconds: float = 0) -> None:
        del seconds
        self.microseconds.append(1.0)


def Workload(_library: Library, _device: int, problem: Problem, *_: object) -> SimpleNamespace:  # noqa: N802
    """Stand in for a workload: data of a hundred layers would take minutes to draw."""
    contender = lambda *_, **__: Timed(lambda: None, lambda: 1.0, 1)  # noqa: E731
    return SimpleNamespace(problem=problem, check=lambda _: 0.5, record=contender, record_floor=contender)


def screen(_workload: object, configs: Sequence[KernelConfig], **_: object) -> Iterator[tuple[KernelConfig, float]]:
    """Screen backwards, so that the fastest is not the choice by chance."""
    return ((config, float(-place)) for place, config in enumerate(configs))


def measure(
    _library: Library, problem: Problem, _mode: QuantMode, configs: Sequence[KernelConfig], **_: object
) -> Iterator[tuple[KernelConfig, float]]:
    """Stand in for measuring: the later a kernel is listed, the faster it is."""
    return ((config, float(problem.m + len(configs) - place)) for place, config in enumerate(configs))


@pytest.fixture
def commands(cli: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    """Return the commands on the default set and an H100."""
    return commands_on(cli, tmp_path, monkeypatch, H100)


def commands_on(cli: Runner, folder: Path, monkeypatch: pytest.MonkeyPatch, device: Device) -> Commands:
    library = FakeLibrary(DEFAULT, devices=[device], folder=folder, compute=record)
    return Commands(cli, library, folder, monkeypatch)


def test_every_command_picks_the_same_kernel_for_every_recorded_problem(commands: Commands) -> None:
    assert len(RECORDED) == 601
    wanted = {problem: commands.gemm(MODE, problem) for problem in RECORDED}
    for command in ("run", "explain"):
        assert {problem: commands.one(command, MODE, problem) for problem in RECORDED} == wanted, command
    assert dict(zip(RECORDED, commands.bench(MODE, RECORDED), strict=True)) == wanted


@pytest.mark.parametrize("device", [H100, H200], ids=lambda device: device.name)
def test_every_command_picks_the_same_kernel_for_random_problems(
    cli: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: Device
) -> None:
    commands = commands_on(cli, tmp_path, monkeypatch, device)
    problems = drawn(120)
    wanted = {problem: commands.gemm(mode, problem) for mode, problem in problems}
    for command in ("run", "explain"):
        assert {problem: commands.one(command, mode, problem) for mode, problem in problems} == wanted, command
    for mode in QuantMode:
        of_mode = [problem for which, problem in problems if which is mode]
        assert commands.bench(mode, of_mode) == [wanted[problem] for problem in of_mode]


def test_every_command_picks_what_tuning_found_fastest(commands: Commands) -> None:
    problems = [RECORDED[place] for place in range(0, 601, 25)]
    before = {problem: commands.library.choose(problem, MODE).kernel.name for problem in problems}
    commands.library.chooser = FakeLibrary(DEFAULT, folder=commands.folder).chooser  # as a process that starts later
    tuned = dict(zip(problems, commands.tune(MODE, problems), strict=True))
    assert len([problem for problem in problems if tuned[problem] != before[problem]]) > 10
    for problem in problems:
        assert commands.gemm(MODE, problem) == tuned[problem]
        for command in ("run", "explain"):
            assert commands.one(command, MODE, problem) == tuned[problem], command
    assert commands.bench(MODE, problems) == list(tuned.values())


def test_every_command_picks_what_the_user_named(commands: Commands) -> None:
    problem = RECORDED[0]
    named = [config for config in DEFAULT if config.mode is MODE][-1]
    assert commands.gemm(MODE, problem) != named.name
    hashes = commands.library.build.content_hashes
    other = next(config for config in hashes if config.mode is MODE)
    add_times(commands.folder / TABLE, one_time(H100, problem, other, Measured(0.1, hashes[other])))
    with use_kernels(named):
        assert commands.gemm(MODE, problem) == named.name
        assert [commands.one(command, MODE, problem) for command in ("run", "explain")] == [named.name] * 2
        assert commands.bench(MODE, [problem]) == [named.name]
