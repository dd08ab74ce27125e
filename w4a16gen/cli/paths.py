"""The type of the folders and files that commands take."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

LARGEST_TEXT = 16 << 20
"""Bytes of the largest text file that an option takes: a device such as /dev/zero has no end."""


class NamedPath(click.Path):
    """A path that names something.

    An empty text is refused: pathlib would read it as the current folder. So is anything but a folder, where a command
    needs one: a link to nothing, a device or a pipe.
    """

    def __init__(self, **attributes: Any) -> None:
        """Take what `click.Path` takes, but not the type of the path."""
        super().__init__(path_type=Path, **attributes)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Check a text, and return it as a path."""
        text = os.fspath(value)
        what = "folder" if not self.file_okay else "file" if not self.dir_okay else "folder or a file"
        if not text:
            self.fail(f"an empty text must name a {what}", param, ctx)
        path = super().convert(value, param, ctx)
        if not self.file_okay and os.path.lexists(text) and not Path(text).is_dir():
            kind = "no folder" if Path(text).exists() else "a link to nothing"
            self.fail(f"{text} is {kind}: name another folder", param, ctx)
        return path


def read_text(path: Path) -> str:
    """Return the text of a file of options.

    Raises:
        OSError: if it cannot be read.
        UnicodeDecodeError: if it is not UTF-8.
        ValueError: if it is larger than any file of options.
    """
    with path.open("rb") as file:
        data = file.read(LARGEST_TEXT + 1)
    if len(data) > LARGEST_TEXT:
        raise ValueError(f"it has more than {LARGEST_TEXT >> 20} MiB")
    return data.decode()
