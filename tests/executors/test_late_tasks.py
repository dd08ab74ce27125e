"""Workers that hang and nodes that freeze: their tasks go on elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from w4a16gen.errors import InvalidValueError
from w4a16gen.executors import cluster as ray_cluster
from w4a16gen.executors import executor as of_executors
from w4a16gen.executors import nodes, pulse
from w4a16gen.executors.cluster import Cluster, Node
from w4a16gen.executors.executor import Executor
from w4a16gen.executors.node import Named, Setup, describe_node
from w4a16gen.executors.place import Place, TaskFunction, WorkerLostError
from w4a16gen.executors.pulse import Pulse
from w4a16gen.executors.summaries import NodeSummary

LATE = 0.05
NODE = Node("1" * 56, "frozen", 4, 0, 0.0)


class Worker(Place):
    """A place whose tasks named in `holds` wait until they are let go."""

    def __init__(self, node: str, slots: int = 1, holds: Sequence[int] = ()) -> None:
        super().__init__(node, slots)
        self.begun: list[int] = []
        self.go_on, self._holds = threading.Event(), holds
        self.ends: Callable[[], None] = lambda: None
        """Called at the end of a task that was held."""

    def stream(self, function: TaskFunction, arguments: Sequence[Any], memory: float = 0.0) -> Iterator[Any]:
        del function, memory
        (number,) = arguments
        self.begun.append(number)
        if number in self._holds and self.begun.count(number) == 1:
            assert self.go_on.wait(10)
            self.ends()
        yield number

    def stop(self) -> None:
        """Let go what is held."""
        self.go_on.set()


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a task be late after a moment."""
    monkeypatch.setattr(of_executors, "LATE_SECONDS", LATE)
    monkeypatch.setattr(of_executors, "_UNKNOWN_SECONDS", LATE)


def number_of(_context: Any, number: int) -> Iterator[int]:
    yield number


def repeat_until_done(executor: Executor, futures: Sequence[Future[list[Any]]]) -> None:
    deadline = time.monotonic() + 10
    while not all(future.done() for future in futures):
        assert time.monotonic() < deadline
        executor.repeat_late_tasks()
        time.sleep(0.01)


def repeat(executor: Executor, worker: Worker) -> None:
    """Repeat late tasks until a worker has one, and a while longer."""
    deadline = time.monotonic() + 10
    while not worker.begun:
        assert time.monotonic() < deadline
        executor.repeat_late_tasks()
        time.sleep(0.01)
    time.sleep(2 * LATE)
    executor.repeat_late_tasks()


def test_a_worker_that_hangs_holds_up_neither_the_queue_nor_the_end() -> None:
    hung, good, told = Worker("hung", holds=[0]), Worker("good"), list[str]()
    with Executor([hung, good], most=1, tell=told.append) as executor:
        futures = [executor.submit(number_of, number) for number in range(5)]
        repeat_until_done(executor, futures)
        assert [future.result() for future in futures] == [[number] for number in range(5)]
    assert told == ["hung takes long for a task, which good tries too"]
    assert hung.begun == [0], "its only slot is taken"
    assert good.begun == [0, 1, 2, 3, 4]
    assert [(one.node, one.tasks, one.lost) for one in executor.summaries] == [("good", 5, 0)]


def test_the_attempt_that_is_first_counts_and_the_other_one_does_not() -> None:
    slow, other = Worker("slow", holds=[0]), Worker("other", holds=[0])
    with Executor([slow, other]) as executor:
        future = executor.submit(number_of, 0)
        repeat(executor, other)
        slow.go_on.set()
        assert future.result(10) == [0]
        other.go_on.set()
    assert (slow.begun, other.begun) == ([0], [0]), "two attempts at once, no more"
    assert executor.summaries == [NodeSummary("slow", 1, executor.summaries[0].seconds)]


def test_an_only_place_tries_a_late_task_again_in_another_slot() -> None:
    only = Worker("only", slots=2, holds=[0])
    with Executor([only]) as executor:
        future = executor.submit(number_of, 0)
        repeat_until_done(executor, [future])
        assert future.result() == [0]
    assert only.begun == [0, 0]


def test_what_other_tasks_took_decides_what_is_late() -> None:
    only = Worker("only", slots=2, holds=[0, 1])
    with Executor([only]) as executor:
        future = executor.submit(number_of, 0)
        time.sleep(4 * LATE)
        only.go_on.set()
        assert future.result(10) == [0]
        only.go_on.clear()
        future = executor.submit(number_of, 1)
        time.sleep(2 * LATE)
        executor.repeat_late_tasks()
        time.sleep(LATE)
        assert only.begun == [0, 1]
        repeat_until_done(executor, [future])
        assert only.begun == [0, 1, 1]


def test_a_shorter_task_does_not_make_others_late_sooner() -> None:
    only = Worker("only", slots=2, holds=[0, 2])
    with Executor([only]) as executor:
        future = executor.submit(number_of, 0)
        time.sleep(4 * LATE)
        only.go_on.set()
        assert future.result(10) == [0]
        assert executor.submit(number_of, 1).result(10) == [1]
        only.go_on.clear()
        future = executor.submit(number_of, 2)
        time.sleep(2 * LATE)
        executor.repeat_late_tasks()
        time.sleep(LATE)
        assert only.begun == [0, 1, 2]
        only.go_on.set()
        assert future.result(10) == [2]


