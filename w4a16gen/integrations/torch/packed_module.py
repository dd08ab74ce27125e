"""What modules of packed weights share: how they move, count overflow, and call the product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from w4a16gen.errors import InvalidValueError
from w4a16gen.integrations.torch import ops
from w4a16gen.integrations.torch.nibbles import Tensor
from w4a16gen.integrations.torch.state import moved_only, set_buffer
from w4a16gen.kernels.config import Target
from w4a16gen.kernels.epilogue import Activation
from w4a16gen.weights.packed import LAYOUT_TARGETS

_OPTIONAL = ("bias", "permutation", "input_scale", "non_finite")
OVERFLOW = ("ignore", "check")
NO_ACTIVATION = str(Activation.NONE)


class PackedModule(torch.nn.Module):
    """A module with packed weights, whose tensors move but are never cast.

    Attributes:
        packed: buffer of packed weights, uint8.
        permutation: buffer of the columns of x in the order of the weight, or None.
        input_scale: buffer of what x is multiplied by first, or None.
        n: output channels.
        k: reduction length.
        group_size: values of K that share a scale.
        mode: text of the quantisation mode.
        layout: tag of the layout.
        activation: the name of the activation, `none` without one.
        activation_scale: a power of two that x is divided by before its cast to fp16, and y multiplied by.
        output_scale: a power of two that y is divided by while it is fp16, and multiplied by after its cast.
        non_finite: buffer, int64 scalar that counts outputs that are not finite, or None.
    """

    packed: Tensor
    permutation: Tensor | None
    input_scale: Tensor | None
    non_finite: Tensor | None
    n: int
    k: int
    group_size: int
    mode: str
    layout: str
    activation: str = NO_ACTIVATION

    def __init__(self) -> None:
        """Start without scales, and count nothing."""
        super().__init__()
        self.activation_scale = 1.0
        self.output_scale = 1.0
        self.non_finite = None

    def input_scale_of(self, *expert: int) -> Tensor | None:
        """Return what activations are multiplied by first, fp16 [k], or None.

        Args:
            expert: number of the expert, for modules of experts.
        """
        scale = self.input_scale
        return scale if scale is None or not expert else scale[expert[0]]

    def __setattr__(self, name: str, value: Any) -> None:
        """Register optional tensors as buffers, and only those that are there: torch.export counts on it."""
        if name in _OPTIONAL:
            set_buffer(self, name, value, persistent=name != "non_finite")
        else:
            super().__setattr__(name, value)

    @property
    def overflow(self) -> str:
        """`check` if outputs that are not finite are counted, on the device and without waiting for it; else `ignore`.

        Raises:
            InvalidValueError: if it is set to anything else.
        """
        return "ignore" if self.non_finite is None else "check"

    @overflow.setter
    def overflow(self, value: str) -> None:
        if value not in OVERFLOW:
            raise InvalidValueError(f"overflow of {value!r} must be one of {', '.join(OVERFLOW)}")
        counter = torch.zeros((), dtype=torch.int64, device=self.packed.device) if value == "check" else None
        self.non_finite = counter

    def _apply(self, fn: Callable[[Any], Any], *arguments: Any, **keywords: Any) -> Any:
        """Move the tensors, and leave their dtypes and bits as they are."""
        return super()._apply(lambda tensor: moved_only(fn, tensor), *arguments, **keywords)


def has_hooks(module: Any) -> bool:
    """Return whether calls of a module run more than its class says; accelerate sets `forward` itself."""
    if not isinstance(module, torch.nn.Module):
        return False
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))  # noqa: SLF001


class Operands(NamedTuple):
    """The tensors of a product beside the activations.

    Attributes:
        packed: the packed weight, uint8 [bytes].
        alpha: factor of the product.
        permutation: the columns of x in the order of the weight, int64 [k], or None.
        input_scale: what x is multiplied by first, fp16 [k], or None.
        bias: fp16 [n], or None.
    """

    packed: Tensor
    alpha: float
    permutation: Tensor | None
    input_scale: Tensor | None
    bias: Tensor | None = None


def product(
    layer: PackedModule,
    x: Tensor,
    operands: Operands,
    *,
    residual: Tensor | None = None,
    dtype: Any = None,
    apart: bool = False,
    layout: str | None = None,
) -> Tensor:
    """Return activation(alpha * x' W + bias) + residual, with what a layer says of its weights.

    Args:
        layer: says what its weights are, which activation and scales it has, and counts outputs.
        x: floating point [..., k].
        operands: the other tensors, and alpha.
        residual: what is added, of the shape and dtype of the result, or None. In fp16 the kernel adds it, unless
            `apart` is set and kernels of the weight's target cannot.
        dtype: of the result; None for that of x.
        apart: see `W4A16Linear.forward`.
        layout: tag of the layout that kernels take the weights for; None is that of the layer.
    """
    packed, alpha, permutation, input_scale, bias = operands
    wanted = x.dtype if dtype is None else dtype
    if layer.activation_scale != 1:
        x = x * (1 / layer.activation_scale)
    if input_scale is not None:
        x = x * input_scale
    if permutation is not None:
        x = x.index_select(-1, permutation)
    added = bias if bias is None or layer.output_scale == 1 else bias * (1 / layer.output_scale)
    factor = alpha * layer.activation_scale / layer.output_scale
    x = x.to(torch.float16)
    facts = layer.n, layer.k, layer.group_size, layer.mode, layer.layout if layout is None else layout
    has_kernels = not apart or LAYOUT_TARGETS[layer.layout] is Target.NATIVE
    adds = residual is not None and residual.dtype == wanted == torch.float16 and layer.output_scale == 1
    adds = adds and has_kernels
    epilogue = layer.activation, residual if adds else None, apart
    y = ops.operator_for(x)(x, packed, added, *facts, factor, *epilogue)
    if layer.non_finite is not None:
        layer.non_finite.add_((~torch.isfinite(y)).sum())
    y = y.to(wanted)
    y = y if layer.output_scale == 1 else y * layer.output_scale
    return y if adds or residual is None else y + residual
