"""Short times of kernels: which launches warm the card up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import quick_measure
from fakes.library import FakeLibrary

from w4a16gen import KernelConfig, Problem, QuantMode
from w4a16gen.kernels.spaces import enumerate_space

MODE = QuantMode.FINEGRAINED_SCALE_ONLY
KERNELS = [config for config in enumerate_space("default") if config.mode is MODE][:3]
SHORT, LONG = Problem(16, 4096, 4096, 128), Problem(1024, 4096, 4096, 128)


class Card(quick_measure.QuickMeasure):
    """Launches nothing: a measurement takes 0.125 s of a clock that nobody waits for, and returns the time."""

    def __init__(self) -> None:
        self.torch: Any = SimpleNamespace(randn=self.nothing, empty=self.nothing, float16=None, uint8=None)
        self.where: Any = None
        self.clock = 0.0

    def nothing(self, *_: Any, **__: Any) -> None:
        """Stand in for arrays."""

    def _weights(self, *_: Any) -> list[Any]:
        return []

    def _time(self, launch: Any, *, is_long: bool) -> float:
        assert callable(launch)
        assert not is_long
        self.clock += 0.125
        return self.clock


@pytest.mark.parametrize(
    ("problem", "expected"),
    [(SHORT, [0.125, 0.25, 0.375]), (LONG, [0.5, 0.625, 0.75])],
    ids=["short", "long"],
)
def test_the_card_is_warm_before_the_first_kernel_of_a_long_problem(
    monkeypatch: pytest.MonkeyPatch, problem: Problem, expected: list[float]
) -> None:
    card = Card()
    monkeypatch.setattr(quick_measure, "time", SimpleNamespace(monotonic=lambda: card.clock))
    times: dict[KernelConfig, float] = dict(card(FakeLibrary(KERNELS), problem, MODE, KERNELS, device=0))
    assert list(times) == KERNELS
    assert list(times.values()) == expected
