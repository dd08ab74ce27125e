"""Options that name problems: one by one, from a file, or as the layers of known models."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from w4a16gen.cli.help import WHICH_PROBLEMS, option
from w4a16gen.cli.options import Parsed, count_option, mode_option, shortened
from w4a16gen.cli.paths import NamedPath, read_text
from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.config import QuantMode
from w4a16gen.kernels.problem import MAX_DIMENSION, Problem

_Command = TypeVar("_Command", bound=Callable[..., Any])
MODEL_TOKENS = (1, 16, 64, 256, 1024)
_PROBLEM = re.compile(r"([0-9]{1,10})x([0-9]{1,10})x([0-9]{1,10})(?:,([0-9]{0,10}))?")
_MODEL = re.compile(r"([^/,]+)(?:/([0-9]{1,10}))?(?:,([0-9]{1,10}))?")


def parse_problem(text: str) -> Problem:
    """Read `MxNxK` or `MxNxK,GROUP`; the group size is 128 unless given.

    Raises:
        InvalidValueError: if the text is anything else.
    """
    match = _PROBLEM.fullmatch(text)
    numbers = [int(number or "128") for number in match.groups()] if match else []
    if not numbers or not all(1 <= number <= MAX_DIMENSION for number in numbers):
        raise InvalidValueError(
            f"{shortened(text)!r} must be MxNxK or MxNxK,GROUP: tokens, output channels, K and group size, "
            f"each 1 to {MAX_DIMENSION}, such as 16x4096x4096,128"
        )
    return Problem(*numbers)


def read_problems(path: Path) -> list[Problem]:
    """Read a file of problems: one per line, `#` begins a comment.

    Raises:
        InvalidValueError: if a line is no problem; the text names the line.
    """
    try:
        lines = read_text(path).splitlines()
    except OSError as error:
        raise InvalidValueError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InvalidValueError(f"{path} is not a text file: write one MxNxK[,GROUP] per line") from None
    except ValueError as error:
        raise InvalidValueError(f"{path} is no list of problems, {error}: write one MxNxK[,GROUP] per line") from None
    problems = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        try:
            problems += [parse_problem(text)] if text else []
        except InvalidValueError as error:
            raise InvalidValueError(f"{path}, line {number}: {error}") from None
    if not problems:
        raise InvalidValueError(f"{path} names no problem: write one MxNxK[,GROUP] per line")
    return problems


def model_names() -> Iterable[str]:
    """Return the names that `--model` and `--step` take."""
    from w4a16gen.measure.models import MODELS

    return MODELS


def parse_model(text: str) -> tuple[str, int, int]:
    """Read `NAME`, `NAME/GPUS`, or either with `,GROUP`; one GPU and group size 128 unless given.

    Raises:
        InvalidValueError: if the text is anything else, or there is no such model.
    """
    match = _MODEL.fullmatch(text)
    name, gpus, group = (match[1], int(match[2] or 1), int(match[3] or 128)) if match else ("", 0, 0)
    if name not in model_names() or gpus < 1 or group < 1:
        raise InvalidValueError(
            f"{shortened(text)!r} must be NAME[/GPUS][,GROUP] such as llama-3-70b/8,128; the models are "
            f"{', '.join(model_names())}"
        )
    return name, gpus, group


def problems_options(command: _Command) -> _Command:
    """Add the options that name problems; the command gets problems, models, files, tokens and mode."""
    for add in (
        mode_option,
        count_option(
            "--tokens",
            section=WHICH_PROBLEMS,
            multiple=True,
            default=MODEL_TOKENS,
            show_default=True,
            help="Token counts to use with --model. Repeatable.",
        ),
        option(
            "--file",
            "files",
            multiple=True,
            type=NamedPath(dir_okay=False, exists=True),
            section=WHICH_PROBLEMS,
            help="File with one MxNxK[,GROUP] per line; # begins a comment. Repeatable.",
        ),
        option(
            "--model",
            "models",
            multiple=True,
            type=Parsed("NAME[/GPUS][,GROUP]", parse_model, lambda _: model_names()),
            section=WHICH_PROBLEMS,
            help="The linear layers of a model, divided among GPUs, such as llama-3-70b/8. Repeatable. An unknown name "
            "lists the models.",
        ),
        option(
            "--problem",
            "problems",
            multiple=True,
            type=Parsed("MxNxK[,GROUP]", parse_problem),
            section=WHICH_PROBLEMS,
            help="Tokens, output channels, K, and the group size (128 unless given). Repeatable.",
        ),
    ):
        command = add(command)
    return command


checkpoint_option = option(
    "--checkpoint",
    "checkpoints",
    multiple=True,
    type=NamedPath(),
    section=WHICH_PROBLEMS,
    help="The layers of a 4-bit checkpoint, a folder or a .gguf file, in their own modes. Repeatable.",
)


def checkpoint_problems(
    checkpoints: Sequence[Path], tokens: Sequence[int]
) -> dict[QuantMode, list[tuple[str, Problem]]]:
    """Return the problems of checkpoints' layers by mode, each with the name of the first layer of its shape.

    Raises:
        InvalidValueError: if a path is no checkpoint that can be read.
    """
    from w4a16gen.weights.importers.checkpoint import open_checkpoint

    names: dict[QuantMode, dict[Problem, str]] = {}
    for path in checkpoints:
        for name, layer in open_checkpoint(path).items():
            for m in tokens:
                problem = Problem(m, layer.n, layer.k, layer.group_size)
                names.setdefault(layer.mode, {}).setdefault(problem, name)
    return {mode: [(name, problem) for problem, name in of_mode.items()] for mode, of_mode in names.items()}


def named_problems(
    problems: Sequence[Problem],
    models: Sequence[tuple[str, int, int]],
    files: Sequence[Path],
    tokens: Sequence[int],
    mode: QuantMode,
    *,
    others: str = "",
) -> list[tuple[str, Problem]]:
    """Return the problems that the options name, each with its layer's name.

    Args:
        problems: of `--problem`.
        models: of `--model`.
        files: of `--file`.
        tokens: of `--tokens`.
        mode: of `--mode`.
        others: other options of the command that name problems, for the message.

    Raises:
        InvalidValueError: if a file or a model cannot be used.
        click.UsageError: if no problem is named.
    """
    from w4a16gen.measure.models import model_problems

    named = [("", problem) for problem in problems]
    for path in files:
        named += [("", problem) for problem in read_problems(path)]
    for name, gpus, group_size in models:
        named += model_problems(name, tokens, tensor_parallel=gpus, group_size=group_size)
    if not named:
        raise click.UsageError(f"Specify at least one of --problem, --model, --file{others}")
    if not mode.is_grouped:
        named = [(name, Problem(asked.m, asked.n, asked.k, asked.k)) for name, asked in named]
    return named
