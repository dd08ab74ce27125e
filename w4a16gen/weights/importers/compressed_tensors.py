"""The format `pack-quantized` of compressed-tensors: symmetric, asymmetric, per channel, per group, with act-order.

Tensors of a layer: `weight_packed` int32 [n, k / 8], `weight_scale` [n, groups], `weight_shape` (n, k), and perhaps
`weight_zero_point` int32 [n / 8, groups], packed along n, and `weight_g_idx` int32 [k]. Each expert is a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from w4a16gen.errors import InvalidValueError
from w4a16gen.weights.importers.config import layer_names, section, text
from w4a16gen.weights.importers.mapped import shown_name
from w4a16gen.weights.importers.stored import Factors, StoredLayer, UnsupportedLayerError, zeros_of_points
from w4a16gen.weights.importers.tensors import FLOATS, INTEGERS, Tensors
from w4a16gen.weights.importers.words import nibbles
from w4a16gen.weights.quantized import OFFSET, Nibbles

PER_WORD = 8
FORMAT = "pack-quantized"
_STRATEGIES = {"group", "channel"}


def stored_layers(tensors: Tensors, config: dict[str, Any]) -> dict[str, Callable[[], StoredLayer]]:
    """Return what makes each layer of a checkpoint, by the layer's name.

    Raises:
        InvalidValueError: if the configuration names another format, type or strategy.
    """
    groups = section(config, "config_groups")
    top = text(config, "format", FORMAT)
    formats = {top} if top != "mixed-precision" else {text(section(groups, name), "format", FORMAT) for name in groups}
    if FORMAT not in formats:
        found = ", ".join(sorted(formats))
        raise InvalidValueError(
            f"compressed-tensors format {shown_name(found)} must be {FORMAT}: save 4-bit integer weights in that format"
        )
    quantizes_inputs = False
    for name in groups:
        group = section(groups, name)
        if text(group, "format", top) in {FORMAT, "mixed-precision"}:
            _check_weights(section(group, "weights"))
        quantizes_inputs |= group.get("input_activations") is not None
    note = "the checkpoint quantizes activations too; here they stay FP16" if quantizes_inputs else None
    return {name: partial(PackQuantizedLayer, tensors, name, note) for name in layer_names(tensors, "weight_packed")}


def _check_weights(weights: dict[str, Any]) -> None:
    """Raise unless the weights of a group of layers are integers with groups along K."""
    kind, strategy = text(weights, "type", "int"), text(weights, "strategy", "group")
    if kind != "int":
        raise InvalidValueError(f"compressed-tensors weights of type {shown_name(kind)} must be int")
    if strategy not in _STRATEGIES:
        raise InvalidValueError(f"compressed-tensors strategy {shown_name(strategy)} must be group or channel")


class PackQuantizedLayer(StoredLayer):
    """A layer in the format `pack-quantized`."""

    format = "compressed-tensors"
    parts = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")

    def __init__(self, tensors: Tensors, name: str, note: str | None) -> None:
        """Check the headers of a layer.

        Raises:
            InvalidValueError: if they contradict each other.
        """
        n, words = tensors.need(f"{name}.weight_packed", INTEGERS, (None, None))
        _, groups = tensors.need(f"{name}.weight_scale", FLOATS, (n, None))
        tensors.need(f"{name}.weight_shape", ("I64", "I32"), (2,))
        rows, k = (int(size) for size in tensors.array(f"{name}.weight_shape"))
        if rows != n or not 0 < k <= words * 32:
            raise InvalidValueError(
                f"layer {shown_name(name)}: weight_shape {[rows, k]} must be {[n, words * PER_WORD]}"
            )
        if words != -(-k // PER_WORD):
            raise UnsupportedLayerError(
                f"layer {shown_name(name)} has {words * 32 / k:.3g} bits, not 4: the kernels read 4-bit values only; "
                "quantize it to 4 bits, or leave it dense"
            )
        if f"{name}.weight_zero_point" in tensors:
            tensors.need(f"{name}.weight_zero_point", INTEGERS, (-(-n // PER_WORD), groups))
        if f"{name}.weight_g_idx" in tensors:
            tensors.need(f"{name}.weight_g_idx", ("I32", "I64"), (k,))
        self._note = note
        super().__init__(tensors, name, n, k, groups)

    @property
    def note(self) -> str | None:
        """Return that the checkpoint quantizes activations, if it does."""
        return self._note

    def values(self) -> Nibbles:
        """Return q, uint8 [n, k]."""
        return np.ascontiguousarray(nibbles(self.tensors.array(f"{self.name}.weight_packed"))[:, : self.k])

    def group_index(self) -> npt.NDArray[np.int64] | None:
        """Return g_idx; -1 everywhere stands for none."""
        name = f"{self.name}.weight_g_idx"
        if name not in self.tensors:
            return None
        index = self.tensors.array(name).astype(np.int64)
        return None if (index == -1).all() else index

    def zero_points(self) -> Nibbles | None:
        """Return the zero points, uint8 [groups, n], or None."""
        name = f"{self.name}.weight_zero_point"
        if name not in self.tensors:
            return None
        return nibbles(self.tensors.array(name).T)[:, : self.n]

    def is_symmetric(self) -> bool:
        """Return whether all zero points are 8."""
        points = self.zero_points()
        return points is None or bool((points == OFFSET).all())

    def factors(self) -> Factors:
        """Return scales and zeros."""
        scales = self.tensors.double(f"{self.name}.weight_scale").T
        points = self.zero_points()
        symmetric = points is None or (points == OFFSET).all()
        return Factors(scales, None if points is None or symmetric else zeros_of_points(points, scales))
