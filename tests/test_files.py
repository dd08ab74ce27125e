"""Writing files: whole or not at all, and never in place of something that is no file."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import pytest

from w4a16gen.files import read_regular, sole_writer, write_all_if_changed, write_if_changed, written_whole


def test_only_regular_files_are_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path, Path("/dev/zero")):
        with pytest.raises(OSError, match="Not a regular file"):
            write_if_changed(path, "text")
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


def test_neither_a_pipe_nor_a_device_is_read(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/zero")):
        with pytest.raises(OSError, match="Not a regular file"):
            read_regular(path)
    with pytest.raises(IsADirectoryError):
        read_regular(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "nothing")


def test_a_reader_of_the_old_file_goes_on_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with path.open() as reader:
        assert write_if_changed(path, "new and longer")
        assert reader.read() == "old", "the new text is another file, renamed"
    assert path.read_text() == "new and longer"


def test_what_is_there_already_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    assert write_if_changed(path, "text")
    before = path.stat()
    assert not write_if_changed(path, b"text")
    after = path.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert [found.name for found in path.parent.iterdir()] == ["file"]


def test_a_write_that_fails_leaves_no_other_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="No space left"):
        write_if_changed(path, "text")
    assert [found.name for found in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"


def test_of_several_files_all_are_written_or_none(tmp_path: Path) -> None:
    first, last = tmp_path / "first", tmp_path / "folder" / "last"
    assert write_all_if_changed({first: "old", last: "text"}, modes={last: 0o600}) == [first, last]
    assert last.stat().st_mode & 0o777 == 0o600
    assert write_all_if_changed({first: "old", last: b"new"}) == [last]
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "file" / "inside", tmp_path / "folder"):
        with pytest.raises(OSError, match=str(bad.parent)):
            write_all_if_changed({first: "new", bad: "text"})
        assert first.read_text() == "old"
        assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "first", "folder", "last"]


def test_of_several_files_none_is_written_if_the_disk_is_too_small(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_all_if_changed({tmp_path / "large": "text" * 8, tmp_path / "small": "text"})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"No space left.*model\.bin") as raised, written_whole(tmp_path / "model.bin"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert raised.value.filename == str(tmp_path / "model.bin")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_has_one_writer_and_the_lock_leaves_no_file(tmp_path: Path) -> None:
    with sole_writer(tmp_path):
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(BlockingIOError), sole_writer(tmp_path):
            pass
    with sole_writer(tmp_path):
        pass
