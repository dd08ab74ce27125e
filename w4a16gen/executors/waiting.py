"""Waiting for futures, so that Ctrl-C ends the wait at once."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import TypeVar

_Result = TypeVar("_Result")

POLL_SECONDS = 0.2
"""Python runs a signal's handler between two steps of the main thread. A signal that comes just before a wait, or that
another thread receives, does not end the wait. So no wait is longer than this."""


def wait_for_any(futures: Collection[Future[_Result]]) -> set[Future[_Result]]:
    """Wait until one of the futures is done, and return all that are.

    Args:
        futures: at least one.
    """
    while not (done := wait(futures, POLL_SECONDS, FIRST_COMPLETED).done):
        pass
    return done


def as_done(futures: Collection[Future[_Result]]) -> Iterator[Future[_Result]]:
    """Yield futures in the order in which they are done."""
    pending = set(futures)
    while pending:
        done = wait_for_any(pending)
        pending -= done
        yield from done
