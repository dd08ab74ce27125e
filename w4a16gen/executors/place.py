"""A place that runs tasks: threads of this process, a GPU, or a node of a cluster."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

TaskFunction = Callable[..., Iterator[Any]]
"""A function of a module: takes the place's context, then the task's arguments, and yields items. A cluster sends its
name, not its code, so it must be installed on every node."""


class WorkerLostError(Exception):
    """A worker ended, or cannot be reached, before its task did. The task itself is not at fault."""


class Place(ABC):
    """Runs tasks, several at once if it has several slots.

    Args:
        node: the machine's name, for summaries.
        slots: tasks at once.
        memory: bytes that its tasks may take together.
    """

    is_here = False
    """Whether it is this machine, whose faults end a command. Another machine's faults cost only its own tasks."""

    def __init__(self, node: str, slots: int = 1, memory: float = math.inf) -> None:
        """Take the name and the room."""
        self.node, self.slots, self.memory = node, slots, memory

    @abstractmethod
    def stream(self, function: TaskFunction, arguments: Sequence[Any], memory: float = 0.0) -> Iterator[Any]:
        """Run a task and yield its items as they come. Closing the iterator stops the task.

        Args:
            function: what the task runs.
            arguments: of the function, behind the place's context.
            memory: bytes that the task takes at most.

        Raises:
            WorkerLostError: if the worker ended first.
        """

    def revive(self) -> bool:
        """After a worker was lost: return whether the place can take another task."""
        return True

    @abstractmethod
    def stop(self) -> None:
        """End the tasks that run here, from another thread."""


@dataclass(frozen=True)
class Context:
    """What the tasks of a place work with."""

    value: Any
    """The first argument of every task's function."""
    cancel: Callable[[], None] = lambda: None
    """Ends running tasks from another thread. Without it they end at their next item."""


class InProcess(Place):
    """This process: a task is a call in a thread.

    Args:
        node: the machine's name.
        context: what its tasks work with.
        slots: tasks at once.
        memory: bytes that its tasks may take together.
    """

    is_here = True

    def __init__(self, node: str, context: Context, slots: int = 1, memory: float = math.inf) -> None:
        """Take the context and the room."""
        super().__init__(node, slots, memory)
        self.context = context

    def stream(self, function: TaskFunction, arguments: Sequence[Any], memory: float = 0.0) -> Iterator[Any]:  # noqa: ARG002
        """Call the function and yield its items."""
        yield from function(self.context.value, *arguments)

    def stop(self) -> None:
        """End running tasks."""
        self.context.cancel()
