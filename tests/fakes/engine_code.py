"""Engines' own code, for tests that run where it can be imported."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def importing(what: str) -> Iterator[None]:
    """Import an engine's modules in the block, or skip the module of tests with the reason.

    Args:
        what: what the module tests. It differs between modules: pytest-xdist reports equal reasons once.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as missing:  # noqa: BLE001  (engines raise many kinds of errors where a part of them is missing)
        pytest.skip(f"{what} cannot be imported: {type(missing).__name__}: {missing}", allow_module_level=True)
