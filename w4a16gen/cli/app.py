"""The command group: which commands there are, and how errors end a process."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import click
from click.shell_completion import CompletionItem, shell_complete

from w4a16gen import __version__
from w4a16gen.cli.output import discard_output, flush_output, note, prepare_streams, print_result
from w4a16gen.errors import EXIT_FAILED, EXIT_USAGE, W4A16Error, missing_extra

PROGRAM = "w4a16gen"
"""The program's name in help texts and for completion, however it was started."""
COMPLETION_VARIABLE = "_W4A16GEN_COMPLETE"
"""Set by the completion script; its value says what the shell asks for."""
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
"""128 + SIGPIPE: the usual status of a program whose output pipe is closed."""
_BUILD_PACKAGES = {"jinja2", "psutil", "pybind11"}
"""Modules of the extra `build` that commands import."""
TRACEBACK_VARIABLE = "W4A16GEN_TRACEBACK"


class Entry(NamedTuple):
    """A command's module, and its line in the list of commands."""

    module: str
    attribute: str
    summary: str


SECTIONS: Mapping[str, Mapping[str, Entry]] = {
    "Kernels": {
        "list": Entry("list", "command", "List kernels: those of a space, or those of the build."),
        "emit": Entry("emit", "command", "Write kernel sources, or TensorRT-LLM instantiations."),
    },
    "Builds": {
        "build": Entry("build", "command", "Compile and link kernels into a library."),
        "verify": Entry("verify", "command", "Prove a build: machine code anywhere, numerics on a GPU."),
        "build-and-verify": Entry("verify", "build_and_verify", "Build kernels, then prove them."),
        "export": Entry("export", "command", "Write a C++ package or a Python wheel of the build."),
        "clean": Entry("clean", "command", "Remove a build; tuning tables and sources stay."),
    },
    "Models": {
        "inspect": Entry("inspect", "command", "Show the layers of a 4-bit checkpoint and their kernels."),
        "convert": Entry("convert", "command", "Pack a 4-bit checkpoint for the native kernels."),
        "quantize": Entry("quantize", "command", "Round a model's linear layers to 4 bits."),
    },
    "Speed": {
        "run": Entry("run", "command", "Run, check and time one GEMM on random data."),
        "bench": Entry("bench", "command", "Time the built kernels beside cuBLAS FP16."),
        "report": Entry("report", "command", "Regenerate CSV, plots and HTML from a bench record."),
        "tune": Entry("tune", "command", "Measure kernels, so that gemm picks by measured times."),
        "explain": Entry("explain", "command", "Show which kernel gemm picks for a problem, and why."),
    },
    "Other": {
        "audit": Entry("audit", "command", "Audit .cu files from TensorRT-LLM's generator."),
        "doctor": Entry("doctor", "command", "Check the tools, the GPU and the build."),
        "completion": Entry("completion", "command", "Print a shell's completion script."),
    },
}
COMMANDS = {name: entry for entries in SECTIONS.values() for name, entry in entries.items()}


