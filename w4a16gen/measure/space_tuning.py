"""Tuning a whole space: build the promising kernels of a space, measure them, and keep the few that are needed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from w4a16gen.choose.chooser import Chooser
from w4a16gen.choose.timing_table import TABLE, TuningTable
from w4a16gen.errors import UnsupportedProblemError
from w4a16gen.kernels.config import KernelConfig, QuantMode, Target
from w4a16gen.kernels.device import Device
from w4a16gen.kernels.problem import Problem, why_cannot_run
from w4a16gen.kernels.spaces import enumerate_space
from w4a16gen.measure.alone import alone
from w4a16gen.measure.gpus import Cards
from w4a16gen.measure.promising import promising, to_build
from w4a16gen.measure.refine import REFINED, Refined
from w4a16gen.measure.results import smallest_cover
from w4a16gen.measure.tune import Job, Tuned
from w4a16gen.progress import Progress
from w4a16gen.runtime.library import Library
from w4a16gen.wording import counted

Key = tuple[QuantMode, Problem]
SLACK = 0.01
"""The kept kernels are within this share of the fastest on every problem."""
BUILDING_SHARE = 0.4
"""Share of a budget that compiling may take."""
COMPILE_SECONDS = 3.0
"""CPU time of a kernel's compilation, at most on the machines seen so far."""
LINK_SECONDS = 20.0
"""Kept back for the last link."""


@dataclass(frozen=True)
class SpaceRequest:
    """What is tuned, from which space, and where the build goes."""

    space: str
    problems: Mapping[QuantMode, Sequence[tuple[str, Problem]]]
    folder: Path
    compilers: int
    """Compilers that run at once."""
    budget: float | None
    """Seconds; None sets no limit."""


@dataclass(frozen=True)
class Workshop:
    """How kernels are built and loaded, and how the user is told."""

    load: Callable[[], Library | None]
    """Returns the build in the folder, or None without one."""
    build: Callable[[Sequence[KernelConfig]], Library]
    """Builds exactly these kernels, says which fail, and loads them."""
    compiled: Callable[[Sequence[KernelConfig]], set[KernelConfig]]
    """Returns those of some kernels whose objects are in the folder."""
    measure_on: Callable[[Library], AbstractContextManager[Cards]]
    """Provides the GPUs that measure a build."""
    tell: Callable[[str], None]
    show_progress: Callable[..., AbstractContextManager[Progress]]
    """Takes a title, and the number of steps if it is known."""


@dataclass(frozen=True)
class SpaceTuned:
    """The result."""

    space: str
    outcomes: Sequence[Tuned]
    estimated: int
    """Kernels of the space that were estimated."""
    promising: int
    """Kernels worth building."""
    not_built: int
    """Promising kernels that the budget, or a failure, left out."""
    not_measured: int
    """Problems that the budget left out."""
    kernels: Sequence[KernelConfig]
    """The tuned modes' native kernels of the build that is left."""
    losses: Sequence[float]
    """For each measured problem the time of a call over that of the fastest measured kernel."""

    def as_json(self) -> dict[str, Any]:
        """Return the member of the command's JSON object."""
        return {
            "space": self.space,
            "estimated": self.estimated,
            "promising": self.promising,
            "not_built": self.not_built,
            "not_measured": self.not_measured,
            "kernels": [config.name for config in self.kernels],
            "mean_loss": round(geometric_mean(self.losses), 4) if self.losses else None,
            "worst_loss": round(max(self.losses), 4) if self.losses else None,
        }


def tune_space(request: SpaceRequest, gpu: Device, job_of: Any, workshop: Workshop) -> SpaceTuned:
    """Estimate a space, build and measure what is promising, and leave a build of the smallest set.

    Everything is kept as it is made: objects in the build's folder, times in its table. A later run with the same
    problems goes on. Nothing is written before all problems are known to have kernels.

    Args:
        request: what is tuned.
        gpu: the GPU to estimate for.
        job_of: returns the measuring job for a library, a mode and GPUs.
        workshop: builds and loads kernels, and provides the GPUs that measure.

    Raises:
        UnsupportedProblemError: if no native kernel of the space can run a problem.
        InvalidValueError: if another run is at work in the folder.
        OSError: if something cannot be written.
    """
    began = time.monotonic()
    estimated = sum(len(_native(request.space, mode)) for mode in request.problems)
    wanted = _estimate(request, gpu, workshop)
    _refuse_what_no_kernel_runs(request, wanted)
    workshop.tell(
        f"{counted(estimated, 'kernel')} of space {request.space} estimated for {counted(len(wanted), 'problem')}, "
        f"{len(to_build(wanted))} are promising"
    )
    with alone(request.folder, "--build-dir"):
        return _build_and_measure(request, gpu, job_of, workshop, wanted, began=began, estimated=estimated)


