"""`w4a16gen doctor`: what this machine has, what it lacks, and the command that fixes it."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

import click

from w4a16gen import __version__
from w4a16gen.cli.help import ExampleCommand
from w4a16gen.cli.options import build_option, json_option
from w4a16gen.cli.output import note, print_result, uses_color, wrapped
from w4a16gen.cli.services import services
from w4a16gen.errors import EXIT_MISSING, W4A16Error
from w4a16gen.wording import counted

if TYPE_CHECKING:
    from w4a16gen.build.diagnose import Finding as Check

_INDENT = 9


class Level(Enum):
    """The weight of a finding."""

    OK = "ok"
    NOTE = "note"
    """It is not there, and this machine may not need it."""
    MISSING = "MISSING"
    """Nothing can be built, or the build cannot be used, without it."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for."""

    subject: str
    level: Level
    detail: str
    fix: str = ""
    """The command, or the step, that fixes it; empty if there is nothing to fix."""

    def as_json(self) -> dict[str, object]:
        """Return the object that JSON output carries."""
        return {**asdict(self), "level": self.level.value.lower()}


@click.command(
    "doctor",
    cls=ExampleCommand,
    examples=(("w4a16gen doctor", "before the first build, and whenever something is not found"),),
)
@build_option
@json_option
def command(folder: Path | None, as_json: bool) -> int:
    """Check the tools, the GPU and the build, and print the command that fixes each fault.

    Exit code 3 if kernels can neither be built nor be loaded here. Building needs no GPU.
    """
    findings = diagnose(folder)
    healthy = all(finding.level is not Level.MISSING for finding in findings)
    if as_json:
        print_result("doctor", {"ok": healthy, "findings": [finding.as_json() for finding in findings]})
    else:
        for finding in findings:
            for line in _lines(finding):
                click.echo(line)
    faults = sum(finding.level is Level.MISSING for finding in findings)
    note("Nothing is missing." if healthy else f"{faults} faults; each has the command that fixes it.")
    return 0 if healthy else EXIT_MISSING


def diagnose(folder: Path | None) -> list[Finding]:
    """Look for what building and running kernels needs. It never raises.

    Tools of a build that are not there are notes on a machine that has a usable build.
    """
    build = _find_build(folder)
    tools = _find_tools()
    if build.level is Level.OK:
        tools = [Finding(tool.subject, _lighter(tool.level), tool.detail, tool.fix) for tool in tools]
    version = f"w4a16gen {__version__}, Python {platform.python_version()} in {sys.prefix}"
    return [Finding("version", Level.OK, version), *tools, *_find_gpus(_runtime(folder)), _find_folder(folder), build]


def _lighter(level: Level) -> Level:
    return Level.NOTE if level is Level.MISSING else level


def _find_tools() -> list[Finding]:
    """Return what a build needs of this machine."""
    try:
        checks = services().diagnose()
    except (W4A16Error, OSError, ValueError) as error:
        return [Finding("tools", Level.MISSING, str(error), "set W4A16GEN_NVCC, W4A16GEN_CUTLASS and CXX to files")]
    return [Finding(check.subject, _level(check), check.detail, check.fix) for check in checks]


def _level(check: Check) -> Level:
    """Return the level of a check: what is fine but has a fix is a note."""
    if not check.ok:
        return Level.MISSING
    return Level.NOTE if check.fix else Level.OK


def _find_gpus(runtime: tuple[int, int]) -> list[Finding]:
    """Return the driver and the GPUs: running kernels needs them, building and static proofs do not.

    Args:
        runtime: release of the CUDA runtime that the kernels contain, as (major, minor).
    """
    from w4a16gen.build.diagnose import driver_finding

    driver = services().find_driver()
    if driver is None:
        found = driver_finding(None, runtime)
        return [Finding(found.subject, Level.NOTE, found.detail, found.fix)]
    found = driver_finding(driver.cuda_version, runtime)
    hopper = any(gpu.is_hopper for gpu in driver.gpus)
    shown = ", ".join(f"{gpu}, {gpu.sm_count} SMs" for gpu in driver.gpus) or "none"
    other = Finding(
        "Hopper GPU", Level.NOTE, f"not found; GPUs: {shown}", "run kernels on an H100, H200, H800 or GH200"
    )
    return [
        Finding(found.subject, _level(found), found.detail, found.fix),
        Finding("Hopper GPU", Level.OK, shown) if hopper else other,
    ]


def _runtime(folder: Path | None) -> tuple[int, int]:
    """Return the release of the CUDA runtime in the build; without a build, in the toolkit."""
    from w4a16gen.build.diagnose import toolkit_version
    from w4a16gen.runtime.artifact import read_manifest
    from w4a16gen.runtime.folders import folder_to_load

    try:
        return read_manifest(folder or folder_to_load()).cuda_version
    except (W4A16Error, OSError, ValueError):
        return toolkit_version()


def _find_folder(folder: Path | None) -> Finding:
    """Return whether the folder that builds go to can be written."""
    from w4a16gen.runtime.folders import default_build_folder

    path = (folder or default_build_folder()).absolute()
    existing = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
    fix = "set --build-dir or W4A16GEN_BUILD_DIR to a folder that you can write to"
    if not existing.is_dir():
        return Finding("build folder", Level.MISSING, f"{existing} is not a folder", fix)
    if not os.access(existing, os.W_OK | os.X_OK):
        return Finding("build folder", Level.NOTE, f"{existing} cannot be written to", fix)
    return Finding("build folder", Level.OK, str(path))


def _find_build(folder: Path | None) -> Finding:
    """Return the build that `load` would load."""
    from w4a16gen.runtime.artifact import MANIFEST, load_build
    from w4a16gen.runtime.folders import folder_to_load, load_default_build

    path = folder or folder_to_load()
    try:
        there = os.path.lexists(path / MANIFEST)
        build = load_build(folder) if folder else load_default_build()
    except (W4A16Error, OSError, ValueError) as error:
        level = Level.MISSING if there else Level.NOTE
        return Finding("build", level, str(error), "w4a16gen build")
    return Finding("build", Level.OK, f"{counted(len(build.configs), 'kernel')} in {path.absolute()}")


def _lines(finding: Finding) -> Iterator[str]:
    """Yield a finding's lines."""
    colors = {Level.OK: "green", Level.NOTE: "yellow", Level.MISSING: "red"}
    label = finding.level.value.ljust(_INDENT)
    lines = wrapped(f"{label}{finding.subject}: {finding.detail}", sys.stdout, _INDENT)
    if uses_color(sys.stdout):
        lines[0] = click.style(label, fg=colors[finding.level], bold=True) + lines[0][_INDENT:]
    yield from lines
    if finding.fix:
        yield from wrapped(f"{'':{_INDENT}}fix: {finding.fix}", sys.stdout, len("fix: "))
