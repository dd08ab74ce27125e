"""Measured times of kernels in a file: what `w4a16gen tune` writes, and what `gemm` chooses by before it estimates."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import filelock

from w4a16gen.errors import InvalidValueError
from w4a16gen.files import write_if_changed
from w4a16gen.kernels.config import KernelConfig, QuantMode
from w4a16gen.kernels.device import Device
from w4a16gen.kernels.problem import Problem

SCHEMA_VERSION = 1
TABLE = "tuning.json"
"""File name in a build's folder."""


class Measured(NamedTuple):
    """What a kernel took, and which machine code it was."""

    microseconds: float
    content_hash: str


@dataclass(frozen=True)
class TuningTable:
    """Times of kernels on one kind of GPU, by mode and problem, then by kernel."""

    gpu: str
    sm_count: int
    times: Mapping[tuple[QuantMode, Problem], Mapping[KernelConfig, Measured]] = field(default_factory=dict)
    dependent: bool = False
    """Whether the times are those of dependent launches, each behind another of the same kernel."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """What the last times were measured with: this package, the compiler, the driver's CUDA. For the reader; whether a
    time counts is decided by the kernel's content hash, in which the compiler is."""

    @classmethod
    def read(cls, path: Path) -> TuningTable:
        """Read a table, all of it or nothing.

        Raises:
            OSError: if there is no such file.
            InvalidValueError: if it holds anything but a table of this schema; the text says what is off.
        """
        try:
            value = json.loads(path.read_text())
            if value["schema"] != SCHEMA_VERSION:
                raise InvalidValueError(f"schema {value['schema']!r} is not {SCHEMA_VERSION}")
            times: dict[tuple[QuantMode, Problem], dict[KernelConfig, Measured]] = {}
            for row in value["times"]:
                config = _parse(row["kernel"])
                problem = Problem(*(_count(row[name]) for name in ("m", "n", "k", "group_size")))
                microseconds = float(row["microseconds"])
                if not 0 < microseconds < float("inf"):
                    raise InvalidValueError(f"{row['kernel']} took {microseconds} us")
                measured = Measured(microseconds, str(row["content_hash"]))
                times.setdefault((config.mode, problem), {})[config] = measured
            versions = {str(name): str(version) for name, version in value.get("versions", {}).items()}
            dependent = value.get("dependent", False)
            if not isinstance(dependent, bool):
                raise InvalidValueError(f"dependent of {dependent!r} is neither true nor false")
            return cls(str(value["gpu"]), _count(value["sm_count"]), times, dependent, versions)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidValueError(
                f"{path} is no tuning table ({type(error).__name__}: {error}): remove it, or name another"
            ) from None

    def as_text(self) -> str:
        """Give the file's text: JSON with a row a line, in an order that depends on the content only."""
        rows = [
            {**vars(problem), "kernel": config.name, **measured._asdict()}
            for (_, problem), of_problem in self.times.items()
            for config, measured in of_problem.items()
        ]
        rows.sort(key=lambda row: (row["n"], row["k"], row["group_size"], row["m"], row["kernel"]))
        more: dict[str, object] = {"dependent": True} if self.dependent else {}
        if self.versions:
            more["versions"] = dict(sorted(self.versions.items()))
        head = json.dumps({"schema": SCHEMA_VERSION, "gpu": self.gpu, "sm_count": self.sm_count, **more})
        return f'{head[:-1]}, "times": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]}\n"

    def updated(self, newer: TuningTable) -> TuningTable:
        """Give this table with another's times, which replace those of the same kernels and problems.

        Raises:
            InvalidValueError: if the other is of another kind of GPU, or of launches.
        """
        if (self.gpu, self.sm_count) != (newer.gpu, newer.sm_count):
            raise InvalidValueError(
                f"times of {newer.gpu} with {newer.sm_count} SMs do not go into a table of {self.gpu} with "
                f"{self.sm_count}: name another table"
            )
        if self.dependent is not newer.dependent:
            kinds = {True: "dependent launches", False: "ordinary launches"}
            raise InvalidValueError(
                f"times of {kinds[newer.dependent]} do not go into a table of {kinds[self.dependent]}: remove it, or "
                "name another"
            )
        keys = [*self.times, *(key for key in newer.times if key not in self.times)]
        times = {key: {**self.times.get(key, {}), **newer.times.get(key, {})} for key in keys}
        return TuningTable(self.gpu, self.sm_count, times, self.dependent, {**self.versions, **newer.versions})

    def valid(self, mode: QuantMode, problem: Problem, hashes: Mapping[KernelConfig, str]) -> dict[KernelConfig, float]:
        """Give the microseconds of exactly this problem, of kernels that are built as they were measured."""
        return {
            config: measured.microseconds
            for config, measured in self.times.get((mode, problem), {}).items()
            if hashes.get(config) == measured.content_hash
        }

    def best(
        self, mode: QuantMode, problem: Problem, hashes: Mapping[KernelConfig, str]
    ) -> tuple[KernelConfig, float] | None:
        """Give the fastest built kernel and its microseconds, for as many tokens or the next more; or None.

        Args:
            mode: the mode.
            problem: the problem; times of less than twice its tokens count, since a kernel that is fast with more
                tokens has tiles that these fill at least by half.
            hashes: the built kernels' content hashes.
        """
        of_layer = sorted(
            measured.m
            for of_mode, measured in self.times
            if of_mode is mode
            and (measured.n, measured.k, measured.group_size) == (problem.n, problem.k, problem.group_size)
            and problem.m <= measured.m < 2 * problem.m
        )
        for m in of_layer:
            valid = self.valid(mode, Problem(m, problem.n, problem.k, problem.group_size), hashes)
            if valid:
                fastest = min(valid, key=lambda config: (valid[config], config))
                return fastest, valid[fastest]
        return None


