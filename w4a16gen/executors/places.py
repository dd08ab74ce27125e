"""The places of an executor: what each has at work, which one takes a task, and which one is dropped after losses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

from w4a16gen.executors.place import Place
from w4a16gen.executors.tasks import Attempt, Task

LOST_IN_A_ROW = 3
"""A place that loses this many tasks one after the other gets no more."""


class Places:
    """Places with their running attempts. Who uses them from several threads holds a lock.

    Args:
        places: where tasks run. More may be added.
    """

    def __init__(self, places: Iterable[Place]) -> None:
        """Take the places; nothing runs yet."""
        self._places = list(places)
        self._running: list[Attempt] = []
        self._begun: Counter[Place] = Counter()
        self._losses: Counter[Place] = Counter()
        self._doubts: Counter[Place] = Counter()
        """Losses of each place after which it is not yet known to be alive. It gets no task meanwhile."""

    @property
    def count(self) -> int:
        """Places that take tasks."""
        return len(self._places)

    @property
    def slots(self) -> int:
        """Tasks at once, of all places."""
        return sum(place.slots for place in self._places)

    @property
    def memory(self) -> float:
        """Bytes that tasks may take together, of all places."""
        return sum(place.memory for place in self._places)

    @property
    def busy(self) -> int:
        """Attempts at tasks that are not done."""
        return sum(not attempt.task.is_done for attempt in self._running)

    @property
    def at_work(self) -> list[Place]:
        """Places that run tasks, or are in doubt after a loss."""
        return list(dict.fromkeys([*(attempt.place for attempt in self._running), *self._doubts]))

    @property
    def running_tasks(self) -> list[Task]:
        """Tasks that are at work, in the order of their starts."""
        return list(dict.fromkeys(attempt.task for attempt in self._running))

    def attempts_at(self, task: Task) -> list[Attempt]:
        """Return the running attempts at a task, the oldest first."""
        return [attempt for attempt in self._running if attempt.task is task]

    def add(self, place: Place) -> None:
        """Add a place."""
        self._places.append(place)

    def drop(self, place: Place) -> bool:
        """Take a place out, and return whether it was in."""
        if place not in self._places:
            return False
        self._places.remove(place)
        return True

    def begin(self, task: Task, place: Place) -> Attempt:
        """Note that a task starts at a place."""
        attempt = Attempt(task, place)
        self._running.append(attempt)
        self._begun[place] += 1
        return attempt

    def end(self, attempt: Attempt, *, is_lost: bool) -> None:
        """Note that an attempt has ended. If it was lost, its place is in doubt until `trust`."""
        place = attempt.place
        self._running.remove(attempt)
        if is_lost:
            self._losses[place] += 1
            self._doubts[place] += 1
        else:
            self._losses[place] = 0

    def trust(self, place: Place) -> None:
        """End the doubt after a loss: the place is alive, or was dropped."""
        self._doubts[place] -= 1
        self._doubts += Counter()  # which drops zeros

    def loses_all(self, place: Place) -> bool:
        """Return whether a place has lost as many tasks in a row as may be."""
        return self._losses[place] >= LOST_IN_A_ROW

    def first_that_fits(self, waiting: Collection[Task]) -> tuple[Task, Place] | None:
        """Return the first task that a place has room for, with that place.

        Args:
            waiting: the queue.
        """
        for place in self._by_room():
            task = next((task for task in waiting if self._may_run(task, place)), None)
            if task is not None and self._has_room(place, task):
                return task, place
        return None

    def second_place(self, task: Task, first: Place) -> Place | None:
        """Return a place with room for another attempt at a task, or None.

        Args:
            task: a task that runs.
            first: where it runs. It is asked only if no other place gets tasks.
        """
        others = [place for place in self._by_room() if place is not first] or self._by_room()
        return next((place for place in others if self._has_room(place, task)), None)

    def _by_room(self) -> list[Place]:
        """Return the places that get tasks: the emptiest first, and of equals the one that has had fewest tasks."""
        places = [place for place in self._places if place not in self._doubts]
        return sorted(places, key=lambda place: (len(self._at(place)) / place.slots, self._begun[place]))

    def _at(self, place: Place) -> list[Task]:
        return [attempt.task for attempt in self._running if attempt.place is place]

    def _may_run(self, task: Task, place: Place) -> bool:
        """Return whether a place has not lost this task before, or no other place is left."""
        return place not in task.lost_at or all(other in task.lost_at for other in self._places)

    def _has_room(self, place: Place, task: Task) -> bool:
        taken = self._at(place)
        memory = sum(other.memory for other in taken) + task.memory
        return not taken or (len(taken) < place.slots and memory <= place.memory)
