"""ModelOpt's int4_awq: 4-bit integers, and a factor for each activation.

Tensors of a layer: `weight` uint8 [n / 2, k], rows 2j in the lower bits and 2j + 1 in the upper ones, two's complement;
`weight_scale` [n, groups], and perhaps `pre_quant_scale` [k], which multiplies the activations.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from w4a16gen.errors import InvalidValueError
from w4a16gen.weights.importers.config import layer_names, text
from w4a16gen.weights.importers.mapped import shown_name
from w4a16gen.weights.importers.stored import Factors, StoredLayer, UnsupportedLayerError
from w4a16gen.weights.importers.tensors import FLOATS, Tensors
from w4a16gen.weights.importers.words import SIGN_BIT
from w4a16gen.weights.quantized import MAX_Q, Nibbles

ALGORITHM = "w4a16_awq"
_MATRIX = 2


def stored_layers(tensors: Tensors, config: dict[str, Any]) -> dict[str, Callable[[], StoredLayer]]:
    """Return what makes each layer of a ModelOpt checkpoint, by the layer's name.

    Raises:
        InvalidValueError: if it was quantized with another algorithm.
    """
    algorithm = text(config, "quant_algo", "missing")
    if algorithm not in {ALGORITHM, "mixed_precision"}:
        raise InvalidValueError(
            f"ModelOpt's quant_algo {shown_name(algorithm)} must be {ALGORITHM.upper()}: others hold no 4-bit "
            "integers, or quantize activations too"
        )
    names = [name for name in layer_names(tensors, "weight_scale") if f"{name}.weight" in tensors]
    return {name: partial(ModelOptLayer, tensors, name) for name in names}


class ModelOptLayer(StoredLayer):
    """A layer of ModelOpt's int4_awq."""

    format = "modelopt-int4_awq"
    parts = ("weight", "weight_scale", "pre_quant_scale")

    def __init__(self, tensors: Tensors, name: str) -> None:
        """Check the headers of a layer.

        Raises:
            InvalidValueError: if they contradict each other.
        """
        info = tensors[f"{name}.weight"]
        if len(info.shape) != _MATRIX or info.dtype != "U8" or f"{name}.weight_scale_2" in tensors:
            raise UnsupportedLayerError(
                f"layer {shown_name(name)}: weight of dtype {info.dtype} and shape {list(info.shape)} is not "
                "int4_awq's uint8 [n / 2, k]: export experts one by one, and other formats as int4_awq"
            )
        pairs, k = tensors.need(f"{name}.weight", ("U8",), (None, None))
        _, groups = tensors.need(f"{name}.weight_scale", FLOATS, (2 * pairs, None))
        super().__init__(tensors, name, 2 * pairs, k, groups)

    @property
    def input_scale_name(self) -> str | None:
        """Name of the factors of the activations."""
        return f"{self.name}.pre_quant_scale"

    def values(self) -> Nibbles:
        """Return q, uint8 [n, k]."""
        data = self.tensors.array(f"{self.name}.weight")
        values: Nibbles = np.stack([data & MAX_Q, data >> 4], axis=1).reshape(self.n, self.k)
        return values ^ SIGN_BIT

    def is_symmetric(self) -> bool:
        """Return true: the format has no zeros."""
        return True

    def factors(self) -> Factors:
        """Return the scales."""
        return Factors(self.tensors.double(f"{self.name}.weight_scale").T, None)
