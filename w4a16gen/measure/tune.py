"""Measuring the kernels of a build on problems, on one or several GPUs, into a tuning table."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from w4a16gen.choose.timing_table import Measured, TuningTable, add_times, one_time
from w4a16gen.kernels.config import KernelConfig, QuantMode
from w4a16gen.kernels.device import Device
from w4a16gen.kernels.problem import Problem, runnable
from w4a16gen.measure.compare import measure, tiles_suit
from w4a16gen.measure.refine import Refined, nearest, refine
from w4a16gen.progress import Progress, no_progress
from w4a16gen.runtime.library import Library


@contextmanager
def _no_progress(_title: str) -> Iterator[Progress]:
    yield no_progress


def _call_all(
    one: Callable[[str, Problem], None], named: Sequence[tuple[str, Problem]], *, threads: int, stop: threading.Event
) -> None:
    """Call a function for every problem, several at once. The first failure sets `stop` and is raised."""
    if threads == 1:
        for name, problem in named:
            one(name, problem)
        return
    with ThreadPoolExecutor(threads) as pool:
        try:
            for done in as_completed([pool.submit(one, name, problem) for name, problem in named]):
                done.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


@dataclass(frozen=True)
class Tuned:
    """The result of one problem."""

    name: str
    problem: Problem
    times: Mapping[KernelConfig, float]
    measured: int
    left_out: int

    def fastest(self) -> KernelConfig:
        """Return the fastest kernel; there must be one."""
        return min(self.times, key=lambda config: (self.times[config], config))

    def __str__(self) -> str:
        what = f"{self.problem} ({self.name})" if self.name else str(self.problem)
        if not self.times:
            return f"{what}: no built kernel can run it"
        left_out = f", {self.left_out} with tiles far from m left out" if self.left_out else ""
        fastest = self.fastest()
        return (
            f"{what}: {self.measured} measured, {len(self.times) - self.measured} known{left_out}; "
            f"{self.times[fastest]:.2f} us, {fastest.name}"
        )

    def as_json(self) -> dict[str, object]:
        """Return the object that JSON output carries."""
        fastest = self.fastest() if self.times else None
        return {
            "problem": vars(self.problem),
            "name": self.name,
            "measured": self.measured,
            "known": len(self.times) - self.measured,
            "left_out": self.left_out,
            "fastest": None if fastest is None else fastest.name,
            "microseconds": None if fastest is None else round(self.times[fastest], 3),
        }


@dataclass(frozen=True)
class Job:
    """One run of `w4a16gen tune`."""

    library: Library
    gpu: Device
    mode: QuantMode
    path: Path
    known: TuningTable
    again: bool
    dependent: bool
    versions: Mapping[str, str]
    candidates: Mapping[Problem, Sequence[KernelConfig]] | None = None
    """The kernels to measure on each problem; None takes all built ones whose token tiles suit it."""
    refined: Refined | None = None
    """Kernels near the fastest are timed again, in turns, unless these are noted; None times them once."""
    deadline: float | None = None
    """Clock (`time.monotonic`) by which problems must end: none is begun that would end later. None sets no limit."""

    def run(
        self,
        named: Sequence[tuple[str, Problem]],
        devices: Sequence[int],
        *,
        tell: Callable[[str], None],
        show_progress: Callable[[str], AbstractContextManager[Progress]],
    ) -> list[Tuned]:
        """Measure problems, each on one of the GPUs, and write every time at once.

        If one GPU fails or is interrupted, the others finish their current kernel and stop.

        Args:
            named: the problems, each with its layer's name.
            devices: the GPUs, all of one model.
            tell: called with a sentence about each finished problem.
            show_progress: shows a bar with a title; used with one GPU only, since several bars would mix.
        """
        hashes = self.library.build.content_hashes
        free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for device in devices:
            free.put(device)
        stop = threading.Event()
        began = time.monotonic()
        outcomes: list[Tuned] = []
        bar = show_progress if len(devices) == 1 else _no_progress

        def one(name: str, problem: Problem) -> None:
            device = free.get()
            try:
                if stop.is_set() or self._is_late(time.monotonic() - began, len(outcomes) / len(devices)):
                    return
                outcome = self._tune_one(name, problem, device, hashes, stop, bar)
            except BaseException:
                stop.set()
                raise
            finally:
                free.put(device)
            if not stop.is_set():
                outcomes.append(outcome)
                left = (time.monotonic() - began) / len(outcomes) * (len(named) - len(outcomes))
                tell(f"{outcome}; {len(outcomes)} of {len(named)} problems, about {left:.0f} s left")

        _call_all(one, named, threads=len(devices), stop=stop)
        return outcomes

    def _is_late(self, elapsed: float, done: float) -> bool:
        """Return whether one more problem would end after the deadline, if it takes as long as those before."""
        return self.deadline is not None and time.monotonic() + elapsed / max(done, 1) > self.deadline

    def _keep(
        self, problem: Problem, config: KernelConfig, microseconds: float, hashes: Mapping[KernelConfig, str]
    ) -> None:
        """Write a time into the table."""
        measured = Measured(microseconds, hashes[config])
        add_times(self.path, one_time(self.gpu, problem, config, measured, self.versions, dependent=self.dependent))

    def _refine(
        self, problem: Problem, times: Mapping[KernelConfig, float], device: int, hashes: Mapping[KernelConfig, str]
    ) -> dict[KernelConfig, float]:
        """Time the kernels near the fastest in turns, unless that was done; return their times."""
        known = {config: Measured(us, hashes[config]) for config, us in times.items()}
        if self.refined is None or (not self.again and self.refined.has(self.mode, problem, known)):
            return {}
        newer = refine(self.library, problem, self.mode, nearest(times), device=device, dependent=self.dependent)
        for config, microseconds in newer.items():
            self._keep(problem, config, microseconds, hashes)
        self.refined.add(
            self.mode, problem, known | {config: Measured(us, hashes[config]) for config, us in newer.items()}
        )
        return newer

    def _tune_one(
        self,
        name: str,
        problem: Problem,
        device: int,
        hashes: Mapping[KernelConfig, str],
        stop: threading.Event,
        show_progress: Callable[[str], AbstractContextManager[Progress]],
    ) -> Tuned:
        able = runnable(hashes, self.mode, problem)
        suitable = [config for config in able if tiles_suit(config, problem)]
        if self.candidates is not None:
            suitable = [config for config in self.candidates[problem] if config in hashes]
        have = {} if self.again else self.known.valid(self.mode, problem, hashes)
        missing = [config for config in suitable if config not in have]
        times = {config: us for config, us in have.items() if config in suitable}
        with show_progress(str(problem)) as progress:
            measured = measure(self.library, problem, self.mode, missing, device=device, dependent=self.dependent)
            for config, us in measured:
                self._keep(problem, config, us, hashes)
                times[config] = us
                progress(len(times.keys() & set(missing)), len(missing), config.short_name)
                if stop.is_set():
                    break
        if times and not stop.is_set():
            times |= self._refine(problem, times, device, hashes)
        return Tuned(name, problem, times, len(missing), len(able) - len(suitable))
