"""How a process ends: exit codes, one form for all errors, and never a traceback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fakes.library import FakeLibrary
from fakes.runner import Runner
from paths import ROOT
from processes import heed_interrupts

from w4a16gen import errors
from w4a16gen.cli.app import EXIT_BROKEN_PIPE, TRACEBACK_VARIABLE
from w4a16gen.cli.services import Services
from w4a16gen.errors import W4A16Error
from w4a16gen.kernels.spaces import enumerate_space

HUGE = "9" * 5000
FOLDER, BINARY, DEEP = "a_folder", "binary", "deep"
"""Files that a fixture makes."""


@pytest.fixture
def oddities(cli: Runner, tmp_path: Path) -> Runner:
    """Return a runner in a folder with odd files."""
    (tmp_path / FOLDER).mkdir()
    (tmp_path / BINARY).write_bytes(bytes(range(256)))
    (tmp_path / "empty").touch()
    records = {"damaged": b"{}", DEEP: b"[" * 100_000, "bytes": b"\xff\xfe", "nothing": b"", "number": b"7\n8\n"}
    for name, record in records.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "bench.jsonl").write_bytes(record)
    (tmp_path / "folder_record" / "bench.jsonl").mkdir(parents=True)
    (tmp_path / "folder_build" / "manifest.json").mkdir(parents=True)
    (tmp_path / "binary_build").mkdir()
    (tmp_path / "binary_build" / "manifest.json").write_bytes(b"\xff\xfe")
    cli.services = Services(load=lambda _: FakeLibrary(enumerate_space("default")))
    return cli


WRONG = [
    (f"explain {HUGE} 4096 4096", 2, "must be a whole number from 1 to 1073741824"),
    ("explain 16 4096 1073741825", 2, "must be a whole number from 1 to 1073741824"),
    ("explain 1_6 4096 4096", 2, "'1_6' must be a whole number"),
    ("explain ² 4096 4096", 2, "must be a whole number"),
    (f"run 16 512 512 --group-size {HUGE}", 2, "must be a whole number"),
    (f"bench --problem {HUGE}x512x512", 2, "must be MxNxK or MxNxK,GROUP"),
    ("bench --problem 16x4096x0", 2, "must be MxNxK or MxNxK,GROUP"),
    (f"bench --model llama-3-8b/{HUGE}", 2, "must be NAME[/GPUS][,GROUP]"),
    (f"bench --problem 1x64x64 --rounds {HUGE}", 2, "must be a whole number from 1 to 10000"),
    ("bench --problem 1x64x64 --smallest-set nan", 2, "'nan' must be a percentage, 0 to 100"),
    ("bench --problem 1x64x64 --smallest-set 1e400", 2, "must be a percentage"),
    (f"list --cta {HUGE}x8x64", 2, "must be CHANNELSxTOKENSxK"),
    (
        f"run 1 64 64 --config native_cs_cta{HUGE}x8x128_cluster1x1x1_warps8_persistent",
        2,
        "is not a kernel name such as",
    ),
    ("run 1 64 64 --config foo", 2, "'foo' is not a kernel name such as"),
    (f"verify --random {HUGE}", 2, "must be a whole number from 0 to 10000000"),
    (f"build -j {HUGE}", 2, "must be a whole number"),
    (f"bench --file {FOLDER}", 2, "is a directory"),
    (f"bench --file {BINARY}", 2, "binary is not a text file: write one MxNxK[,GROUP] per line"),
    ("bench --file empty", 2, "empty names no problem: write one MxNxK[,GROUP] per line"),
    ("bench --file /proc/self/mem", 2, "/proc/self/mem cannot be read: Input/output error"),
    ("bench --file nowhere", 2, "does not exist"),
    (f"tune --problem 1x64x64 --table {FOLDER}", 2, "is a directory"),
    (f"verify --report {FOLDER}", 2, "is a directory"),
    (f"build --build-dir {BINARY}", 2, "is a file"),
    (f"emit --output {BINARY}", 2, "is a file"),
    (f"emit --output {BINARY}/deeper", 1, "binary/deeper: Not a directory"),
    (f"audit {BINARY}", 2, "is a file"),
    (f"audit {FOLDER}", 2, "no .cu files under a_folder"),
    ("report damaged", 2, "damaged/bench.jsonl is no record"),
    ("report deep", 2, "deep/bench.jsonl is no record"),
    ("report bytes", 2, "bytes/bench.jsonl is no record"),
    ("report nothing", 2, "nothing/bench.jsonl is no record"),
    ("report number", 2, "number/bench.jsonl is no record"),
    ("report folder_record", 1, "folder_record/bench.jsonl: Is a directory"),
    (f"report {FOLDER}", 2, "a_folder/bench.jsonl does not exist: `w4a16gen bench --report a_folder` writes it"),
    ("export --prefix out --build-dir binary_build", 3, "binary_build/manifest.json"),
    ("export --wheel out --build-dir nowhere", 3, "No build found in nowhere"),
    ("list --built --explain", 2, "--space and --explain are for spaces"),
    ("list --forbidden", 2, "--forbidden needs --explain"),
    ("emit --mixed-input-schedules", 2, "needs --target trtllm"),
    ("export", 2, "Specify --prefix, --wheel, or both"),
    ("bench", 2, "Specify at least one of --problem, --model, --file, --random, --step, --moe"),
]


@pytest.mark.parametrize(("arguments", "code", "text"), WRONG, ids=[row[0][:60] for row in WRONG])
def test_a_wrong_call_gets_a_sentence(oddities: Runner, arguments: str, code: int, text: str) -> None:
    done = oddities.run(arguments)
    assert done.exit_code == code, done.output
    assert text in " ".join(done.stderr.split())
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.output
    assert "internal error" not in done.output
    assert len(done.stderr) < 1000, "the wrong value is shortened"
    assert done.stdout == ""


@pytest.mark.parametrize(("arguments", "code", "text"), WRONG, ids=[row[0][:60] for row in WRONG])
def test_the_same_as_json(oddities: Runner, arguments: str, code: int, text: str) -> None:
    done = oddities.run(f"{arguments} --json")
    assert done.exit_code == code
    found = json.loads(done.stdout)
    assert found.keys() == {"schema", "error"}
    assert found["schema"] == "w4a16gen.error/1"
    assert found["error"].keys() == {"type", "message", "exit_code"}
    assert found["error"]["exit_code"] == code
    assert text in found["error"]["message"]
    assert text in " ".join(done.stderr.split())


ERRORS = [
    error
    for error in vars(errors).values()
    if isinstance(error, type) and issubclass(error, W4A16Error) and error is not W4A16Error
]
MISSING = {"MissingToolError", "NotBuiltError", "NoHopperGpuError", "ClusterError"}


def library_raising(error: BaseException) -> Any:
    def load(_folder: Path | None) -> Any:
        raise error

    return load


@pytest.mark.parametrize("error", ERRORS)
def test_every_error_class_has_its_exit_code(cli: Runner, error: type[W4A16Error]) -> None:
    cli.services = Services(load=library_raising(error("a [sentence] with brackets")))
    done = cli.run("list --built --json")
    expected = 3 if error.__name__ in MISSING else 2 if issubclass(error, ValueError) else 1
    assert done.exit_code == error.exit_code == expected
    assert json.loads(done.stdout)["error"]["type"] == error.__name__
    assert "error: a [sentence] with brackets" in done.stderr


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (KeyboardInterrupt(), 130, "interrupted: finished work is kept; run the command again to continue"),
        (OSError(28, "No space left on device", "build/x"), 1, "build/x: No space left on device"),
        (FileExistsError(17, "File exists", "build"), 1, "build is no folder: name another folder"),
        (PermissionError(13, "Permission denied", "build"), 1, "build: Permission denied"),
        (RecursionError("too deep"), 1, "RecursionError: too deep (internal error; please report it"),
        (MemoryError(), 1, "MemoryError"),
    ],
)
def test_other_errors_end_in_a_sentence_too(cli: Runner, error: BaseException, code: int, text: str) -> None:
    cli.services = Services(load=library_raising(error))
    done = cli.run("list --built --json")
    assert done.exit_code == code
    assert text in " ".join(done.stderr.split())
    assert json.loads(done.stdout)["error"]["exit_code"] == code


def test_a_current_folder_that_was_removed_is_named(tmp_path: Path) -> None:
    script = f"mkdir gone && cd gone && rmdir ../gone && exec {sys.executable} -m w4a16gen emit --cta 64x16x128"
    command_line = ["/bin/sh", "-c", script]
    done = subprocess.run(command_line, cwd=tmp_path, env=environment(), capture_output=True, check=False)  # noqa: S603
    assert done.returncode == 1
    assert done.stderr.decode().splitlines()[-1] == "error: the current folder was removed: change to another one"


def test_a_traceback_can_be_asked_for(cli: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    cli.services = Services(load=library_raising(ZeroDivisionError("a bug")))
    assert "Traceback" not in cli.run("list --built").output
    monkeypatch.setenv(TRACEBACK_VARIABLE, "1")
    assert "Traceback" in cli.run("list --built").output


def command(arguments: str) -> list[str]:
    return [sys.executable, "-m", "w4a16gen", *arguments.split()]


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), **variables}


def run_in_shell(script: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in which $w4a16gen is the command line."""
    line = f'set -o pipefail; w4a16gen="{sys.executable} -m w4a16gen"; {script}'
    return subprocess.run(  # noqa: S603
        ["/bin/bash", "-c", line],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=environment(**variables),
    )


