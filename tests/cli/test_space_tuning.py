"""`tune --space`: estimate, build, measure and keep, with stand-ins for the compilers and the GPU."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fakes.devices import A100, H100, H200, numbered
from fakes.library import FakeLibrary
from fakes.runner import Runner
from json_shapes import SCHEMAS, SPACE, check

from w4a16gen import KernelConfig, Library, Problem, QuantMode
from w4a16gen.build.objects import Failure
from w4a16gen.build.pipeline import BuildReport
from w4a16gen.choose.chooser import ChoiceSource
from w4a16gen.choose.timing_table import TABLE, TuningTable
from w4a16gen.cli import problems as problem_options
from w4a16gen.cli.services import Services
from w4a16gen.errors import NotBuiltError
from w4a16gen.files import sole_writer
from w4a16gen.kernels.device import Device
from w4a16gen.kernels.spaces import enumerate_space
from w4a16gen.measure import space_tuning, tune
from w4a16gen.runtime.devices import Driver
from w4a16gen.weights.importers import checkpoint

MODE = QuantMode.FINEGRAINED_SCALE_ONLY
NATIVE = enumerate_space("native")
TUNE = "tune --space native --problem 16x512x1024 --problem 300x512x1024"
PROBLEMS = [Problem(16, 512, 1024, 128), Problem(300, 512, 1024, 128)]


class Factory:
    """Stands in for compilers and a GPU: kernels take a time that is a number of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.devices: list[Device] = [H100]
        self.builds: list[list[KernelConfig]] = []
        self.library: FakeLibrary | None = None
        self.failing: set[KernelConfig] = set()
        self.objects: set[KernelConfig] = set()
        self.at_work: set[int] = set()
        self.measured: list[tuple[Problem, KernelConfig]] = []
        self.refined: list[tuple[Problem, KernelConfig]] = []
        self.interrupt_after: int | None = None
        self.clock = 0.0

    def build(self, configs: Iterable[KernelConfig], *, folder: Path, **_: Any) -> BuildReport:
        asked = sorted(set(configs))
        self.builds.append(asked)
        built = [config for config in asked if config not in self.failing]
        folder.mkdir(parents=True, exist_ok=True)
        self.objects.update(built)
        self.library = FakeLibrary(built, devices=self.devices, folder=folder)
        failures = [Failure(config.name, folder / "log", "no registers") for config in asked if config in self.failing]
        return BuildReport(self.library.build, len(built), failures)

    def compiled(self, configs: Iterable[KernelConfig], folder: Path) -> set[KernelConfig]:
        assert folder == self.folder
        return self.objects & set(configs)

    def load(self, folder: Path | None) -> Library:
        assert folder in (None, self.folder)
        if self.library is None:
            raise NotBuiltError("nothing is built")
        return self.library

    def microseconds(self, problem: Problem, config: KernelConfig) -> float:
        return 10.0 + problem.m / 100 + NATIVE.index(config) % 97 / 10

    def measure(
        self,
        _library: Library,
        problem: Problem,
        _mode: QuantMode,
        configs: Sequence[KernelConfig],
        *,
        device: int,
        **_: Any,
    ) -> Iterator[tuple[KernelConfig, float]]:
        self.at_work.add(device)
        for config in configs:
            if len(self.measured) == self.interrupt_after:
                raise KeyboardInterrupt
            self.measured.append((problem, config))
            self.clock += 1.0
            yield config, self.microseconds(problem, config)

    def refine(
        self, _library: Library, problem: Problem, _mode: QuantMode, configs: Sequence[KernelConfig], **_: Any
    ) -> dict[KernelConfig, float]:
        self.refined += [(problem, config) for config in configs]
        return {config: self.microseconds(problem, config) + 0.01 for config in configs}


