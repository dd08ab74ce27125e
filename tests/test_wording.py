"""Words that several messages share."""

from __future__ import annotations

import pytest

from w4a16gen.wording import counted


@pytest.mark.parametrize(("number", "text"), [(0, "0 kernels"), (1, "1 kernel"), (2, "2 kernels")])
def test_only_one_is_singular(number: int, text: str) -> None:
    assert counted(number, "kernel") == text
