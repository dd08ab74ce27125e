"""Values beyond fp16's 65504 in models of bf16 and fp32: count them, name the first layer, and scale them away."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from w4a16gen.errors import InvalidValueError
from w4a16gen.integrations.torch.nibbles import Tensor
from w4a16gen.integrations.torch.packed_module import NO_ACTIVATION, PackedModule
from w4a16gen.weights.importers.rounding import LARGEST_HALF

_LARGEST_SCALE = 2.0**40
_STEP = 16.0


class Overflow(NamedTuple):
    """A layer with outputs that are not finite."""

    name: str
    """Path of the module in the model."""
    outputs: int
    """Outputs that were not finite since the count began."""


class Scales(NamedTuple):
    """The powers of two that `calibrate` has set for a layer."""

    activation_scale: float
    output_scale: float


def check_overflow(model: torch.nn.Module, *, on: bool = True) -> None:
    """Count the outputs that are not finite in every 4-bit layer of a model, from 0; or stop.

    The counts stay on the device, so that no call waits for them.

    Args:
        model: the model.
        on: whether to count.
    """
    for _, layer in layers_of(model):
        layer.overflow = "check" if on else "ignore"


def first_overflow(model: torch.nn.Module) -> Overflow | None:
    """Return the first layer with outputs that were not finite, or None. Waits for the device.

    Layers count in the order of the model's modules, in which most models call them: the layers after the first one
    mostly received what was not finite already.

    Args:
        model: the model.

    Raises:
        InvalidValueError: if no layer counts.
    """
    counting = [(name, layer.non_finite) for name, layer in layers_of(model) if layer.non_finite is not None]
    if not counting:
        raise InvalidValueError('no layer counts overflow: call check_overflow(model), or set overflow = "check"')
    for name, counter in counting:
        if outputs := int(counter):
            return Overflow(name, outputs)
    return None


def layers_of(model: torch.nn.Module) -> Iterator[tuple[str, PackedModule]]:
    """Return every W4A16Linear of a model, and the projections of its experts, by name in the order of its modules."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, PackedModule))


def calibrate(model: torch.nn.Module, run: Callable[[], object], *, headroom: float = 4.0) -> dict[str, Scales]:
    """Set the powers of two by which layers divide activations and outputs that exceed fp16, from a run of the model.

    `activation_scale` and `output_scale` only grow; most layers keep 1. Powers of two change no bits but those that
    fall below fp16's smallest number. Calibrate before the model is compiled or captured.

    Args:
        model: the model, in bf16 or fp32: in fp16 the values themselves do not fit.
        run: calls the model on typical inputs; the more extreme, the better.
        headroom: the factor by which later values may exceed those of the run.

    Returns:
        The scales of the layers that need any, by name.

    Raises:
        InvalidValueError: if the headroom is below 1, or not finite.
    """
    if not isinstance(headroom, numbers.Real) or not 1 <= headroom < math.inf:
        raise InvalidValueError(f"headroom of {headroom!r} must be a finite number of at least 1")

    def before(layer: Any, inputs: Any, named: Any) -> None:
        _before(layer, _arguments(layer, inputs, named), headroom)

    def after(layer: Any, inputs: Any, named: Any, y: Tensor) -> Tensor:
        bound = inspect.signature(layer.forward).bind(*inputs, **named)
        residual = bound.arguments.get("residual")
        x = bound.arguments["x"]
        if residual is None or y.dtype == torch.float16:
            return _after(layer, lambda: layer.forward(*inputs, **named), x, y, headroom)
        bound.arguments["residual"] = None  # in other dtypes the sum follows the product, which alone must fit fp16

        def product() -> Tensor:
            return layer.forward(*bound.args, **bound.kwargs)

        return _after(layer, product, x, product(), headroom) + residual

    hooks = []
    for _, layer in layers_of(model):
        hooks.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(layer.register_forward_hook(after, with_kwargs=True))
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    found = {name: Scales(layer.activation_scale, layer.output_scale) for name, layer in layers_of(model)}
    return {name: scales for name, scales in found.items() if scales != (1, 1)}


def _arguments(layer: PackedModule, inputs: tuple[Any, ...], named: dict[str, Any]) -> list[Any]:
    """Return the activations of a call, and the number of the expert where there is one."""
    given = inspect.signature(layer.forward).bind(*inputs, **named).arguments
    return [given[name] for name in ("x", "expert") if name in given]


def _before(layer: PackedModule, arguments: Sequence[Any], headroom: float) -> None:
    """Let the activations of a call fit fp16."""
    x, *expert = arguments
    scale = layer.input_scale_of(*expert)
    if x.dtype == torch.float16 and scale is None:
        return
    scaled = x.float() if scale is None else x.float() * scale
    layer.activation_scale = max(layer.activation_scale, _scale_for(scaled, headroom))


def _after(layer: PackedModule, again: Callable[[], Tensor], x: Tensor, y: Tensor, headroom: float) -> Tensor:
    """Let the outputs of a call fit fp16, and return them. What goes into an activation cannot be divided."""
    has_activation = layer.activation != NO_ACTIVATION
    if has_activation or y.dtype == torch.float16 or not bool(torch.isfinite(x).all()):
        return y
    before = layer.output_scale
    while not bool(torch.isfinite(y).all()) and layer.output_scale < _LARGEST_SCALE:
        layer.output_scale *= _STEP
        y = again()
    is_finite = bool(torch.isfinite(y).all())
    layer.output_scale = max(before, _scale_for(y.float(), headroom)) if is_finite else before
    return y


def _scale_for(values: Tensor, headroom: float) -> float:
    """Return the least power of two, 1 or more, that brings values into fp16 with some headroom."""
    largest: Any = values.abs().amax().item() if values.numel() else 0.0
    if not math.isfinite(largest) or largest * headroom <= LARGEST_HALF:
        return 1.0
    return 2.0 ** math.ceil(math.log2(largest * headroom / LARGEST_HALF))
