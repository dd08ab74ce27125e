"""One problem's data on a GPU: drawn on the host, and packed there for each target."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from w4a16gen.kernels.config import QuantMode, Target
from w4a16gen.kernels.problem import Problem
from w4a16gen.measure.stage import Stage
from w4a16gen.measure.timing import Contender
from w4a16gen.measure.torch_weight import TorchWeight
from w4a16gen.runtime.library import Library
from w4a16gen.weights.packed import PackedWeight, pack_weight
from w4a16gen.weights.quantized import QuantizedWeight
from w4a16gen.weights.reference import random_weight


@lru_cache(maxsize=1)
def _weight(n: int, k: int, group_size: int, mode: QuantMode, seed: int) -> QuantizedWeight:
    """Draw a weight; the last one is kept, because problems of one layer tend to follow each other."""
    return random_weight(np.random.default_rng(seed), n, k, group_size, mode)


@lru_cache(maxsize=len(Target) + 1)
def _packed(
    n: int, k: int, group_size: int, mode: QuantMode, seed: int, target: Target, gated: bool = False
) -> PackedWeight:
    return pack_weight(_weight(n, k, group_size, mode, seed), target=target, gated=gated)


class Workload(Stage):
    """One problem's data on a GPU: activations, an output, and copies of the weight for each target."""

    def __init__(self, library: Library, device: int, problem: Problem, mode: QuantMode, seed: int = 0) -> None:
        """Draw the data from a seed, and put activations and output on the GPU."""
        super().__init__(library, device, problem, mode)
        self._drawn = (problem.n, problem.k, problem.group_size, mode, seed)
        rng = np.random.default_rng(seed)
        self.host_a = rng.standard_normal((problem.m, problem.k), dtype=np.float32).astype(np.float16)
        self.a = library.to_device(self.host_a, device)
        self.out = self.zeros(problem.n)

    def zeros(self, columns: int) -> Any:
        """Return an array of zeros, fp16 [m, columns] on the GPU."""
        return self.library.to_device(np.zeros((self.problem.m, columns), np.float16), self.device)

    def packed_bytes(self, target: Target) -> int:
        """Return the bytes of the packed weight."""
        return _packed(*self._drawn, target).nbytes

    def new_copy(self, target: Target, *, gated: bool = False) -> PackedWeight:
        """Return one more copy of the packed weight, perhaps for gated activations, on the GPU."""
        return self.library.to_device(_packed(*self._drawn, target, gated), self.device)

    def run_once(self, contender: Contender, rows: npt.NDArray[np.intp], out: Any = None) -> npt.NDArray[np.float16]:
        """Run a graph and return some rows of its output, which hold no number before; None stands for `self.out`."""
        written = self.out if out is None else out
        n = written.shape[1]
        got = np.full((len(rows), n), np.nan, np.float16)
        places = [(got[place], int(row) * n * got.itemsize) for place, row in enumerate(rows)]
        for values, offset in places:
            written.buffer.upload(values, offset)
        contender.timed_replay()  # which waits
        for values, offset in places:
            written.buffer.download(values, offset)
        return got

    def activations(self, rows: npt.NDArray[np.intp]) -> npt.NDArray[np.float16]:
        """Return some rows of the activations, on the host."""
        return self.host_a[rows]

    def channels(self, channels: npt.NDArray[np.intp]) -> QuantizedWeight:
        """Return the weight of some output channels, on the host."""
        return _weight(*self._drawn).channels(channels)

    def torch_activations(self, torch: Any, dtype: str) -> Any:
        """Return the activations [m, k] as a tensor of the dtype that torch names so."""
        return torch.from_numpy(self.host_a).to(torch.device("cuda", self.device)).to(getattr(torch, dtype))

    def torch_weight(self, torch: Any) -> TorchWeight:
        """Return the weight in tensors."""
        return TorchWeight.of(torch, _weight(*self._drawn), torch.device("cuda", self.device))
