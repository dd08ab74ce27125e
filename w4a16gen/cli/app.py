"""What all commands share: the group, how errors become exit codes, options, tables, JSON and progress bars."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from w4a16gen.errors import InvalidValueError, MissingToolError, NoHopperGpuError, NotBuiltError, W4A16Error
from w4a16gen.kernels import spaces as space
from w4a16gen.kernels.config import ClusterShape, CtaShape, QuantMode, Target
from w4a16gen.kernels.problem import Problem
from w4a16gen.runtime.default import BUILD_FOLDER_VARIABLE

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_MISSING = 3
EXIT_INTERRUPTED = 130

_Command = TypeVar("_Command", bound=Callable[..., Any])
notes = Console(stderr=True, highlight=False)
"""Where everything goes that is not the command's result."""


class Parsed(click.ParamType[Any]):
    """An option that a parser reads; its error becomes click's."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        """Take the name that help texts show, and the parser."""
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse a string; pass through what is parsed already."""
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def parse_mode(text: str) -> QuantMode:
    """Read a quantisation mode from its tag or its full name."""
    for mode in QuantMode:
        if text.lower() in (mode.value, mode.name.lower()):
            return mode
    raise InvalidValueError(f"{text!r} is not one of {', '.join(mode.value for mode in QuantMode)}")


def parse_target(text: str) -> Target:
    """Read a kernel family from its name."""
    if text in (target.value for target in Target):
        return Target(text)
    raise InvalidValueError(f"{text!r} is not one of {', '.join(target.value for target in Target)}")


class ErrorReportingGroup(click.Group):
    """Turns the package's errors into messages and the documented exit codes."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; see the class."""
        try:
            return super().invoke(ctx)
        except InvalidValueError as error:
            fail(EXIT_USAGE, str(error))
        except (MissingToolError, NotBuiltError, NoHopperGpuError) as error:
            fail(EXIT_MISSING, str(error))
        except W4A16Error as error:
            fail(EXIT_FAILED, str(error))
        except OSError as error:
            fail(EXIT_FAILED, f"{error.filename or 'a file'}: {error.strerror}: choose another folder or file")
        except KeyboardInterrupt:
            fail(EXIT_INTERRUPTED, "interrupted: what was finished is kept, and the next run goes on from there")


def fail(code: int, message: str) -> None:
    """Print an error and leave with an exit code."""
    notes.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
    sys.exit(code)


