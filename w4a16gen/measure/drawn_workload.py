"""One problem's data drawn on the GPU by torch: a layer of any size is ready in milliseconds."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from w4a16gen.errors import UnsupportedProblemError
from w4a16gen.kernels.config import QuantMode, Target
from w4a16gen.kernels.problem import Problem
from w4a16gen.measure.stage import Stage
from w4a16gen.measure.timing import Contender
from w4a16gen.measure.torch_weight import TorchWeight
from w4a16gen.runtime.library import Library
from w4a16gen.weights.layouts.geometry import WeightGeometry
from w4a16gen.weights.packed import LAYOUTS, TARGET_LAYOUTS, PackedWeight
from w4a16gen.weights.quantized import QuantizedWeight


class DrawnWorkload(Stage):
    """One problem's data on a GPU, for native kernels, cuBLAS and rivals: nothing is packed on the host."""

    def __init__(
        self, torch: Any, library: Library, device: int, problem: Problem, mode: QuantMode, seed: int = 0
    ) -> None:
        """Draw the data from a seed.

        Args:
            torch: the module.
            library: the loaded build, which packs the weight.
            device: the GPU.
            problem: the problem, of one token or more.
            mode: the quantisation mode.
            seed: of the random data.
        """
        super().__init__(library, device, problem, mode)
        self._torch = torch
        where = torch.device("cuda", device)
        self._weight = TorchWeight.drawn(torch, problem, mode, seed, where)
        source = torch.Generator(where).manual_seed(seed + 1)
        self.a = torch.randn((problem.m, problem.k), dtype=torch.float16, device=where, generator=source)
        self.out = self.zeros(problem.n)
        torch.cuda.synchronize(where)

    def zeros(self, columns: int) -> Any:
        """Return a tensor of zeros, fp16 [m, columns] on the GPU."""
        torch = self._torch
        return torch.zeros((self.problem.m, columns), dtype=torch.float16, device=torch.device("cuda", self.device))

    def packed_bytes(self, target: Target) -> int:
        """Return the bytes of the packed weight."""
        problem = self.problem
        geometry = WeightGeometry(problem.n, problem.k, problem.group_size, self.mode)
        return LAYOUTS[TARGET_LAYOUTS[target]].packed_bytes(geometry)

    def new_copy(self, target: Target, *, gated: bool = False) -> PackedWeight:
        """Return one more copy of the packed weight, perhaps for gated activations, on the GPU."""
        if target is not Target.NATIVE:
            raise UnsupportedProblemError(f"weights of target {target} are packed on the host only")
        return self._weight.packed(self.library, gated=gated)

    def run_once(self, contender: Contender, rows: npt.NDArray[np.intp], out: Any = None) -> npt.NDArray[np.float16]:
        """Run a graph and return some rows of its output, which hold no number before; None stands for `self.out`."""
        written = self.out if out is None else out
        written.fill_(float("nan"))
        self._torch.cuda.synchronize(written.device)
        contender.timed_replay()  # which waits
        return np.asarray(written[rows.tolist()].cpu().numpy())

    def activations(self, rows: npt.NDArray[np.intp]) -> npt.NDArray[np.float16]:
        """Return some rows of the activations, on the host."""
        return np.asarray(self.a[rows.tolist()].cpu().numpy())

    def channels(self, channels: npt.NDArray[np.intp]) -> QuantizedWeight:
        """Return the weight of some output channels, on the host."""
        return self._weight.channels(channels)

    def torch_activations(self, torch: Any, dtype: str) -> Any:
        """Return the activations [m, k] as a tensor of the dtype that torch names so."""
        return self.a.to(getattr(torch, dtype))

    def torch_weight(self, torch: Any) -> TorchWeight:  # noqa: ARG002  (it is there already)
        """Return the weight in tensors."""
        return self._weight
