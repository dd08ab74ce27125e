"""Where the time of a step goes, by the names of the kernels that a profiler saw."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from w4a16gen.measure.timing import Contender

_ATTENTION = ("flash", "fmha", "attention", "sdpa")
_PRODUCTS = ("w4a16", "gemm", "nvjet", "cutlass", "humming", "turbomind", "quack", "splitkreduce", "xmma")
_COMPILED = "triton_"
"""Begins the names of Inductor's kernels, which say the operations that they fuse, attention among them."""


@dataclass(frozen=True)
class Shares:
    """Microseconds of a step by the kind of kernel."""

    products: float
    attention: float
    elementwise: float
    gaps: float
    """Time in which no kernel runs; negative if kernels overlap."""


def kind_of(name: str) -> str:
    """Return the field of `Shares` that a kernel's time belongs to."""
    lower = name.lower()
    if lower.startswith(_COMPILED):
        return "elementwise"
    if any(part in lower for part in _ATTENTION):
        return "attention"
    return "products" if any(part in lower for part in _PRODUCTS) else "elementwise"


def sum_up(kernels: Iterable[tuple[str, float]], whole: float) -> Shares:
    """Return the shares of a step.

    Args:
        kernels: names and microseconds.
        whole: microseconds of the step.
    """
    found = dict.fromkeys(("products", "attention", "elementwise"), 0.0)
    for name, microseconds in kernels:
        found[kind_of(name)] += microseconds
    return Shares(**found, gaps=whole - sum(found.values()))


def shares_of(torch: Any, contender: Contender) -> Shares | None:
    """Profile one replay. Return None if the profiler sees no kernel."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        contender.replay()
        torch.cuda.synchronize()
    kernels = [
        (event.name, float(event.device_time))
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    if not kernels:
        return None
    whole = sorted(contender.microseconds)[len(contender.microseconds) // 2]
    return sum_up(kernels, whole)
