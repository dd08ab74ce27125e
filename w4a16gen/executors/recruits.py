"""The nodes of a cluster that take part: those of now, and those that join while work goes on."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from w4a16gen.errors import W4A16Error
from w4a16gen.executors.cluster import Cluster, Node
from w4a16gen.executors.node import Report, differences
from w4a16gen.executors.place import Place, WorkerLostError

OTHERS_SECONDS = 15.0
"""How long the next node is waited for once one can be used. Later ones join then."""
PATIENCE_SECONDS = 60.0
"""How long a run without any worker waits for a node to join."""
_SAID_SECONDS = 10.0
_LOOK_SECONDS = 5.0
"""Time between looks for nodes that have joined."""
_REST_SECONDS = 0.2

Ask = Callable[[Node], Mapping[Any, Callable[[Report], "Place | None"]]]
"""Asks a node for reports: returns, by reference, what makes a place of each."""


class Recruits:
    """Asks nodes for reports and makes places of those that can be used.

    Args:
        cluster: the connection.
        ask: asks a node.
        expected: this machine's versions. A node that differs gets no work, and is named.
    """

    def __init__(self, cluster: Cluster, ask: Ask, expected: Mapping[str, str]) -> None:
        """Take the questions; nobody is asked yet."""
        self._cluster, self._ask, self._expected = cluster, ask, expected
        self._asked: dict[Any, tuple[Node, Callable[[Report], Place | None]]] = {}
        self._known: set[str] = set()
        self._has_refused = False

    def first(self) -> list[Place]:
        """Return the places of now. After each one wait only some seconds for the next."""
        self._look()
        places: list[Place] = []
        began = heard = time.monotonic()
        is_said = False
        while self._asked and (not places or time.monotonic() < heard + OTHERS_SECONDS):
            more = self._answers()
            if more:
                places += more
                heard = time.monotonic()  # nodes that start slowly answer one after the other
            if not places and not is_said and time.monotonic() > began + _SAID_SECONDS:
                self._cluster.tell("no node has answered yet: waiting for a runtime_env, or for a GPU in use")
                is_said = True
        return places

    @property
    def way_out(self) -> str:
        """What to do if no node can be used, as the beginning of a phrase."""
        return "see the sentences above, or start nodes" if self._has_refused else "start nodes"

    def expect(self, node: Node, ref: Any, place_of: Callable[[Report], Place | None]) -> None:
        """Wait for one more report of a node."""
        self._asked[ref] = node, place_of

    def go_on(
        self, add: Callable[[Place], None], is_over: Callable[[], bool], look: Callable[[], None] = lambda: None
    ) -> threading.Thread:
        """Add places in a thread as nodes answer, and call `look` now and then, until the work is over.

        Returns:
            The thread.
        """

        def watch() -> None:
            looked = time.monotonic()
            with contextlib.suppress(Exception):  # the connection may end at any time
                while not is_over():
                    for place in self._answers():
                        add(place)
                    look()
                    if time.monotonic() > looked + _LOOK_SECONDS:
                        self._look()
                        looked = time.monotonic()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        return thread

    def _look(self) -> None:
        for node in self._cluster.nodes():
            if node.id not in self._known:
                self._known.add(node.id)
                for ref, place_of in self._ask(node).items():
                    self._asked[ref] = node, place_of

    def _answers(self) -> list[Place]:
        """Return the places of the nodes that have answered since; wait a little."""
        if not self._asked:
            time.sleep(_REST_SECONDS)
            return []
        places = []
        for ref in self._cluster.ready(list(self._asked)):
            node, place_of = self._asked.pop(ref)
            try:
                report: Report = self._cluster.fetch(ref)
                fault = report.fault or "; ".join(differences(self._expected, report.versions))
            except (WorkerLostError, W4A16Error) as error:
                fault = str(error)
            if fault:
                self._has_refused = True
                self._cluster.tell(f"{node.name} gets no work: {fault}")
            elif (place := place_of(report)) is not None:
                places.append(place)
        return places
