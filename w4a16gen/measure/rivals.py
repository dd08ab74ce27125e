"""The kernels that `bench` times beside this package's: cuBLAS on dense weights, and other 4-bit kernels if installed.

All of them run through torch, which is optional and imported only on use.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from w4a16gen.measure.rival_products import (
    Product,
    humming_products,
    quack_products,
    tinygemm_products,
    turbomind_products,
)
from w4a16gen.measure.timing import Contender
from w4a16gen.measure.torch_weight import TorchWeight

CUBLAS = "cublas_fp16"
"""Name of the dense contender: torch.matmul on the dequantised weight."""
BF16 = "bfloat16"
"""Torch's name of the dtype that this package's kernels do not take; a rival of it is named so."""


@dataclass(frozen=True)
class Rival:
    """Someone else's kernels for 4-bit weights."""

    name: str
    """The name in results. It ends in `_bf16` if the kernels multiply in bf16, which draws less power than fp16."""
    package: str
    """The package to install."""
    dtype: str
    """Torch's name of the dtype of activations, scales and output."""
    largest_error: float
    """Largest error of a right result, relative to the exact one, as Euclidean norms. Activations, weights, products
    and output are rounded to `dtype` about four times. A wrong scale, zero point or nibble order is off by a tenth."""
    prepare: Callable[[Any, TorchWeight, int], Sequence[Product]]
    """Takes the activations on a GPU as `dtype`, the weight there, and the number of copies. Raises ImportError if the
    package is not installed, and UnsupportedProblemError for a weight that it cannot represent."""
    module: str = ""
    """The module to import, if it compiles at a layer's first call and keeps kernels on disk; see `compile_ahead`."""


def find_torch() -> Any | None:
    """Return torch if it is installed."""
    try:
        return importlib.import_module("torch")
    except ImportError:
        return None


def record_torch(torch: Any, device: int, products: Sequence[Product], a: Any, launches: int) -> Contender:
    """Record a graph of launches that take copies of a weight in turn.

    The first launch, before the capture, is on the same stream: what a library allocates for a stream is there by then.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            products[0](a)
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, stream=stream):
                for turn in range(launches):
                    products[turn % len(products)](a)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def timed_replay() -> float:
        with torch.cuda.device(device):
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
        return float(begin.elapsed_time(end))

    return Contender(graph.replay, timed_replay, launches, (products, a))


def relative_error(got: npt.NDArray[Any], exact: npt.NDArray[np.float64]) -> float:
    """Return the Euclidean norm of the error of a product over the norm of the exact one."""
    return float(np.linalg.norm(got - exact) / np.linalg.norm(exact))


HUMMING = Rival("humming", "humming-kernels", "float16", 0.004, humming_products, "humming")
RIVALS = (
    HUMMING,
    Rival("quack_bf16", "quack-kernels", BF16, 0.03, quack_products, "quack"),
    Rival("turbomind", "lmdeploy", "float16", 0.004, turbomind_products),
    Rival("tinygemm_bf16", "torch", BF16, 0.03, tinygemm_products),
)
"""humming is the package humming-kernels, QuACK is quack-kernels, and turbomind belongs to lmdeploy from 0.18 on.
tinygemm, the int4 kernels, comes with torch."""
RIVALS_OF_DRAWS = tuple(rival for rival in RIVALS if rival.package != "torch")
"""The rivals of a random draw. torch's own take many times as long from 64 tokens on, and with them most of the run."""
RIVAL_NAMES = frozenset(rival.name for rival in RIVALS)
BF16_NAMES = frozenset(rival.name for rival in RIVALS if rival.dtype == BF16)
"""Rivals that multiply in bf16: their times are reported apart from those of fp16."""
