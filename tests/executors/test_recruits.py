"""Which nodes a run begins with: those that answer one after the other, not those that are late."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from w4a16gen.executors import recruits
from w4a16gen.executors.cluster import Cluster, Node
from w4a16gen.executors.node import Report
from w4a16gen.executors.place import Place
from w4a16gen.executors.recruits import OTHERS_SECONDS, Recruits


class SlowCluster:
    """Nodes that answer after some seconds of a clock that runs while a run waits for them.

    Args:
        answers: the seconds after which each node answers.
    """

    def __init__(self, *answers: float) -> None:
        self.now = 0.0
        self.told: list[str] = []
        self._answers = answers

    def nodes(self) -> list[Node]:
        return [Node(str(number), f"node {number}", 1, 0, 0.0) for number in range(len(self._answers))]

    def ready(self, refs: list[int]) -> list[int]:
        self.now += 0.5
        return [ref for ref in refs if self._answers[ref] <= self.now]

    def fetch(self, _ref: int) -> Report:
        return Report({}, "")

    def tell(self, sentence: str) -> None:
        self.told.append(sentence)


def began_with(monkeypatch: pytest.MonkeyPatch, *answers: float) -> tuple[list[str], SlowCluster]:
    """Return the nodes that a run begins with, and the cluster."""
    cluster = SlowCluster(*answers)
    monkeypatch.setattr(recruits, "time", SimpleNamespace(monotonic=lambda: cluster.now))

    def ask(node: Node) -> dict[Any, Any]:
        return {int(node.id): lambda _report: cast("Place", SimpleNamespace(node=node.name))}

    found = Recruits(cast("Cluster", cluster), ask, {}).first()
    return [place.node for place in found], cluster


def test_nodes_that_start_slowly_are_waited_for_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = [20 + number * (OTHERS_SECONDS - 1) for number in range(4)]
    found, cluster = began_with(monkeypatch, *slow)
    assert found == [f"node {number}" for number in range(4)]
    assert cluster.now == slow[-1], "nobody is waited for any more"
    assert cluster.told == ["no node has answered yet: waiting for a runtime_env, or for a GPU in use"]


def test_a_node_that_is_late_does_not_hold_up_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    found, cluster = began_with(monkeypatch, 1, 3, 1000)
    assert found == ["node 0", "node 1"]
    assert 3 + OTHERS_SECONDS <= cluster.now <= 3 + OTHERS_SECONDS + 1
    assert cluster.told == []


def test_without_nodes_nothing_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert began_with(monkeypatch)[0] == []
