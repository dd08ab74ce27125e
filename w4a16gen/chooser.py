"""Which kernel a call gets that names none: by what was measured here, or on an H100 elsewhere, or by an estimate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from w4a16gen import shipped
from w4a16gen.config import KernelConfig, QuantMode
from w4a16gen.dispatch import choose, runnable
from w4a16gen.problem import Problem
from w4a16gen.tuning import TABLE, TuningTable, content_hashes, table_for


class Choice(NamedTuple):
    """A kernel, what it is thought to take, and where that is from."""

    kernel: KernelConfig
    microseconds: float | None
    source: str


class Chooser:
    """Chooses among the kernels of a build."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        """Choose for the build in a folder, of which this is the manifest."""
        self._path = folder / TABLE
        self._manifest = manifest
        self._tables: dict[str | None, TuningTable | None] = {}

    def choice(
        self, configs: Iterable[KernelConfig], mode: QuantMode, problem: Problem, gpu: Mapping[str, Any] | None
    ) -> Choice:
        """Choose by the build's tuning table, or else the one that is shipped, or else an estimate; deterministic.

        Args:
            configs: the kernels to choose among.
            mode: the mode.
            problem: the problem.
            gpu: the GPU as `Library.devices` describes it; None for a machine without one.

        Raises:
            UnsupportedProblemError: if none can run the problem.
        """
        configs = list(configs)
        able = runnable(configs, mode, problem)
        if tuned := self.tuned(able, mode, problem, gpu):
            return Choice(*tuned)
        if known := shipped.fastest(able, mode, problem, gpu):
            return Choice(*known, "times of an H100 that come with the package")
        if estimated := shipped.neighbours().estimate(able, mode, problem):
            return Choice(*estimated[0], "an estimate")
        return Choice(choose(configs, mode, problem), None, "a rule of thumb for CUTLASS's kernels")

    def tuned(
        self, configs: Iterable[KernelConfig], mode: QuantMode, problem: Problem, gpu: Mapping[str, Any] | None
    ) -> tuple[KernelConfig, float, str] | None:
        """Give the fastest kernel of the build's tuning table, its microseconds and what they are, or None without any.

        A table that is damaged, or of another kind of GPU, is told of once, as a warning, and counts for nothing. On a
        machine without a GPU any table counts.
        """
        name = None if gpu is None else str(gpu["name"])
        if name not in self._tables:
            self._tables[name] = table_for(self._path, gpu)
        table = self._tables[name]
        found = None if table is None else table.best(mode, problem, content_hashes(self._manifest, configs))
        if table is None or found is None:
            return None
        return *found, "the build's tuning table" + (", which is of dependent launches" if table.dependent else "")
