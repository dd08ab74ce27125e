"""The function that vLLM calls in each of its processes (entry point `vllm.general_plugins`)."""

from __future__ import annotations

import logging

from w4a16gen.integrations.engines.switch import register_safely

LOGGER = "vllm.w4a16gen"
"""Below vLLM's logger, whose level and handlers it takes."""


def register() -> None:
    """Put the kernel at the head of vLLM's list, and register the GPTQ configuration.

    It may be called any number of times, raises nothing, touches no GPU, and logs one line. W4A16GEN_PLUGINS=off turns
    it off.
    """
    register_safely(logging.getLogger(LOGGER), "vLLM", _register)


def _register() -> str:
    """Register with vLLM, and return the line of the log."""
    from w4a16gen.integrations.vllm.registration import register_all  # noqa: PLC0415  (imports vLLM and torch)

    return register_all()
