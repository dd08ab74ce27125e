"""The command line: arguments in, tables or JSON out; every decision is made elsewhere."""

from w4a16gen.cli import builds, kernels, timing, tuning
from w4a16gen.cli.app import main

__all__ = ["builds", "kernels", "main", "timing", "tuning"]
