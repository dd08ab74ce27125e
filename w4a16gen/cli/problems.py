"""Naming problems on the command line: one by one, or as the layers of known models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import click

from w4a16gen.cli.app import Parsed, mode_option
from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.config import QuantMode
from w4a16gen.kernels.problem import Problem
from w4a16gen.measure.models import MODELS, model_problems

MODEL_TOKENS = (1, 16, 64, 256, 1024)


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


def read_problems(path: Path) -> list[Problem]:
    """Read a file of problems.

    Raises:
        InvalidValueError: naming the line that is none.
    """
    problems = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        text = line.partition("#")[0].strip()
        try:
            problems += [parse_problem(text)] if text else []
        except InvalidValueError as error:
            raise InvalidValueError(f"{path}, line {number}: {error}") from None
    return problems


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
        "--file",
        "files",
        multiple=True,
        type=click.Path(path_type=Path, dir_okay=False, exists=True),
        help="A file of problems, MxNxK[,GROUP] a line; # begins a comment.",
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
        files: Sequence[Path],
        tokens: Sequence[int],
        mode: QuantMode,
        **others: Any,
    ) -> None:
        named = [("", problem) for problem in problems]
        for path in files:
            named += [("", problem) for problem in read_problems(path)]
        for name, gpus, group_size in models:
            named += model_problems(name, tokens, tensor_parallel=gpus, group_size=group_size)
        if not named:
            raise click.UsageError("name what to time: --problem 16x4096x4096, --model llama-3-8b, or --file")
        if not mode.is_grouped:
            named = [(name, Problem(asked.m, asked.n, asked.k, asked.k)) for name, asked in named]
        command(named=named, mode=mode, **others)

    return with_problems
