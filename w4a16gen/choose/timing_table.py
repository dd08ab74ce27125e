"""Tables of measured times in files: `w4a16gen tune` writes them, and calls of `gemm` choose kernels by them."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import filelock

from w4a16gen.errors import InvalidValueError
from w4a16gen.files import read_regular, write_if_changed
from w4a16gen.kernels.config import KernelConfig, QuantMode
from w4a16gen.kernels.device import Device
from w4a16gen.kernels.problem import Problem

SCHEMA = "w4a16gen.tuning/2"
"""Kind of file, and version of its fields."""
TABLE = "tuning.json"
"""File name in a build's folder."""
TOKEN_STEP = 8
"""Tiles have multiples of 8 tokens. Token counts that need the same number of steps of 8 therefore have the
same waves of tiles.

A time at more tokens is a poor guide: in 158 problems with a time below twice the tokens, its fastest kernel lost 9.6 %
in geometric mean (H100, 2026-11)."""


class Measured(NamedTuple):
    """One measurement of a kernel."""

    microseconds: float
    content_hash: str
    """Hash of all that decided the machine code: the time counts only for a kernel with the same hash."""


@dataclass(frozen=True)
class TuningTable:
    """Times of kernels on one GPU model, by mode and problem, then by kernel."""

    gpu: str
    """The model's name, as the driver gives it."""
    sm_count: int
    """Its streaming multiprocessors, which distinguish a MIG slice from the whole card."""
    times: Mapping[tuple[QuantMode, Problem], Mapping[KernelConfig, Measured]] = field(default_factory=dict)
    dependent: bool = False
    """Whether the launches were dependent ones, in a chain of the same kernel. A table holds one kind of launch,
    because calls choose by whatever times it holds."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of this package, the compiler and the driver's CUDA at the last measurement, for the reader."""

    @classmethod
    def of_device(cls, device: Device, *, dependent: bool = False) -> TuningTable:
        """Return an empty table for a GPU."""
        return cls(device.name, device.sm_count, dependent=dependent)

    def is_of(self, device: Device) -> bool:
        """Return whether the times are of this GPU model."""
        return (self.gpu, self.sm_count) == (device.name, device.sm_count)

    @classmethod
    def read(cls, path: Path) -> TuningTable:
        """Read a whole table, or refuse it.

        Raises:
            OSError: if the file cannot be read.
            InvalidValueError: if it is not a table with this schema; the text names what is wrong.
        """
        try:
            value = json.loads(read_regular(path))
            if value["schema"] != SCHEMA:
                raise InvalidValueError(f"schema {value['schema']!r} must be {SCHEMA!r}")
            times: dict[tuple[QuantMode, Problem], dict[KernelConfig, Measured]] = {}
            for row in value["times"]:
                config = _parse(row["kernel"])
                problem = Problem(*(_count(row[name]) for name in ("m", "n", "k", "group_size")))
                microseconds = float(row["microseconds"])
                if not 0 < microseconds < float("inf"):
                    raise InvalidValueError(f"{microseconds} us for {row['kernel']} must be positive and finite")
                measured = Measured(microseconds, str(row["content_hash"]))
                times.setdefault((config.mode, problem), {})[config] = measured
            versions = {str(name): str(version) for name, version in value.get("versions", {}).items()}
            dependent = value.get("dependent", False)
            if not isinstance(dependent, bool):
                raise InvalidValueError(f"dependent of {dependent!r} must be true or false")
            return cls(str(value["gpu"]), _count(value["sm_count"]), times, dependent, versions)
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise InvalidValueError(
                f"{path} is not a tuning table ({type(error).__name__}: {error}): remove it, or name another file"
            ) from None

    def as_text(self) -> str:
        """Return the file's text: JSON with one time per line, in an order that depends on the content only."""
        rows = [
            {**vars(problem), "kernel": config.name, **measured._asdict()}
            for (_, problem), of_problem in self.times.items()
            for config, measured in of_problem.items()
        ]
        rows.sort(key=lambda row: (row["n"], row["k"], row["group_size"], row["m"], row["kernel"]))
        more: dict[str, object] = {"dependent": True} if self.dependent else {}
        if self.versions:
            more["versions"] = dict(sorted(self.versions.items()))
        head = json.dumps({"schema": SCHEMA, "gpu": self.gpu, "sm_count": self.sm_count, **more})
        return f'{head[:-1]}, "times": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]}\n"

    def updated(self, newer: TuningTable) -> TuningTable:
        """Return this table with newer times, which replace those of the same kernels and problems.

        Raises:
            InvalidValueError: if the newer times are of another GPU model or kind of launch.
        """
        if (self.gpu, self.sm_count) != (newer.gpu, newer.sm_count):
            raise InvalidValueError(
                f"times of {newer.gpu} with {newer.sm_count} SMs do not go into a table of {self.gpu} with "
                f"{self.sm_count}: name another file"
            )
        if self.dependent is not newer.dependent:
            kinds = {True: "dependent launches", False: "ordinary launches"}
            raise InvalidValueError(
                f"times of {kinds[newer.dependent]} do not go into a table of {kinds[self.dependent]}: remove it, or "
                "name another file"
            )
        keys = [*self.times, *(key for key in newer.times if key not in self.times)]
        times = {key: {**self.times.get(key, {}), **newer.times.get(key, {})} for key in keys}
        return TuningTable(self.gpu, self.sm_count, times, self.dependent, {**self.versions, **newer.versions})

    def valid(self, mode: QuantMode, problem: Problem, hashes: Mapping[KernelConfig, str]) -> dict[KernelConfig, float]:
        """Return the microseconds of exactly this problem, for kernels that are built as they were measured."""
        return {
            config: measured.microseconds
            for config, measured in self.times.get((mode, problem), {}).items()
            if hashes.get(config) == measured.content_hash
        }

    def fastest(
        self, mode: QuantMode, problem: Problem, hashes: Mapping[KernelConfig, str]
    ) -> tuple[KernelConfig, float] | None:
        """Return the built kernel that was fastest in a problem, and its time.

        A time at another token count is valid if every kernel has the same number of tiles there; see `TOKEN_STEP`. The
        nearest count comes first.

        Args:
            mode: the quantisation mode.
            problem: the problem.
            hashes: the built kernels' content hashes.

        Returns:
            The kernel and its microseconds; None if the table has no valid time.
        """
        alike = [m for m in self._tokens_of(mode, problem) if _steps(m) == _steps(problem.m)]
        return self._first(mode, problem, hashes, sorted(alike, key=lambda m: (abs(m - problem.m), -m)))

    def fastest_at_more_tokens(
        self, mode: QuantMode, problem: Problem, hashes: Mapping[KernelConfig, str]
    ) -> tuple[KernelConfig, float] | None:
        """Return what `fastest` returns for the next larger token count that was measured, below twice the tokens."""
        more = [m for m in self._tokens_of(mode, problem) if problem.m <= m < 2 * problem.m]
        return self._first(mode, problem, hashes, sorted(more))

    def _tokens_of(self, mode: QuantMode, problem: Problem) -> list[int]:
        layer = (problem.n, problem.k, problem.group_size)
        return [
            measured.m
            for of_mode, measured in self.times
            if of_mode is mode and (measured.n, measured.k, measured.group_size) == layer
        ]

    def _first(
        self, mode: QuantMode, problem: Problem, hashes: Mapping[KernelConfig, str], tokens: Sequence[int]
    ) -> tuple[KernelConfig, float] | None:
        for m in tokens:
            valid = self.valid(mode, replace(problem, m=m), hashes)
            if valid:
                fastest = min(valid, key=lambda config: (valid[config], config))
                return fastest, valid[fastest]
        return None


