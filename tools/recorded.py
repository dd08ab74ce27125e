"""Recorded times in a CSV file, plain or compressed by its suffix (`.gz`, `.xz`): one measurement per line."""

from __future__ import annotations

import csv
import gzip
import lzma
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO

from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.config import KernelConfig, QuantMode
from w4a16gen.kernels.problem import Problem

DATA_FOLDER = Path(__file__).resolve().parent / "data"
CUBLAS = "cublas_fp16"
"""The name in column `kernel` for a dense FP16 product by cuBLAS."""
COLUMNS = ("kernel", "m", "n", "k", "group_size", "mode", "microseconds", "gpu", "sm_count", "date", "source")


@dataclass(frozen=True)
class Recorded:
    """One measurement."""

    kernel: KernelConfig | None
    """None for cuBLAS."""
    problem: Problem
    mode: QuantMode
    microseconds: float
    gpu: str
    sm_count: int
    date: str
    """ISO 8601: YYYY-MM-DD."""
    source: str
    """The run, or the commit that held the time."""

    @classmethod
    def from_row(cls, row: dict[str, str]) -> Recorded:
        """Read a line of the file.

        Raises:
            ValueError, KeyError, TypeError: if a column is missing or holds something else.
        """
        problem = Problem(*(int(row[name]) for name in ("m", "n", "k", "group_size")))
        microseconds = float(row["microseconds"])
        if not 0 < microseconds < float("inf"):
            raise ValueError(f"{microseconds} us must be positive and finite")
        return cls(
            kernel=None if row["kernel"] == CUBLAS else _parse(row["kernel"]),
            problem=problem,
            mode=QuantMode(row["mode"]),
            microseconds=microseconds,
            gpu=row["gpu"],
            sm_count=int(row["sm_count"]),
            date=row["date"],
            source=row["source"],
        )

    def as_row(self) -> tuple[object, ...]:
        """Return the values of `COLUMNS`."""
        p = self.problem
        name = CUBLAS if self.kernel is None else self.kernel.name
        size = (p.m, p.n, p.k, p.group_size, self.mode)
        return (name, *size, self.microseconds, self.gpu, self.sm_count, self.date, self.source)


_parse = lru_cache(maxsize=None)(KernelConfig.parse)


def read(paths: Iterable[Path]) -> list[Recorded]:
    """Return the measurements of several files, in their order.

    Raises:
        InvalidValueError: if a line is not a measurement; the text names file and line.
        OSError: if a file cannot be read.
    """
    return [recorded for path in paths for recorded in _read_one(path)]


def _read_one(path: Path) -> Iterator[Recorded]:
    with _opener(path)(path, "rt", newline="") as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            try:
                yield Recorded.from_row(row)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise InvalidValueError(f"{path}, line {number} is not a measurement ({error})") from None


def _opener(path: Path) -> Callable[..., IO[str]]:
    openers: dict[str, Callable[..., IO[str]]] = {".gz": gzip.open, ".xz": lzma.open}
    return openers.get(path.suffix, open)
