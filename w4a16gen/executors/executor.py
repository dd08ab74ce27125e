"""One queue of tasks for several places: who gets which task, what a lost worker costs, and how all of it stops."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from w4a16gen.errors import ClusterError
from w4a16gen.executors.place import Place, TaskFunction, WorkerLostError

ATTEMPTS = 4
"""Places that a task is tried on, at most."""
LOST_IN_A_ROW = 3
"""A place that loses this many tasks one after the other gets no more."""
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


@dataclass(eq=False)
class _Task:
    """A task in the queue or at work."""

    function: TaskFunction
    arguments: Sequence[Any]
    memory: float
    on_item: Callable[[Place, Any], None]
    resume: Callable[[Sequence[Any]], Sequence[Any]] | None
    is_wanted: Callable[[], bool]
    future: Future[list[Any]] = field(default_factory=Future)
    items: list[Any] = field(default_factory=list)
    lost_at: list[Place] = field(default_factory=list)


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
        self._waiting: deque[_Task] = deque()
        self._running: dict[_Task, Place] = {}
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
        task = _Task(function, arguments, memory, on_item, resume, is_wanted)
        with self._changed:
            if self._stopped:
                _cancel(task)
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
            places = [*self._running.values(), *self._doubts]
        for place in dict.fromkeys(places):
            place.stop()
        with self._changed:
            self._changed.wait_for(lambda: not self._running and not self._doubts, _STOP_SECONDS)

    def _drop_queue(self) -> None:
        """Begin nothing more, with the lock held."""
        self._stopped = True
        for task in self._waiting:
            _cancel(task)
        self._waiting.clear()

    def _start_tasks(self) -> None:
        """Start what fits, with the lock held."""
        while self._waiting and not self._stopped and len(self._running) < self.slots:
            found = self._next()
            if found is None:
                return
            task, place = found
            self._waiting.remove(task)
            if not task.is_wanted():
                _cancel(task)
                continue
            self._running[task] = place
            self._begun[place] += 1
            threading.Thread(target=self._run, args=(task, place), daemon=True).start()

    def _next(self) -> tuple[_Task, Place] | None:
        """Return the first task that a place has room for, with that place.

        The emptiest place chooses first, and of equals the one that has had fewest tasks.
        """
        for place in sorted(self._places, key=lambda place: (len(self._at(place)) / place.slots, self._begun[place])):
            if place in self._doubts:
                continue
            task = next((task for task in self._waiting if self._may_run(task, place)), None)
            if task is not None and self._has_room(place, task):
                return task, place
        return None

    def _at(self, place: Place) -> list[_Task]:
        return [task for task, at in self._running.items() if at is place]

    def _may_run(self, task: _Task, place: Place) -> bool:
        """Return whether a place has not lost this task before, or no other place is left."""
        return place not in task.lost_at or all(other in task.lost_at for other in self._places)

    def _has_room(self, place: Place, task: _Task) -> bool:
        taken = self._at(place)
        memory = sum(other.memory for other in taken) + task.memory
        return not taken or (len(taken) < place.slots and memory <= place.memory)

    def _run(self, task: _Task, place: Place) -> None:
        """Run a task, in a thread of its own."""
        began = time.monotonic()
        lost: WorkerLostError | None = None
        error: BaseException | None = None
        try:
            self._take_items(task, place)
        except WorkerLostError as loss:
            lost = loss
        except BaseException as failure:  # noqa: BLE001  (it belongs to whoever waits for the future)
            error = failure
        with self._changed:
            del self._running[task]
            summary = self._summaries.setdefault(place.node, NodeSummary(place.node))
            was_stopped = self._stopped
            if lost is None:
                self._losses[place] = 0
                summary.tasks += error is None
                summary.seconds += time.monotonic() - began
                _finish(task, error)
            else:
                summary.lost += 1
                self._doubts[place] += 1
                self._lose(task, place, lost)
            if error is not None:
                self._drop_queue()
            self._start_tasks()
            self._changed.notify_all()
        if lost is not None:
            self._examine(place, lost, was_stopped=was_stopped)

    def _take_items(self, task: _Task, place: Place) -> None:
        items = place.stream(task.function, task.arguments, task.memory)
        for item in items:
            task.items.append(item)
            task.on_item(place, item)
            if self._stopped:
                close = getattr(items, "close", None)
                if close is not None:
                    close()
                return

    def _lose(self, task: _Task, place: Place, loss: WorkerLostError) -> None:
        """Queue a lost task again, in front, before it is known what became of the place; with the lock held."""
        self._losses[place] += 1
        self._last_loss = f"{place.node}: {loss}"
        task.lost_at.append(place)
        if self._stopped:
            _cancel(task)
        elif len(task.lost_at) >= ATTEMPTS:
            task.future.set_exception(ClusterError(f"{ATTEMPTS} workers were lost with one task, the last: {loss}"))
        else:
            if task.resume is not None:
                task.arguments = task.resume(task.items)
            else:
                task.items.clear()
            self._waiting.appendleft(task)

    def _examine(self, place: Place, loss: WorkerLostError, *, was_stopped: bool) -> None:
        """Drop a place that cannot go on after a loss, and say what became of it."""
        is_usable = self._losses[place] < LOST_IN_A_ROW
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
        with suppress(OSError):  # nobody may be left to read it
            if is_dropped:
                self._tell(f"{place.node} gets no more work: {loss}")
            elif not was_stopped:
                self._tell(f"{place.node} lost a task, which goes on elsewhere: {loss}")
        with self._changed:
            self._doubts[place] -= 1
            self._doubts += Counter()  # which drops zeros
            self._start_tasks()
            self._changed.notify_all()

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
                task.future.set_exception(ClusterError(f"no worker is left{why}: {_CONTINUE}"))
            self._waiting.clear()


def _cancel(task: _Task) -> None:
    """Cancel a task's future, and wake those who wait for it."""
    task.future.cancel()
    task.future.set_running_or_notify_cancel()


def _finish(task: _Task, error: BaseException | None) -> None:
    if error is not None:
        task.future.set_exception(error)
    else:
        task.future.set_result(task.items)
