"""Layers of experts of GPTQ, AWQ and compressed-tensors, as vLLM's methods of these formats load them."""

from __future__ import annotations

from typing import Any

import torch

from w4a16gen.errors import UnsupportedProblemError
from w4a16gen.integrations.engines.experts import awq_expert, gptq_expert
from w4a16gen.integrations.engines.layer import RawLayer
from w4a16gen.integrations.engines.words import gptq_zero_points, zero_point_rules
from w4a16gen.integrations.torch.nibbles import expand
from w4a16gen.integrations.vllm.experts import ExpertsMethod


class GPTQExperts(ExpertsMethod):
    """Experts of GPTQ models, also with zero points, which vLLM refuses."""

    names = ("qweight", "scales", "qzeros")
    scale_dtype = torch.float16
    quant_config: Any

    @property
    def weight_type(self) -> Any:
        """The type of the stored values, in vLLM's terms, after the dynamic rules."""
        return self.quant_config.quant_type

    @property
    def has_zeros(self) -> bool:
        """Whether weights have zero points."""
        return not self.quant_config.is_sym

    def leave(self, layer: Any, reason: str) -> None:
        """Leave a layer to vLLM.

        Args:
            layer: vLLM's module.
            reason: why this package does not serve it.

        Raises:
            UnsupportedProblemError: if it has zero points, which vLLM would misread.
        """
        if self.has_zeros:
            raise UnsupportedProblemError(
                f"{layer.layer_name}: vLLM has no kernel for experts of GPTQ with zero points, and w4a16gen does not "
                f"serve them: {reason}"
            )

    def read(self, words: Any, scales: Any, points: Any) -> RawLayer:
        """Return the weight of one expert.

        Args:
            words: int32 [k / 8, n].
            scales: floats [groups, n].
            points: int32 [groups, n / 8], or None.
        """
        rules = zero_point_rules(self.quant_config.full_config)
        return gptq_expert(words, scales, None if points is None else gptq_zero_points(points, **rules))


class AWQExperts(ExpertsMethod):
    """Experts of AWQ models."""

    names = ("qweight", "scales", "qzeros")
    scale_dtype = torch.float16
    quant_config: Any

    @property
    def has_zeros(self) -> bool:
        """Whether weights have zero points."""
        return bool(self.quant_config.zero_point)

    def read(self, words: Any, scales: Any, points: Any) -> RawLayer:
        """Return the weight of one expert.

        Args:
            words: int32 [k, n / 8], in AWQ's order.
            scales: floats [groups, n].
            points: int32 [groups, n / 8], in AWQ's order.
        """
        return awq_expert(words, scales, points)


class CompressedTensorsExperts(ExpertsMethod):
    """Experts of compressed-tensors models."""

    names = ("weight_packed", "weight_scale", "weight_zero_point")
    symmetric: bool
    group_size: int

    @property
    def has_zeros(self) -> bool:
        """Whether weights have zero points."""
        return not self.symmetric

    @property
    def scale_group(self) -> int:
        """The values of K that share a scale; -1 for all."""
        return self.group_size

    def read(self, words: Any, scales: Any, points: Any) -> RawLayer:
        """Return the weight of one expert.

        Args:
            words: int32 [n, k / 8].
            scales: floats [n, groups].
            points: int32 [n / 8, groups], or None.
        """
        return RawLayer(expand(words), scales.t(), None if points is None else expand(points.t()))
