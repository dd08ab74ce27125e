"""The stand-in for nvcc says what kernels say."""

from __future__ import annotations

from fakes.nvcc import LAYOUTS

from w4a16gen.weights.packed import TARGET_LAYOUTS


def test_it_knows_the_layouts_of_all_targets() -> None:
    assert LAYOUTS == TARGET_LAYOUTS
