"""The command line: one file per command; arguments in, tables or JSON out."""

from w4a16gen.cli.app import main

__all__ = ["main"]
