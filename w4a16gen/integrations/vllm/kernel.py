"""The kernel that vLLM asks about each mixed-precision linear layer: GPTQ's, AWQ's and compressed-tensors'.

vLLM passes a configuration of the layer, then the layer with this rank's weights in its parameters, on the GPU. The
class is combined with vLLM's base class at registration, so this module needs no vLLM.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

from w4a16gen.integrations.engines.count import ServedCount
from w4a16gen.integrations.engines.layer import RawLayer, pack_layer
from w4a16gen.integrations.engines.limits import HOPPER, LayerRequest, why_not_served, why_not_type
from w4a16gen.integrations.engines.order import plan_order
from w4a16gen.integrations.engines.parameters import matrix_of, points_of, values_of
from w4a16gen.integrations.engines.store import LayerStore

COUNT = ServedCount(logging.getLogger("vllm.w4a16gen"))
"""Counts the layers of this process."""


def capability() -> tuple[int, int] | None:
    """Return the GPU's compute capability as vLLM knows it, or None without a CUDA GPU."""
    platform = importlib.import_module("vllm.platforms").current_platform
    if not platform.is_cuda():
        return None
    found = platform.get_device_capability()
    return None if found is None else (int(found[0]), int(found[1]))


class LinearKernel:
    """A kernel of vLLM's list: it says which layers it serves, packs their weights, and multiplies."""

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the least compute capability, as vLLM writes it."""
        return HOPPER[0] * 10 + HOPPER[1]

    @classmethod
    def can_implement(cls, c: Any) -> tuple[bool, str | None]:
        """Return whether a layer is served, and why not. Compiles nothing.

        Args:
            c: vLLM's configuration of the layer.
        """
        reason = _why_not(c)
        COUNT.asked(reason)
        return reason is None, reason

    def __init__(
        self,
        c: Any,
        w_q_param_name: str,
        w_s_param_name: str,
        w_zp_param_name: str | None = None,
        w_gidx_param_name: str | None = None,
    ) -> None:
        """Take the configuration and the names of a layer's parameters.

        Args:
            c: vLLM's configuration of the layer.
            w_q_param_name: name of the words.
            w_s_param_name: name of the scales.
            w_zp_param_name: name of the zero points.
            w_gidx_param_name: name of the groups of K, in releases before act-order was removed.
        """
        self.config = c
        self.w_q_name = w_q_param_name
        self.w_s_name = w_s_param_name
        self.w_zp_name = w_zp_param_name
        self.w_gidx_name = w_gidx_param_name
        self._store = LayerStore(w_q_param_name)
        COUNT.expected()

    def process_weights_after_loading(self, layer: Any) -> None:
        """Pack a layer's weight on the GPU and free the parameters that it was packed from. It may be called again.

        Args:
            layer: vLLM's module.

        Raises:
            InvalidValueError: if the parameters are not what vLLM's configuration says, or cannot be packed.
        """
        k, n = self.config.partition_weight_shape
        group = k if self.config.group_size == -1 else self.config.group_size
        words = getattr(layer, self.w_q_name)
        points = None
        if self.config.zero_points:
            points = points_of(str(self.w_zp_name), getattr(layer, str(self.w_zp_name)), n)
        scales = matrix_of(self.w_s_name, getattr(layer, self.w_s_name))
        raw = RawLayer(values_of(self.w_q_name, words, k), scales, points)
        name = getattr(layer, "prefix", "") or self.w_q_name
        packed = pack_layer(raw, plan_order(k, group, device=words.device), name=name)
        is_first = not self._store.is_filled
        dropped = (self.w_s_name, self.w_zp_name, self.w_gidx_name)
        self._store.fill(layer, packed, [name for name in dropped if name is not None])
        if is_first:
            COUNT.finished()

    def apply_weights(self, layer: Any, x: Any, bias: Any = None) -> Any:
        """Return the product of activations and a layer's weight, plus the bias.

        Args:
            layer: vLLM's module.
            x: activations, fp16 or bf16 [..., k].
            bias: [n], or None.
        """
        return self._store.apply(layer, x, bias)


def _why_not(c: Any) -> str | None:
    """Return why vLLM's configuration of a layer is refused, or None."""
    if reason := why_not_type(c.weight_type, has_zeros=c.zero_points):
        return reason
    if getattr(c, "has_g_idx", False):
        return "act-order reaches kernels only in old releases of vLLM: update vLLM, whose GPTQ models are then served"
    if getattr(c, "out_type", None) not in (None, c.act_type):
        return f"output of dtype {c.out_type} must be that of the activations, {c.act_type}"
    k, n = c.partition_weight_shape
    return why_not_served(LayerRequest(n, k, c.group_size, bool(c.zero_points), str(c.act_type), capability()))
