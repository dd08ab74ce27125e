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
                if stop.is_set():
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
        have = {} if self.again else self.known.valid(self.mode, problem, hashes)
        missing = [config for config in suitable if config not in have]
        times = {config: us for config, us in have.items() if config in suitable}
        with show_progress(str(problem)) as progress:
            measured = measure(self.library, problem, self.mode, missing, device=device, dependent=self.dependent)
            for config, us in measured:
                measured_once = Measured(us, hashes[config])
                newer = one_time(self.gpu, problem, config, measured_once, self.versions, dependent=self.dependent)
                add_times(self.path, newer)
                times[config] = us
                progress(len(times.keys() & set(missing)), len(missing), config.short_name)
                if stop.is_set():
                    break
        return Tuned(name, problem, times, len(missing), len(able) - len(suitable))
