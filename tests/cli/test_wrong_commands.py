"""Wrong commands, one row each: a clear error that names value, rule and way out, and nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from w4a16gen import Library
from w4a16gen.cli import main
from w4a16gen.runtime.artifact import Build
from w4a16gen.runtime.folders import BUILD_FOLDER_VARIABLE

FGS = "w4a16_sm90_cutlass_fgs_cta128x64x64_cluster1x1x1_cooperative_streamk"
CS = "w4a16_sm90_cutlass_cs_cta64x16x64_cluster1x1x1_pingpong_persistent"

WITHOUT_BUILD = [
    ("emit --cta 7x7x7", 2, "CTA channels of 7 must be one of 64, 128, 256"),
    ("emit --cta 128x128", 2, "must be CHANNELSxTOKENSxK"),
    ("emit --target cutlass --cta 128x8x64", 2, "does not compile below 16"),
    ("emit --cta 128x16x32", 2, "needs four k16 steps"),
    ("emit --cta 256x256x64", 2, "no legal kernel matches --cta 256x256x64"),
    ("emit --cta 256x128x64 --space trtllm", 2, "is legal, but not in space trtllm: use --space default"),
    ("emit --cluster 4x4x1 --space all", 2, "the portable limit is 8"),
    ("emit --cluster 1x1x2 --space trtllm-native", 2, "is legal, but not in space trtllm-native: use --space default"),
    ("emit --cluster 1x1x2 --target cutlass", 2, "split K through stream-K"),
    ("emit --cluster 3x1x1", 2, "cluster channels of 3 must be one of 1, 2, 4"),
    ("emit --cta 64x64x64 --cluster 2x1x1 --space trtllm", 2, "but not in space trtllm: use --space native"),
    ("emit --mode int8", 2, "'int8' is not one of cs, fgs, fgsz"),
    ("emit --target marlin", 2, "'marlin' is not one of cutlass, native"),
    ("emit --space everything", 2, "is not one of 'default', 'trtllm-native', 'trtllm'"),
    ("emit --output a_file", 2, "is a file"),
    ("emit --output /proc/read_only", 1, "/proc/read_only"),
    ("emit --output /dev/null", 2, "/dev/null is no folder: name another folder"),
    ("report /dev/null", 2, "/dev/null is no folder: name another folder"),
    ("emti", 2, "No such command 'emti'"),
    ("build --jobs 0", 2, "'0' must be a whole number from 1"),
    ("build --build-dir /proc/read_only", 1, "/proc/read_only"),
    ("verify", 3, "No build found in build. Run `w4a16gen build`"),
    ("verify --build-dir elsewhere", 3, "No build found in elsewhere"),
    ("run 16 512 512 --build-dir elsewhere", 3, "No build found in elsewhere"),
    ("run -1 512 512", 2, "No such option"),
    ("run 16 512", 2, "Missing argument 'K'"),
    ("run 16 512 many", 2, "'many' must be a whole number from 1"),
    ("list --built", 3, "No build found in build"),
]
WITH_BUILD = [
    ("run 16 12 512", 2, "n of 12 must be a positive multiple of 8"),
    ("run 16 512 500", 2, "k of 500 must be a positive multiple of 8"),
    ("run 16 512 576 --group-size 96", 2, "group size 96 must be 576 (= k) or a multiple of 64 that divides k"),
    ("run 16 512 576 --group-size 128", 2, "group size 128 must be 576 (= k)"),
    ("run 16 512 512 --mode cs --group-size 64", 2, "per-column mode has one scale per channel"),
    ("run 16 512 512 --config nonsense", 2, "nonsense' is not a kernel name"),
    (f"run 16 512 512 --mode fgs --config {CS}", 2, "pass --mode cs"),
    (f"run 16 512 576 --group-size 96 --config {FGS}", 2, "cannot run 16x512x576, group size 96"),
    (f"run 16 512 512 --config {FGS.replace('128x64x64', '256x64x64')}", 3, "is not in"),
    ("list --built --cta 128x8x64", 2, "the build has no kernel with --cta 128x8x64"),
]


@pytest.mark.parametrize(("arguments", "code", "text"), WITHOUT_BUILD, ids=[row[0] for row in WITHOUT_BUILD])
def test_a_wrong_command_fails_clearly_and_leaves_nothing(
    cli: CliRunner, tmp_path: Path, arguments: str, code: int, text: str
) -> None:
    (tmp_path / "a_file").touch()
    result = cli.invoke(main, arguments.split())
    assert result.exit_code == code, result.output
    assert text in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["a_file"]


EMPTY = [
    ("emit --output", "a folder"),
    ("build --build-dir", "a folder"),
    ("build --generated-dir", "a folder"),
    ("clean --build-dir", "a folder"),
    ("export --prefix", "a folder"),
    ("export --wheel", "a folder"),
    ("verify --report", "a file"),
    ("audit", "a folder"),
    ("inspect", "a folder or a file"),
    ("convert model", "a folder or a file"),
    ("tune --file", "a file"),
]


@pytest.mark.parametrize(("arguments", "what"), EMPTY, ids=[row[0] for row in EMPTY])
def test_an_empty_path_is_not_the_current_folder(cli: CliRunner, tmp_path: Path, arguments: str, what: str) -> None:
    result = cli.invoke(main, [*arguments.split(), ""])
    assert result.exit_code == 2, result.output
    assert f"an empty text must name {what}. See" in " ".join(result.output.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["nothing", "link"])
def test_a_link_to_nothing_is_no_folder(cli: CliRunner, tmp_path: Path, target: str) -> None:
    (tmp_path / "link").symlink_to(target)
    result = cli.invoke(main, ["emit", "--output", "link"])
    assert result.exit_code == 2, result.output
    assert "link is a link to nothing: name another folder" in " ".join(result.output.split())
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("tune --file endless", "endless is no list of problems, it has more than 16 MiB: write one MxNxK"),
        ("build --ray auto --ray-env endless", "endless is not JSON (it has more than 16 MiB): it must be an object"),
    ],
)
def test_an_endless_file_is_refused(cli: CliRunner, tmp_path: Path, arguments: str, text: str) -> None:
    (tmp_path / "endless").symlink_to("/dev/zero")
    result = cli.invoke(main, arguments.split())
    assert result.exit_code == 2, result.output
    assert text in " ".join(result.output.split())


@pytest.mark.parametrize(("arguments", "code", "text"), WITH_BUILD, ids=[row[0] for row in WITH_BUILD])
def test_a_wrong_command_on_a_build_fails_clearly(
    cli: CliRunner, fake_build: Build, monkeypatch: pytest.MonkeyPatch, arguments: str, code: int, text: str
) -> None:
    monkeypatch.setenv(BUILD_FOLDER_VARIABLE, str(fake_build.folder))
    result = cli.invoke(main, arguments.split())
    assert result.exit_code == code, result.output
    assert text in " ".join(result.output.split())


def test_running_without_a_gpu_says_what_is_needed(
    cli: CliRunner, fake_build: Build, fake_library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fake_library.hopper_devices():
        pytest.skip("this machine has a Hopper GPU")
    monkeypatch.setenv(BUILD_FOLDER_VARIABLE, str(fake_build.folder))
    result = cli.invoke(main, ["run", "16", "512", "512"])
    assert result.exit_code == 3
    assert "needs an NVIDIA Hopper GPU" in " ".join(result.output.split())


ENVIRONMENTS = [
    ("no nvcc", {"W4A16GEN_NVCC": "/nowhere/nvcc"}, "W4A16GEN_NVCC=/nowhere/nvcc is not an executable file"),
    ("old nvcc", {"FAKE_NVCC_RELEASE": "11.8"}, "release 11.8; 13.0 or newer is needed"),
    ("no CUTLASS", {"W4A16GEN_CUTLASS": "/nowhere"}, "pip install nvidia-cutlass"),
    ("no host compiler", {"CXX": "no-such-compiler"}, "CXX=no-such-compiler is not a program"),
]


@pytest.mark.usefixtures("fake_nvcc")
@pytest.mark.parametrize(("variables", "text"), [row[1:] for row in ENVIRONMENTS], ids=[row[0] for row in ENVIRONMENTS])
def test_building_without_a_tool_names_it(
    cli: CliRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], text: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    result = cli.invoke(main, ["build", "--space", "trtllm"])  # CUTLASS kernels need every tool
    assert result.exit_code == 3, result.output
    assert text in " ".join(result.output.split())
    assert not (tmp_path / "build").exists()
    assert not (tmp_path / "generated").exists()
    diagnosis = cli.invoke(main, ["doctor"])
    assert diagnosis.exit_code == 3
    assert "MISSING" in diagnosis.output
