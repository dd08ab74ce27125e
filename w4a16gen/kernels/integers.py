"""The one rule for integers that a caller passes."""

from __future__ import annotations

import numbers
import operator
from typing import Any

from w4a16gen.errors import InvalidValueError


def integer(name: str, value: Any) -> int:
    """Return a Python or numpy integer as an int.

    Args:
        name: what the message calls the value.
        value: the value.

    Raises:
        InvalidValueError: if it is anything else, a bool included, or does not fit in 64 bits.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise InvalidValueError(f"{name} of type {type(value).__name__} must be an integer")
    try:
        number = operator.index(value)
    except TypeError:  # numpy's spans of time call themselves integers
        raise InvalidValueError(f"{name} of type {type(value).__name__} must be an integer") from None
    if not -(1 << 63) <= number < 1 << 63:
        raise InvalidValueError(f"{name} must fit in 64 bits")
    return number