@pytest.fixture
def factory(cli: Runner, monkeypatch: pytest.MonkeyPatch) -> Factory:
    """Let `tune --space` build and measure with stand-ins, into ./build."""
    found = Factory(Path("build"))
    cli.services = Services(
        load=found.load,
        build=found.build,
        compiled=found.compiled,
        find_driver=lambda: Driver((13, 0), tuple(found.devices)),
    )
    monkeypatch.setattr(tune, "measure", found.measure)
    monkeypatch.setattr(tune, "refine", found.refine)
    clock = SimpleNamespace(monotonic=lambda: found.clock)
    monkeypatch.setattr(tune, "time", clock)
    monkeypatch.setattr(space_tuning, "time", clock)
    return found


def said(text: str) -> str:
    return " ".join(text.split())


def test_a_space_is_estimated_built_measured_and_reduced(cli: Runner, factory: Factory) -> None:
    done = cli.run(TUNE)
    assert done.exit_code == 0, done.output
    first, last = factory.builds
    assert 10 < len(first) < 100
    assert set(last) < set(first)
    assert len(last) <= 2
    assert {problem for problem, _ in factory.measured} == set(PROBLEMS)
    assert len(factory.measured) == len(set(factory.measured))
    assert factory.library is not None
    for problem in PROBLEMS:
        fastest = min(factory.microseconds(at, config) for at, config in factory.measured if at == problem)
        choice = factory.library.choose(problem, MODE)
        assert choice.source is ChoiceSource.TUNING_TABLE
        assert factory.microseconds(problem, choice.kernel) <= 1.01 * fastest
        near = {config for at, config in factory.measured if at == problem}
        assert {config for at, config in factory.refined if at == problem} <= near
    assert f"build has {len(last)} kernels for 2 problems. Calls take 1.0" in said(done.stderr)
    of_mode = [config for config in NATIVE if config.mode is MODE]
    assert f"{len(of_mode)} kernels of space native estimated for 2 problems" in said(done.stderr)


def test_an_interrupted_run_goes_on_and_a_finished_one_has_nothing_to_do(cli: Runner, factory: Factory) -> None:
    factory.interrupt_after = 5
    assert cli.run(TUNE).exit_code == 130
    assert sum(map(len, TuningTable.read(factory.folder / TABLE).times.values())) == 5
    factory.interrupt_after = None
    assert cli.run(TUNE).exit_code == 0
    assert len(factory.measured) == len(set(factory.measured)), "nothing is measured twice"
    count, refined = len(factory.measured), len(factory.refined)
    again = cli.run(TUNE)
    assert again.exit_code == 0, again.output
    assert (len(factory.measured), len(factory.refined)) == (count, refined)
    assert factory.builds[-1] == factory.builds[-3]


def test_times_that_were_removed_are_measured_again_in_turns_too(cli: Runner, factory: Factory) -> None:
    assert cli.run(TUNE).exit_code == 0
    (factory.folder / TABLE).unlink()
    refined = len(factory.refined)
    assert cli.run(TUNE).exit_code == 0
    assert len(factory.refined) == 2 * refined > 0


