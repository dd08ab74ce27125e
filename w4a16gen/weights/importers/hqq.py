"""HQQ with groups along K (axis 1), as safetensors files hold it.

Tensors of a layer: `W_q` uint8 [n * k / group size / 2, group size], with the first half of the rows in the upper bits;
`scale` and `zero` [n * k / group size, 1], of any float type; `shape` (n, k), and settings as tensors of one value.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from w4a16gen.errors import InvalidValueError
from w4a16gen.weights.importers.config import layer_names, number, section
from w4a16gen.weights.importers.mapped import shown_name
from w4a16gen.weights.importers.stored import Factors, StoredLayer, UnsupportedLayerError
from w4a16gen.weights.importers.tensors import DTYPES, FLOATS, Tensors
from w4a16gen.weights.quantized import MAX_Q, OFFSET, Nibbles

PACKING = "4bit_u8"
BITS = 4
_MAX_TEXT = 64


def stored_layers(tensors: Tensors, config: dict[str, Any]) -> dict[str, Callable[[], StoredLayer]]:
    """Return what makes each layer of an HQQ checkpoint, by the layer's name."""
    settings = section(section(config, "quant_config"), "weight_quant_params")
    return {name: partial(HqqLayer, tensors, name, settings) for name in layer_names(tensors, "W_q")}


class HqqLayer(StoredLayer):
    """A layer of HQQ, 4 bits, axis 1."""

    format = "hqq"
    parts = (
        *("W_q", "scale", "zero", "shape", "nbits", "axis", "group_size", "packing", "compute_dtype", "view_as_float"),
        *("unpack_view_dtype", "quant_scale", "quant_zero", "channel_wise", "optimize", "round_zero", "offload_meta"),
        *("encoded_state_dict", "stores_quant_config"),
    )

    def __init__(self, tensors: Tensors, name: str, settings: dict[str, Any]) -> None:
        """Check the headers and the settings of a layer.

        Raises:
            InvalidValueError: if they contradict each other.
        """
        self.tensors, self.name = tensors, name
        self._refuse(settings)
        tensors.need(f"{name}.shape", ("I64", "I32"), (2,))
        n, k = (int(size) for size in tensors.array(f"{name}.shape"))
        rows, _ = tensors.need(f"{name}.scale", FLOATS, (None, 1))
        tensors.need(f"{name}.zero", FLOATS, (rows, 1))
        stored = tensors.need(f"{name}.W_q", tuple(DTYPES), (None, None))
        if n <= 0 or k <= 0 or rows % n != 0 or rows % 2 != 0 or tensors[f"{name}.W_q"].size * 2 != n * k:
            raise InvalidValueError(
                f"layer {shown_name(name)}: W_q of shape {list(stored)} with {rows} scales does not fit shape {[n, k]}"
            )
        super().__init__(tensors, name, n, k, rows // n)

    def _setting(self, part: str, settings: dict[str, Any], default: int) -> int:
        """Return an integer setting of the layer, out of its tensors, or else of the configuration."""
        tensor = f"{self.name}.{part}"
        if tensor in self.tensors:
            self.tensors.need(tensor, ("U8", "I32", "I64", "BOOL"), ())
            return int(self.tensors.array(tensor))
        return number(settings, (part,), default) or 0

    def _refuse(self, settings: dict[str, Any]) -> None:
        """Raise if the layer has another number of bits, another axis, or factors that are quantized themselves."""
        layer = f"layer {shown_name(self.name)}"
        bits = self._setting("nbits", settings, BITS)
        if bits != BITS:
            raise UnsupportedLayerError(f"{layer} has {bits} bits, not 4: quantize it with nbits=4")
        if (axis := self._setting("axis", settings, 1)) != 1:
            raise UnsupportedLayerError(
                f"{layer} has axis {axis}: its groups run across rows, and kernels need them along K: "
                "quantize it with axis=1"
            )
        if self._setting("quant_scale", {}, 0) or self._setting("quant_zero", {}, 0):
            raise UnsupportedLayerError(
                f"{layer} quantizes its own scales or zeros: quantize it with quant_scale=False and quant_zero=False"
            )
        packing = self._packing()
        if packing != PACKING:
            raise UnsupportedLayerError(
                f"{layer} is packed as {shown_name(packing)}, not {PACKING}: quantize it with nbits=4"
            )

    def _packing(self) -> str:
        """Return the name of the packing, which is stored as the codes of its letters."""
        tensor = f"{self.name}.packing"
        if tensor not in self.tensors:
            return PACKING
        (length,) = self.tensors.need(tensor, ("U8",), (None,))
        return self.tensors.array(tensor)[: min(length, _MAX_TEXT)].tobytes().decode("latin-1")

    def values(self) -> Nibbles:
        """Return q, uint8 [n, k]; the bytes may be stored as floats."""
        data = self.tensors.raw(f"{self.name}.W_q")
        return np.concatenate([data >> 4, data & MAX_Q]).reshape(self.n, self.k)

    def is_symmetric(self) -> bool:
        """Return whether all zero points are 8."""
        return bool((self.tensors.double(f"{self.name}.zero") == OFFSET).all())

    def factors(self) -> Factors:
        """Return scales and zeros; zero points are floats."""
        parts = (self.tensors.double(f"{self.name}.{part}").reshape(self.n, -1).T for part in ("scale", "zero"))
        scales, points = parts
        return Factors(scales, None if self.is_symmetric() else (OFFSET - points) * scales)