_parse = lru_cache(maxsize=None)(KernelConfig.parse)


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidValueError(f"{value!r} is no positive integer")
    return value


def table_for(path: Path, device: Device | None) -> TuningTable | None:
    """Read the table that counts on a GPU, or None: if there is none, or, with a warning, one that cannot be used.

    Args:
        path: the file.
        device: the GPU; None on a machine without one, where every table is used.
    """
    try:
        table = TuningTable.read(path)
    except OSError:
        return None
    except InvalidValueError as error:
        warnings.warn(f"{error}; until then kernels are chosen by estimates", RuntimeWarning, stacklevel=2)
        return None
    if device is None or (table.gpu, table.sm_count) == (device.name, device.sm_count):
        return table
    warnings.warn(
        f"{path} is of {table.gpu} with {table.sm_count} SMs, not of {device.name} with {device.sm_count}: kernels are "
        "chosen by estimates; `w4a16gen tune` measures here once it is removed",
        RuntimeWarning,
        stacklevel=2,
    )
    return None


def add_times(path: Path, table: TuningTable) -> None:
    """Merge times into a file under a lock: what another process adds meanwhile is kept, and a reader never sees half.

    Raises:
        InvalidValueError: if the file is no tuning table, or one of another kind of GPU or of launches; it is left as
            it is.
        OSError: if it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(path.with_name(f".{path.name}.lock")):
        empty = TuningTable(table.gpu, table.sm_count, dependent=table.dependent)
        known = TuningTable.read(path) if path.exists() else empty
        write_if_changed(path, known.updated(table).as_text())


def one_time(
    device: Device,
    problem: Problem,
    config: KernelConfig,
    measured: Measured,
    versions: Mapping[str, str] | None = None,
    *,
    dependent: bool = False,
) -> TuningTable:
    """Return a table of a single measurement."""
    times = {(config.mode, problem): {config: measured}}
    return TuningTable(device.name, device.sm_count, times, dependent, versions or {})
