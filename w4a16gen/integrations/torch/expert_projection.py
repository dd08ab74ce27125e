"""One projection of all experts of a layer, in one buffer: the product of one expert, moves and state dicts.

Weights that are packed for kernels that apply the gate are plain weights in another order of channels. So any kernel
computes their products, whose channels are then put in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from w4a16gen.errors import InvalidValueError
from w4a16gen.integrations.torch import given
from w4a16gen.integrations.torch.apart import gates_first
from w4a16gen.integrations.torch.device_weights import dense_weight
from w4a16gen.integrations.torch.nibbles import Tensor
from w4a16gen.integrations.torch.packed_module import Operands, PackedModule, has_hooks, product
from w4a16gen.integrations.torch.state import check_tensors, powers_of_two, read_facts, write_state
from w4a16gen.kernels.config import QuantMode, Target
from w4a16gen.kernels.integers import integer
from w4a16gen.weights.experts import PackedExperts
from w4a16gen.weights.packed import GATED_LAYOUT, TARGET_LAYOUTS

STATE_FORMAT = "w4a16gen.experts/1"
"""What state dicts carry; the number changes with their tensors."""
_EXTRA_STATE = "_extra_state"
_PLAIN = TARGET_LAYOUTS[Target.NATIVE]
_NATIVE = (_PLAIN, GATED_LAYOUT)
"""Layouts of equal bytes, of which a state dict may bring the other one."""


class ExpertProjection(PackedModule):
    """One projection of all experts of a layer: y = alpha[e] * x W[e].

    Attributes:
        packed: buffer, uint8 [experts, stride]: the packed weights, see `PackedExperts`.
        permutation: buffer, int64 [experts, k], or None: the columns of x in the order of each weight (act-order).
        input_scale: buffer, fp16 [experts, k], or None: what x is multiplied by first.
        alphas: factor of each expert's product.
    """

    def __init__(
        self,
        weights: PackedExperts,
        *,
        permutation: Any = None,
        input_scale: Any = None,
        alphas: Sequence[float] | None = None,
    ) -> None:
        """Take packed experts.

        Args:
            weights: the packed experts; their data is a torch tensor on any device.
            permutation: integers [experts, k], or None.
            input_scale: fp16 [experts, k], or None.
            alphas: a factor per expert; None for 1.

        Raises:
            InvalidValueError: if the sizes do not fit together.
        """
        super().__init__()
        if not isinstance(weights, PackedExperts):
            raise InvalidValueError(f"weights of type {type(weights).__name__} must be PackedExperts: see pack_experts")
        given.check_tensor("data of the experts", weights.data, (weights.experts, weights.stride), torch.uint8)
        self.experts, self.order = weights.experts, weights.order
        self.n, self.k, self.group_size = weights.n, weights.k, weights.group_size
        self.mode, self.layout = str(weights.mode), weights.layout
        self.register_buffer("packed", weights.data)
        device = weights.data.device
        shape = self.experts, self.k
        self.permutation = None if permutation is None else _orders(permutation, shape, device)
        scale = given.tensor_of("input_scale", input_scale)
        self.input_scale = None if scale is None else given.half("input_scale", scale, device)
        if self.input_scale is not None:
            given.check_tensor("input_scale", self.input_scale, shape, torch.float16)
        self.alphas = (1.0,) * self.experts if alphas is None else _factors(alphas, self.experts)
        self.nbytes_of_expert = weights.expert(0).nbytes

    def forward(self, x: Tensor, expert: int) -> Tensor:
        """Return the product of one expert, [m, n], in the dtype of x; all gates before the up projections.

        Args:
            x: floating point [m, k], on the device of the weights.
            expert: number of the expert, from 0.

        Raises:
            InvalidValueError: if x is no tensor, or of another dtype, shape or device; or there is no such expert.
        """
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            raise InvalidValueError(f"x of {given.kind_of(x)} must be a floating point tensor, [m, {self.k}]")
        if not 0 <= integer("expert", expert) < self.experts:
            raise InvalidValueError(f"expert {expert} must be 0 to {self.experts - 1}")
        order, scale = (None if part is None else part[expert] for part in (self.permutation, self.input_scale))
        packed = self.packed[expert, : self.nbytes_of_expert]
        operands = Operands(packed, self.alphas[expert], order, scale)
        if self.layout != GATED_LAYOUT:
            return product(self, x, operands)
        y: Tensor = gates_first(product(self, x, operands, layout=_PLAIN))
        return y

    @property
    def is_plain(self) -> bool:
        """Whether products are x W[e]: without order of columns, scales, factors, hooks, or a counter of overflows."""
        optional = self.permutation, self.input_scale, self.non_finite
        scales = self.activation_scale, self.output_scale, *self.alphas
        return not has_hooks(self) and all(part is None for part in optional) and all(scale == 1 for scale in scales)

    def weights_of(self) -> PackedExperts:
        """Return the packed experts, which share the memory of this module."""
        mode = QuantMode.parse(self.mode)
        return PackedExperts(self.packed, self.layout, self.n, self.k, self.group_size, mode, self.order)

    def dequantize(self, dtype: Any = torch.float32) -> Tensor:
        """Return the weights that multiply activations as they are, [experts, n, k].

        Args:
            dtype: the dtype of the result.
        """
        weights = self.weights_of()
        result = torch.empty((self.experts, self.n, self.k), dtype=dtype, device=self.packed.device)
        for expert in range(self.experts):
            weight = weights.expert(expert).to_host().unpack()
            order, scale = (None if part is None else part[expert] for part in (self.permutation, self.input_scale))
            result[expert].copy_(dense_weight(weight, self.alphas[expert], order, scale))
        return result

    @property
    def facts(self) -> dict[str, Any]:
        """What a state dict must agree with, but for the two layouts of target native."""
        names = ("experts", "order", "n", "k", "group_size", "mode", "layout")
        return {name: getattr(self, name) for name in names}

    def get_extra_state(self) -> Tensor:
        """Return the facts and the scalars as bytes of JSON in a tensor, which files of safetensors can hold."""
        scalars = {name: getattr(self, name) for name in ("activation_scale", "output_scale")}
        return write_state(self.facts, {**scalars, "alphas": list(self.alphas)}, STATE_FORMAT)

    def set_extra_state(self, state: Any) -> None:
        """Take the scales out of the facts of a state dict, and how its gates and up projections lie.

        Raises:
            InvalidValueError: if they describe other experts.
        """
        found = self._read(state)
        self.layout = found["layout"]
        self.alphas = tuple(given.finite_alpha(alpha) for alpha in found["alphas"])
        for name, value in powers_of_two(found).items():
            setattr(self, name, value)

    def _read(self, state: Any) -> dict[str, Any]:
        facts = self.facts
        found = read_facts({name: value for name, value in facts.items() if name != "layout"}, state, STATE_FORMAT)
        if self.layout not in _NATIVE or self.order is None or found.get("layout") not in _NATIVE:
            read_facts(facts, state, STATE_FORMAT)
        alphas = found.get("alphas")
        if not isinstance(alphas, list) or len(alphas) != self.experts:
            raise InvalidValueError(f"the state dict must hold an alpha for each of {self.experts} experts")
        return found

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        """Refuse the state of other experts, or one that was cast, before any tensor is copied."""
        if f"{prefix}{_EXTRA_STATE}" in state_dict:
            self._read(state_dict[f"{prefix}{_EXTRA_STATE}"])
        check_tensors(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        """Return what `print` shows of the projection."""
        parts = f"experts={self.experts}, in_features={self.k}, out_features={self.n}"
        return f"{parts}, group_size={self.group_size}, mode={self.mode}"


def _orders(values: Any, shape: tuple[int, int], device: Any) -> Tensor:
    """Return an order of columns for each expert, int64 [experts, k]."""
    orders = given.tensor_of("permutation", values)
    given.check_tensor("permutation", orders, shape, orders.dtype)
    return torch.stack([given.order("permutation", row, device, shape[1]) for row in orders])


def _factors(alphas: Any, experts: int) -> tuple[float, ...]:
    """Return the factor of each expert's product."""
    try:
        found = tuple(alphas)
    except TypeError:  # also of tensors without dimensions
        raise InvalidValueError(
            f"alphas of {given.kind_of(alphas)} must be a sequence with a factor for each of {experts} experts"
        ) from None
    if len(found) != experts:
        raise InvalidValueError(f"alphas of {len(found)} experts must be of {experts}")
    return tuple(given.finite_alpha(alpha) for alpha in found)
