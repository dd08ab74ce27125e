"""MLX's affine quantization of 4 bits.

Tensors of a layer: `weight` uint32 [n, k / 8], `scales` and `biases` [n, groups]; a weight is q * scale + bias.
Experts are stored together, with one dimension more.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from w4a16gen.errors import InvalidValueError
from w4a16gen.weights.importers.config import layer_names, number, text
from w4a16gen.weights.importers.mapped import shown_name
from w4a16gen.weights.importers.stored import (
    Double,
    Factors,
    StoredLayer,
    UnsupportedLayerError,
    check_matrix,
    expert_numbers,
)
from w4a16gen.weights.importers.tensors import FLOATS, Tensors
from w4a16gen.weights.importers.words import nibbles
from w4a16gen.weights.quantized import OFFSET, Nibbles

BITS = 4


def stored_layers(tensors: Tensors, config: dict[str, Any]) -> dict[str, Callable[[], StoredLayer]]:
    """Return what makes each layer of an MLX checkpoint, by the layer's name; an expert has its number.

    Raises:
        InvalidValueError: if the configuration names another mode.
    """
    mode = text(config, "mode", "affine")
    if mode != "affine":
        raise InvalidValueError(
            f"MLX mode {shown_name(mode)} has levels that are not evenly spaced: quantize the model in mode affine"
        )
    found: dict[str, Callable[[], StoredLayer]] = {}
    for name in layer_names(tensors, "scales"):
        own = config.get(name)
        settings = {**config, **own} if isinstance(own, dict) else config
        for expert in expert_numbers(tensors[f"{name}.scales"].shape):
            layer = name if expert is None else f"{name}.{expert}"
            found[layer] = partial(MlxLayer, tensors, layer, settings, expert)
    return found


class MlxLayer(StoredLayer):
    """A layer of MLX, or one expert of several."""

    format = "mlx"
    parts = ("weight", "scales", "biases")

    def __init__(self, tensors: Tensors, name: str, settings: dict[str, Any], expert: int | None) -> None:
        """Check the headers and the settings of a layer.

        Raises:
            InvalidValueError: if they contradict each other.
        """
        self.name, self.expert = name, expert
        module = self.module
        check_matrix(f"{module}.scales", tensors[f"{module}.scales"].shape, expert)
        bits, size = number(settings, ("bits",), BITS), number(settings, ("group_size",), 64)
        if bits != BITS:
            raise UnsupportedLayerError(f"layer {shown_name(name)} has {bits} bits, not 4: quantize it to 4 bits")
        experts = () if expert is None else (None,)
        *_, n, words = tensors.need(f"{module}.weight", ("U32",), (*experts, None, None))
        k = 8 * words
        if size is None or size <= 0 or k % size != 0:
            raise InvalidValueError(f"layer {shown_name(name)}: group_size {size} must divide k = {k}")
        experts_shape = tensors[f"{module}.weight"].shape[:-2]
        for part in ("scales", "biases"):
            tensors.need(f"{module}.{part}", FLOATS, (*experts_shape, n, k // size))
        super().__init__(tensors, name, n, k, k // size)

    def values(self) -> Nibbles:
        """Return q, uint8 [n, k]."""
        words = self.tensors.array(f"{self.module}.weight")
        return nibbles(words if self.expert is None else words[self.expert])

    def _part(self, name: str) -> Double:
        """Return scales or biases, float64 [groups, n]."""
        values = self.tensors.double(f"{self.module}.{name}")
        return (values if self.expert is None else values[self.expert]).T

    def is_symmetric(self) -> bool:
        """Return whether all biases are -8 times their scales."""
        return self.factors().zeros is None

    def factors(self) -> Factors:
        """Return scales and zeros."""
        scales = self._part("scales")
        zeros = self._part("biases") + OFFSET * scales
        return Factors(scales, zeros if np.any(zeros) else None)
