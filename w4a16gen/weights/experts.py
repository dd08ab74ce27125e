"""Packed weights of all experts of a layer: one buffer, one row for each expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.config import QuantMode, Target, shown
from w4a16gen.kernels.integers import integer
from w4a16gen.weights.importers.stored import MAX_EXPERTS
from w4a16gen.weights.layouts.geometry import WeightGeometry, align
from w4a16gen.weights.packed import (
    GATED_LAYOUT,
    LAYOUTS,
    PackedWeight,
    check_layout_group_size,
    checked_flag,
    layout_for,
    pack_weight,
)
from w4a16gen.weights.quantized import QuantizedWeight

GATE_FIRST = "gate_first"
ORDERS = (GATE_FIRST,)
"""Orders of the rows of a joined gate and up projection: all rows of the gate, then all of the up projection."""
_ROWS = 2
"""Dimensions of the buffer of all experts."""


@dataclass(frozen=True, eq=False)
class PackedExperts:
    """The weights of all experts of a layer, of equal sizes and mode, in one buffer.

    Two of them compare equal only if they are the same object.

    Attributes:
        data: uint8 [experts, stride], a numpy array or any array on a GPU. Row i begins with the bytes that
            `pack_weight` makes of expert i. The rest of the row is 0.
        layout: tag of the layout of each expert.
        n: output channels of one expert; of a joined gate and up projection, those of both.
        k: reduction length.
        group_size: values of K that share a scale; k itself in per-column mode.
        mode: the quantisation mode.
        order: of the rows of a joined gate and up projection, one of `ORDERS`; None if an expert is one matrix.

    Raises:
        InvalidValueError: if the layout or the order is unknown, or the sizes do not fit together.

    Example:
        >>> import numpy as np
        >>> from w4a16gen.weights.quantize import quantize
        >>> weights = [quantize(np.eye(64, 256) * (1 + i), group_size=128) for i in range(4)]
        >>> packed = pack_experts(weights)
        >>> packed.experts, packed.stride, packed.expert(3).nbytes
        (4, 8704, 8704)
    """

    data: Any
    layout: str
    n: int
    k: int
    group_size: int
    mode: QuantMode
    order: str | None = None

    def __post_init__(self) -> None:
        """Check the facts and the shape of the buffer; see the class."""
        weight = PackedWeight(None, self.layout, self.n, self.k, self.group_size, self.mode)  # which checks them
        for name in ("n", "k", "group_size"):
            object.__setattr__(self, name, getattr(weight, name))
        if self.order is not None:
            check_order(self.order, self.n)
        shape = tuple(getattr(self.data, "shape", ()))
        if len(shape) != _ROWS or shape[0] < 1 or shape[1] != self.stride:
            raise InvalidValueError(f"data of shape {list(shape)} must be [experts, {self.stride}]: see pack_experts")

    @property
    def geometry(self) -> WeightGeometry:
        """The sizes and the mode of one expert."""
        return WeightGeometry(self.n, self.k, self.group_size, self.mode)

    @property
    def experts(self) -> int:
        """Number of experts."""
        return int(self.data.shape[0])

    @property
    def stride(self) -> int:
        """Bytes from one expert to the next."""
        return expert_stride(self.layout, self.geometry)

    @property
    def gated(self) -> bool:
        """Whether they are packed for kernels that apply the gate themselves; see `pack_experts`."""
        return self.layout == GATED_LAYOUT

    @property
    def nbytes_of_expert(self) -> int:
        """Bytes of one packed weight, without what aligns the next one."""
        return LAYOUTS[self.layout].packed_bytes(self.geometry)

    @property
    def nbytes(self) -> int:
        """Bytes of all experts."""
        return self.experts * self.stride

    def expert(self, index: int) -> PackedWeight:
        """Return one expert, which shares the memory of the buffer.

        Args:
            index: number of the expert, from 0.

        Raises:
            InvalidValueError: if there is no such expert.
        """
        number = integer("expert", index)
        if not 0 <= number < self.experts:
            raise InvalidValueError(f"expert {number} must be 0 to {self.experts - 1}")
        data = self.data[number][: self.nbytes_of_expert]
        return PackedWeight(data, self.layout, self.n, self.k, self.group_size, self.mode)


def expert_stride(layout: str, geometry: WeightGeometry) -> int:
    """Return the bytes from one expert to the next: the bytes of a packed weight, rounded up to 128.

    Each expert is then as aligned as a packed weight that stands alone.

    Args:
        layout: tag of the layout.
        geometry: sizes and mode of one expert.
    """
    return align(LAYOUTS[layout].packed_bytes(geometry))


def check_order(order: Any, n: int) -> None:
    """Raise unless an order of the rows of gate and up is known, and n is even.

    Raises:
        InvalidValueError: naming the order or n.
    """
    if not isinstance(order, str) or order not in ORDERS:
        raise InvalidValueError(f"order of {shown(order)} must be one of {', '.join(ORDERS)}")
    if n % 2 != 0:
        raise InvalidValueError(f"n of {n} must be even: the rows of the gate, and as many of the up projection")


def pack_experts(
    weights: Sequence[QuantizedWeight],
    up: Sequence[QuantizedWeight] | None = None,
    *,
    gate_up: bool = False,
    order: str = GATE_FIRST,
    target: Target | str = Target.NATIVE,
    gated: bool = False,
) -> PackedExperts:
    """Pack the weights of all experts of a layer into one buffer, expert by expert.

    The sequences are read once, in order. One that makes its weights on demand holds one expert in memory at a time.

    Args:
        weights: the weight of each expert, of equal n, k, group size and mode. With `up`, the gate projections.
        up: the up projections of the same experts, to be joined to the gates along n; or None.
        gate_up: whether `weights` hold gate and up projections joined already, in the order that `order` names.
        order: order of the rows of gate and up. `gate_first`: all rows of the gate, then all of the up projection.
        target: the kernel family that will read the experts, `native` or `cutlass`.
        gated: whether gate and up are packed for kernels that apply the gate themselves; see `pack_weight`.

    Returns:
        The packed experts in host memory.

    Raises:
        InvalidValueError: if there are no experts or too many, or gate and up are not as many. If an expert differs
            from the first one. If the target's layout cannot hold an expert.

    Example:
        >>> import numpy as np
        >>> from w4a16gen.weights.quantize import quantize
        >>> weights = [quantize(np.eye(64, 256) * (1 + i), group_size=128) for i in range(4)]
        >>> pack_experts(weights, weights).n
        128
    """
    layout = layout_for(Target.parse(target), gated=checked_flag("gated", gated))
    joined = checked_flag("gate_up", gate_up) or up is not None
    if gated and not joined:
        raise InvalidValueError("gated experts are gate and up projections: pass both, or gate_up=True")
    _check_sequence("weights", weights)
    if up is not None:
        _check_halves(weights, up, gate_up=gate_up)
    if joined:
        check_order(order, 2)
    data: Any = None
    first: QuantizedWeight | None = None
    for index in range(len(weights)):
        weight = _checked(index, weights[index], "gate" if up is not None else "weight")
        if up is not None:
            weight = _joined(index, weight, _checked(index, up[index], "up"))
        if first is None:
            first = weight
            if joined:
                check_order(order, weight.n)
            check_layout_group_size(layout, weight.k, weight.group_size, weight.mode)
            data = np.zeros((len(weights), expert_stride(layout, _geometry(weight))), np.uint8)
        _check_equal(f"expert {index}", weight, "expert 0", first)
        try:
            packed = pack_weight(weight, target=target, gated=gated)
        except InvalidValueError as error:
            raise InvalidValueError(f"expert {index} cannot be packed: {error}") from None
        data[index, : packed.nbytes] = packed.data
    assert first is not None  # noqa: S101  (there is at least one)
    return PackedExperts(data, layout, *_geometry(first), order if joined else None)


def _check_halves(gate: Sequence[QuantizedWeight], up: Any, *, gate_up: bool) -> None:
    """Raise unless gate and up projections are of as many experts, and not joined already.

    Raises:
        InvalidValueError: naming both.
    """
    _check_sequence("up", up)
    if len(up) != len(gate):
        raise InvalidValueError(f"{len(gate)} gate and {len(up)} up projections must be of the same experts")
    if gate_up:
        raise InvalidValueError("gate_up says that weights are joined already: pass them without up")


def _geometry(weight: QuantizedWeight) -> WeightGeometry:
    return WeightGeometry(weight.n, weight.k, weight.group_size, weight.mode)


def _check_sequence(name: str, weights: Any) -> None:
    """Raise unless there are as many weights as a layer may have experts.

    Raises:
        InvalidValueError: naming the argument.
    """
    if not isinstance(weights, Sequence):
        raise InvalidValueError(f"{name} of type {type(weights).__name__} must be a sequence with a weight per expert")
    if not 0 < len(weights) <= MAX_EXPERTS:
        raise InvalidValueError(f"{name} of {len(weights)} experts must be of 1 to {MAX_EXPERTS}")


def _checked(index: int, weight: Any, what: str) -> QuantizedWeight:
    if not isinstance(weight, QuantizedWeight):
        raise InvalidValueError(
            f"{what} of expert {index} of type {type(weight).__name__} must be a QuantizedWeight: see w4a16gen.quantize"
        )
    return weight


def _check_equal(what: str, weight: QuantizedWeight, other: str, wanted: QuantizedWeight) -> None:
    """Raise unless two weights have the same sizes and mode.

    Raises:
        InvalidValueError: naming both weights and both values.
    """
    for name in ("n", "k", "group_size", "mode"):
        found, needed = getattr(weight, name), getattr(wanted, name)
        if found != needed:
            hint = "" if name in {"n", "k"} else ": bring all to one with w4a16gen.weights.division.regroup"
            raise InvalidValueError(f"{what} has {name} {found}, but {other} has {needed}{hint}")


def _joined(index: int, gate: QuantizedWeight, up: QuantizedWeight) -> QuantizedWeight:
    """Return gate and up as one weight: the rows of the gate first."""
    _check_equal(f"up of expert {index}", up, "its gate", gate)
    zeros = None if gate.zeros is None or up.zeros is None else np.concatenate([gate.zeros, up.zeros], axis=-1)
    return QuantizedWeight(
        np.concatenate([gate.q, up.q]),
        np.concatenate([gate.scales, up.scales], axis=-1),
        zeros,
        gate.group_size,
        gate.mode,
    )
