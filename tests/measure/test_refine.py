"""Timing again what is near the fastest: which kernels, and once only."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from w4a16gen import KernelConfig, Problem, QuantMode
from w4a16gen.choose.timing_table import Measured
from w4a16gen.kernels.spaces import enumerate_space
from w4a16gen.measure import refine as refining
from w4a16gen.measure.refine import Refined, nearest, refine
from w4a16gen.measure.timing import Contender

MODE = QuantMode.FINEGRAINED_SCALE_ONLY
KERNELS = [config for config in enumerate_space("default") if config.mode is MODE]
PROBLEM = Problem(16, 4096, 4096, 128)


def test_kernels_near_the_fastest_are_timed_again() -> None:
    times = dict(zip(KERNELS, [10.4, 10.0, 10.6, 10.5], strict=False))
    assert nearest(times) == [KERNELS[1], KERNELS[0], KERNELS[3]]
    assert len(nearest(dict.fromkeys(KERNELS, 1.0))) == 8


def test_they_take_turns_and_medians_count(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []

    def record(config: KernelConfig, *, dependent: bool) -> Contender:
        assert dependent
        contender = Contender(lambda: None, lambda: 1.0, 1)

        def time(pause: float = 0) -> None:
            del pause
            turns.append(config.name)
            contender.microseconds.append(float(len(contender.microseconds)) + 10 * KERNELS.index(config))

        monkeypatch.setattr(contender, "time", time)
        return contender

    library: Any = None
    monkeypatch.setattr(refining, "Workload", lambda *_drawn: SimpleNamespace(record=record))
    times = refine(library, PROBLEM, MODE, KERNELS[:2], device=0, dependent=True)
    assert times == {KERNELS[0]: 4.0, KERNELS[1]: 14.0}
    assert all(set(turns[at : at + 2]) == {KERNELS[0].name, KERNELS[1].name} for at in range(0, 18, 2))


def test_what_was_timed_again_is_remembered_until_a_kernel_changes(tmp_path: Path) -> None:
    path = tmp_path / "refined.txt"
    timed = {config: Measured(10.0, f"hash of {config.name}") for config in KERNELS[:2]}
    assert not Refined(path).has(MODE, PROBLEM, timed)
    Refined(path).add(MODE, PROBLEM, timed)
    assert Refined(path).has(MODE, PROBLEM, dict(reversed(timed.items())))
    assert not Refined(path).has(MODE, PROBLEM, timed | {KERNELS[0]: Measured(10.0, "built anew")})
    assert not Refined(path).has(MODE, PROBLEM, timed | {KERNELS[0]: timed[KERNELS[0]]._replace(microseconds=10.1)})
    assert not Refined(path).has(MODE, PROBLEM, timed | {KERNELS[2]: Measured(10.0, "new")})
    assert not Refined(path).has(QuantMode.PER_COLUMN_SCALE_ONLY, PROBLEM, timed)
    path.write_bytes(b"\xff\n" + path.read_bytes())
    assert Refined(path).has(MODE, PROBLEM, timed), "a damaged line does not count, and hides no other"
