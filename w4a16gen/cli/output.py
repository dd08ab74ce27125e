"""The output of commands: results on standard output, everything else as sentences on standard error."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

import click

from w4a16gen.errors import BuildError

if TYPE_CHECKING:
    from w4a16gen.runtime.library import Library

SCHEMA_VERSIONS = {
    "list": 1,
    "emit": 1,
    "build": 1,
    "verify": 1,
    "build-and-verify": 1,
    "export": 1,
    "clean": 1,
    "inspect": 1,
    "convert": 1,
    "quantize": 1,
    "run": 1,
    "bench": 1,
    "report": 1,
    "tune": 1,
    "explain": 1,
    "audit": 1,
    "doctor": 1,
    "completion": 1,
    "error": 1,
}
"""Version of the JSON object of each command, and of errors. docs/reference/json.md describes them all."""


def terminal_width() -> int:
    """Return the columns of the terminal, or 80 if there is none."""
    return shutil.get_terminal_size((80, 24)).columns


def note(text: str, *, label: str = "", color: str = "red") -> None:
    """Print a sentence on standard error, wrapped between words on a terminal.

    Args:
        text: the sentence. Several lines are wrapped one by one.
        label: a word in front of it, which a terminal shows in colour.
        color: the label's colour.
    """
    lines = wrapped(f"{label} {text}" if label else text, sys.stderr)
    if label and uses_color(sys.stderr):
        lines[0] = click.style(label, fg=color, bold=True) + lines[0][len(label) :]
    _print_error("\n".join(lines))


def _to_stderr(text: str) -> None:
    click.echo(text, err=True)


_print_error: Callable[[str], None] = _to_stderr


@contextmanager
def printed_by(print_error: Callable[[str], None]) -> Iterator[None]:
    """Let a progress bar print what `note` says meanwhile, above itself."""
    global _print_error  # noqa: PLW0603
    before, _print_error = _print_error, print_error
    try:
        yield
    finally:
        _print_error = before


def wrapped(text: str, stream: TextIO | None, indent: int = 0) -> list[str]:
    """Return the lines of a text, broken between words to fit a terminal; words, paths and options stay whole.

    Args:
        text: the text. Each of its lines is broken by itself.
        stream: where it goes. If it is no terminal, lines stay as they are.
        indent: columns to indent continued lines by, beside those of the line itself.
    """
    lines = text.splitlines() or [""]
    if not is_terminal(stream):
        return lines
    return [part for line in lines for part in _wrap(line, terminal_width(), indent)]


def _wrap(line: str, width: int, indent: int) -> list[str]:
    hanging = " " * (len(line) - len(line.lstrip()) + indent)
    parts = textwrap.wrap(
        line, width, subsequent_indent=hanging, break_long_words=False, break_on_hyphens=False, replace_whitespace=False
    )
    return parts or [""]


def result(command: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON object of a command, or of an error, with its schema. Numbers that are not finite become null.

    Args:
        command: the command's name, or `error`.
        value: the other members.
    """
    schema = {"schema": f"w4a16gen.{command}/{SCHEMA_VERSIONS[command]}"}
    finite = _finite({key: member for key, member in value.items() if key != "schema"})
    return schema | dict(finite)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(member) for key, member in value.items()}
    return [_finite(member) for member in value] if isinstance(value, (list, tuple)) else value


def print_result(command: str, value: Mapping[str, Any]) -> None:
    """Print the JSON object of a command, or of an error; see `result`."""
    click.echo(json.dumps(result(command, value), indent=2))


def end_of_bench(kind: str, measured: Sequence[Any], wrong: Sequence[str], library: Library, *, as_json: bool) -> int:
    """Print what a bench of one kind has measured if JSON is asked for, say what is wrong, and return the exit status.

    Args:
        kind: the member of the object that lists measurements of this kind.
        measured: the measurements, which have `as_json`.
        wrong: sentences about wrong results of this package.
        library: the build.
        as_json: whether JSON is asked for.
    """
    if as_json:
        from w4a16gen.measure.bench import nothing_measured

        print_result(
            "bench", nothing_measured(library.hopper_device()) | {kind: [found.as_json() for found in measured]}
        )
    for sentence in wrong:
        note(sentence, label="error:")
    return BuildError.exit_code if wrong else 0


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether a stream is a terminal that can be written to."""
    return stream is not None and not stream.closed and stream.isatty()


def uses_color(stream: TextIO | None) -> bool:
    """Return whether to colour what a stream shows; NO_COLOR and TERM=dumb forbid it."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def prepare_streams() -> None:
    """Make the standard streams safe to write to.

    A closed descriptor is opened on the null device, so that no file of a build takes its number. Characters that a
    stream's encoding lacks are written as escapes.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # compilers need all three too
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def flush_output() -> None:
    """Write out what is buffered for standard output.

    Raises:
        OSError: if it cannot be written, for example because the reader of a pipe has ended.
    """
    if sys.stdout is not None and not sys.stdout.closed:
        sys.stdout.flush()


def discard_output() -> None:
    """Send the rest of standard output nowhere, so that the interpreter does not fail on it when it ends."""
    try:
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, sys.stdout.fileno())
        os.close(descriptor)
    except (OSError, ValueError, AttributeError):
        return
