"""Words that several messages share."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, which is regular.

    Example:
        >>> counted(1, "kernel"), counted(0, "kernel")
        ('1 kernel', '0 kernels')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
