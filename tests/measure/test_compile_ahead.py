"""Compiling rivals' kernels ahead: which rivals, which problems, and what failures do."""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from w4a16gen import Problem, QuantMode
from w4a16gen.measure import compile_ahead as ahead
from w4a16gen.measure.rival_products import Product
from w4a16gen.measure.rivals import HUMMING, RIVALS, Rival
from w4a16gen.measure.torch_weight import TorchWeight
from w4a16gen.progress import Progress

MODE = QuantMode.FINEGRAINED_SCALE_ONLY
PROBLEMS = [Problem(m, 64, 128, 128) for m in (1, 2, 3)]


class Compilers:
    """Stands in for processes that compile."""

    def __init__(self) -> None:
        self.compiled: list[tuple[str, Problem]] = []
        self.outcomes: dict[int, str | BaseException] = {}

    def compile_one(self, name: str, problem: Problem, _mode: QuantMode, device: int) -> str:
        assert device == 3
        self.compiled.append((name, problem))
        outcome = self.outcomes.get(problem.m, "")
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


@pytest.fixture
def compilers(monkeypatch: pytest.MonkeyPatch) -> Compilers:
    found = Compilers()
    monkeypatch.setattr(ahead, "compile_one", found.compile_one)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    return found


def showing(report: Progress) -> Callable[..., AbstractContextManager[Progress]]:
    """Return what shows progress by reporting it."""

    def show(title: str, *, lines: bool) -> AbstractContextManager[Progress]:
        assert (title, lines) == ("Compiling rivals' kernels", True)
        return nullcontext(report)

    return show


def run(
    problems: Sequence[Problem] = PROBLEMS, rivals: Sequence[Rival] = (HUMMING,)
) -> tuple[list[str], list[tuple[int, int]]]:
    told: list[str] = []
    steps: list[tuple[int, int]] = []
    found = ahead.compile_ahead(
        problems,
        MODE,
        rivals,
        3,
        tell=told.append,
        show_progress=showing(lambda done, total, _what: steps.append((done, total))),
        executor=ThreadPoolExecutor(1),
    )
    assert found == len(problems)
    return told, steps


def test_rivals_that_compile_do_so_ahead(compilers: Compilers) -> None:
    assert run(rivals=RIVALS) == ([], [(done, 6) for done in range(1, 7)])
    assert set(compilers.compiled) == {(name, problem) for name in ("humming", "quack_bf16") for problem in PROBLEMS}


def test_one_kernel_is_left_to_the_run_itself(compilers: Compilers) -> None:
    assert run(PROBLEMS[:1]) == ([], [])
    assert compilers.compiled == []
    assert run(PROBLEMS[:1], RIVALS) == ([], [(1, 2), (2, 2)])


@pytest.mark.parametrize(("cores", "processes"), [(None, 1), (2, 2), (64, len(PROBLEMS))])
def test_there_are_no_more_processes_than_cores_or_kernels(
    compilers: Compilers, monkeypatch: pytest.MonkeyPatch, cores: int | None, processes: int
) -> None:
    begun: list[int] = []

    def pool(workers: int, context: Any) -> Executor:
        assert context.get_start_method() == "spawn"
        begun.append(workers)
        return ThreadPoolExecutor(workers)

    monkeypatch.setattr(ahead, "ProcessPoolExecutor", pool)
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    show = showing(lambda *_: None)
    ahead.compile_ahead(PROBLEMS, MODE, [HUMMING], 3, tell=pytest.fail, show_progress=show)
    assert begun == [processes]
    assert len(compilers.compiled) == len(PROBLEMS)
    monkeypatch.setattr(ahead, "MOST_PROCESSES", 1)
    ahead.compile_ahead(PROBLEMS, MODE, [HUMMING], 3, tell=pytest.fail, show_progress=show)
    assert begun == [processes, 1], "nor than the GPU has memory for"


