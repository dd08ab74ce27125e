"""Measuring the kernels of a build on problems, on GPUs of one kind, into a tuning table."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from w4a16gen.choose.timing_table import Measured, TuningTable, add_times, one_time
from w4a16gen.executors.executor import Executor
from w4a16gen.executors.place import Place
from w4a16gen.executors.waiting import as_done
from w4a16gen.kernels.config import Epilogue, KernelConfig, QuantMode
from w4a16gen.kernels.device import Device
from w4a16gen.kernels.problem import Problem, runnable
from w4a16gen.measure.compare import measure, tiles_suit
from w4a16gen.measure.gpus import Gpu
from w4a16gen.measure.refine import Refined, nearest, refine
from w4a16gen.progress import Progress
from w4a16gen.runtime.library import Library


class Timed(NamedTuple):
    """An item of a measuring task."""

    config: KernelConfig
    microseconds: float


def time_problem(
    gpu: Gpu,
    problem: Problem,
    mode: QuantMode,
    configs: Sequence[KernelConfig],
    known: Mapping[KernelConfig, float],
    dependent: bool,
    refines: bool,
) -> Iterator[Timed | None]:
    """Time kernels on one problem, then those near the fastest in turns: the task that executors run.

    Args:
        gpu: the build and the GPU.
        problem: the problem.
        mode: the quantisation mode.
        configs: the kernels to time.
        known: times of others.
        dependent: whether launches are dependent ones.
        refines: whether to time those near the fastest in turns.

    Yields:
        Each time at once, and None at the end.
    """
    times = dict(known)
    for config, microseconds in measure(gpu.library, problem, mode, configs, device=gpu.index, dependent=dependent):
        times[config] = microseconds
        yield Timed(config, microseconds)
    if refines and times:
        newer = refine(gpu.library, problem, mode, nearest(times), device=gpu.index, dependent=dependent)
        for config, microseconds in newer.items():
            yield Timed(config, microseconds)
    yield None


@dataclass(frozen=True)
class Tuned:
    """The result of one problem."""

    name: str
    problem: Problem
    times: Mapping[KernelConfig, float]
    measured: int
    left_out: int
    card: str = ""
    """The name of the GPU that it was measured on."""

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
            "card": self.card,
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
    """The GPUs' kind."""
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
    epilogues: Sequence[Epilogue] = (Epilogue.NONE,)
    """Those of the kernels to measure: gated ones compute SwiGLU, elementwise ones add a residual."""

    def run(
        self,
        named: Sequence[tuple[str, Problem]],
        executor: Executor,
        *,
        tell: Callable[[str], None],
        show_progress: Callable[..., AbstractContextManager[Progress]],
    ) -> list[Tuned]:
        """Measure problems, each on one of the GPUs, and write every time at once.

        If one GPU fails or the run is interrupted, the others finish their current kernel and stop. A problem whose
        worker is lost goes on elsewhere with the kernels that are left.

        Args:
            named: the problems, each with its layer's name.
            executor: the GPUs, all of one kind.
            tell: called with a sentence about each finished problem.
            show_progress: shows a bar with a title, for all of them.
        """
        plans = [self._plan(name, problem) for name, problem in named]
        run = _Run(self, plans, executor.slots, tell)
        gpus = f"{executor.slots} GPUs" if executor.slots > 1 else "a GPU"
        with show_progress(f"Measuring on {gpus}") as progress:
            futures = [
                executor.submit(
                    time_problem,
                    *plan.arguments(self),
                    on_item=run.taker(plan, progress),
                    resume=plan.resume(self),
                    is_wanted=run.is_in_time,
                )
                for plan in plans
            ]
            try:
                for future in as_done(futures):
                    if not future.cancelled():  # another task's error, which comes too, dropped the queue
                        future.result()
            except BaseException:
                executor.stop()
                raise
        return run.outcomes

    def _plan(self, name: str, problem: Problem) -> _Plan:
        """Return what is measured of a problem."""
        hashes = self.library.build.content_hashes
        able: list[KernelConfig] = []
        for epilogue in sorted(set(self.epilogues)):
            able += runnable(hashes, self.mode, problem, epilogue)
        suitable = [config for config in able if tiles_suit(config, problem)]
        if self.candidates is not None:
            suitable = [config for config in self.candidates[problem] if config in hashes]
        have = {} if self.again else self.known.valid(self.mode, problem, hashes)
        missing = [config for config in suitable if config not in have]
        times = {config: us for config, us in have.items() if config in suitable}
        of_times = {config: Measured(us, hashes[config]) for config, us in times.items()}
        is_known = not missing and self.refined is not None and self.refined.has(self.mode, problem, of_times)
        refines = self.refined is not None and (self.again or not is_known)
        return _Plan(name, problem, missing, len(able) - len(suitable), times, refines)

    def keep(self, problem: Problem, config: KernelConfig, microseconds: float) -> None:
        """Write a time into the table."""
        measured = Measured(microseconds, self.library.build.content_hashes[config])
        add_times(self.path, one_time(self.gpu, problem, config, measured, self.versions, dependent=self.dependent))


