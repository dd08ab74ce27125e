"""The form of GPTQ and AWQ weights that Marlin's kernels read: symmetric, tiles of 16 x 16, shuffled.

Tensors of a layer: the words int32 [k / 16, 2 n], and the scales [groups, n]. GPTQ calls them `B` and `s`, AWQ
`qweight` and `scales`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from w4a16gen.errors import InvalidValueError
from w4a16gen.weights.importers.config import layer_names
from w4a16gen.weights.importers.mapped import shown_name
from w4a16gen.weights.importers.stored import Factors, Indices, StoredLayer
from w4a16gen.weights.importers.tensors import FLOATS, INTEGERS, Tensors
from w4a16gen.weights.importers.words import nibbles
from w4a16gen.weights.quantized import Nibbles

TILE = 16
ROW = 1024
"""Values that are shuffled together: four tiles."""
NIBBLE_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
K_MULTIPLE, N_MULTIPLE = 128, 256


def value_order() -> Indices:
    """Return the place in four tiles of each stored value, intp [1024]."""
    places: list[int] = []
    for thread in range(32):
        column, first = divmod(thread, 4)
        rows = (2 * first, 2 * first + 1, 2 * first + 8, 2 * first + 9)
        of_tile = [TILE * row + column + 8 * block for block in (0, 1) for row in rows]
        places += [place + TILE * TILE * tile for tile in range(4) for place in of_tile]
    return np.array(places).reshape(-1, 8)[:, NIBBLE_ORDER].reshape(-1)


def scale_order(*, grouped: bool) -> Indices:
    """Return the channel of each stored scale within a period: intp [64], or [32] with one scale per channel."""
    if grouped:
        return np.array([i + 8 * j for i in range(8) for j in range(8)])
    return np.array([2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)])


def stored_layers(tensors: Tensors, words: str, scales: str, name: str) -> dict[str, Callable[[], StoredLayer]]:
    """Return what makes each layer, by the layer's name.

    Args:
        tensors: the checkpoint's tensors.
        words: last part of the name of the words.
        scales: last part of the name of the scales.
        name: name of the format.
    """
    kind = type("MarlinLayerOf", (MarlinLayer,), {"format": name})
    return {layer: partial(kind, tensors, layer, words, scales) for layer in layer_names(tensors, words)}


class MarlinLayer(StoredLayer):
    """A layer in Marlin's form."""

    format = "marlin"
    parts = ("B", "s", "qweight", "scales", "qzeros", "g_idx", "workspace")

    def __init__(self, tensors: Tensors, name: str, words: str, scales: str) -> None:
        """Check the headers of a layer.

        Raises:
            InvalidValueError: if they contradict each other.
        """
        self.words, self.scales = f"{name}.{words}", f"{name}.{scales}"
        groups, n = tensors.need(self.scales, FLOATS, (None, None))
        rows, _ = tensors.need(self.words, INTEGERS, (None, 2 * n))
        if n % N_MULTIPLE != 0 or rows * TILE % K_MULTIPLE != 0:
            raise InvalidValueError(
                f"layer {shown_name(name)}: n = {n} and k = {rows * TILE} of Marlin's form must be multiples of "
                f"{N_MULTIPLE} and {K_MULTIPLE}"
            )
        super().__init__(tensors, name, n, rows * TILE, groups)

    def values(self) -> Nibbles:
        """Return q, uint8 [n, k]."""
        stored = nibbles(self.tensors.array(self.words)).reshape(-1, ROW)
        tiles = np.empty_like(stored)
        tiles[:, value_order()] = stored
        blocks = tiles.reshape(self.k // TILE, self.n // TILE, TILE, TILE)
        return np.ascontiguousarray(blocks.transpose(1, 3, 0, 2).reshape(self.n, self.k))

    def is_symmetric(self) -> bool:
        """Return true: Marlin's form has no zeros."""
        return True

    def factors(self) -> Factors:
        """Return the scales."""
        order = scale_order(grouped=self.groups > 1)
        stored = self.tensors.double(self.scales).reshape(-1, len(order))
        scales = np.empty_like(stored)
        scales[:, order] = stored
        return Factors(scales.reshape(self.groups, self.n), None)
