"""Random layers as checkpoints store them, and the exact products that an engine's results are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fakes.checkpoints import packers
from w4a16gen.weights.quantized import QuantizedWeight, canonical
from w4a16gen.weights.reference import HALF_ROUNDING, HALF_UNDERFLOW

BFLOAT_ROUNDING = 2.0**-8
FLOAT64_SLACK = 1e-12
"""Above the error of a product in float64, relative to the sum of magnitudes, which is below 2^-53 per term."""
Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """A layer of a checkpoint: q [n, k] in the order of the file, scales and zero points [groups, n], g_idx [k]."""

    q: Array
    scales: Array
    points: Array | None
    g_idx: Array

    @classmethod
    def random(
        cls,
        rng: np.random.Generator,
        n: int,
        k: int,
        group_size: int,
        *,
        is_symmetric: bool = True,
        act_order: bool = False,
        first_point: int = 1,
    ) -> StoredWeight:
        """Return a layer with all 16 values; group size -1 is one group.

        Args:
            rng: source of the numbers.
            n: output channels.
            k: reduction length.
            group_size: values of K that share a scale.
            is_symmetric: whether there are no zero points.
            act_order: whether K is in random order.
            first_point: the least zero point.
        """
        group = k if group_size == -1 else group_size
        groups = k // group
        g_idx = np.repeat(np.arange(groups), group).astype(np.int32)
        points = None if is_symmetric else rng.integers(first_point, 16, (groups, n)).astype(np.uint8)
        return cls(
            rng.integers(0, 16, (n, k)).astype(np.uint8),
            rng.uniform(0.005, 0.02, (groups, n)).astype(np.float16),
            points,
            rng.permutation(g_idx) if act_order else g_idx,
        )

    def with_bfloat_scales(self) -> StoredWeight:
        """Return this layer with scales that bf16 holds exactly."""
        scales = torch.from_numpy(self.scales).bfloat16().half().numpy()
        return StoredWeight(self.q, scales, self.points, self.g_idx)

    def dequantized(self) -> Array:
        """Return the weight, float64 [n, k], with zeros rounded to fp16 as kernels read them."""
        scales = self.scales.astype(np.float64)
        weight = (self.q.astype(np.float64) - 8) * scales[self.g_idx].T
        if self.points is None:
            return weight
        zeros = ((8 - self.points.astype(np.float64)) * scales).astype(np.float16)
        total: Array = weight + zeros.astype(np.float64)[self.g_idx].T
        return total

    def quantized(self) -> QuantizedWeight:
        """Return the weight in canonical form, with K sorted by groups."""
        groups, k = len(self.scales), self.q.shape[1]
        q = np.ascontiguousarray(self.q[:, np.argsort(self.g_idx, kind="stable")])
        if self.points is None:
            scales = self.scales if groups > 1 else self.scales[0]
            return canonical(q, scales, None, group_size=k // groups)
        zeros = ((8 - self.points.astype(np.float64)) * self.scales).astype(np.float16)
        return canonical(q, self.scales, zeros, group_size=k // groups)

    def sorted_columns(self, x: Any) -> Array:
        """Return activations [m, k] of fp16 in the order of `quantized`."""
        columns: Array = x.cpu().numpy()[:, np.argsort(self.g_idx, kind="stable")]
        return columns

    def gptq(self, *, version: int = 1, with_order: bool = False) -> dict[str, Any]:
        """Return GPTQ's tensors."""
        points = np.full(self.scales.shape, 8, np.uint8) if self.points is None else self.points
        stored = (points - 1) & 15 if version == 1 else points
        tensors = {
            "qweight": packers.along_rows(self.q.T),
            "qzeros": packers.along_columns(stored),
            "scales": self.scales,
        }
        return _tensors(tensors | ({"g_idx": self.g_idx} if with_order else {}))

    def awq(self) -> dict[str, Any]:
        """Return AWQ's tensors."""
        points = np.full(self.scales.shape, 8, np.uint8) if self.points is None else self.points
        return _tensors(
            {
                "qweight": packers.awq_gemm_words(np.ascontiguousarray(self.q.T)),
                "qzeros": packers.awq_gemm_words(points),
                "scales": self.scales,
            }
        )

    def compressed(self) -> dict[str, Any]:
        """Return compressed-tensors' tensors."""
        tensors = {
            "weight_packed": packers.along_columns(self.q),
            "weight_scale": np.ascontiguousarray(self.scales.T),
        }
        if self.points is not None:
            tensors["weight_zero_point"] = packers.along_rows(self.points.T)
        return _tensors(tensors)

    def stored_as(self, kind: str) -> dict[str, Any]:
        """Return the tensors of a format: gptq, awq or compressed-tensors."""
        return {"gptq": self.gptq, "awq": self.awq, "compressed-tensors": self.compressed}[kind]()


def _tensors(arrays: dict[str, Array]) -> dict[str, Any]:
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def activations(rng: np.random.Generator, m: int, k: int, dtype: Any = torch.float16) -> Any:
    """Return random activations [m, k] that both fp16 and bf16 hold exactly."""
    return torch.from_numpy(rng.integers(-64, 65, (m, k)) / 64).to(dtype)


def assert_is_product(got: Any, x: Any, weight: Array, bias: Any = None) -> None:
    """Fail unless a result is the exact product, rounded once to fp16, then once to its dtype.

    Args:
        got: the result, fp16 or bf16 [m, n].
        x: activations [m, k].
        weight: float64 [n, k].
        bias: [n], or None.
    """
    exact = x.double().numpy() @ weight.T
    size = np.abs(x.double().numpy()) @ np.abs(weight.T)
    bound = HALF_ROUNDING * np.abs(exact) + HALF_UNDERFLOW + FLOAT64_SLACK * size
    if bias is not None:
        exact = exact + bias.double().numpy()
        bound = bound + HALF_ROUNDING * np.abs(exact)  # fp16 rounds the sum instead, bf16 adds to the rounded product
    if got.dtype == torch.bfloat16:
        bound = bound + BFLOAT_ROUNDING * (np.abs(exact) + bound)
    error = np.abs(got.double().numpy() - exact)
    assert got.shape == exact.shape
    assert (error <= bound).all(), (error / bound).max()
