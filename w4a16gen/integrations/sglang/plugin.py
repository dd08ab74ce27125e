"""The function that SGLang calls in each of its processes (entry point `sglang.srt.plugins`)."""

from __future__ import annotations

import logging

from w4a16gen.integrations.engines.switch import register_safely

LOGGER = "w4a16gen.sglang"


def register() -> None:
    """Register hooks that replace SGLang's Marlin kernels where this package serves a layer.

    It may be called any number of times, raises nothing, touches no GPU, and logs one line. W4A16GEN_PLUGINS=off turns
    it off.
    """
    register_safely(logging.getLogger(LOGGER), "SGLang", _register)


def _register() -> str:
    """Register with SGLang, and return the line of the log."""
    from w4a16gen.integrations.sglang.registration import register_all  # noqa: PLC0415  (imports SGLang and torch)

    return register_all()
