"""The command line: what it prints, where, and in which form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from w4a16gen.cli import builds, main
from w4a16gen.kernels.spaces import enumerate_space
from w4a16gen.runtime.artifact import Build
from w4a16gen.runtime.folders import BUILD_FOLDER_VARIABLE

SHAPE = ["--cta", "128x128x64", "--cluster", "2x1x1"]


def test_list_prints_bare_names_in_a_pipe_and_counts_beside_them(cli: CliRunner) -> None:
    result = cli.invoke(main, ["list", "--space", "trtllm"])
    assert result.exit_code == 0
    assert result.stdout.split() == [config.name for config in enumerate_space("trtllm")]
    assert "63 kernels (21 cs, 21 fgs, 21 fgsz)" in result.stderr


def test_list_as_json_has_the_documented_fields(cli: CliRunner) -> None:
    found = json.loads(cli.invoke(main, ["list", "--json", *SHAPE, "--mode", "fgs"]).stdout)
    assert found == [
        {
            "name": "w4a16_sm90_native_fgs_cta128x128x64_cluster2x1x1_warpgroups2_persistent",
            "target": "native",
            "mode": "fgs",
            "cta": [128, 128, 64],
            "cluster": [2, 1, 1],
            "schedule": "warpgroups2",
            "scheduler": "persistent",
        }
    ]


def test_filters_repeat_and_combine(cli: CliRunner) -> None:
    arguments = ["--mode", "cs", "--mode", "FINEGRAINED_SCALE_ONLY", "--target", "native"]
    assert len(cli.invoke(main, ["list", *SHAPE, *arguments]).stdout.split()) == 2


def test_explain_gives_a_reason_for_everything_left_out(cli: CliRunner) -> None:
    result = cli.invoke(main, ["list", "--explain", "--space", "all", "--cta", "128x8x64", "--json"])
    found = json.loads(result.stdout)
    assert {row["kind"] for row in found} == {"forbidden"}
    assert all(len(row["reason"].split()) > 4 for row in found)
    assert any("below 16" in row["reason"] for row in found)
    left_out = cli.invoke(main, ["list", "--explain", "--cta", "256x64x64", "--cluster", "1x1x1"])
    assert "left out: TensorRT-LLM has CTA channels of 64 and 128" in left_out.stdout


def test_emit_writes_one_kernel_per_mode_and_a_second_time_nothing(cli: CliRunner, tmp_path: Path) -> None:
    first = cli.invoke(main, ["emit", *SHAPE])
    assert first.exit_code == 0
    assert len(first.stdout.split()) == 3
    assert sorted(path.name for path in (tmp_path / "generated").glob("*.cu")) == sorted(
        Path(line).name for line in first.stdout.split()
    )
    assert "3 kernels: 3 written, 0 unchanged" in first.stderr
    second = cli.invoke(main, ["emit", *SHAPE])
    assert second.stdout == first.stdout
    assert "0 written, 3 unchanged" in second.stderr


def test_emit_removes_stale_sources_when_asked(cli: CliRunner, tmp_path: Path) -> None:
    cli.invoke(main, ["emit", "--output", "out"])
    result = cli.invoke(main, ["emit", "--output", "out", "--remove-stale", "--json", *SHAPE])
    assert len(json.loads(result.stdout)["removed"]) == 60
    assert len(list((tmp_path / "out").glob("*.cu"))) == 3


def test_list_built_shows_the_build(cli: CliRunner, fake_build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BUILD_FOLDER_VARIABLE, str(fake_build.folder))
    result = cli.invoke(main, ["list", "--built"])
    assert len(result.stdout.split()) == 63
    assert "in the build" in result.stderr


def test_doctor_as_json(cli: CliRunner) -> None:
    findings = {row["subject"]: row for row in json.loads(cli.invoke(main, ["doctor", "--json"]).stdout)}
    assert findings["nvcc"]["ok"]
    assert findings["CUTLASS headers"]["detail"].endswith("version 4.2.0")
    assert findings["build"]["fix"] == "w4a16gen build"


@pytest.mark.parametrize(
    "command", ["", "list", "emit", "build", "verify", "build-and-verify", "run", "bench", "explain", "doctor"]
)
def test_every_command_has_help_and_json(cli: CliRunner, command: str) -> None:
    result = cli.invoke(main, [*command.split(), "--help"])
    assert result.exit_code == 0
    assert not command or "--json" in result.stdout


def test_doctor_tells_what_building_needs_from_what_running_needs(
    cli: CliRunner, fake_build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(BUILD_FOLDER_VARIABLE, str(fake_build.folder))
    monkeypatch.setattr(builds, "find_driver", lambda: None)
    result = cli.invoke(main, ["doctor", "--json"])
    findings = {row["subject"]: row for row in json.loads(result.stdout)}
    assert not findings["Hopper GPU"]["ok"]
    assert "63 kernels" in findings["build"]["detail"]
    assert result.exit_code == 0, "a build needs no GPU"
