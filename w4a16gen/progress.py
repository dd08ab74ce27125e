"""The callback by which slow work reports its progress."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""Called with the steps done, the steps in all, and what has just been done."""


def no_progress(_done: int, _total: int, _what: str) -> None:
    """Report to nobody."""
