"""The commands on which kernel is fastest: bench measures, explain estimates as `gemm` does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import click

from w4a16gen import dispatch, sweep
from w4a16gen.api import load
from w4a16gen.bench import hopper_gpu
from w4a16gen.cli.app import (
    Parsed,
    build_option,
    json_option,
    main,
    mode_option,
    notes,
    print_json,
    print_table,
    problem_arguments,
    show_progress,
)
from w4a16gen.config import KernelConfig, QuantMode
from w4a16gen.errors import InvalidValueError
from w4a16gen.models import MODELS, model_problems
from w4a16gen.problem import Problem
from w4a16gen.tuning import TABLE, Measured, TuningTable, add_times, content_hashes, one_time

MODEL_TOKENS = (1, 16, 64, 256, 1024)
HEADINGS = ("m x n x k", "kernel", "us", "dependent us", "TB/s", "TFLOP/s", "over cuBLAS FP16")


def parse_problem(text: str) -> Problem:
    """Read `MxNxK` or `MxNxK,GROUP`; the group is 128 unless given.

    Raises:
        InvalidValueError: if the text is anything else.
    """
    shape, _, group = text.partition(",")
    parts = [*shape.split("x"), group or "128"]
    if len(parts) != 4 or not all(part.isdigit() and int(part) > 0 for part in parts):  # noqa: PLR2004
        raise InvalidValueError(f"{text!r} must be MxNxK or MxNxK,GROUP, positive integers such as 16x4096x4096,128")
    return Problem(*(int(part) for part in parts))


def parse_model(text: str) -> tuple[str, int, int]:
    """Read `NAME`, `NAME/GPUS`, or either and `,GROUP`; one GPU and groups of 128 unless given.

    Raises:
        InvalidValueError: if the text is anything else, or there is no such model.
    """
    rest, comma, group = text.partition(",")
    name, slash, gpus = rest.partition("/")
    counts = (gpus if slash else "1", group if comma else "128")
    if name not in MODELS or not all(count.isdigit() and int(count) > 0 for count in counts):
        raise InvalidValueError(
            f"{text!r} must be NAME[/GPUS][,GROUP] such as llama-3-70b/8,128; the models are {', '.join(MODELS)}"
        )
    return name, int(counts[0]), int(counts[1])


@main.command()
@problem_arguments(least_tokens=1)
@click.option("--top", type=click.IntRange(min=1), default=5, show_default=True, help="Kernels to show.")
@build_option
@json_option
def explain(problem: Problem, mode: QuantMode, top: int, folder: Path | None, as_json: bool) -> None:
    """Show which built kernel a call with M tokens, N output channels and K values gets, and the runners-up."""
    library = load(folder)
    configs = library.configs()
    used = next((config for config in dispatch.kernels_in_use() if config.mode is mode), None)
    tuned = library.tuned(mode, problem)
    chosen = used or (tuned[0] if tuned else dispatch.choose(configs, mode, problem))
    estimated = dispatch.estimate(configs, mode, problem)
    if used is not None:
        notes.print(f"{dispatch.KERNELS_VARIABLE} names {used.name}: calls use it, whatever it takes")
    elif tuned is not None:
        notes.print(f"the tuning table says {tuned[0].name}, {tuned[1]:.2f} us: calls use it, whatever the estimates")
    if as_json:
        shown = [{"kernel": config.name, "estimated_microseconds": round(us, 2)} for config, us in estimated[:top]]
        print_json({"problem": vars(problem), "mode": mode.value, "chosen": chosen.name, "estimates": shown})
        return
    if estimated:
        rows = ((config.name.removeprefix("w4a16_sm90_"), f"{us:.1f}") for config, us in estimated[:top])
        print_table(
            f"{problem}, mode {mode}" + ("" if used or tuned else ": the first is chosen"),
            ("kernel", "estimated us"),
            rows,
        )
        shape = f"{problem.m}x{problem.n}x{problem.k},{problem.group_size}"
        notes.print(
            f"{len(estimated)} native kernels of the build can run it. Estimates are for an H100 and off by 12 % (root "
            f"mean square); `w4a16gen bench --problem {shape}` measures."
        )
    else:
        click.echo(chosen.name)
    if not estimated and used is None:
        notes.print("No native kernel of the build can run it: chosen by a rule of thumb among CUTLASS's.")


def problems_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command what to time as `named`, problems with what each is called, and `mode`."""

    @click.option(
        "--problem",
        "problems",
        multiple=True,
        type=Parsed("MxNxK[,GROUP]", parse_problem),
        help="Tokens, output channels, K; may be repeated.",
    )
    @click.option(
        "--model",
        "models",
        multiple=True,
        type=Parsed("NAME[/GPUS][,GROUP]", parse_model),
        help="The layers of a model on one of so many GPUs, such as llama-3-70b/8; may be repeated.",
    )
    @click.option(
        "--tokens",
        multiple=True,
        type=click.IntRange(min=1),
        default=MODEL_TOKENS,
        show_default=True,
        help="m of --model; may be repeated.",
    )
    @mode_option
    @wraps(command)
    def with_problems(
        problems: Sequence[Problem],
        models: Sequence[tuple[str, int, int]],
        tokens: Sequence[int],
        mode: QuantMode,
        **others: Any,
    ) -> None:
        named = [("", problem) for problem in problems]
        for name, gpus, group_size in models:
            named += model_problems(name, tokens, tensor_parallel=gpus, group_size=group_size)
        if not named:
            raise click.UsageError("name what to time: --problem 16x4096x4096, or --model llama-3-8b")
        if not mode.is_grouped:
            named = [(name, Problem(asked.m, asked.n, asked.k, asked.k)) for name, asked in named]
        command(named=named, mode=mode, **others)

    return with_problems


