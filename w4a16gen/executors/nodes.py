"""The CPUs of a cluster's nodes as places of an executor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from w4a16gen.errors import ClusterError
from w4a16gen.executors.cluster import Cluster, Node
from w4a16gen.executors.executor import Executor
from w4a16gen.executors.node import Files, Named, Report, Setup, describe_node, run_task
from w4a16gen.executors.place import Place, TaskFunction
from w4a16gen.executors.pulse import Pulse
from w4a16gen.executors.recruits import PATIENCE_SECONDS, Recruits


@dataclass(frozen=True)
class Crew:
    """What every worker of an executor needs.

    Args:
        setup: prepares a worker.
        files: what it needs; sent once to each node.
        identify: reports the versions of a node, or of a context with a GPU.
        expected: the versions of this machine. A node that differs gets no work, and is named.
    """

    setup: Setup
    files: Files
    identify: Named
    expected: Mapping[str, str]


def on_cpus(cluster: Cluster, crew: Crew, *, most: int | None) -> Executor:
    """Return an executor on the CPUs of all nodes whose versions are those of this machine.

    Args:
        cluster: the connection.
        crew: what the workers need.
        most: tasks at once; None takes all CPUs.

    Raises:
        ClusterError: if no node can be used.
    """
    files = cluster.put(dict(crew.files))

    def ask(node: Node) -> dict[Any, Callable[[Report], Place | None]]:
        if not node.cpus:
            return {}
        place = _Cpus(cluster, node, crew.setup, files)
        return {cluster.start(describe_node, node, crew.identify, num_cpus=0): lambda _report: place}

    recruits = Recruits(cluster, ask, crew.expected)
    places = recruits.first()
    if not places:
        raise ClusterError(f"no node of the cluster can compile: {recruits.way_out} with CPUs")
    executor = Executor(places, tell=cluster.tell, most=most, patience=PATIENCE_SECONDS)
    return cluster.manage(
        executor, [recruits.go_on(executor.add, lambda: executor.is_stopped, executor.repeat_late_tasks)]
    )


class _Cpus(Place):
    """The CPUs of a node: a task of ours is a task of Ray."""

    def __init__(self, cluster: Cluster, node: Node, setup: Setup, files: Any) -> None:
        super().__init__(node.name, node.cpus, node.memory)
        self._cluster, self._at, self._setup, self._files = cluster, node, setup, files
        self._pulse = Pulse(cluster, node)
        self._stopped = False

    def stream(self, function: TaskFunction, arguments: Sequence[Any], memory: float = 0.0) -> Iterator[Any]:
        """Run a task on the node and yield its items when it is done."""
        resources = {"num_cpus": 1, "memory": int(min(memory, self.memory))}
        call = (self._setup, self._files, Named.of(function), list(arguments))
        ref = self._cluster.start(run_task, self._at, *call, **resources)
        items = self._cluster.fetch(ref, is_stopped=lambda: self._stopped, is_gone=self._pulse.is_gone)
        self._pulse.beat()
        yield from items

    def revive(self) -> bool:
        """Return whether the node is alive."""
        is_alive = self._cluster.answers(self._at, lambda: self._stopped)
        if is_alive:
            self._pulse.beat()
        return is_alive

    def stop(self) -> None:
        """Cancel the tasks that run here."""
        self._stopped = True
