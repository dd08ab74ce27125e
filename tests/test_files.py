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
