"""The times that come with the package: what `gemm` chooses by on an H100 for layers that nobody has tuned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from w4a16gen.config import KernelConfig, QuantMode, Target
from w4a16gen.problem import Problem
from w4a16gen.tuning import TuningTable

TABLE_PATH = Path(__file__).resolve().parent / "data" / "h100.json"
"""Space `default` on an NVIDIA H100 80GB HBM3 (2026-11), as `w4a16gen tune` measured it, of several runs the geometric
mean; content hashes are left out."""
MEASURED_MODE = QuantMode.FINEGRAINED_SCALE_ONLY
MEASURED_GROUP_SIZE = 128


@cache
def table() -> TuningTable:
    """Read the table."""
    return TuningTable.read(TABLE_PATH)


def is_for(gpu: Mapping[str, Any] | None) -> bool:
    """Whether the times are of this kind of GPU, as `Library.devices` describes it; None, no GPU, may be any."""
    if gpu is None:
        return True
    return str(gpu["name"]).startswith("NVIDIA H100") and gpu["sm_count"] == table().sm_count


def fastest(
    configs: Iterable[KernelConfig], mode: QuantMode, problem: Problem, gpu: Mapping[str, Any] | None
) -> tuple[KernelConfig, float] | None:
    """Give the kernel that was fastest, and its microseconds, for as many tokens or the next more; or None.

    Measured were mode fgs and groups of 128. That decides for all modes and groups: they take up to 4 % more or less
    time, and nearly the same for every kernel, so that they hardly change which one is first. Kernels are known by name
    only, so that a change which leaves machine code alone, or makes all of them faster, leaves the table of use.

    Args:
        configs: the kernels to choose among.
        mode: the mode.
        problem: the problem.
        gpu: the GPU, or None on a machine without one.
    """
    if not is_for(gpu):
        return None
    as_measured = {
        replace(config, mode=MEASURED_MODE): config
        for config in configs
        if config.target is Target.NATIVE and config.mode is mode
    }
    asked = Problem(problem.m, problem.n, problem.k, MEASURED_GROUP_SIZE)
    found = table().best(MEASURED_MODE, asked, dict.fromkeys(as_measured, ""))
    return None if found is None else (as_measured[found[0]], found[1])
