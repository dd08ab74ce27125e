"""One queue of tasks for several places: who gets which task, what a lost worker costs, and how all of it stops."""

from __future__ import annotations

import math
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from w4a16gen.errors import ClusterError
from w4a16gen.executors.place import Place, TaskFunction, WorkerLostError
from w4a16gen.executors.tasks import Attempt, Task

ATTEMPTS = 4
"""Places that a task is tried on, at most."""
LOST_IN_A_ROW = 3
"""A place that loses this many tasks one after the other gets no more."""
LATE_SECONDS = 15.0
"""A task that has finished within this time was never late."""
_UNKNOWN_SECONDS = 150.0
"""How long a task takes, as long as none has finished."""
_LATE_FACTOR = 2.0
"""A task is late when it takes longer than the longest one before it, times this."""
_AT_ONCE = 2
"""Attempts at one task at once, at most."""
_CONTINUE = "start nodes, and run the command again to continue"
_STOP_SECONDS = 10.0
"""How long stopping waits for running tasks."""


@dataclass
class NodeSummary:
    """What one machine did."""

    node: str
    tasks: int = 0
    """Tasks that it finished."""
    seconds: float = 0.0
    """Time of these tasks, added up."""
    lost: int = 0
    """Tasks that it lost."""

    def as_json(self) -> dict[str, Any]:
        """Return the object that JSON output carries."""
        return {"node": self.node, "tasks": self.tasks, "seconds": round(self.seconds, 1), "lost": self.lost}


def add_summaries(summaries: Iterable[NodeSummary]) -> list[NodeSummary]:
    """Return one summary for each machine, sorted by name."""
    total: dict[str, NodeSummary] = {}
    for one in summaries:
        known = total.setdefault(one.node, NodeSummary(one.node))
        known.tasks += one.tasks
        known.seconds += one.seconds
        known.lost += one.lost
    return [total[node] for node in sorted(total)]


