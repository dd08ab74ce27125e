"""`w4a16gen bench --step`: a whole decoder's step, beside the dense model and other 4-bit kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from w4a16gen.cli.first_build import load_or_build
from w4a16gen.cli.help import WHICH_PROBLEMS, option
from w4a16gen.cli.options import Parsed, count_option, counts
from w4a16gen.cli.output import end_of_bench, note
from w4a16gen.cli.problems import model_names, parse_model
from w4a16gen.cli.services import services
from w4a16gen.cli.tables import Column, print_table

if TYPE_CHECKING:
    from w4a16gen.kernels.config import QuantMode
    from w4a16gen.measure.decoder import Step
    from w4a16gen.measure.rivals import Rival
    from w4a16gen.measure.step import StepBench, StepTiming

_Command = TypeVar("_Command", bound=Callable[..., Any])
CONTEXT = 512
COLUMNS = (
    Column("kernels", keep=True),
    Column("us", right=True, keep=True),
    Column("tokens/s", right=True, keep=True),
    Column("vs FP16", right=True, keep=True),
    Column("of floor", right=True),
    Column("products", right=True),
    Column("attention", right=True),
    Column("element-wise", right=True),
    Column("gaps", right=True),
)


@dataclass(frozen=True)
class StepChoice:
    """What the options of the command say."""

    models: Sequence[tuple[str, int, int]]
    sequences: Sequence[int]
    context: int
    prefill: int | None
    layers: int | None
    mode: QuantMode
    rounds: int
    rivals: Sequence[Rival]

    def steps(self) -> list[Step]:
        """Return the steps.

        Raises:
            InvalidValueError: if a model's layers cannot be divided.
        """
        from w4a16gen.measure.decoder import Step
        from w4a16gen.measure.models import MODELS

        new, context = (1, self.context) if self.prefill is None else (self.prefill, 0)
        steps = [
            Step(name, MODELS[name], gpus, count, new, context, group, self.layers)
            for name, gpus, group in self.models
            for count in self.sequences
        ]
        for step in steps:
            step.problems()
        return steps


def step_options(command: _Command) -> _Command:
    """Add the options of steps; the command gets steps, sequences, context, prefill and layers."""
    for add in (
        count_option("--layers", section=WHICH_PROBLEMS, help="With --step: run this many layers instead of all."),
        count_option(
            "--prefill",
            section=WHICH_PROBLEMS,
            help="With --step: read COUNT tokens of each sequence, instead of decoding one.",
        ),
        option(
            "--context",
            type=counts(0),
            default=CONTEXT,
            show_default=True,
            section=WHICH_PROBLEMS,
            help="With --step: tokens of each sequence that are in the cache already.",
        ),
        count_option(
            "--sequences",
            section=WHICH_PROBLEMS,
            multiple=True,
            default=(1,),
            show_default=True,
            help="With --step: sequences at once. Repeatable.",
        ),
        option(
            "--step",
            "steps",
            multiple=True,
            type=Parsed("NAME[/GPUS][,GROUP]", parse_model, lambda _: model_names()),
            section=WHICH_PROBLEMS,
            help="Time one step of a whole decoder of a model's sizes, on one GPU of a division. Repeatable.",
        ),
    ):
        command = add(command)
    return command


def step_bench(choice: StepChoice, folder: Path | None, *, wide: bool, as_json: bool) -> int:
    """Time steps, show them, and return the exit status."""
    library = load_or_build(folder)
    measured: list[StepBench] = []
    for step in choice.steps():
        found = services().step_bench(
            library,
            step,
            choice.mode,
            choice.rivals,
            choice.rounds,
            tell=note,
            show_progress=services().show_progress,
        )
        measured.append(found)
        if not as_json:
            rows = [_cells(found, timing) for timing in found.timings]
            print_table(f"{step}; {found.gpu.name}, mode {choice.mode}, one CUDA graph", COLUMNS, rows, wide=wide)
    wrong = [f"{found.step}, {name}: {reason}" for found in measured for name, reason in found.wrong.items()]
    return end_of_bench("steps", measured, wrong, library, as_json=as_json)


def _cells(found: StepBench, timing: StepTiming) -> tuple[str, ...]:
    """Return the cells of an entrant's row, under COLUMNS."""
    from w4a16gen.measure.rivals import CUBLAS

    dense, shares = found.timing(CUBLAS), timing.shares
    kinds = () if shares is None else (shares.products, shares.attention, shares.elementwise, shares.gaps)
    return (
        timing.name,
        f"{timing.median:.0f}",
        f"{found.step.tokens / timing.median * 1e6:.0f}",
        "" if dense is None else f"{dense.median / timing.median:.2f}",
        "" if found.floor is None else f"{found.floor / timing.median:.2f}",
        *(f"{microseconds:.0f}" for microseconds in kinds),
        *[""] * (4 - len(kinds)),
    )
