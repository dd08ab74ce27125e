"""Graphs of launches on one problem's data: kernels, the streaming floor, cuBLAS and rivals, each checked on demand."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from w4a16gen.choose.cost_model import default_cost_model
from w4a16gen.kernels.config import Epilogue, KernelConfig, QuantMode, Target
from w4a16gen.kernels.epilogue import Activation, CallEpilogue
from w4a16gen.kernels.problem import Problem
from w4a16gen.measure.probes import probe_read
from w4a16gen.measure.rival_products import cublas_products
from w4a16gen.measure.rivals import Rival, record_torch, relative_error
from w4a16gen.measure.timing import BRIEF_LAUNCHES, LAUNCHES, Contender
from w4a16gen.measure.torch_weight import TorchWeight
from w4a16gen.runtime.library import Library
from w4a16gen.weights.packed import PackedWeight
from w4a16gen.weights.quantized import QuantizedWeight
from w4a16gen.weights.reference import Expectation, Extra, error_over_bound

COLD_BYTES = 200e6
"""Launches take copies of the weight in turn, of more bytes than this: over three times an H200's 60 MB of L2."""
MAX_COPIES = 1000
"""Copies of a weight, at most: a layer of less than 0.2 MB, such as 512x512, does not fill a graph with its copies."""
_ACTIVATIONS = {
    Epilogue.NONE: Activation.NONE,
    Epilogue.ELEMENTWISE: Activation.NONE,
    Epilogue.GATED: Activation.SWIGLU,
}
"""The activation that kernels are timed with. Elementwise ones add a residual, as products in front of a sum do."""
CHECKED_ROWS = 8
CHECKED_CHANNELS = 64
"""Rows and channels of a finalist's result that are compared with float64 before it is timed."""


def copies_for(nbytes: int) -> int:
    """Return how many copies of a weight launches take in turn, so that they find L2 cold."""
    return min(int(COLD_BYTES / nbytes) + 1, MAX_COPIES)


def evenly(length: int, count: int) -> npt.NDArray[np.int_]:
    """Return up to `count` different indices of a sequence, evenly spread, first and last included."""
    return np.unique(np.linspace(0, length - 1, min(length, count)).astype(int))


