"""Functions around the methods of SGLang's scheme for compressed-tensors layers of 4 bits.

SGLang calls each with the method that it goes around, the scheme, and the method's arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from w4a16gen.integrations.engines.layer import RawLayer, pack_layer
from w4a16gen.integrations.engines.parameters import matrix_of, points_of, values_of
from w4a16gen.integrations.engines.store import LayerStore
from w4a16gen.integrations.sglang.kernels import COUNT, order_of, why_not_config

_STORE = "w4a16gen_store"
"""Attribute of a scheme whose layer is served."""


def around_create(original: Callable[..., Any], scheme: Any, *args: Any, **options: Any) -> Any:
    """Expect the weight of a layer.

    Args:
        original: SGLang's method.
        scheme: the scheme of the layer.
        *args: the method's arguments.
        **options: the method's arguments by name.
    """
    result = original(scheme, *args, **options)
    COUNT.expected()
    return result


def around_process(original: Callable[..., Any], scheme: Any, layer: Any) -> None:
    """Pack a layer's weight, or let SGLang process it.

    Args:
        original: SGLang's method.
        scheme: the scheme of the layer.
        layer: SGLang's module.
    """
    if hasattr(scheme, _STORE):
        _fill(scheme, layer)
        return
    reason = why_not_config(scheme.kernel_config, layer.weight_packed.device)
    COUNT.asked(reason)
    if reason is None:
        setattr(scheme, _STORE, LayerStore("weight_packed"))
        _fill(scheme, layer)
    else:
        original(scheme, layer)
    COUNT.finished(is_served=reason is None)


def _fill(scheme: Any, layer: Any) -> None:
    config = scheme.kernel_config
    k, n = config.partition_weight_shape
    words = layer.weight_packed
    points = points_of("weight_zero_point", layer.weight_zero_point, n) if config.zero_points else None
    raw = RawLayer(values_of("weight_packed", words, k), matrix_of("weight_scale", layer.weight_scale), points)
    order = order_of(config, getattr(layer, "weight_g_idx", None), words.device)
    packed = pack_layer(raw, order, name="a compressed-tensors layer")
    getattr(scheme, _STORE).fill(layer, packed, ("weight_scale", "weight_zero_point", "weight_g_idx"))


def around_apply(original: Callable[..., Any], scheme: Any, layer: Any, x: Any, bias: Any = None) -> Any:
    """Return the product of activations and a layer's weight, plus the bias.

    Args:
        original: SGLang's method.
        scheme: the scheme of the layer.
        layer: SGLang's module.
        x: activations [..., k].
        bias: [n], or None.
    """
    store = getattr(scheme, _STORE, None)
    return original(scheme, layer, x, bias) if store is None else store.apply(layer, x, bias)
