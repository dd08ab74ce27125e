"""The pages of the manual as the tests read them: code blocks with their markers, and prose without its markup.

A marker is an HTML comment in the line above a block:

- `needs: gpu`, `needs: network`, `needs: nvcc`, `needs: cluster`: what the block needs to run;
- `given: NAME`: variables that the test defines before it runs the block;
- `output`, `output: relaxed`: what the block above prints, exactly, or except for numbers and paths; a line `...`
  stands for any lines;
- `main command`, `test command`: what CI runs.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
"""The README and the manual."""
_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$", re.DOTALL | re.MULTILINE)
_MARKER = re.compile(r"<!-- *([a-z ]+?)(?:: *([\w-]+))? *-->\s*$")


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: Path
    line: int
    language: str
    text: str
    marker: str
    """The marker's name, or an empty text."""
    argument: str
    """What follows the marker's colon."""

    def __str__(self) -> str:
        return f"{name_of(self.page)}:{self.line}"

    def needs(self, what: str) -> bool:
        """Return whether the block says that it needs something."""
        return self.marker == "needs" and self.argument == what

    @property
    def given_name(self) -> str:
        """The name of the variables that the block is given, or an empty text."""
        return self.argument if self.marker == "given" else ""

    @property
    def is_output(self) -> bool:
        """Whether the block shows what the one above prints."""
        return self.marker == "output"


def name_of(page: Path) -> str:
    """Return a page's path below the repository."""
    return page.relative_to(ROOT).as_posix()


def blocks_of(page: Path) -> list[Block]:
    """Return the fenced blocks of a page, in order."""
    text = page.read_text()
    blocks = []
    for found in _FENCE.finditer(text):
        before = text[: found.start()]
        marker = _MARKER.search(before.rstrip(" "))
        name, argument = (marker[1], marker[2] or "") if marker else ("", "")
        blocks.append(
            Block(page, before.count("\n") + 1, found["language"], textwrap.dedent(found["text"]), name, argument)
        )
    return blocks


def with_outputs(blocks: list[Block]) -> Iterator[tuple[Block, Block | None]]:
    """Pair each block with the block of its output, or None."""
    for number, block in enumerate(blocks):
        following = blocks[number + 1 : number + 2]
        if not block.is_output:
            yield block, following[0] if following and following[0].is_output else None


def prose_of(page: Path) -> str:
    """Return a page's paragraphs and list items, one per line, without code blocks, tables, headings and markup."""
    text = _FENCE.sub("", page.read_text())
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    paragraphs: list[str] = []
    starts_new = True
    for line in text.splitlines():
        stripped = line.strip()
        if not stripped or re.match(r"(\||#|===|:::|!\[|    \S)", line):
            starts_new = True
            continue
        if re.match(r"([-*] |\d+\. )", stripped):
            starts_new = True
            stripped = stripped.split(" ", 1)[1]
        if starts_new:
            paragraphs.append(stripped)
        else:
            paragraphs[-1] += f" {stripped}"
        starts_new = False
    return "\n".join(_without_markup(paragraph) for paragraph in paragraphs)


def _without_markup(text: str) -> str:
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`[^`]*`", "code", text)
    return re.sub(r"[*_]{1,2}(\S.*?\S|\S)[*_]{1,2}", r"\1", text)


def sentences_of(page: Path) -> list[str]:
    """Return a page's sentences: parts of its prose that end in a full stop, a question mark, or the paragraph."""
    found = []
    for paragraph in prose_of(page).splitlines():
        found += [part for part in re.split(r"(?<=[.?!])\s+", paragraph) if re.search(r"\w", part)]
    return found
