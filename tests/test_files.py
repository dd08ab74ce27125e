"""Writing files: whole or not at all, and never in place of something that is no file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from w4a16gen.files import write_if_changed


def test_only_regular_files_are_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path, Path("/dev/zero")):
        with pytest.raises(OSError, match="Not a regular file"):
            write_if_changed(path, "text")
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


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