class Executor:
    """Runs tasks on places: each goes to the place with most free slots, in the order of the queue.

    The queue is dynamic, so that a slow place takes fewer tasks. If a worker is lost, its task goes on at another
    place. A task's own error is not tried again: it drops the queue, and what runs ends at its next item.

    Args:
        places: where tasks run. More may be added.
        tell: called with a sentence about each loss.
        most: tasks at once, at most; None takes all slots.
        patience: seconds to wait for a new place if all are lost.
    """

    def __init__(
        self,
        places: Iterable[Place],
        *,
        tell: Callable[[str], None] = lambda _sentence: None,
        most: int | None = None,
        patience: float = 0.0,
    ) -> None:
        """Take the places; nothing runs yet."""
        self._places = list(places)
        self._tell, self._asked, self._most, self._patience = tell, most, most, patience
        self._changed = threading.Condition(threading.RLock())
        self._waiting: deque[Task] = deque()
        self._running: list[Attempt] = []
        self._longest = 0.0
        """Seconds of the longest task that has finished."""
        self._begun: Counter[Place] = Counter()
        self._losses: Counter[Place] = Counter()
        self._doubts: Counter[Place] = Counter()
        """Losses of each place after which it is not yet known to be alive. It gets no task meanwhile."""
        self._last_loss = ""
        self._summaries: dict[str, NodeSummary] = {}
        self._stopped = False

    def __enter__(self) -> Executor:  # noqa: PYI034 - `Self` is newer than Python 3.10
        """Return itself; leaving the block stops it."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop what still runs."""
        self.stop()

    @property
    def slots(self) -> int:
        """Tasks at once."""
        slots = sum(place.slots for place in self._places)
        return max(1, slots if self._most is None else min(slots, self._most))

    @property
    def planned_slots(self) -> int:
        """Tasks at once that work is divided for: as many as were asked for, even if fewer fit now."""
        return self._asked or self.slots

    @property
    def planned_memory(self) -> float:
        """Bytes that work is divided for. Who asks for a number of tasks at once sets no other limit."""
        return math.inf if self._asked else sum(place.memory for place in self._places)

    @property
    def place_count(self) -> int:
        """Places that take tasks."""
        return len(self._places)

    @property
    def summaries(self) -> list[NodeSummary]:
        """What each machine did."""
        with self._changed:
            return [self._summaries[node] for node in sorted(self._summaries)]

    def submit(
        self,
        function: TaskFunction,
        *arguments: Any,
        memory: float = 0.0,
        on_item: Callable[[Place, Any], None] = lambda _place, _item: None,
        resume: Callable[[Sequence[Any]], Sequence[Any]] | None = None,
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> Future[list[Any]]:
        """Put a task into the queue.

        Args:
            function: takes a place's context and the arguments, and yields items.
            arguments: plain values.
            memory: bytes that it takes at most.
            on_item: called with the place and each item as it comes, in a thread.
            resume: returns the arguments of another try, given the items that came; None begins again.
            is_wanted: asked when it would begin; if it is not wanted any more, its future is cancelled.

        Returns:
            The future of all items; it is cancelled if the executor was stopped.
        """
        task = Task(function, arguments, memory, on_item, resume, is_wanted)
        with self._changed:
            if self._stopped:
                task.cancel()
                return task.future
            self._waiting.append(task)
            self._start_tasks()
            if not self._places:
                self._await_a_place()
        return task.future

    def add(self, place: Place) -> None:
        """Add a place, such as a node that has joined."""
        with self._changed:
            self._places.append(place)
            self._start_tasks()

    @property
    def is_stopped(self) -> bool:
        """Whether it takes no more tasks."""
        return self._stopped

    def run_one_at_a_time(self) -> None:
        """Run a single task at once from now on, because memory ran out."""
        with self._changed:
            self._most = 1

    def stop(self) -> None:
        """Drop the queue, end running tasks and wait for them, though not for long."""
        with self._changed:
            self._drop_queue()
            places = [*(attempt.place for attempt in self._running), *self._doubts]
        for place in dict.fromkeys(places):
            place.stop()
        with self._changed:
            self._changed.wait_for(lambda: not self._running and not self._doubts, _STOP_SECONDS)

    def _drop_queue(self) -> None:
        """Begin nothing more, with the lock held."""
        self._stopped = True
        for task in self._waiting:
            task.cancel()
        self._waiting.clear()

    def repeat_late_tasks(self) -> None:
        """Try tasks that take much longer than others at one more place; the attempt that finishes first counts.

        So a worker that hangs holds nothing up. Such tasks give the same items anywhere, and do not resume. A late
        task's worker is taken to be idle: its second attempt may exceed the tasks at once.
        """
        told = []
        with self._changed:
            late = max(LATE_SECONDS, _LATE_FACTOR * (self._longest or _UNKNOWN_SECONDS))
            for task in dict.fromkeys(attempt.task for attempt in self._running):
                attempts = [attempt for attempt in self._running if attempt.task is task]
                if task.is_done or len(attempts) >= _AT_ONCE or attempts[0].seconds < late or self._stopped:
                    continue
                slow = attempts[0].place
                others = [place for place in self._by_room() if place is not slow] or self._by_room()
                place = next((place for place in others if self._has_room(place, task)), None)
                if place is not None:
                    self._start(task, place)
                    told.append(f"{slow.node} takes long for a task, which {place.node} tries too")
        for sentence in told:
            self._say(sentence)

    def _start_tasks(self) -> None:
        """Start what fits, with the lock held."""
        while self._waiting and not self._stopped and self._busy < self.slots:
            found = self._next()
            if found is None:
                return
            task, place = found
            self._waiting.remove(task)
            if not task.is_wanted():
                task.cancel()
                continue
            self._start(task, place)

    @property
    def _busy(self) -> int:
        """Attempts at tasks that are not done."""
        return sum(not attempt.task.is_done for attempt in self._running)

    def _start(self, task: Task, place: Place) -> None:
        """Begin an attempt, with the lock held."""
        attempt = Attempt(task, place)
        self._running.append(attempt)
        self._begun[place] += 1
        threading.Thread(target=self._run, args=(attempt,), daemon=True).start()

    def _next(self) -> tuple[Task, Place] | None:
        """Return the first task that a place has room for, with that place."""
        for place in self._by_room():
            task = next((task for task in self._waiting if self._may_run(task, place)), None)
            if task is not None and self._has_room(place, task):
                return task, place
        return None

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

    def _run(self, attempt: Attempt) -> None:
        """Run an attempt, in a thread of its own."""
        place = attempt.place
        lost: WorkerLostError | None = None
        error: BaseException | None = None
        try:
            self._take_items(attempt)
        except WorkerLostError as loss:
            lost = loss
        except BaseException as failure:  # noqa: BLE001  (it belongs to whoever waits for the future)
            error = failure
        with self._changed:
            self._running.remove(attempt)
            is_news = not self._stopped and not attempt.task.is_done
            if lost is not None:
                self._doubts[place] += 1
                self._lose(attempt, lost)
            else:
                self._losses[place] = 0
            if lost is None and not attempt.task.is_done:
                self._count(attempt, is_finished=error is None)
                attempt.finish(error)
                if error is not None:
                    self._drop_queue()
            was_stopped = self._stopped
            self._start_tasks()
            self._changed.notify_all()
        if lost is not None:
            self._examine(place, lost, was_stopped=was_stopped, is_news=is_news)

    def _take_items(self, attempt: Attempt) -> None:
        task = attempt.task
        items = attempt.place.stream(task.function, task.arguments, task.memory)
        for item in items:
            attempt.items.append(item)
            task.on_item(attempt.place, item)
            if self._stopped:
                close = getattr(items, "close", None)
                if close is not None:
                    close()
                return

    def _summary_of(self, place: Place) -> NodeSummary:
        return self._summaries.setdefault(place.node, NodeSummary(place.node))

    def _count(self, attempt: Attempt, *, is_finished: bool) -> None:
        """Note what a task took that no worker lost, with the lock held."""
        summary = self._summary_of(attempt.place)
        summary.tasks += is_finished
        summary.seconds += attempt.seconds
        self._longest = max(self._longest, attempt.seconds)

    def _lose(self, attempt: Attempt, loss: WorkerLostError) -> None:
        """Queue a lost task again, in front, before it is known what became of the place; with the lock held."""
        task, place = attempt.task, attempt.place
        self._losses[place] += 1
        if task.is_done:
            return
        self._summary_of(place).lost += 1
        self._last_loss = f"{place.node}: {loss}"
        task.lost_at.append(place)
        if self._stopped:
            task.cancel()
        elif any(other.task is task for other in self._running):
            pass  # another attempt goes on
        elif len(task.lost_at) >= ATTEMPTS:
            task.fail(ClusterError(f"{ATTEMPTS} workers were lost with one task, the last: {loss}"))
        else:
            if task.resume is not None:
                task.arguments = task.resume(task.items)
            self._waiting.appendleft(task)

    def _examine(self, place: Place, loss: WorkerLostError, *, was_stopped: bool, is_news: bool) -> None:
        """Drop a place that cannot go on after a loss, and say what became of it."""
        is_usable = was_stopped or self._losses[place] < LOST_IN_A_ROW
        if is_usable and not was_stopped:
            try:
                is_usable = place.revive()
            except Exception:  # noqa: BLE001  (whatever keeps it from another task, the others go on)
                is_usable = False
        with self._changed:
            is_dropped = place in self._places and not is_usable
            if is_dropped:
                self._places.remove(place)
                if not self._places:
                    self._await_a_place()
        if is_dropped:
            self._say(f"{place.node} gets no more work: {loss}")
        elif is_news:
            self._say(f"{place.node} lost a task, which goes on elsewhere: {loss}")
        with self._changed:
            self._doubts[place] -= 1
            self._doubts += Counter()  # which drops zeros
            self._start_tasks()
            self._changed.notify_all()

    def _say(self, sentence: str) -> None:
        with suppress(OSError):  # nobody may be left to read it
            self._tell(sentence)

    def _await_a_place(self) -> None:
        threading.Thread(target=self._wait_for_a_place, daemon=True).start()

    def _wait_for_a_place(self) -> None:
        """Fail what waits if no place is added in time."""
        with self._changed:
            self._changed.wait_for(lambda: self._places or self._stopped, self._patience)
            if self._places:
                return
            why = f" (the last was lost at {self._last_loss})" if self._last_loss else ""
            for task in self._waiting:
                task.fail(ClusterError(f"no worker is left{why}: {_CONTINUE}"))
            self._waiting.clear()
