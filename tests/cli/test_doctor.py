"""`doctor`: what is there, what is missing, how much that matters, and how to fix it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from fakes.devices import A100, H100
from fakes.runner import Runner

from w4a16gen.build import versions
from w4a16gen.build.diagnose import Finding as Check
from w4a16gen.cli.services import Services
from w4a16gen.runtime.artifact import Build
from w4a16gen.runtime.devices import Driver
from w4a16gen.runtime.folders import BUILD_FOLDER_VARIABLE


def findings(cli: Runner, arguments: str = "") -> tuple[int, dict[str, dict[str, Any]]]:
    """Return the exit code and the findings by subject."""
    done = cli.run(f"doctor --json {arguments}")
    return done.exit_code, {found["subject"]: found for found in json.loads(done.stdout)["findings"]}


@pytest.fixture
def here(cli: Runner) -> Runner:
    """Return a runner on this machine, as if it had no driver."""
    cli.services = Services(find_driver=lambda: None)
    versions.program_version.cache_clear()
    return cli


@pytest.fixture
def alone(cli: Runner) -> Runner:
    """Return a runner on a machine without a driver, with every tool of a build."""
    cli.services = Services(find_driver=lambda: None, diagnose=lambda: [Check("nvcc", ok=True, detail="/usr/bin/nvcc")])
    return cli


@pytest.mark.compile
def test_this_machine_can_compile(here: Runner) -> None:
    code, found = findings(here)
    assert code == 0
    assert found["trial compilation"]["level"] == "ok"


def test_a_missing_gpu_or_build_is_a_note(alone: Runner) -> None:
    code, found = findings(alone)
    assert code == 0
    assert found["NVIDIA driver"]["level"] == "note"
    assert found["build"]["level"] == "note"
    assert found["build"]["fix"] == "w4a16gen build"
    assert found["nvcc"]["level"] == "ok"


@pytest.mark.parametrize(("gpu", "level"), [(H100, "ok"), (A100, "note")])
def test_the_gpu_is_named(cli: Runner, gpu: Any, level: str) -> None:
    cli.services = Services(find_driver=lambda: Driver((13, 0), (gpu,)), diagnose=list)
    code, found = findings(cli)
    assert code == 0
    assert found["Hopper GPU"]["level"] == level
    assert gpu.name in found["Hopper GPU"]["detail"]
    assert "132 SMs" in found["Hopper GPU"]["detail"] or gpu is A100


def old_nvcc(tmp_path: Path) -> Path:
    script = tmp_path / "old_nvcc"
    script.write_text('#!/bin/sh\necho "Cuda compilation tools, release 12.4, V12.4.131"\n')
    script.chmod(0o755)
    return script


def test_fixes_are_printed_as_they_are_typed(here: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("W4A16GEN_NVCC", str(old_nvcc(tmp_path)))
    done = here.run("doctor")
    assert done.exit_code == 3
    assert "MISSING  nvcc: " in done.stdout
    assert "'cuda-toolkit[cccl," in done.stdout, "brackets are no markup"
    assert str(tmp_path / "old_nvcc") in done.stdout, "paths are whole"


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("CXX", "no-such-compiler"),
        ("W4A16GEN_NVCC", "/nowhere/nvcc"),
        ("W4A16GEN_NVCC", __file__),
        ("W4A16GEN_NVCC", "/"),
    ],
)
def test_it_does_not_stop_at_what_it_is_there_to_find(
    here: Runner, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    code, found = findings(here)
    assert code == 3
    missing = [finding for finding in found.values() if finding["level"] == "missing"]
    assert missing
    assert all(finding["fix"] for finding in missing)
    assert {"build", "build folder", "NVIDIA driver"} <= found.keys()


def test_a_damaged_build_is_a_fault_and_an_unusable_folder_is_named(alone: Runner, tmp_path: Path) -> None:
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "manifest.json").write_text("{")
    code, found = findings(alone, "--build-dir damaged")
    assert (code, found["build"]["level"]) == (3, "missing")
    assert "damaged/manifest.json" in found["build"]["detail"]
    (tmp_path / "file").touch()
    code, found = findings(alone, "--build-dir file/deeper")
    assert code == 3
    assert found["build folder"]["detail"] == f"{tmp_path / 'file'} is not a folder"


def test_a_machine_with_a_build_needs_no_compiler(
    here: Runner, fake_build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv(BUILD_FOLDER_VARIABLE, str(fake_build.folder))
    code, found = findings(here)
    assert code == 0
    assert found["host compiler"]["level"] == "note"
    assert found["build"] == {
        "subject": "build",
        "level": "ok",
        "detail": f"63 kernels in {fake_build.folder}",
        "fix": "",
    }


def test_the_build_of_an_installed_wheel_is_found(
    alone: Runner, fake_build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "w4a16gen_kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "build").symlink_to(fake_build.folder)
    monkeypatch.syspath_prepend(str(package.parent))
    assert "w4a16gen_kernels" not in sys.modules
    code, found = findings(alone)
    assert code == 0
    assert found["build"]["detail"] == f"63 kernels in {package / 'build'}"
