"""One queue of tasks for several places: who gets which task, what a lost worker costs, and how all of it stops."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from types import TracebackType
from typing import Any

from w4a16gen.errors import ClusterError
from w4a16gen.executors.place import Place, TaskFunction, WorkerLostError
from w4a16gen.executors.places import Places
from w4a16gen.executors.summaries import NodeSummary
from w4a16gen.executors.tasks import Attempt, Task

ATTEMPTS = 4
"""Places that a task is tried on, at most."""
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
        self._places = Places(places)
        self._tell, self._asked, self._most, self._patience = tell, most, most, patience
        self._changed = threading.Condition(threading.RLock())
        self._waiting: deque[Task] = deque()
        self._longest = 0.0
        """Seconds of the longest task that has finished."""
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
        slots = self._places.slots
        return max(1, slots if self._most is None else min(slots, self._most))

    @property
    def planned_slots(self) -> int:
        """Tasks at once that work is divided for: as many as were asked for, even if fewer fit now."""
        return self._asked or self.slots

    @property
    def planned_memory(self) -> float:
        """Bytes that work is divided for. Who asks for a number of tasks at once sets no other limit."""
        return math.inf if self._asked else self._places.memory

    @property
    def place_count(self) -> int:
        """Places that take tasks."""
        return self._places.count

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
            if self._places.count == 0:
                self._await_a_place()
        return task.future

    def add(self, place: Place) -> None:
        """Add a place, such as a node that has joined."""
        with self._changed:
            self._places.add(place)
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
            places = self._places.at_work
        for place in places:
            place.stop()
        with self._changed:
            self._changed.wait_for(lambda: not self._places.at_work, _STOP_SECONDS)

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
            for task in self._places.running_tasks:
                attempts = self._places.attempts_at(task)
                if task.is_done or len(attempts) >= _AT_ONCE or attempts[0].seconds < late or self._stopped:
                    continue
                slow = attempts[0].place
                place = self._places.second_place(task, slow)
                if place is not None:
                    self._start(task, place)
                    told.append(f"{slow.node} takes long for a task, which {place.node} tries too")
        for sentence in told:
            self._say(sentence)

    def _start_tasks(self) -> None:
        """Start what fits, with the lock held."""
        while self._waiting and not self._stopped and self._places.busy < self.slots:
            found = self._places.first_that_fits(self._waiting)
            if found is None:
                return
            task, place = found
            self._waiting.remove(task)
            if not task.is_wanted():
                task.cancel()
                continue
            self._start(task, place)

    def _start(self, task: Task, place: Place) -> None:
        """Begin an attempt, with the lock held."""
        attempt = self._places.begin(task, place)
        threading.Thread(target=self._run, args=(attempt,), daemon=True).start()

    def _run(self, attempt: Attempt) -> None:
        """Run an attempt, in a thread of its own."""
        place = attempt.place
        lost: WorkerLostError | None = None
        error: BaseException | None = None
        try:
            attempt.take_items(lambda: self._stopped)
        except WorkerLostError as loss:
            lost = loss
        except BaseException as failure:  # noqa: BLE001  (it belongs to whoever waits for the future)
            error = failure
        with self._changed:
            self._places.end(attempt, is_lost=lost is not None)
            is_news = not self._stopped and not attempt.task.is_done
            if lost is not None:
                self._lose(attempt, lost)
            elif not attempt.task.is_done:
                self._count(attempt, is_finished=error is None)
                attempt.finish(error)
                if error is not None:
                    self._drop_queue()
            was_stopped = self._stopped
            self._start_tasks()
            self._changed.notify_all()
        if lost is not None:
            self._examine(place, lost, was_stopped=was_stopped, is_news=is_news)

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
        if task.is_done:
            return
        self._summary_of(place).lost += 1
        self._last_loss = f"{place.node}: {loss}"
        task.lost_at.append(place)
        if self._stopped:
            task.cancel()
        elif self._places.attempts_at(task):
            pass  # another attempt goes on
        elif len(task.lost_at) >= ATTEMPTS:
            task.fail(ClusterError(f"{ATTEMPTS} workers were lost with one task, the last: {loss}"))
        else:
            if task.resume is not None:
                task.arguments = task.resume(task.items)
            self._waiting.appendleft(task)

    def _examine(self, place: Place, loss: WorkerLostError, *, was_stopped: bool, is_news: bool) -> None:
        """Drop a place that cannot go on after a loss, and say what became of it."""
        is_usable = was_stopped or not self._places.loses_all(place)
        if is_usable and not was_stopped:
            try:
                is_usable = place.revive()
            except Exception:  # noqa: BLE001  (whatever keeps it from another task, the others go on)
                is_usable = False
        with self._changed:
            is_dropped = not is_usable and self._places.drop(place)
            if is_dropped and self._places.count == 0:
                self._await_a_place()
        if is_dropped:
            self._say(f"{place.node} gets no more work: {loss}")
        elif is_news:
            self._say(f"{place.node} lost a task, which goes on elsewhere: {loss}")
        with self._changed:
            self._places.trust(place)
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
            self._changed.wait_for(lambda: self._places.count > 0 or self._stopped, self._patience)
            if self._places.count > 0:
                return
            why = f" (the last was lost at {self._last_loss})" if self._last_loss else ""
            for task in self._waiting:
                task.fail(ClusterError(f"no worker is left{why}: {_CONTINUE}"))
            self._waiting.clear()
