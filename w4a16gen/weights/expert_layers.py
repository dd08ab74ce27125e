"""The experts of each layer of a checkpoint, whose weights are read one layer at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import gcd
from typing import Any, overload

from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.config import QuantMode
from w4a16gen.weights.division import regroup
from w4a16gen.weights.expert_names import DOWN, GATE, GATE_UP, UP, ExpertNames, find_experts
from w4a16gen.weights.importers.mapped import shown_name
from w4a16gen.weights.packed_checkpoint import PackedLayer
from w4a16gen.weights.quantized import QuantizedWeight


class ExpertWeights(Sequence[QuantizedWeight]):
    """The weights of one projection of all experts, read on demand and never kept.

    All have one mode and one group size: those that can hold each of them. No value changes.
    """

    def __init__(self, layers: Sequence[Any], like: Sequence[Any], rows: tuple[int, int] | None = None) -> None:
        """Take the layers of a checkpoint, opened or packed, in the order of the experts.

        Args:
            layers: the layers.
            like: layers whose weights shall have the same form, these included.
            rows: number of the part of the rows to take, and the number of equal parts; None takes all.
        """
        self._layers = layers
        self._like = like
        self._rows = rows
        self._common: tuple[int, QuantMode] | None = None

    def __len__(self) -> int:
        return len(self._layers)

    @overload
    def __getitem__(self, index: int) -> QuantizedWeight: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[QuantizedWeight]: ...

    def __getitem__(self, index: int | slice) -> QuantizedWeight | Sequence[QuantizedWeight]:
        """Read the weight of an expert.

        Raises:
            InvalidValueError: if its product needs more than the weight, such as an order of the activations. If rows
                of gate and up cannot be parted.
        """
        if isinstance(index, slice):
            part = ExpertWeights(self._layers[index], self._like, self._rows)
            part._common = self.common
            return part
        group_size, mode = self.common
        layer = self._layers[index]
        _check_plain(layer)
        weight: QuantizedWeight = layer.weight.unpack() if isinstance(layer, PackedLayer) else layer.quantized()
        if self._rows is not None:
            part_of, parts = self._rows
            if weight.n % parts != 0:
                raise InvalidValueError(
                    f"layer {shown_name(layer.name)} of {weight.n} rows must have an even number: those of the gate, "
                    "and as many of the up projection"
                )
            size = weight.n // parts
            weight = weight.channels(slice(part_of * size, (part_of + 1) * size))
        return regroup(weight, group_size, mode)

    @property
    def common(self) -> tuple[int, QuantMode]:
        """The group size and the mode of all weights. Reads the zero points of asymmetric formats."""
        if self._common is None:
            self._common = common_form(self._like)
        return self._common


def common_form(layers: Iterable[Any]) -> tuple[int, QuantMode]:
    """Return the group size and the mode that can hold each of some layers, exactly.

    Args:
        layers: layers of a checkpoint, opened or packed.
    """
    forms = [layer.weight if isinstance(layer, PackedLayer) else layer for layer in layers]
    group_size = gcd(*(form.group_size for form in forms))
    modes = {form.mode for form in forms}
    if any(mode.has_zeros for mode in modes):
        return group_size, QuantMode.FINEGRAINED_SCALE_AND_ZEROS
    per_column = modes == {QuantMode.PER_COLUMN_SCALE_ONLY}
    return group_size, QuantMode.PER_COLUMN_SCALE_ONLY if per_column else QuantMode.FINEGRAINED_SCALE_ONLY


def _check_plain(layer: Any) -> None:
    """Raise if a layer is more than its weight: leaving the rest out would be a wrong number.

    Raises:
        InvalidValueError: naming the layer and the part.
    """
    parts = {
        "an order of the activations (act-order)": layer.permutation is not None,
        "scales of the activations": layer.input_scale is not None,
        "a bias": layer.bias is not None,
        "an alpha": layer.alpha != 1,
    }
    for part, is_there in parts.items():
        if is_there:
            raise InvalidValueError(
                f"layer {shown_name(layer.name)} has {part} beside its weight: read it as a layer, with MoeLayer.layers"
            )


@dataclass(frozen=True, eq=False)
class MoeLayer:
    """The experts of one layer of a checkpoint. Nothing is read before it is asked for.

    Attributes:
        name: path of the module that holds the experts.
        layers: the checkpoint's layers in the order of the experts, by role: gate, up and down, or gate_up and down.
    """

    name: str
    layers: Mapping[str, tuple[Any, ...]]

    @property
    def experts(self) -> int:
        """Number of experts."""
        return len(self.layers[DOWN])

    @cached_property  # so that the form of all experts is found once, not for each expert that is asked for
    def gate(self) -> ExpertWeights:
        """The gate projection of each expert, in the form of `up`, so that both can be joined."""
        return self._half(GATE, 0)

    @cached_property
    def up(self) -> ExpertWeights:
        """The up projection of each expert."""
        return self._half(UP, 1)

    @cached_property
    def down(self) -> ExpertWeights:
        """The down projection of each expert."""
        return ExpertWeights(self.layers[DOWN], self.layers[DOWN])

    def _half(self, role: str, part: int) -> ExpertWeights:
        if GATE_UP in self.layers:
            return ExpertWeights(self.layers[GATE_UP], self.layers[GATE_UP], (part, 2))
        return ExpertWeights(self.layers[role], (*self.layers[GATE], *self.layers[UP]))


def moe_layers(checkpoint: Mapping[str, Any]) -> Iterator[MoeLayer]:
    """Yield the layers of experts of a checkpoint, in its order.

    All names are checked before the first layer is yielded. Weights are read one by one when they are asked for.

    Args:
        checkpoint: what `open_checkpoint` or `open_packed` returned.

    Raises:
        InvalidValueError: if it is no checkpoint, or a projection of an expert is missing or doubled; the message names
            it.

    Example:
        >>> import w4a16gen
        >>> checkpoint = w4a16gen.open_checkpoint("Qwen3-30B-A3B-GPTQ")  # doctest: +SKIP
        >>> for layer in moe_layers(checkpoint):  # doctest: +SKIP
        ...     gate_up, down = pack_experts(layer.gate, layer.up, gated=True), pack_experts(layer.down)
    """
    if not isinstance(checkpoint, Mapping):  # a text would be read as names of one character each
        raise InvalidValueError(
            f"checkpoint of type {type(checkpoint).__name__} must be what w4a16gen.open_checkpoint or open_packed "
            "returned"
        )
    found = find_experts(checkpoint)
    for names in found.values():
        if reason := names.why_incomplete():
            raise InvalidValueError(reason)
    return (moe_layer(checkpoint, names) for names in found.values())


def moe_layer(checkpoint: Mapping[str, Any], names: ExpertNames) -> MoeLayer:
    """Return the experts of one layer.

    Args:
        checkpoint: the checkpoint.
        names: what `find_experts` found.

    Raises:
        InvalidValueError: if a projection of an expert is missing or doubled.
    """
    return MoeLayer(names.name, {role: tuple(checkpoint[name] for name in names.of_role(role)) for role in names.form})