@dataclass
class _Plan:
    """One problem: what is measured of it, and what came."""

    name: str
    problem: Problem
    missing: Sequence[KernelConfig]
    left_out: int
    times: dict[KernelConfig, float]
    refines: bool
    fresh: set[KernelConfig] = field(default_factory=set)
    """Kernels that were measured in this run."""

    def arguments(self, job: Job) -> tuple[Any, ...]:
        """Return the arguments of `time_problem` for what is left."""
        left = [config for config in self.missing if config not in self.fresh]
        return self.problem, job.mode, left, dict(self.times), job.dependent, self.refines

    def resume(self, job: Job) -> Callable[[Sequence[Any]], Sequence[Any]]:
        """Return the function that gives the arguments of another try."""
        return lambda _items: self.arguments(job)


class _Run:
    """What has come of one run, told by the threads that take items."""

    def __init__(self, job: Job, plans: Sequence[_Plan], gpus: int, tell: Callable[[str], None]) -> None:
        self._job, self._plans, self._gpus, self._tell = job, plans, gpus, tell
        self._steps = sum(len(plan.missing) for plan in plans)
        self._began = time.monotonic()
        self.outcomes: list[Tuned] = []

    def is_in_time(self) -> bool:
        """Return whether one more problem ends by the deadline, if it takes as long as those before."""
        deadline, elapsed = self._job.deadline, time.monotonic() - self._began
        done = len(self.outcomes) / self._gpus
        return deadline is None or time.monotonic() + elapsed / max(done, 1) <= deadline

    def taker(self, plan: _Plan, progress: Progress) -> Callable[[Place, Timed | None], None]:
        """Return the function that takes a problem's items."""

        def take(place: Place, item: Timed | None) -> None:
            if item is None:
                self._finish(plan)
                return
            self._job.keep(plan.problem, item.config, item.microseconds)
            plan.times[item.config] = item.microseconds
            if item.config in plan.missing:
                plan.fresh.add(item.config)
            done = sum(len(other.fresh) for other in self._plans)
            where = f"{place.node}: " if self._gpus > 1 else ""
            progress(done, self._steps, f"{where}{plan.problem} {item.config.short_name}")

        return take

    def _finish(self, plan: _Plan) -> None:
        job = self._job
        if plan.refines and plan.times and job.refined is not None:
            hashes = job.library.build.content_hashes
            measured = {config: Measured(us, hashes[config]) for config, us in plan.times.items()}
            job.refined.add(job.mode, plan.problem, measured)
        self.outcomes.append(Tuned(plan.name, plan.problem, plan.times, len(plan.missing), plan.left_out, job.gpu.name))
        count, total = len(self.outcomes), len(self._plans)
        left = (time.monotonic() - self._began) / count * (total - count)
        self._tell(f"{self.outcomes[-1]}; {count} of {total} problems, about {left:.0f} s left")
