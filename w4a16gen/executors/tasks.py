"""A task of an executor, and the attempts at it: usually one, and more if a worker is lost or hangs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from w4a16gen.executors.place import Place, TaskFunction


@dataclass(eq=False)
class Task:
    """A task in the queue or at work."""

    function: TaskFunction
    arguments: Sequence[Any]
    memory: float
    on_item: Callable[[Place, Any], None]
    resume: Callable[[Sequence[Any]], Sequence[Any]] | None
    is_wanted: Callable[[], bool]
    future: Future[list[Any]] = field(default_factory=Future)
    items: list[Any] = field(default_factory=list)
    """What came before a worker was lost, if the task resumes."""
    lost_at: list[Place] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        """Whether its future has a result, or will never have one."""
        return self.future.done()

    def cancel(self) -> None:
        """Cancel its future, and wake those who wait for it, unless it is done."""
        if self.future.cancel():
            self.future.set_running_or_notify_cancel()

    def fail(self, error: BaseException) -> None:
        """Set the error of its future, unless it is done."""
        if not self.is_done:
            self.future.set_exception(error)


@dataclass(eq=False)
class Attempt:
    """One try of a task at a place."""

    task: Task
    place: Place
    began: float = field(default_factory=time.monotonic)
    """Clock (`time.monotonic`) at its start."""
    items: list[Any] = field(init=False)

    def __post_init__(self) -> None:
        """Go on with the items of earlier tries where the task resumes."""
        self.items = self.task.items if self.task.resume is not None else []

    @property
    def seconds(self) -> float:
        """Seconds since its start."""
        return time.monotonic() - self.began

    def take_items(self, is_stopped: Callable[[], bool]) -> None:
        """Run the task at the place, and keep and tell each item as it comes.

        Args:
            is_stopped: asked after each item; if it is, the task ends there.

        Raises:
            WorkerLostError: if the worker ended first.
        """
        task = self.task
        items = self.place.stream(task.function, task.arguments, task.memory)
        for item in items:
            self.items.append(item)
            task.on_item(self.place, item)
            if is_stopped():
                close = getattr(items, "close", None)
                if close is not None:
                    close()
                return

    def finish(self, error: BaseException | None) -> None:
        """Set the items or the error of the task's future, unless another attempt was faster."""
        if error is not None:
            self.task.fail(error)
        elif not self.task.is_done:
            self.task.future.set_result(self.items)
