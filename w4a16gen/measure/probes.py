"""Probes that measure the GPU's peak rates."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

from w4a16gen.kernels.config import Target
from w4a16gen.measure.timing import (
    BLOCK_REPLAYS,
    BLOCK_SECONDS,
    PAUSE_SECONDS,
    SCREENING_REPLAYS,
    SETTLING_SECONDS,
    WARM_UP_SECONDS,
    settled,
)
from w4a16gen.runtime.arrays import view
from w4a16gen.runtime.library import Library
from w4a16gen.runtime.streams import stream_pointer
from w4a16gen.weights.packed import PackedWeight

BURST_ROUNDS = 150
"""Rounds of the tensor-core probe. They take 0.1 ms, too short for the power limit to act."""


def probe_read(library: Library, w: PackedWeight, *, stream: Any, dependent_launch: bool = False) -> None:
    """Launch a kernel that only reads a packed weight. Its time is a lower bound for every kernel.

    Raises:
        UnsupportedProblemError: if the build holds no native kernel, with which the probes come.
        NoHopperGpuError: if the weight is on another kind of GPU.
    """
    data = view("packed weight", w.data, library.module)
    address = stream_pointer(stream, w.data)
    bindings = library.bindings
    bindings.result_of(
        bindings.library.probe_read(data.pointer, data.nbytes, dependent_launch, address, data.device or 0)
    )


def probe_multiply(library: Library, rounds: int, *, stream: Any, device: int = 0) -> int:
    """Launch a kernel that keeps all tensor cores multiplying fp16, and return the operations that it does.

    Raises:
        UnsupportedProblemError: if the build holds no native kernel, with which the probes come.
        NoHopperGpuError: if it is another kind of GPU.
    """
    bindings = library.bindings
    return int(bindings.result_of(bindings.library.probe_multiply(rounds, stream_pointer(stream, None), device)))


@dataclass(frozen=True)
class TensorPeak:
    """The peak rates of the tensor cores, fp16 TFLOP/s, with operands in registers and shared memory."""

    burst: float
    """The rate for 0.1 ms after a rest."""
    sustained: float
    """The rate at the clock that the power limit allows."""


def tensor_peak(library: Library, device: int) -> TensorPeak | None:
    """Measure the peak rates. Return None if the build has no native kernel, and so no probe."""
    if not any(info.config.target is Target.NATIVE for info in library.kernels):
        return None
    stream = library.module.Stream(device)
    flops = probe_multiply(library, BURST_ROUNDS, stream=stream, device=device)

    def timed() -> float:
        stream.start_timer()
        probe_multiply(library, BURST_ROUNDS, stream=stream, device=device)
        return float(stream.stop_timer())

    bursts = []
    for _ in range(SCREENING_REPLAYS * BLOCK_REPLAYS):
        time.sleep(PAUSE_SECONDS)
        probe_multiply(library, BURST_ROUNDS, stream=stream, device=device)
        bursts.append(timed())
    sustained = settled(timed, WARM_UP_SECONDS + SETTLING_SECONDS, BLOCK_SECONDS)
    return TensorPeak(flops / statistics.median(bursts) / 1e9, flops / sustained / 1e9)
