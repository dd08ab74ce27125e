"""The record of a bench run: one line of JSON for the run, then one for each problem."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from w4a16gen.errors import InvalidValueError
from w4a16gen.files import read_regular, write_if_changed
from w4a16gen.kernels.config import KernelConfig
from w4a16gen.kernels.device import Device
from w4a16gen.measure.probes import TensorPeak
from w4a16gen.measure.results import Comparison, Timing
from w4a16gen.weights.layouts.geometry import WeightGeometry
from w4a16gen.weights.packed import LAYOUTS, TARGET_LAYOUTS

SCHEMA = "w4a16gen.bench-record/1"
RECORD = "bench.jsonl"
"""The file from which every other file of a report can be written again."""


@dataclass(frozen=True)
class Run:
    """The GPU, date and versions of a run, and the GPU's measured peaks."""

    gpu: str
    sm_count: int
    date: str
    version: str
    peak_burst_tflops: float | None
    """fp16 TFLOP/s of the tensor cores for 0.1 ms; None if the build has no probe."""
    peak_sustained_tflops: float | None
    """The same at the power limit."""


@dataclass(frozen=True)
class Row:
    """The fastest kernel on one problem. Times are medians in microseconds; None means not measured."""

    layer: str
    m: int
    n: int
    k: int
    group_size: int
    mode: str
    kernel: str
    packed_bytes: int
    microseconds: float
    least_microseconds: float
    most_microseconds: float
    dependent_microseconds: float | None
    floor_microseconds: float | None
    """A kernel that only reads the packed weight."""
    dependent_floor_microseconds: float | None
    peak_microseconds: float | None
    """The problem's operations at the tensor cores' burst peak."""
    cublas_microseconds: float | None
    chosen_kernel: str | None
    """The kernel that a call gets if it names none."""
    chosen_microseconds: float | None
    best_rival: str | None
    """The fastest of the other 4-bit kernels that were timed."""
    best_rival_microseconds: float | None
    error_over_bound: float | None
    """Largest error against float64, as a share of its bound."""

    @property
    def shape(self) -> str:
        """The layer as channels x k."""
        return f"{self.n}x{self.k}"

    @property
    def short_kernel(self) -> str:
        """The kernel's name without the prefix that all share."""
        return KernelConfig.parse(self.kernel).short_name

    @property
    def bytes_moved(self) -> int:
        """Packed weight, activations and output, each once."""
        return self.packed_bytes + 2 * self.m * (self.k + self.n)

    @property
    def flops(self) -> int:
        """Multiplications and additions: 2mnk."""
        return 2 * self.m * self.n * self.k

    @property
    def tflops(self) -> float:
        """TFLOP/s."""
        return round(self.flops / self.microseconds / 1e6, 2)

    @property
    def gigabytes_per_second(self) -> float:
        """Rate of the packed weight, read once."""
        return round(self.packed_bytes / self.microseconds / 1e3, 1)

    @property
    def share_of_floor(self) -> float | None:
        """The longer of reading the packed weight and multiplying at the burst peak, over the measured time."""
        if self.floor_microseconds is None or self.peak_microseconds is None:
            return None
        return round(max(self.floor_microseconds, self.peak_microseconds) / self.microseconds, 4)

    @property
    def speedup_over_fp16(self) -> float | None:
        """The time of cuBLAS FP16 over this time."""
        return None if self.cublas_microseconds is None else round(self.cublas_microseconds / self.microseconds, 4)

    @property
    def speedup_over_rival(self) -> float | None:
        """The time of the fastest other 4-bit kernel over this time."""
        if self.best_rival_microseconds is None:
            return None
        return round(self.best_rival_microseconds / self.microseconds, 4)

    def as_json(self) -> dict[str, Any]:
        """Return the measured values and those that follow from them."""
        return asdict(self) | {name: getattr(self, name) for name in DERIVED}


DERIVED = ("tflops", "gigabytes_per_second", "share_of_floor", "speedup_over_fp16", "speedup_over_rival")
"""Properties of a row that records and tables carry beside the measured values."""


