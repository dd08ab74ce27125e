"""`explain` in words: how a kernel's time compares with dense FP16."""

from __future__ import annotations

import pytest
from fakes.runner import Runner


@pytest.mark.parametrize(
    ("problem", "sentence"),
    [
        ("16 4096 4096", "times as long as"),
        ("900 1024 1024", "nearly the same as"),
        ("3500 4096 4096", "4-bit weights no longer help"),
        ("1 8 65536", "the layer is too small for 4-bit weights to help"),
    ],
)
def test_dense_fp16_is_named_beside_the_kernel(cli: Runner, problem: str, sentence: str) -> None:
    assert sentence in " ".join(cli.run(f"explain {problem}").stderr.split())
