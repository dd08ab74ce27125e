"""Whether a node still answers, asked now and then while tasks run there."""

from __future__ import annotations

import threading
import time
from typing import Any

from w4a16gen.executors.cluster import Cluster, Node
from w4a16gen.executors.node import is_alive

QUIET_SECONDS = 60.0
"""A node that has not been heard of for so long is asked."""
ANSWER_SECONDS = 60.0
"""How long it may take to answer: it may have to start a process for this, next to compilers."""


class Pulse:
    """Tells whether a node still answers, for all tasks that wait there.

    Ray notices a node that ended, but may never end the tasks of one that is frozen.

    Args:
        cluster: the connection.
        node: the node.
    """

    def __init__(self, cluster: Cluster, node: Node) -> None:
        """Take the node, which has just been heard of."""
        self._cluster, self._node = cluster, node
        self._lock = threading.Lock()
        self._heard = time.monotonic()
        self._asked = 0.0
        self._answer: Any = None

    def beat(self) -> None:
        """Note that the node was heard of."""
        with self._lock:
            self._heard, self._answer = time.monotonic(), None

    def is_gone(self) -> bool:
        """Return whether the node owes an answer; ask it if it has been quiet for long. This does not wait."""
        with self._lock:
            now = time.monotonic()
            if self._answer is None:
                if now > self._heard + QUIET_SECONDS:
                    self._answer, self._asked = self._cluster.start(is_alive, self._node, num_cpus=0), now
                return False
            if self._cluster.has(self._answer):
                self._heard, self._answer = now, None
                return False
            return now > self._asked + ANSWER_SECONDS
