"""The store of objects: what a compiler left is kept by content, or its failure is named."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from w4a16gen.build import causes
from w4a16gen.build.nvcc import UNIT, Compiled
from w4a16gen.build.scratch import LOGS, OBJECTS
from w4a16gen.build.units import COMPILE_COSTS, CompiledUnit
from w4a16gen.errors import BuildError
from w4a16gen.files import make_way, remove, write_if_changed, write_json, written_whole
from w4a16gen.kernels.config import KernelConfig
from w4a16gen.kernels.render import render_kernel, render_unit, source_name

_SERIALISED = "wgmma.mma_async instructions are serialized"
"""Part of ptxas's warnings (C7510, C7512, C7514 and others) that it gives up overlapping WGMMAs."""

_OBJECT = re.compile(r"([0-9a-f]{32}\.o)[:(]")
"""An object's name where the linker says something about the object. A command line has no colon behind it."""
_OTHER_FAULTS = (": undefined reference", ": in function ", "warning: ", "NOTE: ")
"""Parts of sentences that name an object and do not find fault with it."""


@dataclass(frozen=True)
class Failure:
    """A kernel that did not compile, and where nvcc's output is."""

    name: str
    log: Path
    summary: str
    killed: bool = False
    """Whether the compiler was killed, which another try with more memory may cure."""


def sources_of(configs: Sequence[KernelConfig]) -> dict[str, str]:
    """Return the texts of a compile unit's files, by name."""
    names = [source_name(config) for config in configs]
    texts = {name: render_kernel(config) for name, config in zip(names, configs, strict=True)}
    return texts | {UNIT: render_unit(names)}


def keep(
    build: Path, configs: Sequence[KernelConfig], hashes: Mapping[KernelConfig, str], compiled: Compiled
) -> CompiledUnit | Failure:
    """Put an object, its record and its log into the folder of a build, wherever it was compiled.

    Args:
        build: the build's folder.
        configs: the kernels of the unit.
        hashes: the content hash of each.
        compiled: what the compiler left.

    Returns:
        The cached object, or the failure of the unit (named after its first kernel).

    Raises:
        BuildError: if the reason is the machine, not the source.
        OSError: if something cannot be written.
    """
    digest = hashlib.sha256("\n".join(hashes[config] for config in configs).encode()).hexdigest()[:32]
    stem = configs[0].name if len(configs) == 1 else f"unit_{digest}"
    log = build / LOGS / f"{stem}.log"
    if failure := _failure(build, configs, log, compiled):
        return failure
    write_log(log, compiled.text)
    unit = CompiledUnit(
        build / OBJECTS / f"{digest}.o",
        hashlib.sha256(compiled.content).hexdigest(),
        {config.name: hashes[config] for config in configs},
        compiled.cpu_seconds,
        compiled.peak_bytes,
    )
    if unit.path.is_dir() and not unit.path.is_symlink():
        remove(unit.path)
    with written_whole(unit.path) as file:
        file.write(compiled.content)
    record = unit.path.with_suffix(".json")
    make_way(record)
    write_json(record, unit.as_json(), mode=0o644)
    return unit


def _failure(build: Path, configs: Sequence[KernelConfig], log: Path, compiled: Compiled) -> Failure | None:
    """Return why a unit failed; None if it did not.

    Raises:
        BuildError: if the reason is the machine, not the source.
    """
    text = compiled.text
    serialised = [line.strip() for line in text.splitlines() if _SERIALISED in line]
    if compiled.content and not serialised:
        return None
    if compiled.cancelled:
        return Failure(configs[0].name, log, "the build was stopped")
    if compiled.full:
        raise BuildError(compiled.fault)
    if causes.is_full("", [build]):
        raise BuildError(causes.describe_full([build]))
    write_log(log, text)
    if compiled.fault:
        raise BuildError(f"{compiled.fault}\nThe compiler's output: {log}")
    if causes.is_killed(compiled.returncode, text):
        memory = COMPILE_COSTS[configs[0].target].unit_bytes / 1e9
        summary = f"the compiler was killed (out of memory?): compiling it takes about {memory:.1f} GB"
        return Failure(configs[0].name, log, summary, killed=True)
    return Failure(configs[0].name, log, serialised[0] if serialised else causes.summarise(text, compiled.returncode))


def damaged_units(units: Sequence[CompiledUnit], text: str) -> list[CompiledUnit]:
    """Return the units that are damaged, as far as a linker says so.

    It says what is wrong with an object behind the object's name, or that a kernel is in none of them, or in two. What
    an object refers to in vain is no fault of that object.

    Args:
        units: what was linked.
        text: what the linker printed.
    """
    lines = text.splitlines()
    faults = [line for line in lines if not any(words in line for words in _OTHER_FAULTS)]
    named = {name for line in faults for name in _OBJECT.findall(line)}
    missing = "\n".join(line for line in lines if "undefined " in line or "isn't defined" in line)
    return [
        unit for unit in units if unit.path.name in named or any(f"{name}_kernel" in missing for name in unit.hashes)
    ]


def forget(units: Iterable[CompiledUnit]) -> None:
    """Remove objects and their records, so that the next build compiles them again.

    Raises:
        OSError: if they cannot be removed.
    """
    for unit in units:
        remove(unit.path.with_suffix(".json"))
        remove(unit.path)


def write_log(log: Path, text: str) -> None:
    """Write what a compiler printed, over anything that has the log's name."""
    make_way(log)
    write_if_changed(log, text)


def put_in_place(fresh: Path, path: Path) -> None:
    """Move a file to its place in the build's folder, which may be on another disk; until then nothing has its name."""
    if path.is_dir() and not path.is_symlink():
        remove(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    try:
        shutil.move(fresh, beside)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
