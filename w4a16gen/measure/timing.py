"""A contender of a comparison: a recorded graph of launches that take copies of a weight in turn, and its timing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

LAUNCHES = 20
"""Launches per graph, at least: the start of the graph itself is then negligible."""
BRIEF_LAUNCHES = 6
"""Launches per graph of a long problem that is timed briefly."""
SETTLING_SECONDS = 0.1
"""A contender on a long problem runs this long before its times count. An H100 at its power limit takes 50 ms to settle
on a clock. With turns of single replays, all contenders share one clock. That favours the kernel that draws more power
by 2 to 7 % (H100 80GB HBM3, 2026-11)."""
BLOCK_SECONDS = 1.0
"""Length of a timed block on a long problem. Once a second a GPU at its power limit is 8 to 20 % slower, for 0.2 to
0.3 s (H100 80GB HBM3, 2026-11). A 0.15 s block caught this dip only sometimes, which moved the median of five blocks
by up to 7 %. The median of a whole second leaves the dip out."""
BLOCK_REPLAYS = 3
"""Replays per block, at least."""
PAUSE_SECONDS = 0.01
"""Rest before each timed replay of a short problem. Without it an H100 lowers its clock to stay within its power limit:
problems of 64 tokens and more take up to 15 % longer (H100 80GB HBM3, 2026-11)."""

SCREENING_REPLAYS = 2
"""Replays by which a kernel is screened on a short problem; the shorter time counts."""
WARM_UP_SECONDS = 0.4
"""Run this long before screening a long problem: a GPU that has rested starts above the clock that it can sustain."""


@dataclass
class Contender:
    """A recorded graph that can be replayed and timed."""

    replay: Callable[[], None]
    timed_replay: Callable[[], float]
    """Returns milliseconds."""
    launches: int
    kept: Any = None
    """Objects that must live as long as the graph, which holds only their addresses."""
    microseconds: list[float] = field(default_factory=list)

    def time(self, pause: float = PAUSE_SECONDS) -> None:
        """Time one replay, after a rest and a replay that raises the clocks again."""
        time.sleep(pause)
        self.replay()
        self.microseconds.append(self.timed_replay() * 1000 / self.launches)

    def time_block(self, seconds: float = BLOCK_SECONDS) -> None:
        """Replay without rest for the length of a block, and keep the median."""
        milliseconds = settled(self.timed_replay, SETTLING_SECONDS, seconds)
        self.microseconds.append(milliseconds * 1000 / self.launches)


def settled(timed_replay: Callable[[], float], settling: float, seconds: float) -> float:
    """Return the median time of replays in milliseconds.

    Args:
        timed_replay: replays once and returns milliseconds.
        settling: seconds of replays that do not count, first.
        seconds: seconds of replays that count; at least three replays count.
    """
    begin = time.monotonic()
    while time.monotonic() - begin < settling:
        timed_replay()
    begin = time.monotonic()
    milliseconds: list[float] = []
    while len(milliseconds) < BLOCK_REPLAYS or time.monotonic() - begin < seconds:
        milliseconds.append(timed_replay())
    return statistics.median(milliseconds)
