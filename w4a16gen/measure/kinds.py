"""Measuring on several kinds of card at once, each with a queue and a result of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from w4a16gen.executors.waiting import as_done
from w4a16gen.measure.gpus import Cards

_Result = TypeVar("_Result")


def on_each_kind(kinds: Sequence[Cards], run: Callable[[Cards], Sequence[_Result]]) -> list[_Result]:
    """Call a function for each kind of card, all at once; return the results in the order of the kinds.

    An error or an interruption of one stops all.
    """
    if len(kinds) == 1:
        return list(run(kinds[0]))
    with ThreadPoolExecutor(len(kinds)) as pool:
        futures = [pool.submit(run, cards) for cards in kinds]
        try:
            for future in as_done(futures):
                future.result()
        except BaseException:
            for cards in kinds:
                cards.executor.stop()
            raise
    return [result for future in futures for result in future.result()]