def run_of(gpu: Device, date: str, version: str, peak: TensorPeak | None) -> Run:
    """Describe a run on a GPU."""
    peaks = (None, None) if peak is None else (round(peak.burst, 1), round(peak.sustained, 1))
    return Run(gpu.name, gpu.sm_count, date, version, *peaks)


def row_of(layer: str, found: Comparison, peak: TensorPeak | None) -> Row:
    """Condense the measurements of one problem that some kernel can run.

    Args:
        layer: the layer's name, or an empty text.
        found: the comparison.
        peak: the tensor cores' measured peak, or None.
    """
    problem, best = found.problem, found.best
    chosen, rival = found.timing(found.chosen), found.best_rival
    layout = LAYOUTS[TARGET_LAYOUTS[KernelConfig.parse(best.contender).target]]
    return Row(
        layer=layer,
        **vars(problem),
        mode=found.mode.value,
        kernel=best.contender,
        packed_bytes=layout.packed_bytes(WeightGeometry(problem.n, problem.k, problem.group_size, found.mode)),
        microseconds=round(best.median, 3),
        least_microseconds=round(min(best.isolated), 3),
        most_microseconds=round(max(best.isolated), 3),
        dependent_microseconds=_rounded(best.dependent_median),
        floor_microseconds=_median(found.floor),
        dependent_floor_microseconds=None if found.floor is None else _rounded(found.floor.dependent_median),
        peak_microseconds=None if peak is None else round(problem.flops / peak.burst / 1e6, 3),
        cublas_microseconds=_median(found.cublas),
        chosen_kernel=found.chosen,
        chosen_microseconds=_median(chosen),
        best_rival=None if rival is None else rival.contender,
        best_rival_microseconds=_median(rival),
        error_over_bound=_rounded(found.error_over_bound.get(best.contender), 4),
    )


def _median(timing: Timing | None) -> float | None:
    return None if timing is None else round(timing.median, 3)


def _rounded(value: float | None, digits: int = 3) -> float | None:
    return None if value is None else round(value, digits)


class Recorder:
    """Writes a run's record, each line as soon as it is known."""

    def __init__(self, folder: Path, run: Run) -> None:
        """Begin a record in a folder, which is made; a record that is there is replaced."""
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / RECORD
        write_if_changed(self._path, json.dumps({"schema": SCHEMA, **asdict(run)}) + "\n")

    def add(self, row: Row, found: Comparison) -> None:
        """Add a problem: its row, and every measured time."""
        with self._path.open("a") as file:
            file.write(json.dumps({**row.as_json(), "measured": found.as_json()}) + "\n")


def read_record(folder: Path) -> tuple[Run, list[Row]]:
    """Read the record of a run.

    Raises:
        OSError: if the record cannot be read.
        InvalidValueError: if there is none, or it holds anything else.
    """
    path = folder / RECORD
    try:
        head, *lines = map(json.loads, read_regular(path).splitlines())
        if head.pop("schema") != SCHEMA:
            raise InvalidValueError(f"its schema is not {SCHEMA!r}")
        rows = [Row(**{field.name: line[field.name] for field in fields(Row)}) for line in lines]
        for row in rows:
            _check(row)
        return Run(**head), rows
    except FileNotFoundError:
        raise InvalidValueError(f"{path} does not exist: `w4a16gen bench --report {folder}` writes it") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidValueError(f"{path} is no record of `w4a16gen bench --report`: {error}") from None


def _check(row: Row) -> None:
    """Raise unless every value is of the field's kind, and times are positive."""
    KernelConfig.parse(row.kernel)
    for field in fields(Row):
        value = getattr(row, field.name)
        if value is None and "None" in str(field.type):
            continue
        wanted = (str,) if str(field.type).startswith("str") else (int, float)
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise InvalidValueError(f"{field.name} of {value!r} must be {field.type}")
        if "microseconds" in field.name and not 0 <= float(value) < float("inf"):
            raise InvalidValueError(f"{field.name} of {value!r} must be a time in microseconds")
    if min(row.m, row.n, row.k, row.group_size, row.packed_bytes) < 1 or row.microseconds <= 0:
        raise InvalidValueError(f"{row.m}x{row.shape} in {row.microseconds} us is no measured problem")
