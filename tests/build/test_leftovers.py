"""What killed builds leave behind, full disks, and removing a build."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from fakes.workshop import CONFIGS, WEB_APP_MANIFEST, Workshop

from w4a16gen.build import causes, scratch
from w4a16gen.build.clean import clean
from w4a16gen.build.lock import locked
from w4a16gen.errors import BuildError, BuildLockedError
from w4a16gen.files import remove_abandoned, write_if_changed

pytestmark = pytest.mark.compile

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


def test_only_scratch_folders_that_a_build_made_are_removed(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(scratch, "_temporary_folders", lambda: [tmp_path / "temporary"])
    workshop.build()
    temporary = tmp_path / "temporary"
    others = [tmp_path / "w4a16gen-abcdefgh", temporary / "w4a16gen-01234567", temporary / "w4a16gen-ofanothe"]
    for folder in others:
        folder.mkdir(parents=True)
        (folder / ".build").symlink_to(tmp_path if folder == others[2] else workshop.folder)
    (workshop.folder / f".scratch-{others[0].name}").symlink_to(others[0])
    (workshop.folder / ".scratch-w4a16gen-00000000").symlink_to(others[1])
    (workshop.folder / f".scratch-{others[2].name}").symlink_to(others[2])
    notes = workshop.folder / ".scratch-notes.txt"
    notes.touch()
    left = temporary / "w4a16gen-leftover"
    left.mkdir()
    (left / ".build").symlink_to(workshop.folder)
    (workshop.folder / f".scratch-{left.name}").symlink_to(left)
    copied = scratch.libraries_beside(left, workshop.folder)
    copied.mkdir()
    workshop.build()
    assert all(folder.exists() for folder in others)
    assert notes.exists()
    assert not left.exists()
    assert not copied.exists()
    assert list(workshop.folder.glob(".scratch-w4a16gen-*")) == []


def test_a_copy_made_during_a_build_does_not_end_that_build(workshop: Workshop, tmp_path: Path) -> None:
    environment = {**os.environ, "FAKE_NVCC_SLEEP": "4"}
    with subprocess.Popen(COMMAND, cwd=workshop.root, env=environment, stderr=subprocess.DEVNULL) as running:  # noqa: S603
        wait_for_calls(workshop.calls)
        copy = Workshop(tmp_path / "copy")
        shutil.copytree(workshop.root, copy.root, symlinks=True)
        assert list(copy.folder.glob(".scratch-*"))
        copy.build()
        assert not list(copy.folder.glob(".scratch-*"))
    assert running.returncode == 0
    assert len(workshop.calls.read_text().splitlines()) == 2, "a compiler that was ended is started again"


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


def test_clean_removes_a_damaged_manifest_but_not_another_programs(workshop: Workshop) -> None:
    manifest = workshop.folder / "manifest.json"
    workshop.build(CONFIGS[:1])
    manifest.write_text(manifest.read_text()[:-9])
    assert manifest in clean(workshop.folder)
    assert not workshop.folder.exists()
    workshop.build(CONFIGS[:1])
    manifest.write_text(WEB_APP_MANIFEST)
    assert clean(workshop.folder)
    assert [path.name for path in workshop.folder.iterdir()] == ["manifest.json"]


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