def test_a_problem_that_comes_twice_is_measured_once(cli: Runner, factory: Factory) -> None:
    done = cli.run(f"{TUNE} --problem 16x512x1024 --json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["space"]["not_measured"] == 0
    assert "same command goes on" not in said(done.stderr)
    assert len(factory.measured) == len(set(factory.measured))
    measured = len(factory.measured)
    assert cli.run("tune --problem 64x512x1024 --problem 64x512x1024").exit_code == 0
    assert len(factory.measured) - measured == len(set(factory.measured[measured:])) > 0


def test_two_runs_in_one_folder_are_kept_apart(cli: Runner, factory: Factory) -> None:
    factory.folder.mkdir()
    with sole_writer(factory.folder):
        refused = cli.run(TUNE)
    assert refused.exit_code == 2
    assert "another process is measuring into build" in said(refused.stderr)
    assert factory.builds == []


def test_a_budget_leaves_kernels_and_problems_out_and_says_so(cli: Runner, factory: Factory) -> None:
    done = cli.run(f"{TUNE} --budget 0.5 --jobs 1 --json")
    assert done.exit_code == 0, done.output
    value = json.loads(done.stdout)
    assert value.pop("schema") == "w4a16gen.tune/1"
    check(value, SCHEMAS["tune"], "tune")
    check(value["space"], SPACE, "space")
    assert len(factory.builds[0]) == 4, "0.4 of 30 s, at three seconds a kernel"
    assert value["space"]["not_built"] == value["space"]["promising"] - 4
    assert "promising kernels are not built" in said(done.stderr)
    assert (len(value["problems"]), value["space"]["not_measured"]) == (2, 0)
    again = json.loads(cli.run(f"{TUNE} --budget 0.5 --jobs 1 --json").stdout)
    assert len(factory.builds[2]) == 8, "what is compiled costs nothing, so that the same command goes on"
    assert again["space"]["not_built"] == value["space"]["promising"] - 8
    less = cli.run(f"{TUNE} --problem 64x512x1024 --problem 128x512x1024 --budget 0.40 --jobs 1")
    assert "and 1 problem not measured: the same command goes on" in said(less.stderr)
    assert len(factory.builds[-1]) >= 2, "the problem that was not measured has its best estimate"


def test_the_set_that_is_left_is_within_one_percent(
    cli: Runner, factory: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, many = [Problem(16, 512, 1024, 128), Problem(17, 512, 1024, 128)]
    tune_both = "tune --space native --problem 16x512x1024 --problem 17x512x1024"
    assert cli.run(tune_both).exit_code == 0
    of_few, of_many = ({config for at, config in factory.measured if at == problem} for problem in (few, many))
    one, other = sorted(of_few & of_many)[:2]
    for excess, count, loss in ((1.02, 2, 1.0), (1.009, 1, 1.009)):
        fast = {(few, one): 10.0, (few, other): 11.0, (many, other): 10.0, (many, one): 10.0 * excess}
        monkeypatch.setattr(factory, "microseconds", lambda at, config, fast=fast: fast.get((at, config), 20.0))
        space = json.loads(cli.run(f"{tune_both} --again --json").stdout)["space"]
        assert len(factory.builds[-1]) == count
        assert space["worst_loss"] == pytest.approx(loss, abs=1e-4)
        assert space["mean_loss"] == pytest.approx(loss**0.5, abs=1e-4)


def test_times_of_a_few_candidates_do_not_make_a_problem_measured(cli: Runner, factory: Factory) -> None:
    assert cli.run(f"{TUNE} --budget 0.5 --jobs 1").exit_code == 0
    found = json.loads(cli.run(f"{TUNE} --budget 0.35 --jobs 1 --json").stdout)["space"]
    assert len(factory.builds[2]) == 6
    assert found["not_measured"] == 1, "the second problem has times of two of three kernels"


def test_a_budget_that_measures_nothing_names_no_table(cli: Runner, factory: Factory) -> None:
    done = cli.run(f"{TUNE} --budget 0.001 --jobs 1")
    assert done.exit_code == 0, done.output
    assert "2 problems not measured" in said(done.stderr)
    assert "Wrote" not in done.stderr
    assert not (factory.folder / TABLE).exists()


def test_cutlass_kernels_stay_because_they_read_other_weights(cli: Runner, factory: Factory) -> None:
    cutlass = [config for config in enumerate_space("trtllm") if config.mode is MODE][:3]
    factory.build(cutlass, folder=factory.folder)
    assert cli.run(TUNE).exit_code == 0
    assert set(cutlass) < set(factory.builds[-1])


def test_kernels_of_other_modes_stay_and_failures_are_passed_over(cli: Runner, factory: Factory) -> None:
    other = [config for config in enumerate_space("default") if config.mode is QuantMode.PER_COLUMN_SCALE_ONLY]
    factory.build(other, folder=factory.folder)
    probe = cli.run(f"{TUNE} --json")
    promising = factory.builds[1]
    assert set(other) < set(promising)
    assert set(other) < set(factory.builds[2])
    assert json.loads(probe.stdout)["space"]["not_built"] == 0
    kept = set(json.loads(probe.stdout)["space"]["kernels"])
    assert kept == {config.name for config in factory.builds[2]} - {config.name for config in other}
    factory.failing = {next(config for config in factory.builds[2] if config.name in kept)}
    failed = cli.run(f"{TUNE} --json")
    assert failed.exit_code == 0, failed.output
    assert "no registers" in failed.stderr
    assert json.loads(failed.stdout)["space"]["not_built"] == 1


def test_gpus_of_one_model_share_the_problems(cli: Runner, factory: Factory) -> None:
    factory.devices = numbered(H100, H200, H100)
    first = threading.Barrier(2)
    measure = factory.measure

    def at_once(*arguments: Any, **options: Any) -> Iterator[tuple[KernelConfig, float]]:
        first.wait(10)  # two problems are measured at a time, or this fails
        yield from measure(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune, "measure", at_once)
        done = cli.run(f"{TUNE} --gpus 2")
    assert done.exit_code == 0, done.output
    assert factory.at_work == {0, 2}


def test_without_a_hopper_gpu_nothing_is_built(cli: Runner, factory: Factory) -> None:
    for devices in ([], [A100]):
        factory.devices = devices
        refused = cli.run(TUNE)
        assert refused.exit_code == 3
        assert "running needs an NVIDIA Hopper GPU" in said(refused.stderr)
    factory.devices = [H100]
    refused = cli.run(f"{TUNE} --gpus 2")
    assert "--gpus 2 is more than the 1 NVIDIA H100 80GB HBM3" in said(refused.stderr)
    assert factory.builds == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("tune --space native --problem 16x512x1024 --table times.json", "--table does not go with --space"),
        (
            "tune --space native --problem 16x512x1024,24",
            "no native kernel of space native can run 16x512x1024, group size 24: group size 24 must be 1024 (= k)",
        ),
        (
            "tune --space trtllm --problem 16x512x1024",
            "no native kernel of space trtllm can run 16x512x1024, group size 128: it has none of mode fgs",
        ),
        (
            "tune --space native --problem 16x512x1024 --budget 1e308",
            "must be a number of minutes above 0, 525600 at most",
        ),
        ("tune --space native", "Specify at least one of --problem, --model, --file, --checkpoint"),
    ],
)
def test_what_cannot_be_tuned_is_refused_before_anything_is_built(
    cli: Runner, factory: Factory, arguments: str, sentence: str
) -> None:
    refused = cli.run(arguments)
    assert refused.exit_code == 2
    assert sentence in said(refused.stderr)
    assert factory.builds == []


