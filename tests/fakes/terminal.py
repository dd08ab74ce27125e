"""A terminal of a given width, for programs that behave differently on one."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Mapping, Sequence
from pathlib import Path

from paths import ROOT, TESTS

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def run_on_terminal(
    arguments: Sequence[str], columns: int, folder: Path, variables: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Run Python with arguments on a terminal.

    Returns:
        The exit code, and everything that the terminal received.
    """
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm", "PYTHONPATH": f"{ROOT}:{TESTS}", **(variables or {})}
    environment.pop("COLUMNS", None)
    program = subprocess.Popen(  # noqa: S603
        [sys.executable, *arguments], stdin=slave, stdout=slave, stderr=slave, cwd=folder, env=environment
    )
    os.close(slave)
    received = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # the other side is closed
            break
        if not part:
            break
        received += part
    os.close(master)
    return program.wait(), received.decode()


def lines_of(received: str) -> list[str]:
    """Return what a terminal received as lines without control sequences."""
    return [_CONTROL.sub("", line).rstrip() for line in re.split(r"\r\n|\r|\n", received)]
