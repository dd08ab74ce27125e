"""Packages that only some checkpoints need."""

from __future__ import annotations

from typing import Any

from w4a16gen.errors import missing_extra


def need_gguf() -> Any:
    """Return the package `gguf`.

    Raises:
        MissingToolError: if it is not installed.
    """
    try:
        import gguf  # noqa: PLC0415
    except ImportError:
        raise missing_extra("gguf", "transformers") from None
    return gguf
