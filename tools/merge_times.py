"""Merge measured times into the table that comes with the package.

    python tools/merge_times.py tuning.json other/tuning.json      # tables that `w4a16gen tune --table` wrote
    python tools/merge_times.py times.csv                          # recordings of tools/record_times.py
    python tools/merge_times.py --replace tuning.json              # forget the packaged times of these problems

The packaged table counts as one run, each file as another. In each problem, a kernel's time is the geometric mean over
the runs. Runs that hold only some of the kernels are first scaled to the others, by the kernels that they share: the
logarithms are fitted by least squares as a sum of one term for each run and one for each kernel. Only times of mode
fgs, group size 128 and ordinary launches on cards that share an H100's times are accepted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from recorded import read

from w4a16gen.choose.cards import H100, card_of
from w4a16gen.choose.packaged_times import (
    MEASURED_GROUP_SIZE,
    MEASURED_MODE,
    TIMES_PATH,
    read_times,
    times_as_text,
)
from w4a16gen.choose.timing_table import Measured, TuningTable
from w4a16gen.errors import InvalidValueError
from w4a16gen.files import write_if_changed
from w4a16gen.kernels.config import KernelConfig, Target
from w4a16gen.kernels.device import HOPPER, Device
from w4a16gen.kernels.problem import Problem

Run = Mapping[Problem, Mapping[KernelConfig, float]]
"""Microseconds of kernels in problems, measured by one run."""
DECIMALS = 2


def run_of(path: Path) -> Run:
    """Return the times of a tuning table (`.json`) or of a recording (`.csv`, `.csv.gz`, `.csv.xz`).

    Raises:
        InvalidValueError: if the file holds something else, dependent launches, or another card's times.
    """
    run: dict[Problem, dict[KernelConfig, float]] = {}
    if ".csv" in path.suffixes:
        for row in read([path]):
            _check_card(path, row.gpu, row.sm_count)
            if row.kernel is not None:
                _add(run, row.problem, row.kernel, row.microseconds)
        return run
    table = TuningTable.read(path)
    _check_card(path, table.gpu, table.sm_count)
    if table.dependent:
        raise InvalidValueError(f"{path} holds times of dependent launches: measure without --dependent")
    for (_, problem), times in table.times.items():
        for kernel, measured in times.items():
            _add(run, problem, kernel, measured.microseconds)
    return run


def _check_card(path: Path, gpu: str, sm_count: int) -> None:
    if not card_of(Device(0, gpu, HOPPER, sm_count)).shares_times_with(H100):
        raise InvalidValueError(
            f"{path} holds times of {gpu} with {sm_count} SMs, which does not share an H100's times"
        )


def _add(run: dict[Problem, dict[KernelConfig, float]], problem: Problem, kernel: KernelConfig, time: float) -> None:
    if (kernel.mode, problem.group_size, kernel.target) == (MEASURED_MODE, MEASURED_GROUP_SIZE, Target.NATIVE):
        run.setdefault(problem, {})[kernel] = time


def merged_times(runs: Sequence[Mapping[KernelConfig, float]]) -> dict[KernelConfig, float]:
    """Return the merged microseconds of one problem; see the rule in this file's first lines."""
    kernels = sorted({kernel for run in runs for kernel in run})
    entries = [(number, kernel, time) for number, run in enumerate(runs) for kernel, time in run.items()]
    # One row for each time, and a last row by which the runs' terms sum to zero.
    rows = np.zeros((len(entries) + 1, len(runs) + len(kernels)))
    logs = np.zeros(len(entries) + 1)
    for place, (number, kernel, time) in enumerate(entries):
        rows[place, number] = rows[place, len(runs) + kernels.index(kernel)] = 1.0
        logs[place] = np.log(time)
    rows[-1, : len(runs)] = 1.0
    terms = np.linalg.lstsq(rows, logs, rcond=None)[0][len(runs) :]
    return {kernel: round(float(np.exp(term)), DECIMALS) for kernel, term in zip(kernels, terms, strict=True)}


def merge(packaged: TuningTable, runs: Iterable[Run], *, replaces: bool = False) -> TuningTable:
    """Return the packaged table with runs merged into it.

    Args:
        packaged: the table as it is.
        runs: the new times.
        replaces: leave out the packaged times of problems that the runs hold.
    """
    merged = {key[1]: times for key, times in packaged.times.items()}
    for_problem: dict[Problem, list[Mapping[KernelConfig, float]]] = {}
    for run in runs:
        for problem, times in run.items():
            for_problem.setdefault(problem, []).append(times)
    for problem, times_of_runs in for_problem.items():
        old = {kernel: time.microseconds for kernel, time in merged.get(problem, {}).items()}
        counted = [*([old] if old and not replaces else []), *times_of_runs]
        merged[problem] = {kernel: Measured(time, "") for kernel, time in merged_times(counted).items()}
    return replace(packaged, times={(MEASURED_MODE, problem): times for problem, times in merged.items()})


def main(arguments: Sequence[str] | None = None) -> None:
    """Merge files into the packaged table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", help="tuning tables and recordings")
    parser.add_argument("--table", type=Path, default=TIMES_PATH, help="the packaged table, which is written")
    parser.add_argument("--replace", action="store_true", help="forget the packaged times of the problems measured")
    options = parser.parse_args(arguments)
    packaged = read_times(options.table)
    source = json.loads(options.table.read_text())["source"]
    table = merge(packaged, [run_of(path) for path in options.runs], replaces=options.replace)
    names = ", ".join(path.name for path in options.runs)
    verb = "Replaced by" if options.replace else "Merged with"
    write_if_changed(options.table, times_as_text(table, f"{source} {verb} {names}."))
    print(f"{options.table}: {len(table.times)} problems")


if __name__ == "__main__":
    main()
