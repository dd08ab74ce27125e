"""The GPUs of a cluster's nodes as places of an executor, with an executor for each kind of GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from w4a16gen.errors import ClusterError, W4A16Error
from w4a16gen.executors.cluster import Cluster, Node
from w4a16gen.executors.executor import Executor
from w4a16gen.executors.node import Named, Report, TaskActor
from w4a16gen.executors.nodes import Crew
from w4a16gen.executors.place import Place, TaskFunction, WorkerLostError
from w4a16gen.executors.recruits import PATIENCE_SECONDS, Recruits

_TAKE_SECONDS = 0.5
"""How long a GPU's process is asked for items at a time."""
_HUNG_SECONDS = 120.0
"""A GPU's process that does not answer for so long is lost, even if it runs."""
_LAST_SECONDS = 3.0
"""How long a GPU's process may take for its last item when it is stopped."""


KindOf = Callable[[Mapping[str, str]], str]
"""Returns a GPU's kind, given its report; an empty kind is left out."""


@dataclass(frozen=True)
class GpuGroup:
    """The GPUs of one kind, whose times go together."""

    report: Mapping[str, str]
    """What the first one says about itself."""
    executor: Executor
    places: Sequence[OneGpu]

    def end(self) -> None:
        """End the processes, so that others can have the GPUs."""
        self.executor.stop()
        for place in self.places:
            place.end()


def on_gpus(cluster: Cluster, crew: Crew, *, kind_of: KindOf, most: int | None) -> list[GpuGroup]:
    """Return an executor for each kind of GPU, with a process for each GPU.

    Args:
        cluster: the connection.
        crew: what the workers need.
        kind_of: returns a GPU's kind, given its report; an empty kind is left out.
        most: GPUs of each kind; None takes all. If one is lost, another one takes its place.

    Raises:
        ClusterError: if no GPU can be used.
    """
    return list(_Groups(cluster, crew, kind_of, most).by_kind.values())


class _Groups:
    """The GPUs of a cluster by kind: those that work, and those that are kept free as spares."""

    def __init__(self, cluster: Cluster, crew: Crew, kind_of: KindOf, most: int | None) -> None:
        self._cluster, self._crew, self._kind_of, self._most = cluster, crew, kind_of, most
        self._files = cluster.put(dict(crew.files))
        self._spares: list[OneGpu] = []
        self.by_kind: dict[str, GpuGroup] = {}
        self._recruits = Recruits(cluster, self._ask, crew.expected)
        found = [place for place in self._recruits.first() if isinstance(place, OneGpu)]
        if not found:
            raise ClusterError(f"no GPU of the cluster can be used: {self._recruits.way_out} with GPUs")
        for kind in dict.fromkeys(place.kind for place in found):
            of_kind = [place for place in found if place.kind == kind]
            executor = Executor(of_kind[:most], tell=cluster.tell, patience=PATIENCE_SECONDS)
            self.by_kind[kind] = GpuGroup(of_kind[0].report, cluster.manage(executor), of_kind[:most])
            for spare in of_kind[len(of_kind[:most]) :]:
                self._spare(spare)
        cluster.manage(executor, [self._recruits.go_on(self._add, self._is_over, self._call_spare)])

    def _ask(self, node: Node) -> dict[Any, Callable[[Report], Place | None]]:
        places = [OneGpu(self._cluster, node, self._crew, self._files) for _ in range(node.gpus)]
        return {place.describe(): partial(self._described, place) for place in places}

    def _described(self, place: OneGpu, report: Report) -> Place | None:
        """Return a GPU's place now that its kind is known; None if it is left out."""
        place.kind, place.report = self._kind_of(report.versions), report.versions
        if place.kind:
            return place
        place.end()
        return None

    def _is_short(self, kind: str) -> bool:
        """Return whether a group takes one more GPU."""
        return kind in self.by_kind and (self._most is None or self.by_kind[kind].executor.place_count < self._most)

    def _add(self, place: Place) -> None:
        """Take a GPU that has answered after the others."""
        if not isinstance(place, OneGpu):
            return
        if self._is_short(place.kind):
            self.by_kind[place.kind].executor.add(place)
            return
        self._spare(place)
        if place.kind not in self.by_kind:
            self._cluster.tell(
                f"{place.node} has another kind of GPU, and answered late: the same command measures on it"
            )

    def _spare(self, place: OneGpu) -> None:
        """Leave a GPU to others; it may be asked for later."""
        place.end()
        self._spares.append(place)

    def _call_spare(self) -> None:
        """Ask for a spare GPU where one was lost."""
        spare = next((spare for spare in self._spares if self._is_short(spare.kind)), None)
        if spare is not None:
            self._spares.remove(spare)
            self._recruits.expect(spare.at, spare.begin_again(), partial(self._described, spare))

    def _is_over(self) -> bool:
        return all(group.executor.is_stopped for group in self.by_kind.values())


class OneGpu(Place):
    """A GPU of a node, with a process of its own.

    Args:
        cluster: the connection.
        node: the node, which has a GPU for it.
        crew: what the process needs.
        files: the reference of the crew's files.
    """

    def __init__(self, cluster: Cluster, node: Node, crew: Crew, files: Any) -> None:
        """Start the process."""
        super().__init__(node.name)
        self._cluster, self.at, self._crew, self._files = cluster, node, crew, files
        self._actor = self._new_actor()
        self._stopped_at: float | None = None
        self.kind = ""
        self.report: Mapping[str, str] = {}

    def _new_actor(self) -> Any:
        resources = {"num_cpus": 0, "num_gpus": 1}
        return self._cluster.start_actor(TaskActor, self.at, self._crew.setup, self._files, **resources)

    def describe(self) -> Any:
        """Return the reference of the GPU's report."""
        return self._actor.describe.remote(self._crew.identify)

    def stream(self, function: TaskFunction, arguments: Sequence[Any], memory: float = 0.0) -> Iterator[Any]:  # noqa: ARG002
        """Run a task in the process and yield its items as they come."""
        self._answer_to(self._actor.start.remote(Named.of(function), list(arguments)))
        is_done = False
        try:
            while not is_done:
                items, is_done, error = self._answer_to(self._actor.take.remote(_TAKE_SECONDS))
                yield from items
                if isinstance(error, str):
                    raise WorkerLostError(error)
                if error is not None:
                    raise error
                if self._is_stopped() and not items:
                    return
        finally:
            if not is_done:
                self._actor.stop.remote()

    def _answer_to(self, ref: Any) -> Any:
        """Wait for a short call of the process.

        Raises:
            WorkerLostError: if the process is lost, or does not answer in time.
        """

        def is_late() -> bool:
            return self._stopped_at is not None and time.monotonic() > self._stopped_at + _LAST_SECONDS

        return self._cluster.fetch(ref, time.monotonic() + _HUNG_SECONDS, is_late)

    def revive(self) -> bool:
        """Start another process, unless the node is gone."""
        self.end()
        if not self._cluster.answers(self.at, self._is_stopped):
            return False
        try:
            report: Report = self._cluster.fetch(self.begin_again(), is_stopped=self._is_stopped)
        except (WorkerLostError, W4A16Error):
            return False
        return not report.fault and dict(report.versions) == dict(self.report)

    def begin_again(self) -> Any:
        """Start another process; return the reference of the GPU's report."""
        self._actor = self._new_actor()
        return self.describe()

    def end(self) -> None:
        """End the process."""
        self._cluster.end_actor(self._actor)

    def stop(self) -> None:
        """End the task at its next item."""
        self._stopped_at = time.monotonic()

    def _is_stopped(self) -> bool:
        return self._stopped_at is not None
