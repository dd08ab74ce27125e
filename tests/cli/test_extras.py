"""Without the extra `build`: what runs all the same, and what each other command says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fakes.checkpoints.cases import CASES
from paths import ROOT

from w4a16gen.runtime.artifact import Build

BLOCKED = ("jinja2", "psutil", "pybind11", "cuda", "matplotlib", "torch", "safetensors", "hypothesis", "ray")
PROGRAM = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
sys.argv[0] = "w4a16gen"
from w4a16gen.cli import main
main()
"""


def run_without(arguments: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process that lacks the packages of all extras."""
    command = [sys.executable, "-c", PROGRAM, *arguments]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=variables)  # noqa: S603


@pytest.mark.parametrize(
    "arguments",
    [
        "--help",
        "list --mode fgs",
        "explain 16 4096 4096",
        "inspect checkpoint",
        "convert checkpoint out",
        "clean",
        "completion bash",
    ],
)
def test_this_needs_no_extra(arguments: str, tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    CASES["awq-gemm"](tmp_path / "checkpoint", np.random.default_rng(1))
    done = run_without(arguments.split(), tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", ["emit", "build", "build-and-verify"])
def test_a_command_names_the_extra_that_it_needs(arguments: str, tmp_path: Path) -> None:
    done = run_without(arguments.split(), tmp_path)
    assert done.returncode == 3
    assert "is not installed, which this needs: pip install 'w4a16gen[build]'" in done.stderr
    assert not list(tmp_path.rglob("*.cu"))


@pytest.mark.parametrize("arguments", [["export", "--prefix", "sdk"], ["verify"]])
def test_what_reads_a_build_names_the_extra_too(arguments: list[str], fake_build: Build, tmp_path: Path) -> None:
    done = run_without(arguments, tmp_path, W4A16GEN_BUILD_DIR=str(fake_build.folder))
    assert done.returncode == 3
    assert "pip install" in done.stderr


def test_doctor_runs_without_the_extra(tmp_path: Path) -> None:
    done = run_without(["doctor", "--json"], tmp_path, PATH="/usr/bin:/bin")
    assert done.returncode in (0, 3), done.stderr  # 0 where the system has a toolkit
    findings = {finding["subject"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert "nvcc" in findings
    assert "pybind11" in findings


def test_calls_need_no_extra(tmp_path: Path) -> None:
    program = PROGRAM.replace("from w4a16gen.cli import main\nmain()\n", "") + (
        "import numpy, w4a16gen\n"
        "packed = w4a16gen.pack_weight(w4a16gen.quantize(numpy.eye(64, 256), group_size=128))\n"
        "assert (w4a16gen.gemm(numpy.ones((4, 256), numpy.float16), packed) == 1).all()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path)  # noqa: S603
    assert done.returncode == 0, done.stderr
