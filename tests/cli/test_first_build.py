"""`run` and `bench` where nothing is built yet."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes.devices import A100, H100
from fakes.library import FakeLibrary
from fakes.runner import Runner

from w4a16gen.build.pipeline import BuildReport
from w4a16gen.errors import NotBuiltError
from w4a16gen.kernels.spaces import enumerate_space
from w4a16gen.measure.single import Outcome
from w4a16gen.runtime.devices import Driver

DEFAULT_COUNT = len(enumerate_space("default"))
COMMANDS = ["run 16 4096 4096", "bench --problem 16x4096x4096"]


class Machine:
    """A machine whose first build takes no time."""

    def __init__(self, cli: Runner, *, gpus: tuple[Any, ...] = (H100,)) -> None:
        self.library = FakeLibrary(enumerate_space("default"))
        self.built: list[int] = []
        self.measured = 0
        cli.services = replace(
            cli.services,
            load=self.load,
            build=self.build,
            find_driver=lambda: Driver((13, 0), gpus),
            run_one=self.run_one,
            bench=self.bench,
        )

    def load(self, _folder: Path | None) -> FakeLibrary:
        if not self.built:
            raise NotBuiltError("no build here")
        return self.library

    def build(self, configs: Any, **_: Any) -> BuildReport:
        self.built.append(len(configs))
        return BuildReport(self.library.build, len(configs), [])

    def run_one(self, *_: Any, **__: Any) -> Outcome:
        self.measured += 1
        return Outcome(H100, 0, 16, 0.5, [5.0], 20)

    def bench(self, *_: Any, **__: Any) -> Any:
        self.measured += 1
        raise KeyboardInterrupt  # what is measured is tested elsewhere


@pytest.mark.parametrize("command", COMMANDS)
def test_the_default_kernels_are_built_before_the_first_time(cli: Runner, command: str) -> None:
    machine = Machine(cli)
    shown = cli.run(command)
    assert (machine.built, machine.measured) == ([DEFAULT_COUNT], 1)
    assert "the default kernels are built first" in shown.stderr
    cli.run(command)
    assert machine.built == [DEFAULT_COUNT], "they are built once"


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("gpus", [(), (A100,)], ids=["no GPU", "another GPU"])
def test_nothing_is_built_where_no_kernel_can_run(cli: Runner, command: str, gpus: tuple[Any, ...]) -> None:
    machine = Machine(cli, gpus=gpus)
    shown = cli.run(command)
    assert shown.exit_code == 3
    assert "running needs an NVIDIA Hopper GPU" in shown.stderr, "a build would not help"
    assert (machine.built, machine.measured) == ([], 0)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_named_folder_and_a_damaged_build_are_not_built_over(
    cli: Runner, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(cli)
    assert cli.run(f"{command} --build-dir elsewhere").exit_code == 3
    Path("build").mkdir()
    Path("build/manifest.json").write_text("{")
    assert cli.run(command).exit_code == 3
    Path("build/manifest.json").unlink()
    monkeypatch.setenv("W4A16GEN_BUILD_DIR", "elsewhere")
    assert cli.run(command).exit_code == 3
    assert (machine.built, machine.measured) == ([], 0)
