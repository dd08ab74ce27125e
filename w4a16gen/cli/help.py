"""Commands and options whose help has sections and examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

_Command = TypeVar("_Command", bound=Callable[..., Any])

WHICH_KERNELS = "Which kernels"
WHICH_PROBLEMS = "Which problems"
METHOD = "Method"
FILES = "Files and folders"
OUTPUT = "Output"


class SectionedOption(click.Option):
    """An option that help lists under a heading."""

    def __init__(self, *args: Any, section: str = "Options", **attributes: Any) -> None:
        """Take the heading, and what `click.Option` takes."""
        super().__init__(*args, **attributes)
        self.section = section


def option(*names: str, section: str, **attributes: Any) -> Callable[[_Command], _Command]:
    """Add an option to a command, in a section of its help."""
    return click.option(*names, cls=SectionedOption, section=section, **attributes)


class ExampleCommand(click.Command):
    """A command with examples in its help."""

    def __init__(self, *args: Any, examples: Sequence[tuple[str, str]] = (), **attributes: Any) -> None:
        """Take (command line, purpose) pairs, and what `click.Command` takes."""
        super().__init__(*args, **attributes)
        self.examples = examples

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options by section."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and not isinstance(parameter, click.Argument):
                sections.setdefault(getattr(parameter, "section", "Options"), []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records, col_max=26)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples, each as one line that can be copied."""
        super().format_epilog(ctx, formatter)
        if not self.examples:
            return
        with formatter.section("Examples"):
            for line, purpose in self.examples:
                formatter.write(f"{'':{formatter.current_indent}}# {purpose}\n")
                formatter.write(f"{'':{formatter.current_indent}}{line}\n")
