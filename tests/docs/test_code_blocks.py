"""Every code block of README and manual runs here, or says what it needs that is not here."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import pytest
from conftest import install_fake_nvcc
from fakes.library import FakeLibrary
from fakes.runner import Runner
from paths import EXAMPLES, ROOT

from docs.checkpoints import FOLDERS, MODELS, tensors
from docs.pages import PAGES, Block, blocks_of, name_of, with_outputs
from w4a16gen import __version__
from w4a16gen.build import toolchain, versions
from w4a16gen.cli.services import Services
from w4a16gen.kernels.spaces import enumerate_space
from w4a16gen.runtime.artifact import Build

PROGRESS = re.compile(r"Building \d+ kernels: step \d+ of \d+|")
"""Lines that a terminal shows as a bar."""
CPP_HEADERS = ROOT / "w4a16gen" / "cuda"
RUNNER = CPP_HEADERS / "sdk" / "runner.h"
RUN_BY_CI = ("main command", "test command")
SYNOPSES = ("docs/reference/cli.md", "docs/reference/json.md")
"""Pages whose blocks of text show how commands are written; the first is generated."""
NEEDS = ("gpu", "network", "nvcc", "cluster")
GIVEN = ("gptq", "awq", "compressed-tensors", *FOLDERS, *MODELS)
CPP_EXAMPLE = Path(__file__).with_name("example.cpp.jinja")
"""A function around a C++ block, and the variables that the README takes for declared."""
NETWORK_COMMANDS = (
    r"git clone https://github\.com/w4a16gen/w4a16gen( && cd w4a16gen)?",
    r"python3 -m venv \.venv && \. \.venv/bin/activate",
    r"pip install (-e )?'?(\.|w4a16gen)(\[(?P<extra>\w+)\])?'?",
    r"pip wheel --no-deps --wheel-dir dist \.",
    rf"pip install dist/w4a16gen(_kernels)?-{re.escape(__version__)}-[\w.-]+\.whl",
)
"""What blocks that need a network may do; they are read, not run."""


def every_block() -> list[Block]:
    return [block for page in PAGES for block in blocks_of(page)]


def pages_with(language: str) -> list[Path]:
    return [page for page in PAGES if any(is_run(block, language) for block in blocks_of(page))]


def is_run(block: Block, language: str) -> bool:
    """Return whether a block runs on a machine without GPU and network."""
    return block.language == language and block.marker not in (*RUN_BY_CI, "needs", "output")


@pytest.mark.parametrize("block", every_block(), ids=str)
def test_every_block_is_run_or_says_what_it_needs(block: Block) -> None:
    if block.language == "text" and not block.marker:
        assert name_of(block.page) in SYNOPSES
    elif block.marker == "needs":
        assert block.argument in NEEDS
    elif block.marker == "given":
        assert block.argument in GIVEN
    elif block.is_output:
        assert block.language in ("text", "json")
        assert block.argument in ("", "relaxed")
    else:
        assert block.marker in ("", *RUN_BY_CI)
        assert block.language in ("python", "bash", "c", "cpp", "cmake")


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch")
@pytest.mark.parametrize("page", pages_with("python"), ids=name_of)
def test_python_blocks_run_one_after_the_other(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if any("import torch" in block.text for block in blocks_of(page) if is_run(block, "python")):
        pytest.importorskip("torch")
    for package in {block.given_name for block in blocks_of(page)} & set(MODELS) and ("transformers", "gguf"):
        pytest.importorskip(package, exc_type=ImportError)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    for block, output in with_outputs(blocks_of(page)):
        if not is_run(block, "python"):
            continue
        if block.given_name:
            scope |= tensors(block.given_name)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block.text, str(block), "exec"), scope)  # noqa: S102
        check_output(block, output, printed.getvalue())


@pytest.fixture(scope="session")
def manual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for all pages, with `w4a16gen`, which is this package, in `tools`, and a place to work."""
    folder = tmp_path_factory.mktemp("manual")
    command = folder / "tools" / "w4a16gen"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m w4a16gen "$@"\n')
    command.chmod(0o755)
    (folder / "work").mkdir()
    return folder


