"""Time kernels briefly on random bytes, thousands a minute: for fits, where many times count more than exact ones.

Needs torch and a Hopper GPU. A graph of a few launches takes slices of one block of random bytes in turn as packed
weights, so that nothing is packed and L2 stays cold for most layers. The least of a few replays counts. Times of
problems at the power limit are of short bursts; `w4a16gen bench` has those of sustained work.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterable, Sequence
from typing import Any

from w4a16gen.kernels.config import KernelConfig, QuantMode, Target
from w4a16gen.kernels.problem import Problem
from w4a16gen.runtime.library import Library
from w4a16gen.weights.packed import TARGET_LAYOUTS, PackedWeight

POOL_BYTES = 700_000_000
COLD_BYTES = 200_000_000
MAX_COPIES = 24
ALIGNMENT = 1024
LAUNCHES, REPLAYS = 12, 6
LONG_LAUNCHES, LONG_REPLAYS = 5, 4
LONG_FLOPS = 8e10
WARM_UP_FLOPS, WARM_UP_SECONDS = 3e10, 0.3
"""Above this number of operations, a card that was at rest is up to 10 % faster for the first kernels of a problem."""


class QuickMeasure:
    """Times kernels on one GPU; an instance is what `record_times.Measure` describes."""

    def __init__(self, device: int = 0) -> None:
        """Draw the random bytes.

        Raises:
            ImportError: if torch is not installed.
        """
        self.torch: Any = importlib.import_module("torch")
        self.where = self.torch.device("cuda", device)
        self.pool = self.torch.randint(0, 256, (POOL_BYTES,), dtype=self.torch.uint8, device=self.where)
        self.stream = self.torch.cuda.Stream(self.where)

    def __call__(
        self, library: Library, problem: Problem, mode: QuantMode, configs: Sequence[KernelConfig], *, device: int
    ) -> Iterable[tuple[KernelConfig, float]]:
        """Yield each native kernel with its microseconds."""
        native = [config for config in configs if config.target is Target.NATIVE]
        if not native:
            return
        activations = self.torch.randn(problem.m, problem.k, dtype=self.torch.float16, device=self.where)
        out = self.torch.empty(problem.m, problem.n, dtype=self.torch.float16, device=self.where)
        weights = self._weights(library.packed_bytes(native[0], problem), problem, mode)
        for config in native:
            needed = library.workspace_bytes(config, problem, device=device)
            workspace = self.torch.empty(needed, dtype=self.torch.uint8, device=self.where)

            def launch(turn: int, config: KernelConfig = config, workspace: Any = workspace) -> None:
                stream = self.torch.cuda.current_stream(self.where)
                weight = weights[turn % len(weights)]
                library.gemm(activations, weight, config=config, out=out, workspace=workspace, stream=stream)

            is_long = problem.flops > LONG_FLOPS
            if config is native[0] and problem.flops > WARM_UP_FLOPS:
                begin = time.monotonic()
                while time.monotonic() - begin < WARM_UP_SECONDS:
                    self._time(launch, is_long=is_long)
            yield config, self._time(launch, is_long=is_long)

    def _weights(self, nbytes: int, problem: Problem, mode: QuantMode) -> list[PackedWeight]:
        step = -(-nbytes // ALIGNMENT) * ALIGNMENT
        copies = max(1, min(MAX_COPIES, COLD_BYTES // step + 1, POOL_BYTES // step))
        layout = TARGET_LAYOUTS[Target.NATIVE]
        return [
            PackedWeight(
                self.pool[turn * step : turn * step + nbytes], layout, problem.n, problem.k, problem.group_size, mode
            )
            for turn in range(copies)
        ]

    def _time(self, launch: Any, *, is_long: bool) -> float:
        """Record a graph of launches and return the least microseconds of one."""
        cuda = self.torch.cuda
        launches, replays = (LONG_LAUNCHES, LONG_REPLAYS) if is_long else (LAUNCHES, REPLAYS)
        launch(0)
        cuda.synchronize(self.where)
        graph = cuda.CUDAGraph()
        with cuda.graph(graph, stream=self.stream):
            for turn in range(launches):
                launch(turn)
        begin, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        least = float("inf")
        with cuda.stream(self.stream):
            graph.replay()
            for _ in range(replays):
                begin.record()
                graph.replay()
                end.record()
                end.synchronize()
                least = min(least, begin.elapsed_time(end) * 1000 / launches)
        return least
