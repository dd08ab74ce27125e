"""A canonical weight in torch tensors, as rivals and cuBLAS take it: copied from the host, or drawn on the GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from w4a16gen.kernels.config import QuantMode
from w4a16gen.kernels.problem import Problem
from w4a16gen.runtime.library import Library
from w4a16gen.weights.packed import PackedWeight
from w4a16gen.weights.quantized import OFFSET, QuantizedWeight

WORD_VALUES = 8
"""Values of 4 bits in an int32."""
SCALE_SIZE = 0.01
"""Middle of drawn scales, which lie within one power of two of it, up or down."""


@dataclass(frozen=True, eq=False)
class TorchWeight:
    """A weight of 4 bits in torch tensors of one device; see `QuantizedWeight`."""

    torch: Any
    """The module."""
    q: Any
    """uint8 [n, k], values 0 to 15."""
    scales: Any
    """fp16 [k / group_size, n]; one row in per-column mode."""
    zeros: Any
    """fp16 [k / group_size, n], (8 - zero point) * scale, or None."""
    mode: QuantMode

    @classmethod
    def of(cls, torch: Any, weight: QuantizedWeight, device: Any) -> TorchWeight:
        """Copy a weight from the host to a device."""

        def tensor(values: npt.NDArray[Any]) -> Any:
            return torch.from_numpy(values).to(device)

        zeros = None if weight.zeros is None else tensor(weight.zeros)
        return cls(torch, tensor(weight.q), tensor(weight.scales.reshape(-1, weight.n)), zeros, weight.mode)

    @classmethod
    def drawn(
        cls, torch: Any, problem: Problem, mode: QuantMode, seed: int, device: Any, scale_size: float = SCALE_SIZE
    ) -> TorchWeight:
        """Draw a weight on a device: nothing is quantised, so that a large one takes milliseconds.

        Args:
            torch: the module.
            problem: the problem; m does not matter.
            mode: the quantisation mode.
            seed: of the random values.
            device: the device.
            scale_size: middle of the scales.
        """
        source = torch.Generator(device).manual_seed(seed)
        n, k, groups = problem.n, problem.k, problem.groups

        def nibbles(*shape: int) -> Any:
            return torch.randint(0, 16, shape, dtype=torch.uint8, device=device, generator=source)

        octaves = 2 * torch.rand((groups, n), device=device, generator=source) - 1
        scales = (scale_size * torch.exp2(octaves)).half()
        zeros = ((OFFSET - nibbles(groups, n).float()) * scales).half() if mode.has_zeros else None
        return cls(torch, nibbles(n, k), scales, zeros, mode)

    @property
    def n(self) -> int:
        """Output channels."""
        return int(self.q.shape[0])

    @property
    def k(self) -> int:
        """Values of K."""
        return int(self.q.shape[1])

    @property
    def group_size(self) -> int:
        """Values of K that share a scale."""
        return self.k // int(self.scales.shape[0])

    def packed(self, library: Library, *, gated: bool = False) -> PackedWeight:
        """Return the weight packed for the native kernels, on its GPU, and perhaps for gated activations."""
        scales = self.scales if self.mode.is_grouped else self.scales[0]
        return library.pack(self.q, scales, self.zeros, group_size=self.group_size, gated=gated)

    def channels(self, index: npt.NDArray[np.intp]) -> QuantizedWeight:
        """Return the weight of some output channels, on the host."""
        chosen = self.torch.from_numpy(index).to(self.q.device)

        def values(tensor: Any) -> npt.NDArray[Any]:
            return np.asarray(tensor.cpu().numpy())

        scales = values(self.scales[:, chosen])
        zeros = None if self.zeros is None else values(self.zeros[:, chosen])
        if not self.mode.is_grouped:
            scales = scales.reshape(-1)
        return QuantizedWeight(values(self.q[chosen]), scales, zeros, self.group_size, self.mode)

    def _spread(self, by_group: Any) -> Any:
        """Return values of groups [k / group_size, n] as fp32 [n, k]."""
        return by_group.T.float().repeat_interleave(self.group_size, 1)

    def dense(self) -> Any:
        """Return the weight as fp16 [n, k], less its zeros: zeros take no time in a dense product."""
        return self._spread(self.scales).mul_(self.q.float() - OFFSET).half()

    def exact(self) -> Any:
        """Return the weight as fp32 [n, k], zeros included."""
        scaled = self._spread(self.scales).mul_(self.q.float() - OFFSET)
        return scaled if self.zeros is None else scaled.add_(self._spread(self.zeros))

    def gptq_words(self) -> Any:
        """Return int32 [k / 8, n]: eight values along K in a word, the first lowest, as in GPTQ's checkpoints."""
        words = self.torch.zeros((self.n, self.k // WORD_VALUES), dtype=self.torch.int32, device=self.q.device)
        for place in range(WORD_VALUES):
            words |= self.q[:, place::WORD_VALUES].to(self.torch.int32) << 4 * place
        return words.T.contiguous()

    def pairs(self, *, first_low: bool) -> Any:
        """Return uint8 [n, k / 2]: two values along K in a byte.

        Args:
            first_low: whether the first value of a pair is in the low half.
        """
        first, second = self.q[:, 0::2], self.q[:, 1::2]
        low, high = (first, second) if first_low else (second, first)
        return (low | (high << 4)).contiguous()
