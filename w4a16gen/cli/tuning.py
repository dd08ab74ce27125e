"""The command that measures kernels for later choices."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from w4a16gen import __version__, dispatch, sweep
from w4a16gen.api import load
from w4a16gen.bench import hopper_gpu
from w4a16gen.cli.app import build_option, json_option, main, notes, print_json, show_progress
from w4a16gen.cli.problems import problems_options
from w4a16gen.config import KernelConfig, QuantMode
from w4a16gen.driver import find_driver
from w4a16gen.module import Library
from w4a16gen.problem import Problem
from w4a16gen.tuning import TABLE, Measured, TuningTable, add_times, content_hashes, one_time


@main.command()
@problems_options
@click.option(
    "--table",
    type=click.Path(path_type=Path, dir_okay=False),
    help=f"The file that times go to.  [default: {TABLE} in the build's folder, where `gemm` looks]",
)
@click.option(
    "--gpus",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="GPUs of this machine to measure on, each problem on one of them.",
)
@click.option("--again", is_flag=True, help="Also measure what the table holds already.")
@build_option
@json_option
def tune(
    named: Sequence[tuple[str, Problem]],
    mode: QuantMode,
    table: Path | None,
    gpus: int,
    again: bool,
    folder: Path | None,
    as_json: bool,
) -> None:
    """Measure the kernels of the build on problems, so that calls choose by times instead of estimates.

    Every time is kept at once: an interrupted run goes on where it was. Kernels that are built anew are measured anew.
    """
    library = load(folder)
    gpu = hopper_gpu(library)
    same = [found for found in library.hopper_devices() if found["name"] == gpu["name"]]
    if gpus > len(same):
        raise click.UsageError(f"--gpus {gpus} is more than the {len(same)} {gpu['name']} of this machine")
    path = table or library.build.folder / TABLE
    known = TuningTable(gpu["name"], gpu["sm_count"])
    if path.exists():
        known = TuningTable.read(path).updated(known)  # which another kind of GPU's refuses
    driver = find_driver()
    versions = {
        "w4a16gen": __version__,
        "compiler": str(library.build.manifest["compiler"]),
        "driver": "none" if driver is None else f"CUDA {driver.cuda_version[0]}.{driver.cuda_version[1]}",
    }
    job = _Job(library, gpu, mode, path, known, again, versions)
    outcomes = job.tune(named, [int(found["index"]) for found in same[:gpus]])
    if as_json:
        print_json({"gpu": gpu, "table": str(path), "problems": [outcome.as_json() for outcome in outcomes]})
        return
    notes.print(f"{path}: processes that start from now on choose by it" if table is None else f"{path} is written")


@dataclass(frozen=True)
class _Job:
    """One run of `tune`."""

    library: Library
    gpu: Mapping[str, Any]
    mode: QuantMode
    path: Path
    known: TuningTable
    again: bool
    versions: Mapping[str, str]

    def tune(self, named: Sequence[tuple[str, Problem]], devices: Sequence[int]) -> list[_Tuned]:
        """Measure problems, each on one of the GPUs, and tell of each."""
        hashes = content_hashes(self.library.build.manifest, self.library.configs())
        free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for device in devices:
            free.put(device)
        stop = threading.Event()
        began = time.monotonic()
        outcomes: list[_Tuned] = []

        def one(name: str, problem: Problem) -> None:
            device = free.get()
            try:
                if stop.is_set():
                    return
                outcome = self._tune_one(name, problem, device, hashes, stop, bar=len(devices) == 1)
            except BaseException:
                stop.set()
                raise
            finally:
                free.put(device)
            if not stop.is_set():
                outcomes.append(outcome)
                left = (time.monotonic() - began) / len(outcomes) * (len(named) - len(outcomes))
                notes.print(f"{outcome}; {len(outcomes)} of {len(named)} problems, about {left:.0f} s left")

        if len(devices) == 1:
            for name, problem in named:
                one(name, problem)
            return outcomes
        with ThreadPoolExecutor(len(devices)) as pool:
            try:
                for done in as_completed([pool.submit(one, name, problem) for name, problem in named]):
                    done.result()
            except BaseException:
                stop.set()
                pool.shutdown(cancel_futures=True)
                raise
        return outcomes

    def _tune_one(
        self,
        name: str,
        problem: Problem,
        device: int,
        hashes: Mapping[KernelConfig, str],
        stop: threading.Event,
        *,
        bar: bool,
    ) -> _Tuned:
        able = dispatch.runnable(hashes, self.mode, problem)
        suitable = [config for config in able if sweep.tiles_suit(config, problem)]
        have = {} if self.again else self.known.valid(self.mode, problem, hashes)
        missing = [config for config in suitable if config not in have]
        times = {config: us for config, us in have.items() if config in suitable}
        with show_progress(str(problem)) if bar else nullcontext(lambda *_: None) as progress:
            measured = sweep.measure(self.library, problem, self.mode, missing, device=device)
            for done, (config, us) in enumerate(measured, 1):
                measured_once = Measured(us, hashes[config])
                add_times(self.path, one_time(self.gpu, problem, config, measured_once, self.versions))
                times[config] = us
                progress(done, len(missing), config.name)
                if stop.is_set():
                    break
        return _Tuned(name, problem, times, len(missing), len(able) - len(suitable))


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