def test_nothing_is_done_for_what_is_not_installed(compilers: Compilers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert run() == ([], [])
    assert compilers.compiled == []


def test_failures_are_said_and_do_not_end_the_run(compilers: Compilers) -> None:
    compilers.outcomes = {1: "humming: no", 2: "humming: no"}
    told, _ = run()
    assert told == ["2 of 3 kernels of rivals were not compiled ahead: humming: no"]
    compilers.outcomes = {2: BrokenProcessPool("gone")}
    told, _ = run()
    assert told == ["1 of 3 kernels of rivals were not compiled ahead: a process ended"]


def test_nothing_is_begun_after_the_end(compilers: Compilers, monkeypatch: pytest.MonkeyPatch) -> None:
    may_end = threading.Event()

    def compile_one(*arguments: Any) -> str:
        if compilers.compiled:
            may_end.wait(10)  # the second one has begun when the end comes
        return compilers.compile_one(*arguments)

    def progress(*_: Any) -> None:
        threading.Timer(0.2, may_end.set).start()

    monkeypatch.setattr(ahead, "compile_one", compile_one)
    pool, told = ThreadPoolExecutor(1), list[str]()
    ready = ahead.compile_ahead(
        PROBLEMS,
        MODE,
        [HUMMING],
        3,
        tell=told.append,
        show_progress=showing(progress),
        executor=pool,
        until=time.monotonic(),
    )
    assert ready == len(compilers.compiled) < len(PROBLEMS)
    assert told == []


class FirstOnly(Executor):
    """Runs the first tasks at once, and no other until it is shut down."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.waiting: list[Future[Any]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        if self.count > 0:
            future.set_result(fn(*args, **kwargs))
        else:
            self.waiting.append(future)
            timer = threading.Timer(5, self._fail, [future])
            timer.daemon = True
            timer.start()
        self.count -= 1
        return future

    def _fail(self, future: Future[Any]) -> None:
        """End the wait for a task that should have been cancelled, so that the test fails and does not hang."""
        if future.set_running_or_notify_cancel():
            future.set_exception(AssertionError("a task was awaited that does not run"))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        del wait
        assert all(future.cancel() for future in self.waiting if cancel_futures)


@pytest.mark.parametrize(("compiled", "ready"), [(1, 0), (3, 1), (4, 2)])
def test_a_problem_is_ready_when_all_rivals_have_compiled_for_it(
    compilers: Compilers, compiled: int, ready: int
) -> None:
    rivals = [replace(RIVALS[0], name=name, module="any") for name in ("first", "second")]
    steps: list[int] = []
    found = ahead.compile_ahead(
        PROBLEMS,
        MODE,
        rivals,
        3,
        tell=pytest.fail,
        show_progress=showing(lambda done, _total, _what: steps.append(done)),
        executor=FirstOnly(compiled),
        until=time.monotonic(),
    )
    assert found == ready
    assert compilers.compiled == [(rival.name, problem) for problem in PROBLEMS for rival in rivals][:compiled]
    assert steps == [1], "the end has come with the first one"


def test_an_interruption_ends_it(compilers: Compilers) -> None:
    compilers.outcomes = {1: KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        run()


class CpuTorch:
    """torch, whose GPUs are the CPU."""

    def __init__(self) -> None:
        self._torch: Any = pytest.importorskip("torch")
        self.cuda = SimpleNamespace(device=lambda _: nullcontext(), synchronize=lambda: None, empty_cache=lambda: None)

    def device(self, kind: str, index: int) -> Any:
        assert (kind, index) == ("cuda", 3)
        return self._torch.device("cpu")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._torch, name)


def test_a_rival_compiles_by_running_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []

    def prepare(a: Any, weight: TorchWeight, copies: int) -> Sequence[Product]:
        def product(given: Any) -> Any:
            if weight.n == 128:
                raise RuntimeError("no\nsuch kernel")
            ran.append((given is a, tuple(a.shape), weight.n, copies))

        return [product] * copies

    monkeypatch.setattr(ahead, "RIVALS", [replace(HUMMING, name="x", prepare=prepare)])
    monkeypatch.setattr(ahead, "find_torch", CpuTorch)
    assert ahead.compile_one("x", Problem(2, 64, 128, 128), MODE, 3) == ""
    assert ran == [(True, (2, 128), 64, 1)]
    assert ahead.compile_one("x", Problem(2, 128, 128, 128), MODE, 3) == "x: RuntimeError: no such kernel"