def _build_and_measure(
    request: SpaceRequest,
    gpu: Device,
    job_of: Any,
    workshop: Workshop,
    wanted: Mapping[Key, Sequence[KernelConfig]],
    *,
    began: float,
    estimated: int,
) -> SpaceTuned:
    """Build the promising kernels, measure them, and build the smallest set."""
    every = to_build(wanted)
    kept = _others_of_build(request, workshop)
    most = _affordable(request)
    chosen = every if most is None else to_build(wanted, most, workshop.compiled([*every, *kept]))
    library = workshop.build([*chosen, *kept])
    deadline = None if request.budget is None else began + request.budget - LINK_SECONDS
    outcomes = _measure(request, library, wanted, job_of, workshop, deadline=deadline)
    table = _table(request.folder / TABLE, gpu)
    times = _times(library, table, list(wanted), wanted)
    smallest = _smallest(times, wanted, library)
    final = workshop.build([*smallest, *kept])
    losses = [_loss(final, gpu, key, of_problem) for key, of_problem in times.items() if of_problem]
    known_losses = [loss for loss in losses if loss is not None]
    built = set(library.configs())
    return SpaceTuned(
        request.space,
        outcomes,
        estimated=estimated,
        promising=len(every),
        not_built=len(every) - len([config for config in chosen if config in built]),
        not_measured=len(wanted) - len(losses),
        kernels=smallest,
        losses=known_losses,
    )


def _estimate(request: SpaceRequest, gpu: Device, workshop: Workshop) -> dict[Key, list[KernelConfig]]:
    """Return the kernels worth building for each problem, the best first."""
    wanted: dict[Key, list[KernelConfig]] = {}
    for mode, named in request.problems.items():
        configs = _native(request.space, mode)
        chooser = Chooser(dict.fromkeys(configs, ""), request.folder / TABLE)
        title = f"Estimating {counted(len(configs), 'kernel')}"
        with workshop.show_progress(title, len(named)) as progress:
            for done, (_, problem) in enumerate(named, 1):
                wanted[mode, problem] = promising(chooser.estimates(problem, mode, gpu), problem)
                progress(done, len(named), str(problem))
    return wanted


def _native(space: str, mode: QuantMode) -> list[KernelConfig]:
    return [config for config in enumerate_space(space) if config.mode is mode and config.target is Target.NATIVE]


def _refuse_what_no_kernel_runs(request: SpaceRequest, wanted: Mapping[Key, Sequence[KernelConfig]]) -> None:
    for mode, named in request.problems.items():
        for name, problem in named:
            if not wanted[mode, problem]:
                native = _native(request.space, mode)
                reason = why_cannot_run(native[0], problem) if native else f"it has none of mode {mode}"
                what = f"{problem} ({name})" if name else str(problem)
                raise UnsupportedProblemError(f"no native kernel of space {request.space} can run {what}: {reason}")


def _affordable(request: SpaceRequest) -> int | None:
    """Return how many more kernels the budget's share compiles; None for all."""
    if request.budget is None:
        return None
    return int(BUILDING_SHARE * request.budget * request.compilers / COMPILE_SECONDS)


def _others_of_build(request: SpaceRequest, workshop: Workshop) -> list[KernelConfig]:
    """Return the kernels of the build in the folder that this run does not choose among.

    CUTLASS's are of this kind: nothing estimates them, and they read weights that native kernels do not.
    """
    library = workshop.load()
    return [
        config
        for config in (library.configs() if library else ())
        if config.mode not in request.problems or config.target is not Target.NATIVE
    ]


def _measure(
    request: SpaceRequest,
    library: Library,
    wanted: Mapping[Key, Sequence[KernelConfig]],
    job_of: Any,
    workshop: Workshop,
    *,
    deadline: float | None,
) -> list[Tuned]:
    """Measure each problem's promising kernels, then those near the fastest in turns."""
    outcomes: list[Tuned] = []
    with workshop.measure_on(library) as cards:
        for mode, named in request.problems.items():
            job: Job = replace(
                job_of(library, mode, cards),
                candidates={problem: wanted[mode, problem] for _, problem in named},
                refined=Refined(request.folder / REFINED),
                deadline=deadline,
            )
            outcomes += job.run(named, cards.executor, tell=workshop.tell, show_progress=workshop.show_progress)
    return outcomes


def _table(path: Path, gpu: Device) -> TuningTable:
    return TuningTable.read(path) if path.exists() else TuningTable.of_device(gpu)


def _times(
    library: Library, table: TuningTable, keys: Sequence[Key], wanted: Mapping[Key, Sequence[KernelConfig]]
) -> dict[Key, dict[KernelConfig, float]]:
    """Return the valid times of each problem's candidates; none for a problem that was not measured to the end."""
    hashes = library.build.content_hashes
    times: dict[Key, dict[KernelConfig, float]] = {}
    for mode, problem in keys:
        candidates = [config for config in wanted[mode, problem] if config in hashes]
        valid = table.valid(mode, problem, hashes)
        is_complete = bool(candidates) and valid.keys() >= set(candidates)
        times[mode, problem] = {config: valid[config] for config in candidates} if is_complete else {}
    return times


def _smallest(
    times: Mapping[Key, Mapping[KernelConfig, float]],
    wanted: Mapping[Key, Sequence[KernelConfig]],
    library: Library,
) -> list[KernelConfig]:
    """Return the smallest set for the measured problems, and the best estimate of each of the others."""
    built = set(library.configs())
    estimated = {
        next((config for config in wanted[key] if config in built), None)
        for key, of_problem in times.items()
        if not of_problem
    }
    return sorted({*smallest_cover(times, SLACK), *(config for config in estimated if config is not None)})


def _loss(library: Library, gpu: Device, key: Key, times: Mapping[KernelConfig, float]) -> float | None:
    """Return the time of what a call gets over that of the fastest kernel; None if an override names another one."""
    mode, problem = key
    choice = library.choose(problem, mode, device=gpu.index)
    microseconds = times.get(choice.kernel, choice.microseconds)
    return None if microseconds is None else microseconds / min(times.values())