def card_table(device: Device) -> str:
    """Return the file name of one card's table, where a build has tables of several kinds."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-")
    return f"tuning-{slug}-{device.sm_count}.json"


def _steps(m: int) -> int:
    return -(-m // TOKEN_STEP)


_parse = lru_cache(maxsize=None)(KernelConfig.parse)


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidValueError(f"{value!r} must be a positive integer")
    return value


def table_for(path: Path, device: Device | None) -> TuningTable | None:
    """Return the table that applies to a GPU.

    Args:
        path: the file.
        device: the GPU; None, on a machine without one, accepts every table.

    Returns:
        The table; None if there is none, or if it is damaged or of another GPU model, with a single warning.
    """
    try:
        table = TuningTable.read(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        _warn(f"{path} cannot be read ({error.strerror}): kernels are chosen without it")
        return None
    except InvalidValueError as error:
        _warn(f"{error}. Kernels are chosen without it")
        return None
    if device is None or table.is_of(device):
        return table
    _warn(
        f"{path} is of {table.gpu} with {table.sm_count} SMs, not of {device.name} with {device.sm_count}: kernels are "
        "chosen without it. Remove it and run `w4a16gen tune`"
    )
    return None


def _warn(sentence: str) -> None:
    warnings.warn(sentence, RuntimeWarning, stacklevel=3)


def add_times(path: Path, table: TuningTable) -> None:
    """Merge times into a file under a lock: concurrent writers keep each other's times, readers see whole files.

    Raises:
        InvalidValueError: if the file is not a tuning table, or is of another GPU model or kind of launch. The file
            stays as it is.
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
    return replace(TuningTable.of_device(device, dependent=dependent), times=times, versions=versions or {})
