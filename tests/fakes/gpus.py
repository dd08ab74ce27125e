"""Stand-ins for GPUs on the nodes of a cluster: a timer that needs none, and cards that fail.

FAKE_GPU_CARD names the card, FAKE_GPU_SMS its multiprocessors, FAKE_GPU_FAILS=N makes every Nth task fail after its
first kernel, FAKE_GPU_SECONDS is how long a kernel takes, FAKE_GPU_LOG gets a line for every kernel that is timed, with
the process.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fakes.devices import H100, H200
from fakes.library import FakeLibrary
from w4a16gen import KernelConfig, Problem, QuantMode
from w4a16gen.errors import CudaError
from w4a16gen.executors.place import Context
from w4a16gen.kernels.spaces import enumerate_space
from w4a16gen.measure import tune
from w4a16gen.measure.gpus import Gpu
from w4a16gen.runtime.library import Library

KERNELS = [config for config in enumerate_space("trtllm") if config.mode is QuantMode.FINEGRAINED_SCALE_ONLY]


def microseconds(card: str, problem: Problem, config: KernelConfig) -> float:
    """Return how long a kernel takes on a card."""
    return (2.0 if card == H200.name else 1.0) + KERNELS.index(config) + problem.m


class Timer:
    """Stands in for `measure` in a worker's process."""

    def __init__(self) -> None:
        self.tasks = 0
        self.fails = int(os.environ.get("FAKE_GPU_FAILS", "0"))

    def measure(
        self, library: Library, problem: Problem, _mode: QuantMode, configs: Sequence[KernelConfig], **_: Any
    ) -> Iterator[tuple[KernelConfig, float]]:
        self.tasks += 1
        fails = self.fails and self.tasks % self.fails == 0
        for number, config in enumerate(configs):
            if fails and number == 1:
                raise CudaError("an uncorrectable ECC error was encountered")
            time.sleep(float(os.environ.get("FAKE_GPU_SECONDS", "0.005")))
            with Path(os.environ["FAKE_GPU_LOG"]).open("a") as file:
                file.write(f"{library.devices()[0].name};{problem};{config.name};{os.getpid()}\n")
            yield config, microseconds(library.devices()[0].name, problem, config)


def open_fake_gpu(_folder: Path) -> Context:
    """Return the context of a worker with a stand-in GPU."""
    card = H200 if os.environ.get("FAKE_GPU_CARD") == "H200" else H100
    card = replace(card, index=0, sm_count=int(os.environ.get("FAKE_GPU_SMS", card.sm_count)))
    vars(tune)["measure"] = Timer().measure
    return Context(Gpu(FakeLibrary(KERNELS, devices=[card]), 0))
