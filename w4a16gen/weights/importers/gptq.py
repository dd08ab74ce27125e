"""GPTQ's packing: eight 4-bit values along K in an int32."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from w4a16gen.weights.quantized import Nibbles


def gptq_words(q: Nibbles, axis: int) -> npt.NDArray[np.int32]:
    """Pack eight values of 0 to 15 along an axis into an int32, the first lowest, as GPTQ's checkpoints do."""
    moved = np.moveaxis(q, axis, -1)
    eights = moved.reshape(*moved.shape[:-1], -1, 8).astype(np.uint32)
    words = (eights << np.arange(0, 32, 4, dtype=np.uint32)).sum(axis=-1, dtype=np.uint32)
    return np.ascontiguousarray(np.moveaxis(words, -1, axis)).view(np.int32)
