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
from fakes.workshop import CONFIGS, Workshop
from processes import heed_interrupts

from w4a16gen.build.link import STEPS
from w4a16gen.build.pipeline import build, compiled
from w4a16gen.build.units import COMPILE_COSTS, CompileCost, functions_of, plan_jobs, plan_units, split_evenly
from w4a16gen.cli import main
from w4a16gen.errors import BuildLockedError
from w4a16gen.kernels.config import Target
from w4a16gen.kernels.spaces import enumerate_space
from w4a16gen.runtime.artifact import Build, Manifest, load_build

pytestmark = pytest.mark.compile

CUTLASS_COST = COMPILE_COSTS[Target.CUTLASS]
NATIVE_COST = COMPILE_COSTS[Target.NATIVE]
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
    """Return the kernels of every call of the stand-in compiler."""
    return [line.split() for line in log.read_text().splitlines()] if log.exists() else []


def test_what_is_compiled_is_known_before_a_build(workshop: Workshop) -> None:
    assert compiled(CONFIGS, workshop.folder) == set()
    workshop.build(CONFIGS[:2])
    assert compiled(CONFIGS, workshop.folder) == set(CONFIGS[:2])
    assert compiled(CONFIGS[:1], workshop.folder) == set(), "its object has another kernel that is not asked for"
    workshop.build(CONFIGS)
    assert calls(workshop.calls)[-1] == [config.name for config in CONFIGS[2:]]


def test_only_what_changed_is_compiled_again(workshop: Workshop) -> None:
    assert workshop.build(CONFIGS[:3]).compiled == 3
    assert calls(workshop.calls) == [[config.name for config in CONFIGS[:3]]], "one unit for one job"
    library = load_build(workshop.folder).library
    before = library.stat().st_mtime_ns
    assert workshop.build(CONFIGS[:3]).compiled == 0
    assert load_build(workshop.folder).library == library
    assert library.stat().st_mtime_ns == before, "nothing changed, so nothing is linked"
    assert workshop.build(CONFIGS).compiled == 1
    assert calls(workshop.calls)[1:] == [[CONFIGS[3].name]]
    assert workshop.built() == CONFIGS


def test_a_smaller_build_contains_nothing_of_the_larger(workshop: Workshop) -> None:
    workshop.build(CONFIGS)
    assert workshop.build(CONFIGS[:1]).compiled == 1, "its unit contained others too"
    assert workshop.built() == CONFIGS[:1]
    assert workshop.build(CONFIGS).compiled == 0, "the larger unit is still there"
    assert workshop.built() == CONFIGS


def test_progress_knows_its_total_from_the_start_and_counts_linking(workshop: Workshop) -> None:
    told: list[tuple[int, int, str]] = []
    build(
        CONFIGS[:2],
        generated=workshop.generated,
        folder=workshop.folder,
        jobs=2,
        progress=lambda done, total, what: told.append((done, total, what)),
    )
    assert {total for _, total, _ in told} == {2 + len(STEPS)}
    assert told[0] == (0, 4, "compiling")
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
    assert (2, 4, "linking") in told
    assert told[-1][0] == 4


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
    assert "1 kernel failed to compile" in output
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
            build(CONFIGS[:1], generated=tmp_path / "generated", folder=tmp_path / "build", jobs=1)
        second = subprocess.run(COMMAND, cwd=tmp_path, capture_output=True, text=True, check=False)  # noqa: S603
        assert second.returncode == 1
        assert "another process is building" in " ".join(second.stderr.split())
        first.send_signal(signal.SIGTERM)
        assert first.wait(timeout=60) == 130


@pytest.mark.usefixtures("fake_nvcc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=["ctrl-c", "terminated", "hung-up"])
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


@pytest.mark.usefixtures("fake_nvcc")
def test_a_build_that_ignores_hang_ups_goes_on(tmp_path: Path) -> None:
    log = tmp_path / "calls"
    environment = {**os.environ, "FAKE_NVCC_LOG": str(log), "FAKE_NVCC_SLEEP": "2"}
    with subprocess.Popen(["nohup", *COMMAND], cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL) as process:  # noqa: S603, S607
        wait_for(lambda: bool(calls(log)))
        process.send_signal(signal.SIGHUP)
    assert process.returncode == 0


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
        assert 1 <= kernel.unit_kernels <= CUTLASS_COST.max_functions
    assert Manifest.from_json(json.loads(json.dumps(manifest.as_json()))) == manifest


@pytest.mark.parametrize(
    ("kernels", "cores", "memory", "cost", "expected"),
    [
        (0, 8, 1e12, CUTLASS_COST, (0, 0)),
        (1, 8, 1e12, CUTLASS_COST, (1, 1)),
        (63, 16, 1e12, CUTLASS_COST, (16, 16)),
        (63, 2, 24e9, CUTLASS_COST, (8, 2)),
        (63, 2, CUTLASS_COST.unit_bytes, CUTLASS_COST, (63, 1)),
        (63, 2, 0, CUTLASS_COST, (63, 1)),
        (24, 2, 24e9, CUTLASS_COST, (4, 2)),
        (63, 64, 64e9, CUTLASS_COST, (63, 16)),
        (60, 16, 8e9, NATIVE_COST, (16, 16)),
        (60, 128, 6e9, NATIVE_COST, (60, 17)),
    ],
)
def test_units_fit_cores_and_memory(
    kernels: int, cores: int, memory: float, cost: CompileCost, expected: tuple[int, int]
) -> None:
    units, jobs = plan_jobs(kernels, cores, memory, cost)
    assert (units, jobs) == expected
    if memory > cost.unit_bytes and kernels:
        largest = max(len(part) for part in split_evenly(enumerate_space("trtllm")[:kernels], units))
        assert jobs * cost.peak_bytes(largest) <= memory


def test_units_cover_everything_once() -> None:
    configs = enumerate_space("trtllm")
    parts = split_evenly(configs, 8)
    assert [config for part in parts for config in part] == configs
    assert {len(part) for part in parts} == {7, 8}


@pytest.mark.parametrize(("cores", "units"), [(1, 12), (2, 12), (4, 12), (8, 16), (64, 64), (512, 237)])
def test_native_units_take_about_the_same_time(cores: int, units: int) -> None:
    configs = enumerate_space("default")
    planned = plan_units(configs, cores, memory=float("inf"))
    assert [config for unit in planned for config in unit] == configs
    sizes = [sum(map(functions_of, unit)) for unit in planned]
    assert len(sizes) <= units
    most = max(map(functions_of, configs))
    assert max(sizes) < sum(sizes) / units + most


def test_a_unit_is_of_one_family() -> None:
    configs = [*enumerate_space("trtllm")[:5], *enumerate_space("default")[:5]]
    units = plan_units(configs, cores=2, memory=24e9)
    assert sorted(config for unit in units for config in unit) == sorted(configs)
    assert [{config.target for config in unit} for unit in units] == [{Target.CUTLASS}] * 2 + [{Target.NATIVE}] * 2