@pytest.fixture
def workspace(manual: Path, fake_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The place to work, while `w4a16gen` is on PATH, and builds use the stand-in compiler."""
    install_fake_nvcc(manual, fake_cache, monkeypatch)
    monkeypatch.setenv("PATH", f"{manual / 'tools'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("W4A16GEN_BUILD_DIR", "W4A16GEN_KERNELS"):
        monkeypatch.delenv(name, raising=False)
    yield manual / "work"
    versions.program_version.cache_clear()


@pytest.mark.compile
@pytest.mark.parametrize("page", pages_with("bash"), ids=name_of)
def test_bash_blocks_run_one_after_the_other(page: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    if page.name != "quickstart.md":  # which builds itself
        shell("w4a16gen build", workspace)
    for block, output in with_outputs(blocks_of(page)):
        if is_run(block, "bash"):
            if block.given_name:
                tensors(block.given_name)
            check_output(block, output, shell(block.text, workspace))


@pytest.mark.compile
def test_blocks_that_need_nvcc_run_beside_a_real_build(real_build: Build, workspace: Path) -> None:
    assert workspace.exists()  # and with it `w4a16gen` on PATH
    for page in PAGES:
        for block, output in with_outputs(blocks_of(page)):
            if block.needs("nvcc"):
                printed = shell(block.text, real_build.folder.parent)
                if not Path("/dev/nvidiactl").exists():  # the page shows what machines without a GPU print
                    check_output(block, output, printed)


def shell(script: str, folder: Path) -> str:
    """Run a script and return what it printed on both streams."""
    command = ["bash", "-euo", "pipefail", "-c", script]
    done = subprocess.run(  # noqa: S603
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}"
    return done.stdout


def check_output(block: Block, output: Block | None, printed: str) -> None:
    """Fail if a block prints something else than the page shows."""
    if output is None:
        return
    shown = [line.rstrip() for line in output.text.strip().splitlines()]
    lines = [line.rstrip() for line in printed.strip().splitlines() if not PROGRESS.fullmatch(line)]
    found = "\n".join(lines)
    if output.argument == "relaxed":
        shown, found = [relaxed(line) for line in shown], relaxed(found)
    pattern = "".join(r"(?:.*\n)*?" if line == "..." else f"{re.escape(line)}\n" for line in shown)
    assert re.fullmatch(pattern, found + "\n"), f"{block} prints\n{found}"


def relaxed(text: str) -> str:
    """Return a text without its numbers, its paths, and the widths that follow from them."""
    text = re.sub(r"[\w.~+-]*(/[\w.~+-]+)+", "PATH", text)
    text = re.sub(r"\d[\d.,]*", "N", text)
    return re.sub(r"[ \u2500\u2501]+", " ", text)


@pytest.mark.parametrize("block", [block for block in every_block() if block.language in ("c", "cpp")], ids=str)
def test_c_and_cpp_blocks_compile(block: Block, tmp_path: Path) -> None:
    tools = toolchain.find_toolchain()
    (tmp_path / "w4a16").mkdir()
    (tmp_path / "w4a16" / "runner.h").write_text(f'#include "{RUNNER}"\n')
    text = block.text
    if "main(" not in text:
        head, rest = text.split("\n\n", 1)
        text = jinja2.Template(CPP_EXAMPLE.read_text()).render(head=head, rest=rest)  # C++, not HTML
    source = tmp_path / f"program.{block.language}"
    source.write_text(text)
    compiler = [str(tools.host_compiler), *(["-x", "c"] if block.language == "c" else ["-std=c++17"])]
    command = [*compiler, "-fsyntax-only", "-Wall", "-Wextra", "-Werror", f"-I{tmp_path}", f"-I{CPP_HEADERS}"]
    done = subprocess.run(  # noqa: S603
        [*command, "-isystem", str(tools.cuda_include), str(source)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("block", [block for block in every_block() if block.language == "cmake"], ids=str)
def test_cmake_blocks_are_those_of_the_example(block: Block) -> None:
    example = without_targets((EXAMPLES / "cpp" / "CMakeLists.txt").read_text())
    assert [line for line in without_targets(block.text) if line not in example] == []


def without_targets(text: str) -> list[str]:
    """Return the lines of a CMake file, without the names of the programs that are linked."""
    return [re.sub(r"(target_link_libraries)\(\S+", r"\1(TARGET", line.strip()) for line in text.splitlines()]


@pytest.mark.parametrize("block", [block for block in every_block() if block.needs("network")], ids=str)
def test_blocks_that_need_a_network_install_what_there_is(block: Block) -> None:
    project = (ROOT / "pyproject.toml").read_text()
    for line in block.text.splitlines():
        found = [match for command in NETWORK_COMMANDS if (match := re.fullmatch(command, line))]
        assert found, line
        extra = found[0].groupdict().get("extra")
        assert extra is None or re.search(rf"^{extra} = \[", project, re.MULTILINE), extra


CLUSTER_LINES = [
    line
    for block in every_block()
    if block.needs("cluster")
    for line in block.text.splitlines()
    if line.startswith("w4a16gen ")
]


@pytest.mark.parametrize("line", CLUSTER_LINES)
def test_commands_for_a_cluster_are_understood(cli: Runner, tmp_path: Path, line: str) -> None:
    def connect(*_: Any) -> Any:
        raise KeyboardInterrupt  # now the options have been read

    (tmp_path / "env.json").write_text("{}")
    library = FakeLibrary(enumerate_space("default")[:1])
    cli.services = Services(load=lambda _folder: library, connect=connect)
    assert cli.run(line.removeprefix("w4a16gen ")).exit_code == 130


def test_the_readme_has_the_two_commands_that_ci_reads() -> None:
    found = {block.marker: block.text for block in blocks_of(ROOT / "README.md") if block.marker in RUN_BY_CI}
    assert set(found) == set(RUN_BY_CI)
    assert all(text.startswith("python3 -m venv .venv && .venv/bin/pip install ") for text in found.values())
    assert found["main command"].endswith(".venv/bin/w4a16gen build-and-verify\n")
    assert found["test command"].endswith(".venv/bin/pytest\n")
