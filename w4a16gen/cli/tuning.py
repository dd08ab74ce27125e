"""The work of `tune`: measuring a build on each kind of card, or building and measuring a space."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from w4a16gen import __version__
from w4a16gen.cli.cluster import compile_options, connected
from w4a16gen.cli.gpus import GpuChoice, find_gpu, gpus_of, gpus_on, hide_progress
from w4a16gen.cli.output import note
from w4a16gen.cli.progress import termination_interrupts
from w4a16gen.cli.services import services
from w4a16gen.errors import NotBuiltError
from w4a16gen.kernels.config import Epilogue
from w4a16gen.wording import counted

if TYPE_CHECKING:
    from w4a16gen.choose.timing_table import TuningTable
    from w4a16gen.executors.cluster import Cluster
    from w4a16gen.executors.summaries import NodeSummary
    from w4a16gen.kernels.config import KernelConfig, QuantMode
    from w4a16gen.kernels.device import Device
    from w4a16gen.kernels.problem import Problem
    from w4a16gen.measure.gpus import Cards
    from w4a16gen.measure.space_tuning import SpaceRequest, SpaceTuned, Workshop
    from w4a16gen.measure.tune import Job, Tuned
    from w4a16gen.runtime.library import Library


@dataclass(frozen=True)
class How:
    """How problems are measured, and into which table."""

    table: Path | None
    again: bool
    dependent: bool
    epilogues: Sequence[Epilogue] = (Epilogue.NONE,)


@dataclass(frozen=True)
class Tables:
    """The result: the times' tables by card, and what was measured."""

    folder: Path
    """The build's folder."""
    gpu: Device
    tables: Mapping[str, Path]
    outcomes: Sequence[Tuned]
    nodes: Sequence[NodeSummary]

    def as_json(self) -> dict[str, Any]:
        """Return the members of the command's JSON object."""
        return {
            "gpu": self.gpu.as_json(),
            "table": str(next(iter(self.tables.values()))),
            "tables": {card: str(path) for card, path in self.tables.items()},
            "problems": [outcome.as_json() for outcome in self.outcomes],
            "nodes": [node.as_json() for node in self.nodes],
        }


def tune_build(
    by_mode: Mapping[QuantMode, Sequence[tuple[str, Problem]]],
    seconds: float | None,
    where: GpuChoice,
    how: How,
    folder: Path | None,
) -> Tables:
    """Measure the build's kernels on each kind of card."""
    from w4a16gen.executors.summaries import add_summaries
    from w4a16gen.measure.kinds import on_each_kind

    deadline = None if seconds is None else time.monotonic() + seconds
    library = services().load(folder)
    for mode, epilogue in itertools.product(by_mode, how.epilogues):
        library.chooser.check_built(mode, epilogue)
    with gpus_of(where, library) as kinds:
        tables = _tables_of(library.build.folder, how.table, kinds)
        paths = list(tables.values())

        def run(cards: Cards) -> list[Tuned]:
            outcomes: list[Tuned] = []
            show = services().show_progress if len(kinds) == 1 else hide_progress
            for mode, named in by_mode.items():
                job = _job(library, cards, mode, paths[kinds.index(cards)], how, deadline=deadline)
                outcomes += job.run(named, cards.executor, tell=note, show_progress=show)
            return outcomes

        outcomes = on_each_kind(kinds, run)
        nodes = add_summaries(node for cards in kinds for node in cards.executor.summaries)
    left_out = len(kinds) * sum(map(len, by_mode.values())) - len(outcomes)
    if left_out:
        note(f"{counted(left_out, 'problem')} not measured: the same command goes on", label="warning:")
    return Tables(library.build.folder, kinds[0].device, tables, outcomes, nodes)