class Application(click.Group):
    """The commands, each imported when it runs, and one form for all errors."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Return the names of the commands."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import a command."""
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        command = getattr(importlib.import_module(f"w4a16gen.cli.{entry.module}"), entry.attribute)
        return command if isinstance(command, click.Command) else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that the arguments name; suggest near ones for an unknown name."""
        if args[0] not in COMMANDS and not args[0].startswith("-") and not ctx.resilient_parsing:
            import difflib

            near = difflib.get_close_matches(args[0], COMMANDS)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise click.UsageError(f"No such command {args[0]!r}.{hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Write the list of commands without importing any."""
        for heading, entries in SECTIONS.items():
            with formatter.section(heading):
                width = max(map(len, COMMANDS))
                formatter.write_dl([(name.ljust(width), entry.summary) for name, entry in entries.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete commands without importing any."""
        items = [
            CompletionItem(name, help=entry.summary) for name, entry in COMMANDS.items() if name.startswith(incomplete)
        ]
        return items + click.Command.shell_complete(self, ctx, incomplete)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,  # noqa: ARG002
        complete_var: str | None = None,  # noqa: ARG002
        standalone_mode: bool = True,  # noqa: ARG002
        **extra: Any,
    ) -> NoReturn:
        """Run a command, or complete one for a shell, and exit with its status."""
        prepare_streams()
        arguments = sys.argv[1:] if args is None else list(args)
        if instruction := os.environ.get(COMPLETION_VARIABLE):
            sys.exit(shell_complete(self, {}, PROGRAM, COMPLETION_VARIABLE, instruction))
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                status = self._run(arguments, extra)
            flush_output()
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  (no command ends in a traceback)
            status = _end(error, as_json="--json" in arguments)
        sys.exit(status)

    def _run(self, arguments: list[str], extra: Mapping[str, Any]) -> int:
        try:
            with self.make_context(PROGRAM, arguments, **extra) as ctx:
                return self.invoke(ctx) or 0
        except click.exceptions.Exit as exit_:
            return exit_.exit_code


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    note(str(message), label="warning:", color="yellow")


class _Ending(NamedTuple):
    """The report of an error to the user."""

    kind: str
    message: str
    status: int


def _end(error: BaseException, *, as_json: bool) -> int:
    """Report an error and return the exit status."""
    if isinstance(error, BrokenPipeError):
        discard_output()
        return EXIT_BROKEN_PIPE
    if os.environ.get(TRACEBACK_VARIABLE):
        traceback.print_exception(error)
    ending = _describe(error)
    try:
        if as_json:
            parts = {"type": ending.kind, "message": ending.message, "exit_code": ending.status}
            print_result("error", {"error": parts})
            flush_output()
    except OSError:
        discard_output()
    with suppress(OSError):
        note(ending.message, label="error:")
    return ending.status


def _describe(error: BaseException) -> _Ending:
    kind = type(error).__name__
    if isinstance(error, W4A16Error):
        return _Ending(kind, str(error), error.exit_code)
    if isinstance(error, click.UsageError):
        message = error.format_message()
        stop = "" if message.endswith((".", "?")) else "."
        path = error.ctx.command_path if error.ctx else PROGRAM
        return _Ending(kind, f"{message}{stop} See `{path} --help`.", EXIT_USAGE)
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        done = "interrupted: finished work is kept; run the command again to continue"
        return _Ending("Interrupted", done, EXIT_INTERRUPTED)
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in _BUILD_PACKAGES:
        return _describe(missing_extra(str(error.name), "build"))
    if isinstance(error, FileNotFoundError) and not _has_current_folder():
        return _Ending(kind, "the current folder was removed: change to another one", EXIT_FAILED)
    if isinstance(error, FileExistsError) and error.filename is not None:  # where a folder was to be made
        return _Ending(kind, f"{error.filename} is no folder: name another folder", EXIT_FAILED)
    if isinstance(error, OSError) and error.strerror:
        name = f"{error.filename}: " if error.filename is not None else ""
        return _Ending(kind, f"{name}{error.strerror}", EXIT_FAILED)
    hint = f"internal error; please report it. Set {TRACEBACK_VARIABLE}=1 to see where it happened"
    return _Ending(kind, f"{kind}: {error} ({hint})", EXIT_FAILED)


def _has_current_folder() -> bool:
    try:
        Path.cwd()
    except FileNotFoundError:
        return False
    return True


@click.group(
    cls=Application,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, prog_name=PROGRAM)
@click.pass_context
def main(ctx: click.Context) -> int:
    """Generate, build, prove and run FP16 x uint4 GEMM kernels for NVIDIA Hopper GPUs.

    CTA and cluster shapes are CHANNELSxTOKENSxK. Problems are MxNxK: tokens, output channels, K.

    \b
    Quick start:
      w4a16gen doctor              check this machine
      w4a16gen build-and-verify    build the default kernels and prove them
      w4a16gen run 16 4096 4096    run one GEMM

    \b
    Exit codes:
        0  success
        1  a proof, a compilation, a check or a write failed
        2  a wrong call
        3  a tool, a build, a GPU or a cluster is missing
      130  interrupted
    """  # noqa: D301  (click's mark of a paragraph that is not wrapped)
    if ctx.invoked_subcommand is not None:
        return 0
    click.echo(ctx.get_help(), err=True)
    return EXIT_USAGE
