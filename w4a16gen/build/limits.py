"""Cores and memory that this process may use: affinity and control groups (versions 1 and 2) limit both."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import psutil

_PROCESS = Path("/proc/self")
_UNLIMITED = 1 << 60
"""Version 1 writes a number near 2**63 where there is no limit."""


def usable_cores(process: Path = _PROCESS) -> int:
    """Return how many processes may run at once: the CPU affinity, less what a control group's quota takes away.

    Args:
        process: the folder of the process below /proc.
    """
    cores = len(os.sched_getaffinity(0))
    quotas = [quota for folder, version in _groups("cpu", process) if (quota := _cpu_quota(folder, version))]
    return max(1, min([cores, *(math.ceil(quota) for quota in quotas)]))


def usable_memory(process: Path = _PROCESS) -> int:
    """Return the bytes that may still be allocated: what the machine has, or what the control groups leave.

    Args:
        process: the folder of the process below /proc.
    """
    left = [
        room for folder, version in _groups("memory", process) if (room := _memory_left(folder, version)) is not None
    ]
    return max(0, min([psutil.virtual_memory().available, *left]))


def _groups(resource: str, process: Path) -> Iterator[tuple[Path, int]]:
    """Return the process's control group of a resource and those above it, each with its version."""
    for line in _lines(process / "cgroup"):
        _, controllers, path = line.split(":", 2)
        version = 1 if controllers else 2
        if version == 1 and resource not in controllers.split(","):
            continue
        for root, mount in _mounts(resource, version, process):
            if root not in {path, "/"} and not path.startswith(f"{root}/"):
                continue
            inside = path.removeprefix(root) if root != "/" else path
            folder = mount / inside.strip("/")
            while folder != mount.parent:
                yield folder, version
                folder = folder.parent


def _mounts(resource: str, version: int, process: Path) -> Iterator[tuple[str, Path]]:
    """Return (root, mount point) of every hierarchy that controls a resource."""
    kind = "cgroup2" if version == 2 else "cgroup"  # noqa: PLR2004
    for line in _lines(process / "mountinfo"):
        before, _, after = line.partition(" - ")
        fields, (filesystem, _, options) = before.split(), after.split()[:3]
        if filesystem == kind and (version == 2 or resource in options.split(",")):  # noqa: PLR2004
            yield fields[3], Path(fields[4].encode().decode("unicode_escape"))


def _cpu_quota(folder: Path, version: int) -> float | None:
    """Return the cores that a control group's quota allows."""
    if version == 1:
        quota, period = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    else:
        fields = " ".join(_lines(folder / "cpu.max")).split()
        quota, period = (int(field) if field.isdigit() else None for field in (*fields, "", "")[:2])
    return quota / period if quota and period and quota > 0 else None


def _memory_left(folder: Path, version: int) -> int | None:
    """Return the bytes between a control group's use and its limit; page cache that can be dropped is not use."""
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    limit, used = (_number(folder / name) for name in names)
    if limit is None or used is None or limit >= _UNLIMITED:
        return None
    cache_name = "total_inactive_file" if version == 1 else "inactive_file"
    counted = dict(line.split(" ", 1) for line in _lines(folder / "memory.stat") if " " in line)
    return limit - used + min(used, int(counted.get(cache_name, 0)))


def _lines(path: Path) -> list[str]:
    """Return a file's lines; none if it cannot be read."""
    try:
        return path.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return []


def _number(path: Path) -> int | None:
    """Return the number in a file, or None for `max` and where there is no such file."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.lstrip("-").isdigit() else None
