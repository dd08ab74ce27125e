"""Settings out of a checkpoint's configuration, checked, and names of layers out of names of tensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from w4a16gen.errors import InvalidValueError
from w4a16gen.weights.importers.mapped import shown_name


def text(config: dict[str, Any], name: str, default: str) -> str:
    """Return a setting of text in lower case, or the default.

    Raises:
        InvalidValueError: if it is something else.
    """
    value = config.get(name)
    if value is None:
        return default
    if not isinstance(value, str):
        raise InvalidValueError(f"the configuration's {name} of {shown_name(value)} must be text")
    return value.lower()


def flag(config: dict[str, Any], name: str, *, default: bool) -> bool:
    """Return a setting that is true or false, or the default.

    Raises:
        InvalidValueError: if it is something else.
    """
    value = config.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise InvalidValueError(f"the configuration's {name} of {shown_name(value)} must be true or false")
    return value


def number(config: dict[str, Any], names: tuple[str, ...], default: int | None) -> int | None:
    """Return the first integer setting of some names, or the default.

    Raises:
        InvalidValueError: if one is something else.
    """
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        if type(value) is not int:
            raise InvalidValueError(f"the configuration's {name} of {shown_name(value)} must be an integer")
        return value
    return default


def section(config: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a part of a configuration that is an object; an empty one if it is missing.

    Raises:
        InvalidValueError: if it is something else.
    """
    value = config.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidValueError(f"the configuration's {name} must be an object")
    return value


def layer_names(tensors: Iterable[str], last_part: str) -> list[str]:
    """Return the names of the modules that have a tensor of some name, in the order of the files."""
    ending = f".{last_part}"
    return [name.removesuffix(ending) for name in tensors if name.endswith(ending) and name != ending]