@pytest.mark.parametrize("arguments", ["list --space all", "list --explain"])
def test_a_reader_that_ends_early_is_no_error(tmp_path: Path, arguments: str) -> None:
    done = run_in_shell(f"$w4a16gen {arguments} 2>err | head -1; exit ${{PIPESTATUS[0]}}", tmp_path)
    assert done.returncode == EXIT_BROKEN_PIPE
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == ""
    assert (tmp_path / "err").read_text() == ""


def test_a_reader_that_ends_before_the_last_line_is_no_error(tmp_path: Path) -> None:
    done = run_in_shell("{ sleep 1; $w4a16gen list; } 2>err | true; exit ${PIPESTATUS[0]}", tmp_path)
    assert done.returncode == EXIT_BROKEN_PIPE
    assert "Traceback" not in (tmp_path / "err").read_text()
    assert "Exception ignored" not in (tmp_path / "err").read_text()


@pytest.mark.parametrize(
    ("arguments", "closed"),
    [
        ("list", ">&-"),
        ("list --json", ">&- 2>&-"),
        ("explain 16 4096 4096", "2>&-"),
        ("emit --mode cs", "<&- >&- 2>&-"),
        ("--help", ">&-"),
        pytest.param("doctor", "<&-", marks=pytest.mark.compile),
        pytest.param("doctor", "<&- >&- 2>&-", marks=pytest.mark.compile),
    ],
)
def test_closed_streams_are_no_error(tmp_path: Path, arguments: str, closed: str) -> None:
    done = run_in_shell(f"$w4a16gen {arguments} {closed}", tmp_path)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize("arguments", ["list", "list --json", "--help"])