@pytest.mark.parametrize("ends_first", ["slow", "other"])
def test_one_lost_attempt_of_two_is_not_tried_again(ends_first: str) -> None:
    def lose() -> None:
        raise WorkerLostError("the power was cut")

    slow, other, told = Worker("slow", holds=[0]), Worker("other", holds=[0]), list[str]()
    loser, winner = (slow, other) if ends_first == "slow" else (other, slow)
    loser.ends = lose
    with Executor([slow, other], tell=told.append) as executor:
        future = executor.submit(number_of, 0)
        repeat(executor, other)
        loser.go_on.set()
        while len(told) < 2:
            time.sleep(0.001)
        winner.go_on.set()
        assert future.result(10) == [0]
    assert told[1] == f"{loser.node} lost a task, which goes on elsewhere: the power was cut"
    assert len(slow.begun) == len(other.begun) == 1


def test_both_attempts_lost_are_tried_again() -> None:
    def lose() -> None:
        raise WorkerLostError("the power was cut")

    slow, other = Worker("slow", holds=[0]), Worker("other", holds=[0])
    slow.ends = other.ends = lose
    with Executor([slow, other]) as executor:
        future = executor.submit(number_of, 0)
        repeat(executor, other)
        slow.go_on.set()
        other.go_on.set()
        assert future.result(10) == [0]


def test_a_loss_after_the_other_attempt_was_done_is_not_told() -> None:
    lost = threading.Event()

    def lose() -> None:
        lost.set()
        raise WorkerLostError("the power was cut")

    slow, other, told = Worker("slow", holds=[0]), Worker("other"), list[str]()
    slow.ends = lose
    with Executor([slow, other], tell=told.append) as executor:
        future = executor.submit(number_of, 0)
        repeat_until_done(executor, [future])
        slow.go_on.set()
        assert lost.wait(10)
        assert [executor.submit(number_of, number).result(10) for number in (1, 2)] == [[1], [2]]
    assert told == ["slow takes long for a task, which other tries too"]
    assert sum(summary.lost for summary in executor.summaries) == 0


def test_an_error_after_the_other_attempt_was_done_ends_nothing() -> None:
    def fail() -> None:
        raise InvalidValueError("no")

    slow, other = Worker("slow", holds=[0]), Worker("other")
    slow.ends = fail
    with Executor([slow, other]) as executor:
        future = executor.submit(number_of, 0)
        repeat_until_done(executor, [future])
        slow.go_on.set()
        assert [executor.submit(number_of, number).result(10) for number in (1, 2)] == [[1], [2]]


class FrozenRay:
    """Stands in for Ray with nodes that answer nothing, until they thaw."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.cancelled = 0
        self.is_frozen = True

    def remote(self, function: Callable[..., Any]) -> Any:
        def start(*_arguments: Any) -> str:
            self.started.append(function.__name__)
            return function.__name__

        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=start))

    def put(self, value: Any) -> Any:
        return value

    def wait(self, refs: Sequence[str], timeout: float) -> tuple[list[str], list[str]]:
        if self.is_frozen:
            time.sleep(min(timeout, 0.01))
            return [], list(refs)
        return list(refs), []

    def get(self, ref: str) -> Any:
        return ref == "is_alive" or ["an item"]

    def cancel(self, _ref: str) -> None:
        self.cancelled += 1


@pytest.fixture
def frozen(monkeypatch: pytest.MonkeyPatch) -> FrozenRay:
    pytest.importorskip("ray")
    monkeypatch.setattr(ray_cluster, "_ANSWER_SECONDS", 0.1)
    monkeypatch.setattr(pulse, "QUIET_SECONDS", 0.1)
    monkeypatch.setattr(pulse, "ANSWER_SECONDS", 0.1)
    return FrozenRay()


def test_a_node_that_answers_no_more_loses_its_tasks_and_is_asked_once_for_all(frozen: FrozenRay) -> None:
    cpus = nodes._Cpus(Cluster(frozen, print), NODE, Setup(Named.of(describe_node)), None)  # noqa: SLF001
    told: list[str] = []
    with Executor([cpus], tell=told.append) as executor:
        futures = [executor.submit(number_of, number) for number in range(5)]
        executor.add(Worker("good"))
        assert [future.result(10) for future in futures] == [[number] for number in range(5)]
        while "frozen gets no more work: it does not answer" not in told:
            time.sleep(0.01)
    assert frozen.started.count("run_task") == NODE.cpus
    assert frozen.cancelled >= NODE.cpus
    assert frozen.started.count("is_alive") <= 1 + NODE.cpus, "once for all, and once for each that was lost"


def test_a_node_that_answers_or_finishes_tasks_is_not_gone(frozen: FrozenRay) -> None:
    heart = Pulse(Cluster(frozen, print), NODE)

    def is_gone_after(seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if heart.is_gone():
                return True
            time.sleep(0.005)
        return False

    assert not is_gone_after(0.05)
    assert frozen.started == [], "it was just heard of"
    assert is_gone_after(1)
    assert frozen.started == ["is_alive"]
    heart.beat()
    assert not is_gone_after(0.05)
    assert frozen.started == ["is_alive"]
    frozen.is_frozen = False
    assert not is_gone_after(0.5)
    assert 2 <= len(frozen.started) <= 6, "asked again only after a while"
