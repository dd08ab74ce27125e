"""The blocks that need a GPU run there, with the build that W4A16GEN_BUILD_DIR names."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from docs.pages import PAGES, Block, blocks_of, name_of, with_outputs
from w4a16gen.runtime.folders import BUILD_FOLDER_VARIABLE

pytestmark = pytest.mark.gpu
PYTHON_PAGES = [
    page for page in PAGES if any(block.needs("gpu") and block.language == "python" for block in blocks_of(page))
]
RUN_LINES = [
    (block, line)
    for page in PAGES
    for block in blocks_of(page)
    if block.needs("gpu")
    for line in block.text.splitlines()
    if line.startswith("w4a16gen run ")
]


@pytest.fixture(autouse=True)
def on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip unless there are a GPU and a build; run in an empty folder."""
    if not Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has no NVIDIA GPU")
    if BUILD_FOLDER_VARIABLE not in os.environ:
        pytest.skip(f"{BUILD_FOLDER_VARIABLE} names no build")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", PYTHON_PAGES, ids=name_of)
def test_python_blocks_run_one_after_the_other(page: Path) -> None:
    pytest.importorskip("torch")
    scope: dict[str, Any] = {}
    for block, output in with_outputs(blocks_of(page)):
        if block.language != "python" or block.given_name:
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block.text, str(block), "exec"), scope)  # noqa: S102
        assert output is None or printed.getvalue() == output.text


@pytest.mark.parametrize(("block", "line"), RUN_LINES, ids=str)
def test_problems_run(block: Block, line: str) -> None:
    arguments = line.split()[1:]
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-m", "w4a16gen", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{block}\n{done.stderr}"