def test_a_full_disk_is_an_error(tmp_path: Path, arguments: str) -> None:
    if not Path("/dev/full").is_char_device():
        pytest.skip("this machine has no /dev/full")
    done = run_in_shell(f"$w4a16gen {arguments} >/dev/full", tmp_path)
    assert done.returncode == 1
    assert "error: No space left on device" in done.stderr
    assert "Exception ignored" not in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize("arguments", ["doctor", "list --explain", "--help"])
def test_streams_of_any_encoding_will_do(tmp_path: Path, encoding: str, arguments: str) -> None:
    done = run_in_shell(f"$w4a16gen {arguments}", tmp_path, PYTHONIOENCODING=encoding, CXX="no-such-compiler")
    assert done.returncode == (3 if arguments == "doctor" else 0), done.stderr
    assert done.stdout


def test_characters_that_an_encoding_lacks_are_shown_as_escapes(tmp_path: Path) -> None:
    done = run_in_shell("$w4a16gen emit --mode cs --output 核", tmp_path, PYTHONIOENCODING="latin-1")
    assert done.returncode == 0, done.stderr
    assert "\\u6838/w4a16_sm90_native_cs" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_build_ends_with_a_sentence(tmp_path: Path, number: signal.Signals) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo "release 13.0, V13.0.88" && exit 0\ntouch began\nexec sleep 60\n'
    )
    nvcc.chmod(0o755)
    line = command("build --cta 64x8x128 --mode cs --generated-dir g")
    with subprocess.Popen(  # noqa: S603
        line,
        cwd=tmp_path,
        env=environment(W4A16GEN_NVCC=str(nvcc)),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,  # noqa: PLW1509
    ) as program:
        try:
            until = time.monotonic() + 60
            while not list(tmp_path.rglob("began")) and time.monotonic() < until and program.poll() is None:
                time.sleep(0.05)
            program.send_signal(number)
            _, stderr = program.communicate(timeout=60)
        finally:
            program.kill()
    if program.returncode == 3:
        pytest.skip(f"no toolchain: {stderr}")
    assert program.returncode == 130, stderr
    assert "error: interrupted: finished work is kept; run the command again to continue" in stderr
    assert "Traceback" not in stderr
