"""What killed builds leave behind, full disks, and removing a build."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from fakes.workshop import CONFIGS, Workshop

from w4a16gen.build import causes
from w4a16gen.build.clean import clean
from w4a16gen.build.lock import locked
from w4a16gen.errors import BuildError, BuildLockedError
from w4a16gen.files import remove_abandoned, write_if_changed

COMMAND = [
    *(sys.executable, "-m", "w4a16gen", "build", "--space", "trtllm", "--mode", "cs"),
    *("--cta", "64x16x64", "--cluster", "1x1x1", "-j", "2"),
]


def wait_for_calls(log: Path) -> None:
    deadline = time.monotonic() + 60
    while not log.exists() or not log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def sleepers(root: Path) -> list[psutil.Process]:
    """Return the stand-in compilers that run in a folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if "nvcc" in " ".join(process.cmdline()) and process.cwd().startswith(str(root)):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_the_next_build_ends_orphaned_compilers_and_removes_what_they_had(workshop: Workshop) -> None:
    environment = {**os.environ, "FAKE_NVCC_SLEEP": "150"}
    with subprocess.Popen(COMMAND, cwd=workshop.root, env=environment, stderr=subprocess.DEVNULL) as killed:  # noqa: S603
        wait_for_calls(workshop.calls)
        killed.send_signal(signal.SIGKILL)
    assert sleepers(workshop.root), "a killed build cannot end its compilers"
    assert list(workshop.folder.glob(".scratch-*"))
    workshop.build()
    assert not sleepers(workshop.root)
    assert not list(workshop.folder.glob(".scratch-*"))
    assert workshop.built() == CONFIGS[:1]


def test_temporary_files_of_dead_writers_are_removed_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    dead = tmp_path / f".file.{int(done.stdout)}-0123abcd.tmp"
    living = tmp_path / f".file.{os.getpid()}-0123abcd.tmp"
    others = tmp_path / ".file.tmp"
    for path in (dead, living, others):
        path.write_text("")
    remove_abandoned(tmp_path)
    assert set(tmp_path.iterdir()) == {living, others}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_if_changed(path, "old")

    def fail(self: Path, target: Path) -> None:
        assert self.parent == target.parent, "a rename within one folder cannot be half done"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        write_if_changed(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_told_as_such(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    workshop.build(CONFIGS[:1])
    monkeypatch.setenv("FAKE_NVCC_SAY", "as: can't write unit.o: No space left on device")
    with pytest.raises(BuildError, match=r"^No space left on device: .* MB free"):
        workshop.build(CONFIGS[:2])
    monkeypatch.delenv("FAKE_NVCC_SAY")
    assert workshop.built() == CONFIGS[:1], "the earlier build is still good"
    assert not list(workshop.folder.glob(".scratch-*"))


def test_a_disk_without_room_counts_as_full_whatever_the_compiler_says(tmp_path: Path) -> None:
    assert not causes.is_full("error: something", [tmp_path])
    assert causes.is_full("x: No space left on device", [tmp_path])


def test_clean_removes_what_build_wrote_and_nothing_else(workshop: Workshop) -> None:
    workshop.build(CONFIGS[:2])
    kept = workshop.folder / "objects" / "mine.o"
    table = workshop.folder / "tuning.json"
    for path in (kept, table):
        path.write_text("")
    removed = clean(workshop.folder)
    assert any(path.name == "manifest.json" for path in removed)
    assert {path for path in workshop.folder.rglob("*") if path.is_file()} == {kept, table}
    kept.unlink()
    table.unlink()
    workshop.build(CONFIGS[:2])
    assert workshop.folder in clean(workshop.folder)
    assert not workshop.folder.exists()


def test_clean_touches_no_folder_in_which_nothing_was_built(tmp_path: Path) -> None:
    (tmp_path / "objects").mkdir()
    kept = tmp_path / "objects" / ("0" * 32 + ".o")
    kept.write_text("")
    assert clean(tmp_path) == []
    assert clean(tmp_path / "nothing") == []
    assert kept.exists()


def test_clean_waits_for_no_build(workshop: Workshop) -> None:
    workshop.build()
    with locked(workshop.folder), pytest.raises(BuildLockedError, match="another process is building"):
        clean(workshop.folder)
