"""Damage to the files of a build, and odd names for its folder; `fault_campaign.py` uses both."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

NAMES = (
    *("a b", " leading", "trailing ", "a,b", "a;b", "a:b", "a=b", "a%b", "a+b", "a@b", "@A@", "a~b", "#a", "a&b"),
    *("a|b", "a'b", 'a"b', "a`b", "a\\b", "a\\", "$HOME", "$(touch HACKED)", "`touch HACKED`", "${IFS}", "a>b", "a<b"),
    *("a*b", "a?b", "[a]", "{a,b}", "(a)", "!a", "^a", "-a", "--help", "-o", "\u00e4", "\u65e5\u672c"),
    *("a\nb", "a\tb", "e" * 200),
)
"""Names of folders that a shell, CMake or Ninja may misread."""
PARTS = ("library", "module", "object", "record", "manifest", "source", "source list", "log", "cached module")
"""The parts of a build."""


def parts_of(folder: Path, part: str) -> list[Path]:
    """Return the files of one part of a build."""
    build = folder / "build"
    found = {
        "library": build.glob("lib-*/libw4a16_kernels.so"),
        "module": build.glob("lib-*/_w4a16*"),
        "object": (build / "objects").glob("*.o"),
        "record": (build / "objects").glob("*.json"),
        "cached module": (build / "objects").glob("*.so"),
        "manifest": [build / "manifest.json"],
        "source": (folder / "generated").glob("*.cu"),
        "source list": [folder / "generated" / "manifest.json"],
        "log": (build / "logs").glob("*"),
    }
    return sorted(found[part])


def _truncate(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(max(1, path.stat().st_size)))


def _empty(path: Path, _rng: random.Random) -> None:
    os.truncate(path, 0)


def _flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes() or b"\0")
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def _remove(path: Path, _rng: random.Random) -> None:
    path.unlink()


def _folder(path: Path, _rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def _full_folder(path: Path, _rng: random.Random) -> None:
    path.unlink()
    path.mkdir()
    (path / "content").write_text("content")


def _dangling_link(path: Path, _rng: random.Random) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def _link_to_other(path: Path, _rng: random.Random) -> None:
    path.unlink()
    path.symlink_to(sys.executable)


def _pipe(path: Path, _rng: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


HARMS: tuple[tuple[str, Callable[[Path, random.Random], None]], ...] = (
    ("truncated", _truncate),
    ("emptied", _empty),
    ("one bit flipped", _flip),
    ("removed", _remove),
    ("replaced by a folder", _folder),
    ("replaced by a folder with content", _full_folder),
    ("replaced by a dangling link", _dangling_link),
    ("replaced by a link to another file", _link_to_other),
    ("replaced by a pipe", _pipe),
)
"""Ways to damage a file, each with its name."""
