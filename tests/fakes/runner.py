"""The command line in this process, with stand-ins for what needs a compiler, a build or a GPU."""

from __future__ import annotations

from typing import Any

from click.testing import CliRunner, Result

from w4a16gen.cli import main
from w4a16gen.cli.services import Services


class Runner(CliRunner):
    """Runs commands with services that a test may replace."""

    def __init__(self) -> None:
        super().__init__()
        self.services = Services()

    def invoke(self, cli: Any = main, args: Any = None, *rest: Any, **extra: Any) -> Result:
        extra.setdefault("obj", self.services)
        return super().invoke(cli, args, *rest, **extra)

    def run(self, arguments: str) -> Result:
        """Run a command line without quotes in it."""
        return self.invoke(main, arguments.split())
