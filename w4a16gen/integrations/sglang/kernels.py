"""SGLang's kernels for GPTQ and AWQ layers, with this package's before them.

Each class goes before SGLang's own, which is its other base. It decides when the weight is loaded: a layer that is not
served is processed and multiplied by SGLang's class.
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from w4a16gen.integrations.engines.count import ServedCount
from w4a16gen.integrations.engines.layer import RawLayer, pack_layer
from w4a16gen.integrations.engines.limits import LayerRequest, why_not_served, why_not_type
from w4a16gen.integrations.engines.order import Order, plan_act_order, plan_order
from w4a16gen.integrations.engines.parameters import matrix_of, points_of, values_of
from w4a16gen.integrations.engines.store import LayerStore
from w4a16gen.integrations.engines.words import awq_points
from w4a16gen.integrations.torch.nibbles import expand_awq

LOGGER = logging.getLogger("w4a16gen.sglang")
COUNT = ServedCount(LOGGER)
"""Counts the linear layers of this process."""
BITS = 4


def capability_of(device: Any) -> tuple[int, int] | None:
    """Return the compute capability of a device of torch, or None if it is no CUDA GPU.

    Args:
        device: the device that holds a layer's weight.
    """
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return int(major), int(minor)


def why_not_config(config: Any, device: Any) -> str | None:
    """Return why SGLang's configuration of a layer is refused, or None.

    Args:
        config: SGLang's `MarlinLinearLayerConfig`.
        device: the device that holds the weight.
    """
    if reason := why_not_type(config.weight_type, has_zeros=config.zero_points):
        return reason
    k, n = config.partition_weight_shape
    order = bool(getattr(config, "has_g_idx", False))
    request = LayerRequest(
        n, k, config.group_size, config.zero_points, str(config.act_type), capability_of(device), regroups=order
    )
    return why_not_served(request)


def order_of(config: Any, groups: Any, device: Any) -> Order:
    """Return the order of K of a layer on this rank.

    Args:
        config: SGLang's `MarlinLinearLayerConfig`.
        groups: the parameter with the group of each value of K, or None.
        device: the device that holds the weight.
    """
    k, _ = config.partition_weight_shape
    group = k if config.group_size == -1 else config.group_size
    if getattr(config, "has_g_idx", False) and group != k:
        return plan_act_order(groups.data, group)
    return plan_order(k, group, device=device)


class _Kernel:
    """What both kernels share."""

    def __init__(self, quant_config: Any = None) -> None:
        """Take SGLang's quantization configuration.

        Args:
            quant_config: the configuration of the model.
        """
        inherited: Any = super()
        inherited.__init__(quant_config)
        self._store = LayerStore("qweight")
        COUNT.expected()

    def process_weights_after_loading(self, layer: Any) -> None:
        """Pack a layer's weight, or let SGLang process it.

        Args:
            layer: SGLang's module.
        """
        if self._store.is_filled:
            self._fill(layer)
            return
        reason = self._why_not(layer)
        COUNT.asked(reason)
        if reason is None:
            self._fill(layer)
        else:
            inherited: Any = super()
            inherited.process_weights_after_loading(layer)
        COUNT.finished(is_served=reason is None)

    def apply(self, layer: Any, x: Any, bias: Any = None) -> Any:
        """Return the product of activations and a layer's weight, plus the bias.

        Args:
            layer: SGLang's module.
            x: activations [..., k].
            bias: [n], or None.
        """
        if self._store.is_filled:
            return self._store.apply(layer, x, bias)
        inherited: Any = super()
        return inherited.apply(layer, x, bias)

    def _why_not(self, layer: Any) -> str | None:
        raise NotImplementedError

    def _fill(self, layer: Any) -> None:
        raise NotImplementedError


class GPTQKernel(_Kernel):
    """Goes before SGLang's `GPTQMarlinLinearKernel`."""

    kernel_config: Any
    """SGLang sets it before it loads the weight."""

    def _why_not(self, layer: Any) -> str | None:
        return why_not_config(self.kernel_config, layer.qweight.device)

    def _fill(self, layer: Any) -> None:
        config = self.kernel_config
        k, n = config.partition_weight_shape
        points = points_of("qzeros", layer.qzeros, n) if config.zero_points else None
        raw = RawLayer(values_of("qweight", layer.qweight, k), matrix_of("scales", layer.scales), points)
        order = order_of(config, getattr(layer, "g_idx", None), layer.qweight.device)
        self._store.fill(layer, pack_layer(raw, order, name="a GPTQ layer"), ("scales", "qzeros", "g_idx"))


class AWQKernel(_Kernel):
    """Goes before SGLang's `AWQMarlinLinearKernel`."""

    quant_config: Any
    """SGLang's class keeps it."""

    def _why_not(self, layer: Any) -> str | None:
        bits = getattr(self.quant_config, "weight_bits", BITS)
        if bits != BITS:
            return f"weights of {bits} bits must have {BITS}"
        n, k = layer.output_size_per_partition, layer.input_size_per_partition
        group, dtype, device = self.quant_config.group_size, str(layer.scales.dtype), layer.qweight.device
        return why_not_served(LayerRequest(n, k, group, True, dtype, capability_of(device)))

    def _fill(self, layer: Any) -> None:
        k = layer.input_size_per_partition
        group = k if self.quant_config.group_size == -1 else self.quant_config.group_size
        raw = RawLayer(expand_awq(layer.qweight.data), layer.scales.data, awq_points(layer.qzeros.data))
        order = plan_order(k, group, device=layer.qweight.device)
        self._store.fill(layer, pack_layer(raw, order, name="an AWQ layer"), ("scales", "qzeros"))
