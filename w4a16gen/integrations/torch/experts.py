"""`W4A16Experts`: the experts of a layer of a torch model, whose weights have 4 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from w4a16gen.errors import InvalidValueError
from w4a16gen.integrations.torch import given
from w4a16gen.integrations.torch.apart import FUNCTIONS
from w4a16gen.integrations.torch.expert_projection import ExpertProjection
from w4a16gen.integrations.torch.experts_op import has_grouped_kernels, sum_of_experts
from w4a16gen.integrations.torch.nibbles import INTEGERS, Tensor
from w4a16gen.integrations.torch.upload import device_of
from w4a16gen.kernels.config import Target
from w4a16gen.kernels.epilogue import Activation
from w4a16gen.runtime.expert_calls import GATED_ACTIVATIONS, MAX_EXPERTS
from w4a16gen.weights.experts import PackedExperts
from w4a16gen.weights.packed import LAYOUT_TARGETS, TARGET_LAYOUTS

_MATRIX = 2
_OTHER = "other"
"""The name of an activation that is none of `ACTIVATIONS`."""
_KERNEL_INTEGERS = (torch.int32, torch.int64)
"""Dtypes of ids that kernels read."""
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": FUNCTIONS[Activation.SILU],
    "gelu": FUNCTIONS[Activation.GELU],
    "gelu_tanh": FUNCTIONS[Activation.GELU_TANH],
    "relu": torch.nn.functional.relu,
}
"""Activations by name."""


class W4A16Experts(torch.nn.Module):
    """The experts of a layer: the sum over a token's routes of weight * (act(x Wg) * (x Wu)) Wd.

    It takes the place of the modules of experts that transformers has, and is called like them. x may be fp16, bf16 or
    fp32. It is cast to fp16 before the products, and the result is cast to the dtype of x. Products are rounded to
    fp16; the activation is computed in fp32 and rounded to fp16 once; the routes of a token are added in fp32, in the
    order of the slots. The sum is rounded to fp16 where `is_grouped` says yes. Equal inputs give equal bits.

    With grouped kernels in the build, a call waits for nothing, and can be compiled, captured and exported. They are
    built by `w4a16gen build --space default --space experts --epilogue none --epilogue gated`. Otherwise, and where
    `is_grouped` says no, experts are computed one by one. **Such a call waits for the device**, because it asks how
    many tokens each expert has. CUDA graphs cannot hold it.

    If gate and up are packed with gated=True, grouped kernels with epilogue `gated` apply the gate, and do not round
    the products before. Without such kernels, and for other weights, a launch between the products applies it.

    `.to(device)`, `state_dict`, `copy.deepcopy` and pickle work as with other modules. `.half()`, `.bfloat16()` and
    `.to(dtype)` change nothing. `load_state_dict` takes the state of either packing, and keeps that packing. The packed
    bytes and `_extra_state` of a projection belong together: one without the other may be of the other packing.

    Attributes:
        gate_up: the gate and up projections, joined: the rows of the gate first.
        down: the down projections.
        activation: the function of the gate.
        activation_name: its name in `ACTIVATIONS`, or `other`.
        num_experts: number of experts.

    Example:
        >>> import numpy as np, torch
        >>> from w4a16gen.weights.experts import pack_experts
        >>> from w4a16gen.weights.quantize import quantize
        >>> weights = [quantize(np.eye(64), group_size=32) for _ in range(4)]
        >>> gate_up = pack_experts(weights, weights, gated=True)
        >>> experts = W4A16Experts.from_packed(gate_up, pack_experts(weights))
        >>> x, ids = torch.ones(3, 64), torch.tensor([[0, 2], [2, 3], [1, -1]])
        >>> experts(x, ids, torch.full((3, 2), 0.5)).shape
        torch.Size([3, 64])
    """

    def __init__(
        self, gate_up: ExpertProjection, down: ExpertProjection, activation: str | Callable[[Any], Any] = "silu"
    ) -> None:
        """Take the projections.

        Args:
            gate_up: the gate and up projections, joined.
            down: the down projections.
            activation: one of `ACTIVATIONS`, or a function of tensors.

        Raises:
            InvalidValueError: if the projections are not of the same experts, or the activation is unknown.
        """
        super().__init__()
        for name, part in (("gate_up", gate_up), ("down", down)):
            if not isinstance(part, ExpertProjection):
                raise InvalidValueError(f"{name} of type {type(part).__name__} must be an ExpertProjection")
        if not callable(activation) and not (isinstance(activation, str) and activation in ACTIVATIONS):
            raise InvalidValueError(f"activation {activation!r} must be a function, or one of {', '.join(ACTIVATIONS)}")
        found = (gate_up.experts, gate_up.n, gate_up.k)
        wanted = (down.experts, 2 * down.k, down.n)
        if found != wanted or gate_up.order is None:
            raise InvalidValueError(
                f"gate_up of {found[0]} experts of {list(found[1:])} must be joined, and beside down be of {wanted[0]} "
                f"experts of {list(wanted[1:])}"
            )
        self.gate_up, self.down = gate_up, down
        self.activation = activation if callable(activation) else ACTIVATIONS[activation]
        self.activation_name = _name_of(self.activation)
        self.num_experts, self.hidden_dim, self.intermediate_dim = down.experts, down.n, down.k

    @classmethod
    def from_packed(
        cls,
        gate_up: PackedExperts,
        down: PackedExperts,
        activation: str | Callable[[Any], Any] = "silu",
        *,
        device: Any = None,
    ) -> W4A16Experts:
        """Make a layer of packed experts.

        Args:
            gate_up: what `pack_experts(gate, up, gated=True)` returned, or the same without `gated`.
            down: what `pack_experts(down)` returned.
            activation: one of `ACTIVATIONS`, or a function of tensors.
            device: where the experts shall be; None leaves them where they are.

        Raises:
            InvalidValueError: if they are not of the same experts, or the activation is unknown; or there is no such
                device.
        """
        return cls(ExpertProjection(_on_torch(gate_up, device)), ExpertProjection(_on_torch(down, device)), activation)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the sum of each token's experts, [tokens, hidden], in the dtype of the activations.

        Args:
            hidden_states: floating point [tokens, hidden].
            top_k_index: number of the expert of each route, integers [tokens, slots]. Numbers that name no expert are
                skipped, such as -1 or `num_experts`.
            top_k_weights: weight of each route, floating point [tokens, slots]. Those of skipped routes do not matter.

        Raises:
            InvalidValueError: if a tensor has another dtype, shape or device. If experts that are computed one by one
                are traced or exported, which would keep the number of tokens that each has in this call.
        """
        is_grouped = self.is_grouped
        if not is_grouped and (torch.jit.is_tracing() or torch.compiler.is_exporting()):
            raise InvalidValueError(
                "experts that are computed one by one cannot be traced or exported, because each call asks how many "
                "tokens each expert has: use torch.compile, which leaves them as they are"
            )
        self._check(hidden_states, top_k_index, top_k_weights)
        if hidden_states.is_meta:
            return torch.empty(hidden_states.shape, dtype=hidden_states.dtype, device="meta")
        records = torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad)
        if records or not is_grouped:
            out = self._one_by_one(hidden_states, top_k_index, top_k_weights)
            out = out.to(torch.float16) if is_grouped else out  # as where no gradients are recorded
            return out.to(hidden_states.dtype)
        ids = top_k_index if top_k_index.dtype in _KERNEL_INTEGERS else top_k_index.to(torch.int64)
        out = torch.ops.w4a16gen.moe(
            hidden_states.to(torch.float16),
            ids,
            top_k_weights.to(torch.float32),
            self.gate_up.packed,
            self.down.packed,
            self.hidden_dim,
            self.intermediate_dim,
            self.gate_up.group_size,
            self.down.group_size,
            self.down.mode,
            self.gate_up.layout,
            self.activation_name,
        )
        return out.to(hidden_states.dtype)

    @property
    def is_grouped(self) -> bool:
        """Whether grouped kernels can compute the layer, if the build has any; otherwise it is computed one by one.

        They compute SiLU and GELU, for at most 1,024 experts. They know no order of columns, no scales, no counter of
        overflows and no hooks of the projections. Where gradients are recorded, experts are computed one by one in any
        case.
        """
        parts = self.gate_up, self.down
        return (
            self.activation_name in GATED_ACTIVATIONS
            and self.num_experts <= MAX_EXPERTS
            and self.gate_up.mode == self.down.mode
            and LAYOUT_TARGETS[self.gate_up.layout] is Target.NATIVE
            and self.down.layout == TARGET_LAYOUTS[Target.NATIVE]
            and all(part.is_plain for part in parts)
        )

    @property
    def waits(self) -> bool:
        """Whether a call without gradients waits for the device, so that CUDA graphs cannot hold it.

        Raises:
            NotBuiltError: if the experts are on a GPU, and there is no usable build.
        """
        return not self.is_grouped or (self.down.packed.is_cuda and not has_grouped_kernels(self.down.mode))

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    def _one_by_one(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the sum of each token's experts, fp32 [tokens, hidden]."""
        x = hidden_states.float()  # fp32 keeps what fp16 and bf16 hold; products round it to fp16
        return sum_of_experts(x, top_k_index, top_k_weights, self.num_experts, self._expert)

    def _expert(self, x: Tensor, expert: int) -> Tensor:
        """Return one expert's result for some rows, fp32 [m, hidden], without the weights of the routes."""
        gate, up = self.gate_up(x, expert).chunk(2, dim=-1)
        result: Tensor = self.down(self.activation(gate) * up, expert)
        return result

    def _check(self, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> None:
        """Raise unless the tensors of a call fit together.

        Raises:
            InvalidValueError: naming the tensor.
        """
        if not isinstance(hidden_states, torch.Tensor) or not hidden_states.is_floating_point():
            raise InvalidValueError(f"hidden_states of {given.kind_of(hidden_states)} must be a floating point tensor")
        if hidden_states.dim() != _MATRIX or hidden_states.shape[1] != self.hidden_dim:
            raise InvalidValueError(
                f"hidden_states of shape {list(hidden_states.shape)} must be [tokens, {self.hidden_dim}]"
            )
        if not isinstance(top_k_index, torch.Tensor) or top_k_index.dtype not in INTEGERS:
            raise InvalidValueError(f"top_k_index of {given.kind_of(top_k_index)} must be a tensor of integers")
        if not isinstance(top_k_weights, torch.Tensor) or not top_k_weights.is_floating_point():
            raise InvalidValueError(f"top_k_weights of {given.kind_of(top_k_weights)} must be a floating point tensor")
        for name, tensor in (("top_k_index", top_k_index), ("top_k_weights", top_k_weights)):
            if tensor.dim() != _MATRIX or len(tensor) != len(hidden_states) or tensor.shape != top_k_index.shape:
                raise InvalidValueError(
                    f"{name} of shape {list(tensor.shape)} must be [{len(hidden_states)}, slots], both alike"
                )
        device = self.down.packed.device
        for name, tensor in (
            ("hidden_states", hidden_states),
            ("top_k_index", top_k_index),
            ("top_k_weights", top_k_weights),
        ):
            if tensor.device != device:
                raise InvalidValueError(
                    f"{name} is on {tensor.device}, but the experts on {device}: move them to one device"
                )

    def extra_repr(self) -> str:
        """Return what `print` shows of the experts, beside the projections."""
        return f"num_experts={self.num_experts}"


def _name_of(function: Callable[[Any], Any]) -> str:
    """Return the name of the activation that a function computes, or `other`. Models have modules of their own."""
    x = torch.linspace(-6, 6, 128, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        try:
            got = function(x)
        except Exception:  # noqa: BLE001  (a function of somebody else may raise anything)
            return _OTHER
        for name, known in ACTIVATIONS.items():
            if isinstance(got, torch.Tensor) and got.shape == x.shape and torch.equal(got, known(x)):
                return name
    return _OTHER


def _on_torch(weights: PackedExperts, device: Any) -> PackedExperts:
    """Return packed experts whose data is a torch tensor."""
    if not isinstance(weights, PackedExperts):
        raise InvalidValueError(f"experts of type {type(weights).__name__} must be PackedExperts: see pack_experts")
    data = weights.data
    if isinstance(data, np.ndarray):  # torch has no tensors that are read only
        data = torch.from_numpy(data if data.flags.writeable else data.copy())
    moved = data if device is None else data.to(device_of(device))
    return PackedExperts(moved, weights.layout, weights.n, weights.k, weights.group_size, weights.mode, weights.order)
