"""What the README says is true: its Python runs, its commands exist, its numbers are those of the spaces."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from w4a16gen.cli import main
from w4a16gen.kernels.spaces import SPACES, enumerate_space

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()


def test_the_python_example_runs() -> None:
    (program,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    scope: dict[str, object] = {}
    exec(program, scope)  # noqa: S102
    assert getattr(scope["c"], "shape", None) == (16, 512)


@pytest.mark.parametrize("command", sorted(set(re.findall(r"`w4a16gen ([a-z-]+)", README))))
def test_every_command_exists(cli: CliRunner, command: str) -> None:
    assert cli.invoke(main, [command, "--help"]).exit_code == 0


def test_the_spaces_have_the_sizes_it_gives() -> None:
    for space in SPACES:
        assert re.search(rf"`{space}` \((the )?{len(enumerate_space(space)):,}[ :]", README)


def test_its_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (Path(__file__).resolve().parents[2] / link).exists()
