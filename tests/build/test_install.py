"""The commands that messages suggest, found without a side effect on the process."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import Any

import pytest

from w4a16gen.build import install


def test_pip_is_looked_for_without_importing_its_finders(monkeypatch: pytest.MonkeyPatch) -> None:
    """With setuptools installed, a search for the module pip removes distutils from a process that uses it."""

    def refuse(name: str, *_: Any) -> None:
        pytest.fail(f"searched for module {name}")

    monkeypatch.setattr(importlib.util, "find_spec", refuse)
    assert " -m pip install" in install.install_cuda()


def test_without_pip_uv_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    assert install.install_cuda().startswith("uv pip install --python ")
