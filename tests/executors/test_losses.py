"""Lost tasks and errors: what becomes of the queue, and which sentences are said."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from w4a16gen.errors import ClusterError, InvalidValueError
from w4a16gen.executors.executor import Executor
from w4a16gen.executors.place import Context, InProcess, Place, TaskFunction, WorkerLostError
from w4a16gen.executors.places import LOST_IN_A_ROW


class Fragile(Place):
    """A place whose first tasks wait until they are let go, and then are lost.

    Args:
        loses: the number of these tasks.
        slots: tasks at once.
        is_alive: whether it takes more tasks after a loss.
    """

    def __init__(self, loses: int, slots: int = 1, *, is_alive: bool = True) -> None:
        super().__init__("fragile", slots)
        self.begun: list[int] = []
        self.go_on, self.all_begun = threading.Event(), threading.Event()
        self._loses, self._is_alive = loses, is_alive

    def stream(self, function: TaskFunction, arguments: Sequence[Any], memory: float = 0.0) -> Iterator[Any]:
        del memory
        self.begun.append(*arguments)
        if len(self.begun) <= self._loses:
            if len(self.begun) == self._loses:
                self.all_begun.set()
            assert self.go_on.wait(10)
            raise WorkerLostError("the power was cut")
        yield from function(self, *arguments)

    def stop(self) -> None:
        """Lose what runs."""
        self.go_on.set()

    def revive(self) -> bool:
        return self._is_alive


def number_of(_context: Any, number: int) -> Iterator[int]:
    yield number


def test_a_lost_task_goes_on_before_those_that_wait() -> None:
    place = Fragile(1)
    with Executor([place]) as executor:
        futures = [executor.submit(number_of, number) for number in range(3)]
        place.go_on.set()
        assert [future.result(10) for future in futures] == [[0], [1], [2]]
    assert place.begun == [0, 0, 1, 2]


def test_a_place_that_loses_several_tasks_at_once_is_dropped_once() -> None:
    place, told = Fragile(2, 2, is_alive=False), list[str]()
    with Executor([place], tell=told.append) as executor:
        futures = [executor.submit(number_of, number) for number in range(2)]
        assert place.all_begun.wait(10)
        executor.add(InProcess("good", Context(None)))
        place.go_on.set()
        assert [future.result(10) for future in futures] == [[0], [1]]
    assert sorted(told) == [
        "fragile gets no more work: the power was cut",
        "fragile lost a task, which goes on elsewhere: the power was cut",
    ]


def test_what_stopping_ends_is_no_loss_to_tell_of() -> None:
    place, told = Fragile(LOST_IN_A_ROW, LOST_IN_A_ROW), list[str]()
    executor = Executor([place], tell=told.append)
    futures = [executor.submit(number_of, number) for number in range(LOST_IN_A_ROW)]
    assert place.all_begun.wait(10)
    executor.stop()
    assert all(future.cancelled() for future in futures)
    assert told == []


def test_an_error_of_a_task_drops_the_queue() -> None:
    go_on = threading.Event()

    def fail(_context: Any) -> Iterator[int]:
        assert go_on.wait(10)
        raise InvalidValueError("no")
        yield

    with Executor([InProcess("here", Context(None))]) as executor:
        failed, waiting = executor.submit(fail), executor.submit(number_of, 1)
        go_on.set()
        with pytest.raises(InvalidValueError, match="no"):
            failed.result(10)
    assert waiting.cancelled()
    assert executor.is_stopped


def test_a_task_that_its_owner_cancelled_keeps_no_other_from_failing() -> None:
    with Executor([], patience=0.05) as executor:
        cancelled, waiting = (executor.submit(number_of, number) for number in range(2))
        assert cancelled.cancel()
        with pytest.raises(ClusterError, match="no worker is left: start nodes"):
            waiting.result(10)