def build_and_tune(
    request: SpaceRequest, where: GpuChoice, how: How, generated: Path, jobs: int | None
) -> tuple[SpaceTuned, Tables]:
    """Build and measure a space on one kind of card."""
    from w4a16gen.measure.space_tuning import tune_space

    nodes: list[NodeSummary] = []
    table = table_of(request.folder)
    with connected(where.cluster) as cluster:
        gpu = find_gpu(where, cluster)
        _known(table, gpu, dependent=how.dependent)  # refused before anything is built

        def job_of(library: Library, mode: QuantMode, cards: Cards) -> Job:
            return _job(library, cards, mode, table, how)

        @contextmanager
        def measure_on(library: Library) -> Iterator[Cards]:
            from w4a16gen.measure.gpus import one_kind

            cards = one_kind(gpus_on(where, library, cluster))
            with cards.executor:
                yield cards
            nodes.extend(cards.executor.summaries)

        workshop = _workshop(request.folder, generated, jobs, cluster, measure_on)
        found = tune_space(request, gpu, job_of, workshop)
    return found, Tables(request.folder, gpu, {gpu.name: table}, found.outcomes, nodes)


def _tables_of(folder: Path, table: Path | None, kinds: Sequence[Cards]) -> dict[str, Path]:
    """Return the table of each kind of card, by its name: the build's table if there is one kind."""
    from w4a16gen.choose.timing_table import card_table
    from w4a16gen.measure.gpus import labels_of

    labels = labels_of(kinds)
    if len(kinds) == 1:
        return {kinds[0].device.name: table or table_of(folder)}
    if table is not None:
        raise click.UsageError(
            f"--table names one file, and the cluster has several kinds of card: {', '.join(labels)}. Add --card"
        )
    return {label: folder / card_table(cards.device) for label, cards in zip(labels, kinds, strict=True)}


def _workshop(
    folder: Path,
    generated: Path,
    jobs: int | None,
    cluster: Cluster | None,
    measure_on: Callable[[Library], AbstractContextManager[Cards]],
) -> Workshop:
    """Return the services of this command that build and load kernels."""
    from w4a16gen.measure.space_tuning import Workshop

    def load() -> Library | None:
        try:
            return services().load(folder)
        except NotBuiltError:
            return None

    def build(configs: Sequence[KernelConfig]) -> Library:
        title = f"Building {counted(len(configs), 'kernel')}"
        with termination_interrupts(), services().show_progress(title, lines=True) as progress:
            report = services().build(
                configs,
                generated=generated,
                folder=folder,
                jobs=jobs,
                progress=progress,
                **compile_options(cluster, configs),
            )
        note(f"{counted(report.compiled, 'kernel')} compiled, {len(report.build.configs) - report.compiled} up to date")
        for failure in report.failures:
            note(f"{failure.name}: {failure.summary}; log: {failure.log}", label="FAILED")
        return services().load(folder)

    def compiled(configs: Sequence[KernelConfig]) -> set[KernelConfig]:
        return set(services().compiled(configs, folder))

    return Workshop(load, build, compiled, measure_on, note, services().show_progress)


def table_of(folder: Path) -> Path:
    """Return the table of a build, where `gemm` looks."""
    from w4a16gen.choose.timing_table import TABLE

    return folder / TABLE


def _known(path: Path, gpu: Device, *, dependent: bool) -> TuningTable:
    """Return the times that are known.

    Raises:
        InvalidValueError: if the table is of another GPU or of other launches.
    """
    from w4a16gen.choose.timing_table import TuningTable

    known = TuningTable(gpu.name, gpu.sm_count, dependent=dependent)
    return TuningTable.read(path).updated(known) if path.exists() else known


def _job(
    library: Library,
    cards: Cards,
    mode: QuantMode,
    path: Path,
    how: How,
    *,
    deadline: float | None = None,
) -> Job:
    """Return the measuring job for a build."""
    from w4a16gen.measure.tune import Job

    versions = {"w4a16gen": __version__, "compiler": str(library.build.manifest.compiler), "driver": cards.driver}
    known = _known(path, cards.device, dependent=how.dependent)
    return Job(
        library,
        cards.device,
        mode,
        path,
        known,
        how.again,
        how.dependent,
        versions,
        deadline=deadline,
        epilogues=how.epilogues,
    )
