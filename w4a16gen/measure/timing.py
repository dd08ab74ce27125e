"""One contender of a comparison: a recorded graph of launches that take copies of a weight in turn, and its timing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

LAUNCHES = 20
"""Launches per graph, at least; enough that the graph's own start does not show."""
BRIEF_LAUNCHES = 6
"""The same where long problems (`dispatch.is_long`) are timed briefly."""
SETTLING_SECONDS = 0.1
"""How long a contender runs by itself on a long problem before its times count: an H100 at its power limit takes some
50 ms to settle on a clock. Where contenders took turns replay by replay, all ran at the clock that their mean power
left them: weights of nothing but zeros took as long as any, though by themselves they are 20 % faster, and of two
kernels the one that needs more power gained 2 to 7 % on the other (H100 80GB HBM3, 2026-11)."""
BLOCK_SECONDS = 1.0
"""How long its times then count before the next one's turn. About once a second, for 0.2 to 0.3 s, a GPU at its power
limit is 8 to 20 % slower, whatever runs (1024x8192x8192: 191 us, then 228, 233, 215 and 201 in tenths of a second, then
191 again; H100 80GB HBM3, 2026-11-25). Blocks of 0.15 s now caught that and now did not, so that medians of five were
off by up to 7 %; the median of a whole second is that of the time between."""
BLOCK_REPLAYS = 3
PAUSE_SECONDS = 0.01
"""Rest before each timed replay of a short problem. Without rest an H100 lowers its clock to stay in its power limit:
problems of 64 tokens and more then take up to 15 % longer (H100 80GB HBM3, 2026-11)."""

SCREENING_REPLAYS = 2
WARM_UP_SECONDS = 0.4
"""What comes before them: a GPU that has rested starts cold, and above the clock that it can keep."""


@dataclass
class Contender:
    """A recorded graph that can be replayed and timed."""

    replay: Callable[[], None]
    timed_replay: Callable[[], float]
    """Returns milliseconds."""
    launches: int
    kept: Any = None
    """What must live as long as the graph, which holds addresses only."""
    microseconds: list[float] = field(default_factory=list)

    def time(self, pause: float = PAUSE_SECONDS) -> None:
        """Time one replay: after a rest, a replay that is not timed brings the clocks back."""
        time.sleep(pause)
        self.replay()
        self.microseconds.append(self.timed_replay() * 1000 / self.launches)

    def time_block(self) -> None:
        """Replay for some time without rest, and keep the median of what counts."""
        milliseconds = settled(self.timed_replay, SETTLING_SECONDS, BLOCK_SECONDS)
        self.microseconds.append(milliseconds * 1000 / self.launches)


def settled(timed_replay: Callable[[], float], settling: float, seconds: float) -> float:
    """Give the median of some seconds of replays, of three at least, in milliseconds; before them, some to settle."""
    begin = time.monotonic()
    while time.monotonic() - begin < settling:
        timed_replay()
    begin = time.monotonic()
    milliseconds: list[float] = []
    while len(milliseconds) < BLOCK_REPLAYS or time.monotonic() - begin < seconds:
        milliseconds.append(timed_replay())
    return statistics.median(milliseconds)
