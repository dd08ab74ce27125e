"""The environment variable that turns the plug-ins off, and the logger that their lines go to."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

PLUGINS_VARIABLE = "W4A16GEN_PLUGINS"
ON, OFF, FLOAT16 = "on", "off", "float16"
_VALUES = (ON, OFF, FLOAT16)


def switch() -> str:
    """Return what W4A16GEN_PLUGINS says: `on`, `off`, or `float16`; an unknown value counts as `off`.

    Example:
        >>> import os
        >>> os.environ["W4A16GEN_PLUGINS"] = "float16"
        >>> switch()
        'float16'
        >>> del os.environ["W4A16GEN_PLUGINS"]
    """
    value = os.environ.get(PLUGINS_VARIABLE, "").strip().lower() or ON
    return value if value in _VALUES else OFF


def why_off() -> str | None:
    """Return why no layer is served, or None if the plug-ins are on."""
    if switch() != OFF:
        return None
    value = os.environ.get(PLUGINS_VARIABLE)
    return f"{PLUGINS_VARIABLE} is {value!r}: unset it, or set it to {ON} or {FLOAT16}, to use w4a16gen"


def register_safely(logger: logging.Logger, engine: str, register: Callable[[], str]) -> None:
    """Run the part of a plug-in that touches the engine, and log one line about the outcome.

    An exception that leaves a plug-in's function stops the engine, so none does.

    Args:
        logger: where the line goes.
        engine: the engine's name, for the line.
        register: registers the kernels and returns the line.
    """
    reason = why_off()
    if reason is not None:
        logger.info("w4a16gen leaves %s alone: %s", engine, reason)
        return
    try:
        line = register()
    except Exception as error:  # noqa: BLE001  (the engine may have changed in any way)
        logger.warning("w4a16gen leaves %s alone: %s: %s", engine, type(error).__name__, error)
        return
    logger.info("%s", line)


def tried(logger: logging.Logger, register: Callable[[], str], otherwise: str) -> str:
    """Return the line of a part's registration, or what holds without the part: others serve most models alone.

    Args:
        logger: where the details of an error go.
        register: registers the part and returns its line.
        otherwise: what holds if it raises.
    """
    try:
        return register()
    except Exception as error:  # the engine may have changed in any way
        logger.debug("a part was not registered", exc_info=True)
        return f"{otherwise} ({type(error).__name__}: {error})"
