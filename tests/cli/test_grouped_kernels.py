"""Commands with a build of grouped kernels only, and with the name of one: sentences, and listings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fakes.library import FakeLibrary
from fakes.runner import Runner

from w4a16gen import KernelConfig, QuantMode
from w4a16gen.choose.overrides import KERNELS_VARIABLE
from w4a16gen.cli.services import Services
from w4a16gen.kernels.named_spaces import GEMM_SPACES, SPACES
from w4a16gen.kernels.spaces import enumerate_space

GROUPED = enumerate_space("experts")
NAME = next(config.name for config in GROUPED if config.mode is QuantMode.FINEGRAINED_SCALE_ONLY)
COMMAND = "`w4a16gen build --space default --space experts`"
ONLY = f"the build holds grouped kernels only, which gemm does not call: run {COMMAND}"
PROBLEM = "16x4096x4096"


@pytest.fixture
def commands(cli: Runner) -> Runner:
    """Return the commands on a build of grouped kernels only."""
    library = FakeLibrary(GROUPED)
    cli.services = Services(load=lambda _folder: library)
    return cli


def error_of(cli: Runner, *arguments: str) -> tuple[int, str]:
    """Return the exit code and the sentence of a command that fails."""
    done = cli.invoke(args=list(arguments))
    assert done.exit_code != 0, done.output
    return done.exit_code, done.output.strip().removeprefix("error: ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["explain", "16", "4096", "4096"],
        ["run", "16", "4096", "4096"],
        ["tune", "--problem", PROBLEM],
        ["bench", "--problem", PROBLEM],
        ["bench", "--problem", PROBLEM, "--epilogue", "gated"],
    ],
    ids=" ".join,
)
def test_a_build_of_grouped_kernels_only_names_the_command(commands: Runner, arguments: list[str]) -> None:
    assert error_of(commands, *arguments) == (3, ONLY)


def test_random_problems_need_kernels_of_one_product(commands: Runner) -> None:
    text = "the build holds no plain native kernel of mode fgs: run `w4a16gen build`"
    assert error_of(commands, "bench", "--random", "3") == (3, text)


def test_a_grouped_kernel_that_is_named_is_refused(commands: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    sentence = f"{NAME} computes grouped products: name it in the call of grouped_gemm"
    assert error_of(commands, "run", "16", "4096", "4096", "--config", NAME) == (2, sentence)
    monkeypatch.setenv(KERNELS_VARIABLE, NAME)
    assert error_of(commands, "explain", "16", "4096", "4096") == (2, f"{KERNELS_VARIABLE}: {sentence}")


@pytest.mark.parametrize(
    "arguments",
    [
        ["explain", "16", "4096", "4096", "--space", "experts"],
        ["tune", "--problem", PROBLEM, "--space", "experts"],
        ["bench", "--random", "3", "--choose-from", "experts"],
    ],
    ids=" ".join,
)
def test_gemm_chooses_from_no_space_of_grouped_kernels(commands: Runner, arguments: list[str]) -> None:
    code, text = error_of(commands, *arguments)
    assert code == 2
    assert "'experts' is not one of 'default'" in text
    assert set(SPACES) - set(GEMM_SPACES) == {"experts"}


def test_a_folder_of_a_checkpoint_is_no_kernel(commands: Runner) -> None:
    code, text = error_of(commands, "inspect", NAME)
    assert (code, text) == (2, f"{NAME} does not exist: name a folder or a file of a checkpoint. Nothing is downloaded")


def test_grouped_kernels_are_listed_and_emitted(commands: Runner, tmp_path: Path) -> None:
    listed = json.loads(commands.invoke(args=["list", "--space", "experts", "--json"]).stdout)
    assert [kernel["name"] for kernel in listed["kernels"]] == [config.name for config in GROUPED]
    assert {kernel["scheduler"] for kernel in listed["kernels"]} == {"grouped"}
    built = commands.invoke(args=["list", "--built"])
    assert built.output.count("_grouped\n") == len(GROUPED)
    folder = tmp_path / "sources"
    done = commands.invoke(args=["emit", "--space", "experts", "--cta", "64x8x128", "--output", str(folder)])
    assert done.exit_code == 0, done.output
    names = {config.name for config in GROUPED if str(config.cta) == "64x8x128"}
    assert {path.stem for path in folder.glob("*.cu")} == names
    assert all(KernelConfig.parse(name).is_grouped for name in names)