class Stage(ABC):
    """Records graphs of launches on one problem's data, which subclasses put on the GPU."""

    a: Any
    """Activations, fp16 [m, k] on the GPU."""
    out: Any
    """Output, fp16 [m, n] on the GPU."""

    def __init__(self, library: Library, device: int, problem: Problem, mode: QuantMode) -> None:
        """Record on a GPU; no copy of the weight is there yet."""
        self.library, self.device, self.problem, self.mode = library, device, problem, mode
        self._copies: dict[tuple[Target, bool], list[PackedWeight]] = {}
        self._more: dict[int, Any] = {}
        """Arrays of m rows by their columns, for what epilogues read or write."""

    @abstractmethod
    def packed_bytes(self, target: Target) -> int:
        """Return the bytes of the packed weight."""

    @abstractmethod
    def new_copy(self, target: Target, *, gated: bool = False) -> PackedWeight:
        """Return one more copy of the packed weight, perhaps for gated activations, on the GPU."""

    @abstractmethod
    def zeros(self, columns: int) -> Any:
        """Return an array of zeros, fp16 [m, columns] on the GPU."""

    @abstractmethod
    def activations(self, rows: npt.NDArray[np.intp]) -> npt.NDArray[np.float16]:
        """Return some rows of the activations, on the host."""

    @abstractmethod
    def channels(self, channels: npt.NDArray[np.intp]) -> QuantizedWeight:
        """Return the weight of some output channels, on the host."""

    @abstractmethod
    def run_once(self, contender: Contender, rows: npt.NDArray[np.intp], out: Any = None) -> npt.NDArray[np.float16]:
        """Run a graph and return some rows of its output, which hold no number before; None stands for `self.out`."""

    @abstractmethod
    def torch_activations(self, torch: Any, dtype: str) -> Any:
        """Return the activations [m, k] as a tensor of the dtype that torch names so."""

    @abstractmethod
    def torch_weight(self, torch: Any) -> TorchWeight:
        """Return the weight in tensors."""

    def copies(self, target: Target, *, brief: bool = False, gated: bool = False) -> list[PackedWeight]:
        """Return copies of the weight on the GPU, enough for a cold L2, or a few if a long problem is timed briefly."""
        wanted = copies_for(self.packed_bytes(target))
        if brief and default_cost_model().is_long(self.problem):
            wanted = min(wanted, BRIEF_LAUNCHES)
        copies = self._copies.setdefault((target, gated), [])
        copies += [self.new_copy(target, gated=gated) for _ in range(wanted - len(copies))]
        return copies[:wanted]

    def launches(self, copies: int, *, brief: bool = False) -> int:
        """Return the launches of a graph: each copy has its turn, unless a long problem is timed briefly."""
        return BRIEF_LAUNCHES if brief and default_cost_model().is_long(self.problem) else max(LAUNCHES, copies)

    def record(self, config: KernelConfig, *, dependent: bool, brief: bool = False) -> Contender:
        """Record a graph of a kernel's launches, a short one if a long problem is timed briefly.

        A gated kernel computes SwiGLU, an elementwise one adds a residual.
        """
        needed = self.library.workspace_bytes(config, self.problem, device=self.device)
        workspace = self.library.to_device(np.zeros(needed, np.uint8), self.device)
        out = self._output_of(config)
        residual = self._array(self.problem.n) if config.epilogue is Epilogue.ELEMENTWISE else None

        def launch(weight: PackedWeight, stream: Any) -> None:
            self.library.gemm(
                self.a,
                weight,
                config=config,
                out=out,
                workspace=workspace,
                stream=stream,
                dependent_launch=dependent,
                activation=_ACTIVATIONS[config.epilogue],
                residual=residual,
            )

        return self._record(launch, config.target, workspace, brief=brief, gated=config.epilogue is Epilogue.GATED)

    def _array(self, columns: int) -> Any:
        if columns not in self._more:
            self._more[columns] = self.zeros(columns)
        return self._more[columns]

    def _output_of(self, config: KernelConfig) -> Any:
        """Return the array that a kernel's launches write."""
        return self._array(self.problem.n // 2) if config.epilogue is Epilogue.GATED else self.out

    def record_floor(self, *, dependent: bool) -> Contender:
        """Record a graph of launches that only read the packed weight."""

        def launch(weight: PackedWeight, stream: Any) -> None:
            probe_read(self.library, weight.data, stream=stream, dependent_launch=dependent)

        return self._record(launch, Target.NATIVE, None)

    def check(self, config: KernelConfig, *, rows: int = CHECKED_ROWS, channels: int = CHECKED_CHANNELS) -> float:
        """Run a kernel and return its largest error against float64, as a share of the bound.

        Args:
            config: the kernel.
            rows: how many rows of the result are compared, evenly spread.
            channels: how many channels of these rows.
        """
        if self.problem.m == 0:
            return 0.0
        extra = Extra(_ACTIVATIONS[config.epilogue])  # residuals are zeros
        columns = CallEpilogue(extra.activation).outputs(self.problem.n)
        chosen_rows, chosen_columns = evenly(self.problem.m, rows), evenly(columns, channels)
        contender = self.record(config, dependent=False, brief=True)
        got = self.run_once(contender, chosen_rows, self._output_of(config))
        factors = chosen_columns + columns if extra.activation.is_gated else chosen_columns[:0]
        weight = self.channels(np.concatenate([chosen_columns, factors]))
        expected = Expectation(self.activations(chosen_rows), weight)
        return error_over_bound(got[:, chosen_columns], expected, 1.0, None, extra)

    def _record(
        self,
        launch_on: Callable[[PackedWeight, Any], None],
        target: Target,
        workspace: Any,
        *,
        brief: bool = False,
        gated: bool = False,
    ) -> Contender:
        """Record a graph of launches that take the copies in turn."""
        copies = self.copies(target, brief=brief, gated=gated)
        stream = self.library.module.Stream(self.device)
        launches = self.launches(len(copies), brief=brief)

        def launch(turn: int) -> None:
            launch_on(copies[turn % len(copies)], stream)

        launch(0)
        stream.begin_capture()
        for turn in range(launches):
            launch(turn)
        stream.end_capture()

        def timed_replay() -> float:
            stream.start_timer()
            stream.replay()
            return float(stream.stop_timer())

        return Contender(stream.replay, timed_replay, launches, workspace)

    def record_cublas(self, torch: Any) -> Contender:
        """Record the dense product of the dequantised weight, less its zeros, through torch."""
        a, weight = self.torch_activations(torch, "float16"), self.torch_weight(torch)
        wanted = copies_for(2 * self.problem.n * self.problem.k)
        products = cublas_products(a, weight, max(2, wanted))
        return record_torch(torch, self.device, products, a, self.launches(wanted))

    def record_rival(self, torch: Any, rival: Rival) -> tuple[Contender, float]:
        """Check a rival's kernel and record it; return its largest error as a share of the allowed one.

        Raises:
            ImportError: if it is not installed.
            UnsupportedProblemError: if it cannot run the problem.
        """
        a, weight = self.torch_activations(torch, rival.dtype), self.torch_weight(torch)
        wanted = copies_for(self.problem.n * self.problem.k // 2)
        rows, channels = evenly(self.problem.m, CHECKED_ROWS), evenly(self.problem.n, CHECKED_CHANNELS)
        with torch.cuda.device(self.device):
            products = rival.prepare(a, weight, wanted)
            got = products[0](a)[rows.tolist()][:, channels.tolist()].double().cpu().numpy()
            given = a[rows.tolist()].double().cpu().numpy()
            error = relative_error(got, given @ self.channels(channels).dequantize().T)
        return record_torch(torch, self.device, products, a, self.launches(wanted)), error / rival.largest_error
