"""The CPUs and the GPUs of a cluster's nodes as places of an executor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from w4a16gen.errors import ClusterError
from w4a16gen.executors.cluster import Cluster, Node
from w4a16gen.executors.executor import Executor
from w4a16gen.executors.node import Files, Named, Report, Setup, TaskActor, describe_node, run_task
from w4a16gen.executors.place import Place, TaskFunction, WorkerLostError
from w4a16gen.executors.recruits import PATIENCE_SECONDS, Recruits

_TAKE_SECONDS = 0.5
"""How long a GPU's process is asked for items at a time."""


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
        raise ClusterError("no node of the cluster can compile: see the sentences above, or start nodes with CPUs")
    executor = Executor(places, tell=cluster.tell, most=most, patience=PATIENCE_SECONDS)
    return cluster.manage(executor, [recruits.go_on(executor.add, lambda: executor.is_stopped)])


@dataclass(frozen=True)
class GpuGroup:
    """The GPUs of one kind, whose times go together."""

    report: Mapping[str, str]
    """What the first one says about itself."""
    executor: Executor
    places: Sequence[_OneGpu]

    def end(self) -> None:
        """End the processes, so that others can have the GPUs."""
        self.executor.stop()
        for place in self.places:
            place.end()


def on_gpus(
    cluster: Cluster, crew: Crew, *, kind_of: Callable[[Mapping[str, str]], str], most: int | None
) -> list[GpuGroup]:
    """Return an executor for each kind of GPU, with a process for each GPU.

    Args:
        cluster: the connection.
        crew: what the workers need.
        kind_of: returns a GPU's kind, given its report; an empty kind is left out.
        most: GPUs of each kind; None takes all.

    Raises:
        ClusterError: if no GPU can be used.
    """
    files = cluster.put(dict(crew.files))

    def ask(node: Node) -> dict[Any, Callable[[Report], Place | None]]:
        places = [_OneGpu(cluster, node, crew, files) for _ in range(node.gpus)]
        return {place.describe(): partial(_described, place, kind_of) for place in places}

    recruits = Recruits(cluster, ask, crew.expected)
    found = [place for place in recruits.first() if isinstance(place, _OneGpu)]
    if not found:
        raise ClusterError("no GPU of the cluster can be used: see the sentences above, or start nodes with GPUs")
    groups: dict[str, GpuGroup] = {}
    for kind in dict.fromkeys(place.kind for place in found):
        of_kind = [place for place in found if place.kind == kind]
        for place in of_kind[most:] if most else []:
            place.end()
        executor = Executor(of_kind[:most], tell=cluster.tell, patience=PATIENCE_SECONDS)
        groups[kind] = GpuGroup(of_kind[0].report, cluster.manage(executor), of_kind[:most])

    def add(place: Place) -> None:
        group = groups.get(place.kind) if isinstance(place, _OneGpu) else None
        if group is None:
            cluster.tell(f"{place.node} has another kind of GPU, and answered late: the same command measures on it")
        elif most is None or group.executor.slots < most:
            group.executor.add(place)

    threads = [recruits.go_on(add, lambda: all(group.executor.is_stopped for group in groups.values()))]
    cluster.manage(next(iter(groups.values())).executor, threads)
    return list(groups.values())


class _Cpus(Place):
    """The CPUs of a node: a task of ours is a task of Ray."""

    def __init__(self, cluster: Cluster, node: Node, setup: Setup, files: Any) -> None:
        super().__init__(node.name, node.cpus, node.memory)
        self._cluster, self._at, self._setup, self._files = cluster, node, setup, files
        self._stopped = False

    def stream(self, function: TaskFunction, arguments: Sequence[Any], memory: float = 0.0) -> Iterator[Any]:
        """Run a task on the node and yield its items when it is done."""
        resources = {"num_cpus": 1, "memory": int(min(memory, self.memory))}
        call = (self._setup, self._files, Named.of(function), list(arguments))
        ref = self._cluster.start(run_task, self._at, *call, **resources)
        yield from self._cluster.fetch(ref, is_stopped=lambda: self._stopped)

    def revive(self) -> bool:
        """Return whether the node is alive."""
        return self._cluster.answers(self._at)

    def stop(self) -> None:
        """Cancel the tasks that run here."""
        self._stopped = True


class _OneGpu(Place):
    """A GPU of a node, with a process of its own."""

    def __init__(self, cluster: Cluster, node: Node, crew: Crew, files: Any) -> None:
        super().__init__(node.name)
        self._cluster, self._at, self._crew, self._files = cluster, node, crew, files
        self._actor = self._new_actor()
        self._stopped = False
        self.kind = ""
        self.report: Mapping[str, str] = {}

    def _new_actor(self) -> Any:
        resources = {"num_cpus": 0, "num_gpus": 1}
        return self._cluster.start_actor(TaskActor, self._at, self._crew.setup, self._files, **resources)

    def describe(self) -> Any:
        """Return the reference of the GPU's report."""
        return self._actor.describe.remote(self._crew.identify)

    def stream(self, function: TaskFunction, arguments: Sequence[Any], memory: float = 0.0) -> Iterator[Any]:  # noqa: ARG002
        """Run a task in the process and yield its items as they come."""
        self._cluster.fetch(self._actor.start.remote(Named.of(function), list(arguments)))
        is_done = False
        try:
            while not is_done:
                items, is_done, error = self._cluster.fetch(self._actor.take.remote(_TAKE_SECONDS))
                yield from items
                if isinstance(error, str):
                    raise WorkerLostError(error)
                if error is not None:
                    raise error
                if self._stopped and not items:
                    return
        finally:
            if not is_done:
                self._actor.stop.remote()

    def revive(self) -> bool:
        """Start another process, unless the node is gone."""
        self.end()
        if not self._cluster.answers(self._at):
            return False
        self._actor = self._new_actor()
        try:
            report: Report = self._cluster.fetch(self.describe(), is_stopped=lambda: self._stopped)
        except WorkerLostError:
            return False
        return not report.fault and dict(report.versions) == dict(self.report)

    def end(self) -> None:
        """End the process."""
        self._cluster.end_actor(self._actor)

    def stop(self) -> None:
        """End the task at its next item."""
        self._stopped = True


def _described(place: _OneGpu, kind_of: Callable[[Mapping[str, str]], str], report: Report) -> Place | None:
    """Return a GPU's place now that its kind is known; None if it is left out."""
    place.kind, place.report = kind_of(report.versions), report.versions
    if place.kind:
        return place
    place.end()
    return None
