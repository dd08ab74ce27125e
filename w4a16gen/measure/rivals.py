"""The kernels that `bench` times beside this package's: cuBLAS on dense weights, and other 4-bit kernels if installed.

All of them run through torch, which is optional and imported only on use.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np

from w4a16gen.errors import UnsupportedProblemError
from w4a16gen.kernels.config import QuantMode
from w4a16gen.measure.timing import Contender
from w4a16gen.weights.importers.gptq import gptq_words
from w4a16gen.weights.quantized import OFFSET, Half, QuantizedWeight

CUBLAS = "cublas_fp16"
"""Name of the dense contender: torch.matmul on the dequantised weight."""

Product = Callable[[], Any]
"""Multiplies the activations by one copy of the weight and returns the output."""


@dataclass(frozen=True)
class Rival:
    """Someone else's kernels for 4-bit weights."""

    name: str
    package: str
    """The package to install."""
    dtype: str
    """Torch's name of the dtype of activations, scales and output."""
    largest_error: float
    """Largest error of a right result, relative to the exact one, as Euclidean norms. Activations, weights, products
    and output are rounded to `dtype` about four times. A wrong scale, zero point or nibble order is off by a tenth."""
    prepare: Callable[[Any, Any, QuantizedWeight, int], Sequence[Product]]
    """Takes torch, the activations on a GPU as `dtype`, the weight, and the number of copies. Raises ImportError if the
    package is not installed, and UnsupportedProblemError for a weight that it cannot represent."""


def find_torch() -> Any | None:
    """Return torch if it is installed."""
    try:
        return importlib.import_module("torch")
    except ImportError:
        return None


def record_torch(torch: Any, device: int, products: Sequence[Product], launches: int) -> Contender:
    """Record a graph of launches that take copies of a weight in turn."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        products[0]()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for turn in range(launches):
                products[turn % len(products)]()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def timed_replay() -> float:
        with torch.cuda.device(device):
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
        return float(begin.elapsed_time(end))

    return Contender(graph.replay, timed_replay, launches, products)


def cublas_products(torch: Any, a: Any, weight: QuantizedWeight, copies: int) -> list[Product]:
    """Multiply by copies of the dequantised weight, less its zeros; `a` is fp16 [m, k] on a GPU."""
    groups = torch.from_numpy(weight.scales.reshape(-1, weight.n)).to(a.device).float()
    spread = groups.repeat_interleave(weight.k // len(groups), 0).T
    dense = ((torch.from_numpy(weight.q).to(a.device).float() - OFFSET) * spread).half().contiguous()
    out = torch.empty((a.shape[0], weight.n), dtype=a.dtype, device=a.device)

    def product(copy: Any) -> Product:
        return lambda: torch.matmul(a, copy.T, out=out)

    return [product(dense.clone()) for _ in range(copies)]


def relative_error(torch: Any, a: Any, weight: QuantizedWeight, product: Product, channels: Any) -> float:
    """Compare some channels of a product with float64, of the activations as they were given to it."""
    got = product().double().cpu().numpy()[:, channels]
    torch.cuda.synchronize()
    exact = a.double().cpu().numpy() @ weight.channels(channels).dequantize().T
    return float(np.linalg.norm(got - exact) / np.linalg.norm(exact))


def _tinygemm(torch: Any, a: Any, weight: QuantizedWeight, copies: int) -> list[Product]:
    """Prepare torch's own kernels, which compute (q - 8) * scale + zero in bf16."""
    if weight.mode is QuantMode.PER_COLUMN_SCALE_ONLY or weight.group_size not in (32, 64, 128, 256):
        raise UnsupportedProblemError("it supports groups of 32, 64, 128 and 256 only")
    if weight.k % 128:
        raise UnsupportedProblemError("it needs k in multiples of 128")
    pairs = weight.q[:, ::2] << 4 | weight.q[:, 1::2]
    operators = torch.ops.aten
    packed = operators._convert_weight_to_int4pack(torch.from_numpy(pairs).to(a.device), 8)  # noqa: SLF001
    zeros = np.zeros_like(weight.scales) if weight.zeros is None else weight.zeros
    both = np.stack([weight.scales, zeros], axis=-1).astype(np.float32)
    scales_and_zeros = torch.from_numpy(both).to(a.device).to(a.dtype).contiguous()

    def product(copy: Any, of_copy: Any) -> Product:
        return lambda: operators._weight_int4pack_mm(a, copy, weight.group_size, of_copy)  # noqa: SLF001

    return [product(packed.clone(), scales_and_zeros.clone()) for _ in range(copies)]


def _humming(torch: Any, a: Any, weight: QuantizedWeight, copies: int) -> list[Product]:
    """Prepare humming's kernels from a symmetric weight in GPTQ's form."""
    layer_type = importlib.import_module("humming.layer").HummingLayer
    if weight.zeros is not None:
        raise UnsupportedProblemError("zeros that are not multiples of the scale have no GPTQ form")
    scales: Half = weight.scales.reshape(-1, weight.n)
    layer = layer_type(
        shape_n=weight.n,
        shape_k=weight.k,
        weight_config={"quant_method": "gptq", "bits": 4, "group_size": weight.k // len(scales), "sym": True},
        torch_dtype=a.dtype,
    )
    tensors = {
        "qweight": gptq_words(weight.q.T, 0),
        "scales": np.ascontiguousarray(scales),
        "qzeros": gptq_words(np.full(scales.shape, OFFSET - 1, np.uint8), 1),
        "g_idx": np.arange(weight.k, dtype=np.int32) // (weight.k // len(scales)),
    }
    layer.load_from_tensors({name: torch.from_numpy(values) for name, values in tensors.items()})
    layer = layer.to(a.device)
    layer.transform()
    out = torch.empty((a.shape[0], weight.n), dtype=a.dtype, device=a.device)

    def product(copy: Any) -> Product:
        def multiply() -> Any:
            copy(a, outputs=out)
            return out

        return multiply

    return [product(deepcopy(layer)) for _ in range(copies)]


RIVALS = (
    Rival("humming", "humming-kernels", "float16", 0.004, _humming),
    Rival("tinygemm_bf16", "torch", "bfloat16", 0.03, _tinygemm),
)
"""humming is the package humming-kernels; tinygemm, the int4 kernels, comes with torch."""
RIVAL_NAMES = frozenset(rival.name for rival in RIVALS)
