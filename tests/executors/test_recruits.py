"""Which nodes a run begins with: those that answer one after the other, not those that are late."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from w4a16gen.errors import ClusterError
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


def test_a_node_without_a_report_is_named_and_the_others_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(_cluster: SlowCluster, ref: int) -> Report:
        if ref == 0:
            raise ClusterError("its runtime_env cannot be made")
        return Report({}, "")

    monkeypatch.setattr(SlowCluster, "fetch", fetch)
    found, cluster = began_with(monkeypatch, 1, 2)
    assert found == ["node 1"]
    assert cluster.told == ["node 0 gets no work: its runtime_env cannot be made"]


@pytest.mark.parametrize(
    ("fault", "way_out"), [("", "start nodes"), ("it has no nvcc", "see the sentences above, or start nodes")]
)
def test_the_way_out_points_at_what_was_told(monkeypatch: pytest.MonkeyPatch, fault: str, way_out: str) -> None:
    cluster = SlowCluster(1)
    monkeypatch.setattr(cluster, "fetch", lambda _ref: Report({}, fault))
    monkeypatch.setattr(recruits, "time", SimpleNamespace(monotonic=lambda: cluster.now))
    found = Recruits(cast("Cluster", cluster), lambda _node: {0: lambda _report: None}, {})
    assert found.first() == []
    assert found.way_out == way_out
    assert cluster.told == ([f"node 0 gets no work: {fault}"] if fault else [])


def test_nodes_that_join_are_asked_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, asked, added = SlowCluster(1), list[str](), list[str]()

    def ask(node: Node) -> dict[Any, Any]:
        asked.append(node.name)
        return {int(node.id): lambda _report: cast("Place", SimpleNamespace(node=node.name))}

    def rest(seconds: float) -> None:
        cluster.now += seconds

    monkeypatch.setattr(recruits, "time", SimpleNamespace(monotonic=lambda: cluster.now, sleep=rest))
    found = Recruits(cast("Cluster", cluster), ask, {})
    assert [place.node for place in found.first()] == ["node 0"]
    monkeypatch.setattr(cluster, "_answers", (1, 2))
    found.go_on(lambda place: added.append(place.node), lambda: cluster.now > 60).join(10)
    assert asked == ["node 0", "node 1"]
    assert added == ["node 1"]
