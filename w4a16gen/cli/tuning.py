"""The command that measures kernels for later choices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from w4a16gen import dispatch, sweep
from w4a16gen.api import load
from w4a16gen.bench import hopper_gpu
from w4a16gen.cli.app import build_option, json_option, main, notes, print_json, show_progress
from w4a16gen.cli.problems import problems_options
from w4a16gen.config import KernelConfig, QuantMode
from w4a16gen.problem import Problem
from w4a16gen.tuning import TABLE, Measured, TuningTable, add_times, content_hashes, one_time


@main.command()
@problems_options
@click.option(
    "--table",
    type=click.Path(path_type=Path, dir_okay=False),
    help=f"The file that times go to.  [default: {TABLE} in the build's folder, where `gemm` looks]",
)
@click.option("--again", is_flag=True, help="Also measure what the table holds already.")
@build_option
@json_option
def tune(
    named: Sequence[tuple[str, Problem]],
    mode: QuantMode,
    table: Path | None,
    again: bool,
    folder: Path | None,
    as_json: bool,
) -> None:
    """Measure the kernels of the build on problems, so that calls choose by times instead of estimates.

    Every time is kept at once: an interrupted run goes on where it was. Kernels that are built anew are measured anew.
    """
    library = load(folder)
    gpu = hopper_gpu(library)
    path = table or library.build.folder / TABLE
    known = TuningTable(gpu["name"], gpu["sm_count"])
    if path.exists():
        known = TuningTable.read(path).updated(known)  # which another kind of GPU's refuses
    hashes = content_hashes(library.build.manifest, library.configs())
    outcomes = []
    for name, problem in named:
        able = dispatch.runnable(hashes, mode, problem)
        suitable = [config for config in able if sweep.tiles_suit(config, problem)]
        have = {} if again else known.valid(mode, problem, hashes)
        missing = [config for config in suitable if config not in have]
        times = {config: us for config, us in have.items() if config in suitable}
        with show_progress(str(problem)) as progress:
            for done, (config, us) in enumerate(sweep.measure(library, problem, mode, missing), 1):
                add_times(path, one_time(gpu, problem, config, Measured(us, hashes[config])))
                times[config] = us
                progress(done, len(missing), config.name)
        outcome = _Tuned(name, problem, times, len(missing), len(able) - len(suitable))
        notes.print(str(outcome))
        outcomes.append(outcome)
    if as_json:
        print_json({"gpu": gpu, "table": str(path), "problems": [outcome.as_json() for outcome in outcomes]})
        return
    notes.print(f"{path}: processes that start from now on choose by it" if table is None else f"{path} is written")


@dataclass(frozen=True)
class _Tuned:
    """What is known of one problem after `tune`."""

    name: str
    problem: Problem
    times: Mapping[KernelConfig, float]
    measured: int
    left_out: int

    def fastest(self) -> KernelConfig:
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
        fastest = self.fastest() if self.times else None
        return {
            "problem": vars(self.problem),
            "name": self.name,
            "measured": self.measured,
            "known": len(self.times) - self.measured,
            "left_out": self.left_out,
            "fastest": None if fastest is None else fastest.name,
            "microseconds": None if fastest is None else round(self.times[fastest], 3),
        }
