"""`w4a16gen tune --space`: build the promising kernels of a space, measure them, and keep the few that are needed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import geometric_mean
from typing import TYPE_CHECKING, Any

from w4a16gen.cli.output import note
from w4a16gen.cli.progress import termination_interrupts
from w4a16gen.cli.services import services
from w4a16gen.errors import NotBuiltError, UnsupportedProblemError

if TYPE_CHECKING:
    from w4a16gen.choose.timing_table import TuningTable
    from w4a16gen.kernels.config import KernelConfig, QuantMode
    from w4a16gen.kernels.device import Device
    from w4a16gen.kernels.problem import Problem
    from w4a16gen.measure.tune import Job, Tuned
    from w4a16gen.runtime.library import Library

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
    generated: Path
    jobs: int | None
    budget: float | None
    """Seconds; None sets no limit."""


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
    """The tuned modes' kernels of the build that is left."""
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


def tune_space(request: SpaceRequest, gpu: Device, job_of: Any, *, gpus: int) -> SpaceTuned:
    """Estimate a space, build and measure what is promising, and leave a build of the smallest set.

    Everything is kept as it is made: objects in the build's folder, times in its table. A later run with the same
    problems goes on.

    Args:
        request: what is tuned.
        gpu: the GPU to estimate for.
        job_of: returns the measuring job for a library and a mode.
        gpus: how many GPUs measure.
    """
    from w4a16gen.measure.promising import to_build

    began = time.monotonic()
    keys = [(mode, problem) for mode, named in request.problems.items() for _, problem in named]
    estimated, wanted = _estimate(request, gpu)
    nothing = next((problem for (_, problem), configs in wanted.items() if not configs), None)
    if nothing is not None:
        raise UnsupportedProblemError(f"no native kernel of space {request.space} can run {nothing}")
    chosen = to_build(wanted, _affordable(request))
    promising = len({config for configs in wanted.values() for config in configs})
    note(f"{estimated} kernels of space {request.space} estimated for {len(keys)} problems, {promising} are promising")
    kept = _kernels_of_other_modes(request)
    library = _build(request, [*chosen, *kept])
    deadline = None if request.budget is None else began + request.budget - LINK_SECONDS
    outcomes = _measure(request, library, wanted, job_of, gpus=gpus, deadline=deadline)
    table = _table(library, gpu, job_of)
    times = _times(library, table, keys, wanted)
    smallest = _smallest(times, wanted, library)
    final = _build(request, [*smallest, *kept])
    losses = [_loss(final, gpu, key, of_problem) for key, of_problem in times.items() if of_problem]
    known_losses = [loss for loss in losses if loss is not None]
    built = set(library.configs())
    return SpaceTuned(
        request.space,
        outcomes,
        estimated,
        promising,
        promising - len([config for config in chosen if config in built]),
        len(keys) - len(losses),
        smallest,
        known_losses,
    )


def _estimate(request: SpaceRequest, gpu: Device) -> tuple[int, dict[Key, list[KernelConfig]]]:
    """Return the number of kernels estimated, and those worth building for each problem, the best first."""
    from w4a16gen.choose.chooser import Chooser
    from w4a16gen.choose.timing_table import TABLE
    from w4a16gen.kernels.spaces import enumerate_space
    from w4a16gen.measure.promising import promising

    count = 0
    wanted: dict[Key, list[KernelConfig]] = {}
    for mode, named in request.problems.items():
        configs = [config for config in enumerate_space(request.space) if config.mode is mode]
        count += len(configs)
        chooser = Chooser(dict.fromkeys(configs, ""), request.folder / TABLE)
        title = f"Estimating {len(configs)} kernels"
        with services().show_progress(title, len(named)) as progress:
            for done, (_, problem) in enumerate(named, 1):
                wanted[mode, problem] = promising(chooser.estimates(problem, mode, gpu), problem)
                progress(done, len(named), str(problem))
    return count, wanted


def _affordable(request: SpaceRequest) -> int | None:
    """Return how many kernels the budget's share compiles; None for all."""
    if request.budget is None:
        return None
    from w4a16gen.build.limits import usable_cores

    return int(BUILDING_SHARE * request.budget * (request.jobs or usable_cores()) / COMPILE_SECONDS)


def _kernels_of_other_modes(request: SpaceRequest) -> list[KernelConfig]:
    """Return the kernels of the build in the folder that this run does not choose among."""
    try:
        library: Library = services().load(request.folder)
    except NotBuiltError:
        return []
    return [config for config in library.configs() if config.mode not in request.problems]


def _build(request: SpaceRequest, configs: Sequence[KernelConfig]) -> Library:
    """Build exactly these kernels, say which fail, and load them."""
    title = f"Building {len(configs)} kernels"
    with termination_interrupts(), services().show_progress(title, lines=True) as progress:
        report = services().build(
            configs, generated=request.generated, folder=request.folder, jobs=request.jobs, progress=progress
        )
    note(f"{report.compiled} kernels compiled, {len(report.build.configs) - report.compiled} up to date")
    for failure in report.failures:
        note(f"{failure.name}: {failure.summary}; log: {failure.log}", label="FAILED")
    return services().load(request.folder)


def _measure(
    request: SpaceRequest,
    library: Library,
    wanted: Mapping[Key, Sequence[KernelConfig]],
    job_of: Any,
    *,
    gpus: int,
    deadline: float | None,
) -> list[Tuned]:
    """Measure each problem's promising kernels, then those near the fastest in turns."""
    from w4a16gen.measure.refine import REFINED, Refined

    outcomes: list[Tuned] = []
    devices = [found.index for found in library.hopper_devices() if found.name == library.hopper_device().name]
    for mode, named in request.problems.items():
        job: Job = replace(
            job_of(library, mode),
            candidates={problem: wanted[mode, problem] for _, problem in named},
            refined=Refined(request.folder / REFINED),
            deadline=deadline,
        )
        outcomes += job.run(named, devices[:gpus], tell=note, show_progress=services().show_progress)
    return outcomes


def _table(library: Library, gpu: Device, job_of: Any) -> TuningTable:
    from w4a16gen.choose.timing_table import TuningTable
    from w4a16gen.kernels.config import QuantMode

    path = job_of(library, QuantMode.FINEGRAINED_SCALE_ONLY).path
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
    from w4a16gen.measure.results import smallest_cover

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
