"""Help, version and completion: what they say, and that they import nothing heavy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from fakes.runner import Runner
from paths import ROOT

import w4a16gen
from w4a16gen.cli.app import COMMANDS, SECTIONS, main
from w4a16gen.cli.bench import RIVAL_PACKAGES
from w4a16gen.cli.help import ExampleCommand
from w4a16gen.cli.options import KERNEL_NAME_START
from w4a16gen.cli.reference import reference
from w4a16gen.kernels.spaces import enumerate_space
from w4a16gen.measure.rivals import RIVALS

HEAVY = (
    "numpy",
    "jinja2",
    "rich",
    "matplotlib",
    "cuda",
    "importlib.metadata",
    "psutil",
    "filelock",
    "pybind11",
    "torch",
)
COMPLETIONS = [
    ("", 1, {"list", "build-and-verify", "completion"}),
    ("b", 1, {"build", "build-and-verify", "bench"}),
    ("list --space t", 3, {"trtllm", "trtllm-native"}),
    ("list --mode f", 3, {"fgs", "fgsz"}),
    ("build --target ", 3, {"cutlass", "native"}),
    ("emit --target t", 3, {"trtllm"}),
    ("build --cta 64x8", 3, {"64x8x64", "64x8x128"}),
    ("build --cluster 1x1x", 3, {"1x1x1", "1x1x2", "1x1x4"}),
    ("bench --model llama", 3, {"llama-3-8b", "llama-3-70b"}),
    ("run --config native_cs_cta256x8", 3, {"native_cs_cta256x8x128_cluster1x1x1_warpgroups4_persistent"}),
    (
        "run --config w4a16_sm90_native_cs_cta256x8",
        3,
        {f"{KERNEL_NAME_START}native_cs_cta256x8x128_cluster1x1x1_warpgroups4_persistent"},
    ),
    ("run --config nonsense", 3, set()),
    ("verify --re", 2, {"--report", "--require-gpu"}),
    ("completion ", 2, {"bash", "zsh", "fish"}),
]


def imported_by(arguments: str, environment: dict[str, str], folder: Path) -> tuple[str, set[str]]:
    """Run the command line in a new process; return what it printed and the heavy modules that it imported."""
    program = (
        "import sys, atexit\n"
        f"atexit.register(lambda: print('MODULES', *[m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr))\n"
        "sys.argv[0] = 'w4a16gen'\nfrom w4a16gen.cli import main\nmain()\n"
    )
    finished = subprocess.run(  # noqa: S603
        [sys.executable, "-c", program, *arguments.split()],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    *_, modules = finished.stderr.splitlines()
    assert modules.startswith("MODULES"), finished.stderr
    return finished.stdout, set(modules.split()[1:])


@pytest.mark.parametrize("arguments", ["--help", "--version", *(f"{command} --help" for command in COMMANDS)])
def test_help_imports_nothing_heavy(arguments: str, tmp_path: Path) -> None:
    printed, heavy = imported_by(arguments, {}, tmp_path)
    assert printed
    assert heavy == set()


@pytest.mark.parametrize(("words", "position", "expected"), COMPLETIONS, ids=[row[0] for row in COMPLETIONS])
def test_completion_is_filled_and_imports_nothing_heavy(
    words: str, position: int, expected: set[str], tmp_path: Path
) -> None:
    environment = {
        "_W4A16GEN_COMPLETE": "bash_complete",
        "COMP_WORDS": f"w4a16gen {words}",
        "COMP_CWORD": str(position),
    }
    printed, heavy = imported_by("", environment, tmp_path)
    found = {line.partition(",")[2] for line in printed.split()}
    assert expected <= found
    assert expected or not found
    assert all(value.startswith(words.rsplit(" ", maxsplit=1)[-1]) for value in found)
    assert heavy == set()


def test_the_kernels_of_the_build_are_completed(tmp_path: Path) -> None:
    (tmp_path / "build").mkdir()
    name = f"{KERNEL_NAME_START}native_cs_cta64x8x64_cluster1x2x1_warpgroups2_persistent"
    (tmp_path / "build" / "manifest.json").write_text(f'{{"kernels": [{{"name": "{name}"}}]}}')
    environment = {"_W4A16GEN_COMPLETE": "zsh_complete", "COMP_WORDS": "w4a16gen run --config ", "COMP_CWORD": "3"}
    printed, _ = imported_by("", environment, tmp_path)
    assert printed.split() == ["plain", name, "_", "plain", name.removeprefix(KERNEL_NAME_START), "_"]


def test_the_package_imports_numpy_with_the_first_name_that_needs_it() -> None:
    program = "import sys, w4a16gen; a = 'numpy' in sys.modules; w4a16gen.gemm; print(a, 'numpy' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)  # noqa: S603
    assert printed.stdout.split() == ["False", "True"]


def test_every_public_name_can_be_had() -> None:
    assert sorted(dir(w4a16gen)) == sorted(w4a16gen.__all__)
    for name in w4a16gen.__all__:
        assert getattr(w4a16gen, name) is getattr(w4a16gen, name)
    with pytest.raises(AttributeError, match="no attribute 'gem'"):
        getattr(w4a16gen, "gem")  # noqa: B009


def test_the_list_of_commands_fits_80_columns(cli: Runner) -> None:
    shown = cli.run("--help").stdout
    assert max(map(len, shown.splitlines())) <= 80
    for heading, entries in SECTIONS.items():
        assert f"{heading}:" in shown
        for name, entry in entries.items():
            assert f"  {name:16}  {entry.summary}\n" in shown


def test_without_a_command_there_is_help_and_a_status(cli: Runner) -> None:
    done = cli.run("")
    assert done.exit_code == 2
    assert "Usage: w4a16gen" in done.stderr
    assert done.stdout == ""


def test_version(cli: Runner) -> None:
    assert cli.run("--version").stdout == f"w4a16gen, version {w4a16gen.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_fits_and_has_an_example_and_json(cli: Runner, command: str) -> None:
    shown = cli.run(f"{command} --help").stdout
    head, _, examples = shown.partition("\nExamples:\n")
    assert max(map(len, head.splitlines())) <= 80
    assert "--json" in head
    lines = [line for line in examples.splitlines() if line.strip()]
    assert len(lines) >= 2
    assert len(lines) % 2 == 0
    assert all(line.startswith("  # ") for line in lines[::2])
    assert "(default)" not in shown
    assert "<=x<=" not in shown


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.usefixtures("cli")
def test_the_examples_are_right_calls(command: str, tmp_path: Path) -> None:
    found = main.get_command(None, command)  # type: ignore[arg-type]
    assert isinstance(found, ExampleCommand)
    for line, _ in found.examples:
        words = line.replace('eval "$(', "").replace(')"', "").partition(" > ")[0].split()
        assert words.pop(0) == "w4a16gen"
        assert words[0] in COMMANDS
        for folder in ("generated", "out"):
            (tmp_path / folder).mkdir(exist_ok=True)
        arguments = [word.replace("NAME", enumerate_space("default")[0].name) for word in words[1:]]
        sub = main.get_command(None, words[0])  # type: ignore[arg-type]
        assert sub is not None
        group = click.Context(main, info_name="w4a16gen", **main.context_settings)  # names of --help are inherited
        sub.make_context(words[0], arguments, parent=group)


def test_an_unknown_command_or_option_suggests_a_near_one(cli: Runner) -> None:
    assert "No such command 'emti'. Did you mean emit? See `w4a16gen --help`." in " ".join(
        cli.run("emti").stderr.split()
    )
    assert "--jobs" in cli.run("build --jos 3").stderr


def test_names_that_help_gives_without_importing_them_are_right() -> None:
    assert ", ".join(rival.package for rival in RIVALS) == RIVAL_PACKAGES
    assert all(config.name == KERNEL_NAME_START + config.short_name for config in enumerate_space("all"))


def test_the_command_reference_is_up_to_date() -> None:
    page = (ROOT / "docs" / "reference" / "cli.md").read_text()
    assert page == reference(), "run: python -m w4a16gen.cli.reference docs/reference/cli.md"
