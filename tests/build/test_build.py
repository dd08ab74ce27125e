"""The build's machinery, with a stand-in compiler: units, caching, failures, locks, interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from w4a16gen import KernelConfig
from w4a16gen.build.compile import KERNEL_BYTES, MAX_UNIT_KERNELS, UNIT_BYTES, plan_jobs, split_evenly
from w4a16gen.build.pipeline import build
from w4a16gen.cli import main
from w4a16gen.errors import BuildLockedError
from w4a16gen.kernels.spaces import enumerate_space
from w4a16gen.runtime.artifact import Build, Manifest, load_build
from w4a16gen.runtime.library import Library

CONFIGS = enumerate_space("trtllm")[:4]
BUILD_CS = ["build", "--space", "trtllm", "--mode", "cs"]
COMMAND = [
    sys.executable,
    "-m",
    "w4a16gen",
    "build",
    "--space",
    "trtllm",
    "--mode",
    "cs",
    "--cta",
    "64x16x64",
    "--cta",
    "64x32x64",
    "-j",
    "2",
]


def calls(log: Path) -> list[list[str]]:
    """Give the kernels of every call of the stand-in compiler."""
    return [line.split() for line in log.read_text().splitlines()] if log.exists() else []


def run_build(folder: Path, configs: list[KernelConfig], jobs: int = 1) -> int:
    """Build and give how many kernels were compiled."""
    return build(configs, generated=folder / "generated", folder=folder / "build", jobs=jobs).compiled


@pytest.mark.usefixtures("fake_nvcc")
def test_only_what_changed_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "calls"
    monkeypatch.setenv("FAKE_NVCC_LOG", str(log))
    assert run_build(tmp_path, CONFIGS[:3]) == 3
    assert calls(log) == [[config.name for config in CONFIGS[:3]]], "one unit for one job"
    library = load_build(tmp_path / "build").library
    before = library.stat().st_mtime_ns
    assert run_build(tmp_path, CONFIGS[:3]) == 0
    assert library.stat().st_mtime_ns == before, "nothing changed, so nothing is linked"
    assert run_build(tmp_path, CONFIGS) == 1
    assert calls(log)[1:] == [[CONFIGS[3].name]]
    assert Library(load_build(tmp_path / "build")).configs() == CONFIGS


@pytest.mark.usefixtures("fake_nvcc")
def test_a_smaller_build_holds_nothing_of_the_larger(tmp_path: Path) -> None:
    run_build(tmp_path, CONFIGS)
    assert run_build(tmp_path, CONFIGS[:1]) == 1, "its unit held others too"
    assert Library(load_build(tmp_path / "build")).configs() == CONFIGS[:1]
    assert run_build(tmp_path, CONFIGS) == 0, "the larger unit is still there"


@pytest.mark.usefixtures("fake_nvcc")
def test_a_damaged_object_record_is_compiled_again(tmp_path: Path) -> None:
    run_build(tmp_path, CONFIGS[:1])
    (record,) = (tmp_path / "build" / "objects").glob("*.json")
    record.write_text("{")
    assert run_build(tmp_path, CONFIGS[:1]) == 1


@pytest.mark.usefixtures("fake_nvcc")
def test_a_failing_kernel_is_named_and_does_not_stop_the_others(
    cli: CliRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = "cs_cta64x32x64"
    monkeypatch.setenv("FAKE_NVCC_FAIL", failing)
    result = cli.invoke(
        main,
        [*BUILD_CS, "--cta", "64x16x64", "--cta", "64x32x64", "--cta", "128x16x64", "--cluster", "1x1x1"],
    )
    assert result.exit_code == 1, result.output
    output = " ".join(result.output.split())
    assert "1 kernels failed to compile" in output
    assert f"w4a16_sm90_cutlass_{failing}_cluster1x1x1_pingpong_persistent" in output
    assert "error: this kernel cannot be compiled" in output
    built = load_build(tmp_path / "build")
    assert [str(config.cta) for config in built.configs] == ["64x16x64", "128x16x64"]
    assert len(built.manifest.failed) == 1
    (log,) = (tmp_path / "build" / "logs").glob(f"*{failing}*.log")
    assert "cannot be compiled" in log.read_text()
    monkeypatch.delenv("FAKE_NVCC_FAIL")
    assert cli.invoke(main, [*BUILD_CS, "--cta", "64x32x64", "--json"]).exit_code == 0


@pytest.mark.usefixtures("fake_nvcc")
def test_when_every_kernel_fails_there_is_no_build(
    cli: CliRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_NVCC_FAIL", "w4a16")
    result = cli.invoke(main, [*BUILD_CS, "--cta", "64x16x64"])
    assert result.exit_code == 1
    assert not (tmp_path / "build" / "manifest.json").exists()
    assert not list((tmp_path / "build" / "objects").iterdir())


@pytest.mark.usefixtures("fake_nvcc")
def test_two_builds_in_one_folder_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "calls"
    environment = {**os.environ, "FAKE_NVCC_LOG": str(log), "FAKE_NVCC_SLEEP": "150"}
    with subprocess.Popen(COMMAND, cwd=tmp_path, env=environment, stderr=subprocess.PIPE) as first:  # noqa: S603
        wait_for(lambda: bool(calls(log)))
        monkeypatch.setenv("FAKE_NVCC_SLEEP", "0")
        with pytest.raises(BuildLockedError, match="another process is building"):
            run_build(tmp_path, CONFIGS[:1])
        second = subprocess.run(COMMAND, cwd=tmp_path, capture_output=True, text=True, check=False)  # noqa: S603
        assert second.returncode == 1
        assert "another process is building" in " ".join(second.stderr.split())
        first.send_signal(signal.SIGTERM)
        assert first.wait(timeout=60) == 130


@pytest.mark.usefixtures("fake_nvcc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminated"])
def test_an_interrupted_build_leaves_nothing_half_written_and_goes_on(tmp_path: Path, how: signal.Signals) -> None:
    log = tmp_path / "calls"
    environment = {**os.environ, "FAKE_NVCC_LOG": str(log), "FAKE_NVCC_SLEEP": "150"}
    with subprocess.Popen(  # noqa: S603
        COMMAND,
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,  # noqa: PLW1509
    ) as process:
        wait_for(lambda: len(calls(log)) == 2)
        process.send_signal(how)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in errors
    assert not list((tmp_path / "build" / "objects").iterdir())
    assert not (tmp_path / "build" / "manifest.json").exists()
    finished = subprocess.run(COMMAND, cwd=tmp_path, capture_output=True, text=True, check=False)  # noqa: S603
    assert finished.returncode == 0, finished.stderr
    assert "2 kernels compiled, 0 up to date" in " ".join(finished.stderr.split())


def heed_interrupts() -> None:
    """Undo what a background shell job inherits: an ignored SIGINT, which Python then leaves ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_manifest_says_what_each_kernel_cost(fake_build: Build) -> None:
    manifest = fake_build.manifest
    assert len(manifest.kernels) == 63
    for kernel in manifest.kernels:
        assert kernel.compile_cpu_seconds >= 0
        assert kernel.compile_peak_bytes > 1e6
        assert 1 <= kernel.unit_kernels <= MAX_UNIT_KERNELS
    assert Manifest.from_json(json.loads(json.dumps(manifest.as_json()))) == manifest


@pytest.mark.parametrize(
    ("kernels", "cores", "memory", "expected"),
    [
        (0, 8, 1e12, (0, 0)),
        (1, 8, 1e12, (1, 1)),
        (63, 16, 1e12, (16, 16)),
        (63, 2, 24e9, (8, 2)),
        (63, 2, UNIT_BYTES, (63, 1)),
        (63, 2, 0, (63, 1)),
        (24, 2, 24e9, (4, 2)),
        (63, 64, 64e9, (63, 16)),
    ],
)
def test_units_fit_cores_and_memory(kernels: int, cores: int, memory: float, expected: tuple[int, int]) -> None:
    units, jobs = plan_jobs(kernels, cores, memory)
    assert (units, jobs) == expected
    if memory > UNIT_BYTES and kernels:
        largest = max(len(part) for part in split_evenly(enumerate_space("trtllm")[:kernels], units))
        assert jobs * (UNIT_BYTES + KERNEL_BYTES * (largest - 1)) <= memory


def test_units_cover_everything_once() -> None:
    configs = enumerate_space("trtllm")
    parts = split_evenly(configs, 8)
    assert [config for part in parts for config in part] == configs
    assert {len(part) for part in parts} == {7, 8}
