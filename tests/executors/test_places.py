"""Which place takes a task, by room and by losses, and how an attempt takes items: without threads."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from w4a16gen.executors.place import Context, InProcess, Place
from w4a16gen.executors.places import LOST_IN_A_ROW, Places
from w4a16gen.executors.tasks import Attempt, Task


def place_named(node: str, slots: int = 1, memory: float = math.inf) -> Place:
    return InProcess(node, Context(None), slots, memory)


def numbers(_context: Any, count: int) -> Iterator[int]:
    yield from range(count)


def task_of(memory: float = 0.0, taken: list[Any] | None = None) -> Task:
    """Return a task of three items, which go into a list."""
    kept = [] if taken is None else taken
    return Task(numbers, [3], memory, lambda _place, item: kept.append(item), None, lambda: True)


def taker(places: Places, waiting: Sequence[Task]) -> str | None:
    """Return the node that takes a task."""
    found = places.first_that_fits(waiting)
    return None if found is None else found[1].node


def lose(places: Places, task: Task, place: Place) -> None:
    places.end(places.begin(task, place), is_lost=True)
    task.lost_at.append(place)


def test_the_emptiest_place_takes_a_task_and_of_equals_the_one_with_fewest_before() -> None:
    small, large = place_named("small", 2), place_named("large", 4)
    places = Places([small, large])
    for _ in range(2):
        assert taker(places, [task_of()]) == "small"
        places.begin(task_of(), small)
        places.begin(task_of(), large)
        assert taker(places, [task_of()]) == "large", "a quarter of its slots is taken, and half of the other's"
        places.begin(task_of(), large)
    places = Places([small, large])
    places.end(places.begin(task_of(), small), is_lost=False)
    assert taker(places, [task_of()]) == "large"


def test_a_place_takes_no_more_than_its_slots_and_memory() -> None:
    place = place_named("one", 2, memory=10)
    places = Places([place])
    assert taker(places, [task_of(memory=20)]) == "one", "a task too large for any place runs by itself"
    first = places.begin(task_of(memory=20), place)
    assert taker(places, [task_of()]) is None
    places.end(first, is_lost=False)
    places.begin(task_of(memory=6), place)
    assert taker(places, [task_of(memory=5)]) is None
    assert taker(places, [task_of(memory=4)]) == "one"
    places.begin(task_of(memory=4), place)
    assert taker(places, [task_of()]) is None


def test_a_lost_task_returns_to_a_place_only_if_no_other_is_left() -> None:
    first, second = place_named("first"), place_named("second")
    places, task, other = Places([first, second]), task_of(), task_of()
    lose(places, task, first)
    assert taker(places, [task]) == "second"
    places.begin(other, second)
    assert taker(places, [task]) is None
    places.trust(first)
    assert taker(places, [task]) is None
    assert places.first_that_fits([task, other]) == (other, first)
    assert places.drop(second)
    assert not places.drop(second)
    assert taker(places, [task]) == "first"


def test_a_place_in_doubt_is_at_work_and_gets_no_task_until_it_is_trusted_after_each_loss() -> None:
    place = place_named("one", 2)
    places = Places([place])
    attempts = [places.begin(task_of(), place) for _ in range(2)]
    for attempt in attempts:
        places.end(attempt, is_lost=True)
    places.trust(place)
    assert places.at_work == [place]
    assert taker(places, [task_of()]) is None
    places.trust(place)
    assert places.at_work == []
    assert taker(places, [task_of()]) == "one"


def test_a_place_loses_all_after_losses_in_a_row_only() -> None:
    place = place_named("one")
    places = Places([place])
    for _ in range(LOST_IN_A_ROW - 1):
        lose(places, task_of(), place)
    places.end(places.begin(task_of(), place), is_lost=False)
    for number in range(LOST_IN_A_ROW):
        assert not places.loses_all(place), number
        lose(places, task_of(), place)
    assert places.loses_all(place)


def test_a_second_attempt_prefers_another_place() -> None:
    first, second = place_named("first", 3), place_named("second")
    places, task = Places([first, second]), task_of()
    places.begin(task, first)
    assert places.second_place(task, first) is second
    places.begin(task_of(), second)
    assert places.second_place(task, first) is None, "the other place is full"
    places.drop(second)
    assert places.second_place(task, first) is first, "no other place is left"


@pytest.mark.parametrize("after", [1, 2, 4])
def test_an_attempt_ends_at_the_next_item_when_it_is_stopped(after: int) -> None:
    taken: list[Any] = []
    attempt = Attempt(task_of(taken=taken), place_named("one"))
    attempt.take_items(lambda: len(taken) >= after)
    assert attempt.items == taken == list(range(min(after, 3)))
