"""Contenders timed in turns, where time is short: a slow one on a long problem gets one block only."""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping

from w4a16gen.measure.timing import Contender

SECONDS_OF_BLOCK = 0.5
"""Length of a block on a long problem; see `timing.BLOCK_SECONDS`. A contender's blocks are apart, so that few fall
into the slow moment of a second."""
ROUNDS_PER_BLOCK = 5
"""A long problem gets one block for this many rounds."""
STILL_RUNNING = 1.1
"""After its first block, a contender gets more only if it is within this factor of the fastest, or the call."""


def take_turns(
    contenders: dict[str, Contender],
    own: frozenset[str],
    chosen: str,
    rounds: int,
    order: random.Random,
    *,
    is_long: bool,
) -> dict[str, str]:
    """Time contenders in turn, in a new order each round.

    Args:
        contenders: by name. Those of others that fail are removed.
        own: names of this package's kernels, whose failures are raised.
        chosen: the one that is timed to the end, however slow.
        rounds: timed replays of each; a long problem gets a block for every five of them.
        order: source of the order.
        is_long: whether the power limit sets the clock.

    Returns:
        Why contenders were removed, by name.
    """
    failed: dict[str, str] = {}
    for turn in range(-(-rounds // ROUNDS_PER_BLOCK) if is_long else rounds):
        entrants = _still_running(contenders, chosen) if is_long and turn else list(contenders)
        order.shuffle(entrants)
        for name in entrants:
            try:
                _time_once(contenders[name], is_long=is_long)
            except Exception as failure:
                if name in own:
                    raise
                failed[name] = " ".join(f"{type(failure).__name__}: {failure}".split())
                del contenders[name]
    return failed


def _time_once(contender: Contender, *, is_long: bool) -> None:
    if is_long:
        contender.time_block(SECONDS_OF_BLOCK)
    else:
        contender.time()


def _still_running(contenders: Mapping[str, Contender], chosen: str) -> list[str]:
    """Return those that may be the fastest, and the call: slow ones need no second block."""
    medians = {name: statistics.median(contender.microseconds) for name, contender in contenders.items()}
    limit = STILL_RUNNING * min(medians.values())
    return [name for name, median in medians.items() if median <= limit or name == chosen]
