"""The headers that a source includes, found as the compiler finds them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

CUDA_FOLDER = Path(__file__).resolve().parents[1] / "cuda"
_INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)
_CUTLASS = ("cute/", "cutlass/")


@dataclass(frozen=True)
class Headers:
    """The headers that a source includes, directly or through other headers."""

    own: tuple[Path, ...]
    """Headers of this package, sorted."""
    needs_cutlass: bool


def headers_of(source: str, beside: Path = CUDA_FOLDER) -> Headers:
    """Return the headers that a source includes.

    Names that are neither beside the including file nor in `CUDA_FOLDER` belong to CUDA or CUTLASS.

    Args:
        source: its text.
        beside: the folder that it lies in.
    """
    return _headers_named(tuple(_INCLUDE.findall(source)), beside)


@cache  # the kernels of a family all include the same
def _headers_named(included: tuple[str, ...], beside: Path) -> Headers:
    own: set[Path] = set()
    needs_cutlass = False
    waiting: list[tuple[Path, Sequence[str]]] = [(beside, included)]
    while waiting:
        here, names = waiting.pop()
        for name in names:
            path = next((path for path in (here / name, CUDA_FOLDER / name) if path.is_file()), None)
            if path is None:
                needs_cutlass |= name.startswith(_CUTLASS)
            elif (resolved := path.resolve()) not in own:
                own.add(resolved)
                waiting.append((resolved.parent, _included_names(resolved)))
    return Headers(tuple(sorted(own)), needs_cutlass)


@cache
def _included_names(path: Path) -> Sequence[str]:
    return _INCLUDE.findall(path.read_text())