@main.command()
@problems_options
@click.option("--finalists", type=click.IntRange(min=1), default=4, show_default=True, help="Kernels timed in turn.")
@click.option("--rounds", type=click.IntRange(min=1), default=9, show_default=True, help="Timed replays of each.")
@click.option(
    "--smallest-set",
    "slack",
    type=click.FloatRange(min=0),
    help="Also name the smallest set of kernels within so many percent of the fastest on every problem.",
)
@build_option
@json_option
def bench(
    named: Sequence[tuple[str, Problem]],
    mode: QuantMode,
    finalists: int,
    rounds: int,
    slack: float | None,
    folder: Path | None,
    as_json: bool,
) -> None:
    """Time the kernels of the build on problems, with cold L2, beside cuBLAS FP16 where torch is installed."""
    library = load(folder)
    gpu = hopper_gpu(library)
    comparisons = []
    for name, asked in named:
        with show_progress(str(asked)) as progress:
            found = sweep.compare(library, asked, mode, finalists=finalists, rounds=rounds, progress=progress)
        comparisons.append(found)
        if found.screened:
            left_out = f"; {found.left_out} kernels with tiles far from m not timed" if found.left_out else ""
            layer = f" ({name})" if name else ""
            notes.print(f"{asked}{layer}: {found.best.median:.2f} us, {found.best.contender}{left_out}")
        else:
            notes.print(f"{asked}: no built kernel of mode {mode} can run it")
    small = sweep.smallest_set(comparisons, slack / 100) if slack is not None else []
    if not any(found.cublas for found in comparisons):
        notes.print("torch is not installed: cuBLAS FP16 was not timed beside the kernels")
    if as_json:
        print_json(
            {"gpu": gpu, "comparisons": [found.as_json() for found in comparisons], "smallest_set": small},
        )
        return
    print_table(f"{gpu['name']}, mode {mode}, cold L2, medians", HEADINGS, map(_row, comparisons))
    for name in small:
        click.echo(name)


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


def _row(found: sweep.Comparison) -> tuple[str, ...]:
    """Show the fastest kernel of one problem."""
    problem = found.problem
    shape = f"{problem.m}x{problem.n}x{problem.k}"
    if not found.screened:
        return (shape, "none", *[""] * (len(HEADINGS) - 2))
    best, cublas = found.best, found.cublas
    scale_bytes = 2 * problem.groups * problem.n * (2 if found.mode.has_zeros else 1)
    weight_bytes = problem.n * problem.k / 2 + scale_bytes
    dependent = best.dependent_median
    return (
        shape,
        best.contender.removeprefix("w4a16_sm90_"),
        f"{best.median:.2f}",
        "" if dependent is None else f"{dependent:.2f}",
        f"{weight_bytes / best.median / 1e6:.2f}",
        f"{problem.flops / best.median / 1e6:.0f}",
        "" if cublas is None else f"{cublas.median / best.median:.2f}",
    )
