"""Probes that measure the GPU's peak rates."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
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

BURST_ROUNDS = 150
"""Rounds of the tensor-core probe. They take 0.1 ms, too short for the power limit to act."""

READS = 20
"""Reads per graph, at least."""
READ_REPLAYS = 5


def probe_read(library: Library, packed: Any, *, stream: Any, dependent_launch: bool = False) -> None:
    """Launch a kernel that only reads packed weights. Its time is a lower bound for every kernel that needs them.

    Args:
        library: the loaded build.
        packed: uint8 array of a positive multiple of 16 bytes, on a Hopper GPU.
        stream: a CUDA stream object or address.
        dependent_launch: whether the launch is dependent.

    Raises:
        UnsupportedProblemError: if the build holds no native kernel, with which the probes come.
        NoHopperGpuError: if the array is on another kind of GPU.
    """
    data = view("packed weights", packed, library.module)
    address = stream_pointer(stream, packed)
    bindings = library.bindings
    bindings.result_of(
        bindings.library.probe_read(data.pointer, data.nbytes, dependent_launch, address, data.device or 0)
    )


def cold_read_microseconds(library: Library, copies: Sequence[Any], device: int) -> float:
    """Return the median microseconds of reading an array, in a graph of launches that take copies in turn.

    Args:
        library: the loaded build.
        copies: arrays as `probe_read` takes them, enough of them that a copy has left L2 at its next turn.
        device: the CUDA device number.
    """
    stream = library.module.Stream(device)
    reads = max(READS, len(copies))
    stream.begin_capture()
    for turn in range(reads):
        probe_read(library, copies[turn % len(copies)], stream=stream)
    stream.end_capture()
    milliseconds = []
    for _ in range(READ_REPLAYS):
        stream.start_timer()
        stream.replay()
        milliseconds.append(float(stream.stop_timer()))
    return statistics.median(milliseconds) * 1000 / reads


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