@click.group(
    cls=ErrorReportingGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(package_name="w4a16gen")
def main() -> None:
    """Generate, build, prove and run FP16 x uint4 GEMM kernels for NVIDIA Hopper GPUs.

    Shapes are CHANNELSxTOKENSxK: output channels, tokens, k.

    Exit codes: 0 success; 1 a proof, a compilation or a write failed; 2 a wrong call; 3 a tool, a build or a GPU is
    missing; 130 interrupted.
    """


TRTLLM = "trtllm"
"""What `emit` takes for a target besides the families that are built here."""


def parse_emitted_target(text: str) -> Target | str:
    """Read a kernel family, or `trtllm`."""
    if text == TRTLLM:
        return text
    try:
        return parse_target(text)
    except InvalidValueError as error:
        raise InvalidValueError(f"{error}, {TRTLLM}") from None


def kernel_filters(default_space: str, *, emits: bool = False) -> Callable[[_Command], _Command]:
    """Add the options that choose kernels; the command gets them as `wanted` and `space_name`.

    Args:
        default_space: the space unless another is named.
        emits: whether the command also writes sources for TensorRT-LLM; it then gets `for_trtllm` too, and the space's
            name is None unless it was given.
    """

    def decorate(command: _Command) -> _Command:
        @wraps(command)
        def with_filter(*args: Any, **kwargs: Any) -> Any:
            ctas, clusters, modes, targets = (kwargs.pop(axis) for axis in ("ctas", "clusters", "modes", "targets"))
            if emits:
                kwargs["for_trtllm"] = TRTLLM in targets
                if kwargs["for_trtllm"] and set(targets) != {TRTLLM}:
                    raise click.UsageError(f"--target {TRTLLM} stands alone: it writes files for another source tree")
                targets = () if kwargs["for_trtllm"] else targets
            return command(*args, wanted=space.Filter(ctas, clusters, modes, targets), **kwargs)

        options = (
            click.option("--cta", "ctas", multiple=True, type=Parsed("shape", CtaShape.parse), help="CTA shape."),
            click.option(
                "--cluster", "clusters", multiple=True, type=Parsed("shape", ClusterShape.parse), help="Cluster shape."
            ),
            click.option("--mode", "modes", multiple=True, type=Parsed("mode", parse_mode), help="cs, fgs or fgsz."),
            click.option(
                "--target",
                "targets",
                multiple=True,
                type=Parsed("target", parse_emitted_target if emits else parse_target),
                help="Kernel family: native or cutlass"
                + ("; trtllm: TensorRT-LLM's instantiations, for its source tree." if emits else "."),
            ),
            click.option(
                "--space",
                "space_name",
                type=click.Choice(list(space.SPACES)),
                default=None if emits else default_space,
                show_default=default_space,
                help="Named set to choose from.",
            ),
        )
        for option in reversed(options):
            with_filter = option(with_filter)
        return cast("_Command", with_filter)

    return decorate


def problem_arguments(least_tokens: int) -> Callable[[_Command], _Command]:
    """Add M, N, K, --group-size and --mode; the command gets them as `problem` and `mode`."""

    def decorate(command: _Command) -> _Command:
        @wraps(command)
        def with_problem(m: int, n: int, k: int, group_size: int | None, mode: QuantMode, **kwargs: Any) -> Any:
            size = group_size or (min(128, k) if mode.is_grouped else k)
            return command(problem=Problem(m, n, k, size), mode=mode, **kwargs)

        options = (
            click.argument("m", type=click.IntRange(min=least_tokens)),
            click.argument("n", type=click.IntRange(min=1)),
            click.argument("k", type=click.IntRange(min=1)),
            click.option(
                "--group-size", type=click.IntRange(min=1), help="Values of K per scale.  [default: 128, or k in cs]"
            ),
            mode_option,
        )
        decorated: Callable[..., Any] = with_problem
        for option in reversed(options):
            decorated = option(decorated)
        return cast("_Command", decorated)

    return decorate


mode_option = click.option(
    "--mode", type=Parsed("mode", parse_mode), default="fgs", show_default=True, help="cs, fgs or fgsz."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on standard output.")
generated_option = click.option(
    "--generated-dir",
    "generated",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("generated"),
    show_default=True,
    help="Folder of the emitted sources.",
)
build_option = click.option(
    "--build-dir",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    default=None,
    help=f"Folder of the build.  [default: ${BUILD_FOLDER_VARIABLE}, or build]",
)
jobs_option = click.option(
    "--jobs", "-j", type=click.IntRange(min=1), help="Compilers at once.  [default: by cores and free memory]"
)
gpu_option = click.option("--require-gpu", is_flag=True, help="Fail where there is no Hopper GPU for the numerics.")
report_option = click.option(
    "--report", type=click.Path(path_type=Path, dir_okay=False), help="Also write the report, as JSON and as .md."
)


def print_json(value: Any) -> None:
    """Print a value as JSON on standard output."""
    click.echo(json.dumps(value, indent=2))


def print_table(title: str, headings: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Print a table on standard output."""
    table = Table(*headings, title=title)
    for row in rows:
        table.add_row(*row)
    wide = None if sys.stdout.isatty() else 200  # what reads a pipe has no columns to spare
    Console(highlight=False, width=wide).print(table)


@contextmanager
def termination_interrupts() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C while compilers run, which must be stopped too.

    Not elsewhere: a handler of Python's does not run while the process waits for a GPU, and the default ends it there.
    """

    def interrupt(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def show_progress(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """Show a bar on standard error while a long task reports (done, total, name)."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=notes, transient=True) as bar:
        task = bar.add_task(title, total=None)

        def report(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, description=f"{title}: {name}")

        yield report