def test_a_table_of_another_gpu_is_refused_before_anything_is_built(cli: Runner, factory: Factory) -> None:
    factory.folder.mkdir()
    (factory.folder / TABLE).write_text(TuningTable.of_device(H200).as_text())
    refused = cli.run(TUNE)
    assert refused.exit_code == 2
    assert "do not go into a table of" in said(refused.stderr)
    assert factory.builds == []


def test_a_checkpoints_layers_are_tuned_in_their_own_modes(
    cli: Runner, factory: Factory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    layers = {
        "q": SimpleNamespace(n=512, k=1024, group_size=128, mode=MODE),
        "k": SimpleNamespace(n=512, k=1024, group_size=128, mode=MODE),
        "o": SimpleNamespace(n=1024, k=512, group_size=64, mode=QuantMode.FINEGRAINED_SCALE_AND_ZEROS),
    }
    monkeypatch.setattr(checkpoint, "open_checkpoint", lambda _path: layers)
    named = problem_options.checkpoint_problems([tmp_path], [1, 16])
    assert named == {
        MODE: [("q", Problem(1, 512, 1024, 128)), ("q", Problem(16, 512, 1024, 128))],
        QuantMode.FINEGRAINED_SCALE_AND_ZEROS: [("o", Problem(1, 1024, 512, 64)), ("o", Problem(16, 1024, 512, 64))],
    }
    done = cli.run(f"tune --space native --checkpoint {tmp_path} --tokens 1 --tokens 16 --json")
    assert done.exit_code == 0, done.output
    assert len(factory.measured) == len(set(factory.measured))
    value = json.loads(done.stdout)
    assert [row["name"] for row in value["problems"]] == ["q", "q", "o", "o"]
    assert {KernelConfig.parse(name).mode for name in value["space"]["kernels"]} == set(named)
