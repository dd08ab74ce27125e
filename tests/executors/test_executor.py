"""The queue of tasks: who gets which, what a lost worker costs, and how all of it stops."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest

from w4a16gen.errors import ClusterError, CudaError, InvalidValueError
from w4a16gen.executors.executor import ATTEMPTS, Executor
from w4a16gen.executors.node import Named, Setup, differences, place_files, run_task
from w4a16gen.executors.place import Context, InProcess, Place, TaskFunction, WorkerLostError
from w4a16gen.executors.places import LOST_IN_A_ROW
from w4a16gen.executors.summaries import NodeSummary, add_summaries
from w4a16gen.files import file_digest


class Unsteady(Place):
    """A place that loses some of its tasks after their first item."""

    def __init__(self, node: str, loses: Callable[[int], bool] = lambda _number: False, seconds: float = 0.0) -> None:
        super().__init__(node)
        self.begun = 0
        self._loses, self._seconds = loses, seconds

    def stream(self, function: TaskFunction, arguments: Sequence[Any], memory: float = 0.0) -> Iterator[Any]:
        del memory
        self.begun += 1
        loses = self._loses(self.begun)
        for item in function(self, *arguments):
            time.sleep(self._seconds)
            yield item
            if loses:
                raise WorkerLostError("the power was cut")

    def stop(self) -> None:
        """End at the next item."""


def count(_context: Any, numbers: Sequence[int]) -> Iterator[int]:
    yield from numbers


def open_folder(folder: Path) -> Context:
    return Context(folder)


def read_header(folder: Path) -> Iterator[bytes]:
    yield (folder / "a.h").read_bytes()


def left(numbers: Sequence[int]) -> Callable[[Sequence[int]], Sequence[Any]]:
    return lambda done: [[number for number in numbers if number not in done]]


def test_of_eight_nodes_one_fails_every_third_task_and_nothing_is_lost_or_doubled() -> None:
    places = [Unsteady(f"node {number}") for number in range(7)]
    places.append(Unsteady("bad", lambda number: number % 3 == 0))
    told: list[str] = []
    items: Counter[int] = Counter()
    lock = threading.Lock()

    def keep(_place: Place, item: int) -> None:
        with lock:
            items[item] += 1

    with Executor(places, tell=told.append) as executor:
        tasks = [[3 * task, 3 * task + 1, 3 * task + 2] for task in range(100)]
        futures = [executor.submit(count, task, on_item=keep, resume=left(task)) for task in tasks]
        assert [sorted(future.result(10)) for future in futures] == tasks
    assert items == Counter(range(300)), "each once"
    bad = next(summary for summary in executor.summaries if summary.node == "bad")
    assert bad.lost == places[-1].begun // 3 > 0
    assert len(told) == bad.lost
    assert "bad lost a task, which goes on elsewhere: the power was cut" in told
    assert sum(summary.tasks for summary in executor.summaries) == 100


def test_a_slow_node_does_not_hold_up_the_others() -> None:
    slow, fast = Unsteady("slow", seconds=0.5), Unsteady("fast", seconds=0.001)
    with Executor([slow, fast]) as executor:
        wait([executor.submit(count, [number]) for number in range(50)])
    assert slow.begun < 5
    assert slow.begun + fast.begun == 50


def test_a_place_that_loses_one_task_after_the_other_gets_no_more() -> None:
    bad, good = Unsteady("bad", lambda _number: True), Unsteady("good", seconds=0.001)
    told: list[str] = []
    with Executor([bad, good], tell=told.append) as executor:
        wait([executor.submit(count, [1, 2]) for _ in range(30)])
    assert bad.begun == LOST_IN_A_ROW
    assert "bad gets no more work: the power was cut" in told


def test_a_task_that_every_worker_loses_ends_with_an_error() -> None:
    places = [Unsteady(str(number), lambda _number: True) for number in range(ATTEMPTS + 1)]
    message = f"{ATTEMPTS} workers were lost with one task"
    with Executor(places) as executor, pytest.raises(ClusterError, match=message):
        executor.submit(count, [1]).result(10)


def test_without_any_place_left_waiting_tasks_fail() -> None:
    with Executor([Unsteady("only", lambda _number: True)]) as executor:
        futures = [executor.submit(count, [1]) for _ in range(5)]
        for future in futures:
            with pytest.raises(ClusterError, match="no worker is left"):
                future.result(10)


def test_a_node_that_joins_takes_over() -> None:
    bad = Unsteady("bad", lambda _number: True)
    with Executor([bad], patience=10) as executor:
        futures = [executor.submit(count, [number]) for number in range(5)]
        while bad.begun < LOST_IN_A_ROW:
            time.sleep(0.01)
        executor.add(Unsteady("new"))
        assert [future.result(10) for future in futures] == [[number] for number in range(5)]


class Doubtful(Unsteady):
    """A place that loses its first task, and of which it is not known whether it is alive."""

    def __init__(self, revive: Callable[[], bool]) -> None:
        super().__init__("doubtful", lambda number: number == 1)
        self._revive = revive

    def revive(self) -> bool:
        return self._revive()


def test_a_task_goes_on_elsewhere_before_it_is_known_what_became_of_its_place() -> None:
    known, told = threading.Event(), list[str]()
    doubtful = Doubtful(lambda: not known.wait(10))
    with Executor([doubtful, Unsteady("good")], tell=told.append) as executor:
        futures = [executor.submit(count, [number]) for number in range(10)]
        assert [future.result(5) for future in futures] == [[number] for number in range(10)]
        assert doubtful.begun == 1, "no task goes to it meanwhile"
        known.set()
    assert told == ["doubtful gets no more work: the power was cut"]


def test_a_place_that_cannot_even_be_asked_gets_no_more_work() -> None:
    def fail() -> bool:
        raise CudaError("an uncorrectable ECC error was encountered")

    told: list[str] = []
    with Executor([Doubtful(fail), Unsteady("good")], tell=told.append) as executor:
        assert executor.submit(count, [1, 2]).result(5) == [1, 2]
    assert told == ["doubtful gets no more work: the power was cut"]


def test_a_closed_standard_error_loses_no_task() -> None:
    def tell(_sentence: str) -> None:
        raise BrokenPipeError

    with Executor([Unsteady("bad", lambda number: number == 1), Unsteady("good")], tell=tell) as executor:
        futures = [executor.submit(count, [number]) for number in range(5)]
        assert [future.result(5) for future in futures] == [[number] for number in range(5)]


def test_what_is_submitted_too_late_does_not_wait_for_ever() -> None:
    executor = Executor([Unsteady("only", lambda _number: True)])
    with pytest.raises(ClusterError, match=r"no worker is left \(the last was lost at only: the power was cut"):
        executor.submit(count, [1]).result(5)
    with pytest.raises(ClusterError, match="no worker is left"):
        executor.submit(count, [1]).result(5)
    executor.stop()
    assert executor.submit(count, [1]).cancelled()


def test_work_is_divided_for_as_many_tasks_as_were_asked_for() -> None:
    place = InProcess("small", Context(None), 2, 10.0)
    assert (Executor([place]).planned_slots, Executor([place]).planned_memory) == (2, 10.0)
    asked = Executor([place], most=16)
    assert (asked.planned_slots, asked.planned_memory, asked.slots) == (16, float("inf"), 2)
    assert Executor([]).planned_slots == 1, "places may join"


def test_an_error_of_the_task_is_not_tried_again() -> None:
    def fail(_context: Any) -> Iterator[int]:
        raise InvalidValueError("no")
        yield

    place = InProcess("here", Context(None))
    with Executor([place]) as executor, pytest.raises(InvalidValueError, match="no"):
        executor.submit(fail).result(10)
    assert executor.summaries == [NodeSummary("here", tasks=0, seconds=executor.summaries[0].seconds)]


def test_tasks_fit_slots_and_memory() -> None:
    most: list[int] = []
    running: list[int] = []
    lock = threading.Lock()

    def work(_context: Any) -> Iterator[int]:
        with lock:
            running.append(1)
            most.append(len(running))
        time.sleep(0.02)
        with lock:
            running.pop()
        yield 0

    for memory, limit, expected in ((0.0, None, 4), (4.0, None, 2), (100.0, None, 1), (0.0, 3, 3)):
        most.clear()
        with Executor([InProcess("here", Context(None), 4, 10.0)], most=limit) as executor:
            assert executor.slots == (limit or 4)
            wait([executor.submit(work, memory=memory) for _ in range(8)])
        assert max(most) == expected
    with Executor([InProcess("here", Context(None), 4, 10.0)]) as executor:
        executor.run_one_at_a_time()
        most.clear()
        wait([executor.submit(work) for _ in range(8)])
    assert max(most) == 1


def test_stopping_drops_the_queue_and_ends_what_runs() -> None:
    cancelled, began = threading.Event(), threading.Event()

    def hang(_context: Any) -> Iterator[int]:
        began.set()
        cancelled.wait(10)
        yield 1

    executor = Executor([InProcess("here", Context(None, cancelled.set))])
    first, second = executor.submit(hang), executor.submit(hang)
    began.wait(10)
    executor.stop()
    assert first.result(10) == [1]
    assert second.cancelled()
    assert wait([first, second], 10).done == {first, second}, "who waits for both is woken"


def test_summaries_of_one_machine_are_added_up() -> None:
    both = add_summaries([NodeSummary("b", 1, 2.0, 2), NodeSummary("a", 1), NodeSummary("b", 2, 1.0, 1)])
    assert both == [NodeSummary("a", 1), NodeSummary("b", 3, 3.0, 3)]


def test_only_names_of_functions_travel() -> None:
    assert Named.of(file_digest) == Named("w4a16gen.files", "file_digest")
    assert Named.of(file_digest).find() is file_digest
    for function in (lambda: None, left([1]), Unsteady.stream):
        with pytest.raises(InvalidValueError, match="only names travel"):
            Named.of(function)


def test_differing_versions_are_named() -> None:
    assert list(differences({"nvcc": "13.0", "g++": "12"}, {"nvcc": "13.1"})) == [
        "nvcc is '13.1' there and '13.0' here",
        "g++ is 'missing' there and '12' here",
    ]


def test_files_are_written_once_and_again_if_they_are_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    files = {"a.h": b"a", "folder/b.h": b"b"}
    folder = place_files(files)
    assert {str(path.relative_to(folder)) for path in folder.rglob("*.h")} == files.keys()
    assert folder.parent.parent.stat().st_mode & 0o77 == 0, "nobody else reads or writes them"
    before = (folder / "a.h").stat().st_mtime_ns
    assert place_files(files) == folder
    assert (folder / "a.h").stat().st_mtime_ns == before
    (folder / "a.h").write_bytes(b"x")
    assert place_files(files) == folder, "in the same place, where running workers look"
    assert (folder / "a.h").read_bytes() == b"a"
    shutil.rmtree(folder)
    folder.write_bytes(b"a file")
    assert (place_files(files) / "folder" / "b.h").read_bytes() == b"b"
    assert len(list(folder.parent.iterdir())) == 1, "nothing damaged is left"


def test_a_worker_mends_files_that_were_damaged_between_two_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    setup, read = Setup(Named.of(open_folder)), Named.of(read_header)
    assert run_task(setup, {"a.h": b"a"}, read, []) == [b"a"]
    (header,) = tmp_path.rglob("a.h")
    header.write_bytes(b"x")
    assert run_task(setup, {"a.h": b"a"}, read, []) == [b"a"]


def test_old_files_of_a_node_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = place_files({"a.h": b"a"})
    other = place_files({"a.h": b"c"})
    assert other != folder
    os.utime(other, (0, 0))
    place_files({"a.h": b"d"})
    assert not other.exists(), "old files go"
