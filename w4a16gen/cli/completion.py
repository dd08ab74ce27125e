"""`w4a16gen completion`: the script that makes a shell complete commands, options and kernel names."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from w4a16gen.cli.app import COMPLETION_VARIABLE, PROGRAM
from w4a16gen.cli.help import ExampleCommand
from w4a16gen.cli.options import json_option
from w4a16gen.cli.output import print_result

SHELLS = ("bash", "zsh", "fish")


@click.command(
    "completion",
    cls=ExampleCommand,
    examples=(
        ('eval "$(w4a16gen completion bash)"', "for this shell; put it into ~/.bashrc to keep it"),
        ('eval "$(w4a16gen completion zsh)"', "the same for zsh, in ~/.zshrc"),
        ("w4a16gen completion fish > ~/.config/fish/completions/w4a16gen.fish", "for fish"),
    ),
)
@click.argument("shell", type=click.Choice(SHELLS))
@json_option
@click.pass_context
def command(ctx: click.Context, shell: str, as_json: bool) -> None:
    """Print the completion script of a shell: it completes commands, options, kernels, shapes, modes and models."""
    completion = get_completion_class(shell)
    if completion is None:
        raise click.UsageError(f"this click cannot complete in {shell}")
    script = completion(ctx.find_root().command, {}, PROGRAM, COMPLETION_VARIABLE).source()
    if as_json:
        print_result("completion", {"shell": shell, "script": script})
    else:
        click.echo(script)
