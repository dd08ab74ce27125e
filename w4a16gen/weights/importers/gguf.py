"""GGUF's blocks of 4 bits: Q4_0, Q4_1 and Q4_K. Rows are stored one after the other, in blocks along K."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from w4a16gen.errors import InvalidValueError
from w4a16gen.weights.importers.mapped import shown_name
from w4a16gen.weights.importers.stored import (
    Double,
    Factors,
    Indices,
    StoredLayer,
    UnsupportedLayerError,
    check_matrix,
    expert_numbers,
)
from w4a16gen.weights.importers.tensors import DTYPES, Tensors
from w4a16gen.weights.quantized import MAX_Q, OFFSET, Nibbles

Bytes = np.ndarray
GROUP_SIZE = 32
BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q4_K": 144}
BLOCK_VALUES = {"Q4_0": 32, "Q4_1": 32, "Q4_K": 256}
DATA = {"Q4_0": 2, "Q4_1": 4, "Q4_K": 16}
"""The first byte of a block that holds values."""
_UNEVEN = ("IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4")
ROTATED = ("llama", "smollm3")
"""Architectures whose files hold the rows of attn_q and attn_k in the order of ggml's rotary embedding."""
_ENDING = ".weight"
MAX_LAYERS = 1 << 17


def stored_layers(tensors: Tensors) -> dict[str, Callable[[], StoredLayer]]:
    """Return what makes each layer of a GGUF file, by the tensor's name without `.weight`; an expert has its number.

    Raises:
        InvalidValueError: if there are too many.
    """
    found: dict[str, Callable[[], StoredLayer]] = {}
    for tensor, info in tensors.items():
        name = tensor.removesuffix(_ENDING)
        if info.dtype in DTYPES:
            continue
        for expert in expert_numbers(info.shape):
            layer = name if expert is None else f"{name}.{expert}"
            found[layer] = partial(GgufLayer, tensors, tensor, layer, expert)
        if len(found) > MAX_LAYERS:
            raise InvalidValueError(f"the file holds more than {MAX_LAYERS} matrices")
    return found


class GgufLayer(StoredLayer):
    """A matrix of a GGUF file, or one expert of several."""

    format = "gguf"

    def __init__(self, tensors: Tensors, tensor: str, name: str, expert: int | None) -> None:
        """Check the type and the shape of the tensor.

        Raises:
            UnsupportedLayerError: if its blocks are not of 4-bit integers.
        """
        info = tensors[tensor]
        self.tensor, self.type, self.expert = tensor, info.dtype, expert
        if info.dtype not in BLOCK_BYTES:
            why = "levels that are not evenly spaced" if info.dtype in _UNEVEN else "no 4-bit integers"
            raise UnsupportedLayerError(
                f"tensor {shown_name(tensor)} of type {info.dtype} holds {why}: leave it dense, dequantized with the "
                "gguf package, or quantize it to Q4_0"
            )
        check_matrix(tensor, info.shape, expert)
        n, k = info.shape[-2:]
        self.rows: Indices | None = None
        super().__init__(tensors, name, n, k, k // GROUP_SIZE)

    def with_rows(self, rows: Indices) -> GgufLayer:
        """Return the layer with its output channels in another order.

        Args:
            rows: the row of the file that each output channel takes, intp [n].

        Raises:
            InvalidValueError: if it does not name each row once.
        """
        if not np.array_equal(np.sort(rows), np.arange(self.n)):
            raise InvalidValueError(f"layer {shown_name(self.name)}: rows must name each of 0 to {self.n - 1} once")
        layer = GgufLayer(self.tensors, self.tensor, self.name, self.expert)
        layer.rows = rows
        return layer

    @property
    def tensor_names(self) -> set[str]:
        """Name of the tensor, and of the bias."""
        return {self.tensor, f"{self.module}.bias"}

    @property
    def note(self) -> str | None:
        """Return that rows are rotated, if they are."""
        architecture = self.tensors.metadata.get("general.architecture")
        if self.rows is None and self.name.endswith(("attn_q", "attn_k")) and architecture in ROTATED:
            return "rows are in the order of ggml's rotary embedding: permute them for models of transformers"
        return None

    def _blocks(self) -> Bytes:
        """Return the blocks, uint8 [n, blocks of a row, bytes of a block]."""
        rows = self.tensors.raw(self.tensor).reshape(
            -1, self.n, self.k // BLOCK_VALUES[self.type], BLOCK_BYTES[self.type]
        )
        blocks: Bytes = rows[self.expert or 0]
        return blocks if self.rows is None else blocks[self.rows]

    def bias(self) -> Double | None:
        """Return the bias, float64 [n], or None, in the order of the rows.

        Raises:
            InvalidValueError: if it has another shape, or is not finite.
        """
        bias = super().bias()
        return bias if bias is None or self.rows is None else bias[self.rows]

    def values(self) -> Nibbles:
        """Return q, uint8 [n, k]: of 32 bytes or 16, first the lower halves, then the upper ones."""
        data = self._blocks()[..., DATA[self.type] :]
        chunks = data.reshape(self.n, -1, GROUP_SIZE if self.type == "Q4_K" else GROUP_SIZE // 2)
        return np.stack([chunks & MAX_Q, chunks >> 4], axis=-2).reshape(self.n, self.k)

    def is_symmetric(self) -> bool:
        """Return whether the type has no minima."""
        return self.type == "Q4_0"

    def factors(self) -> Factors:
        """Return scales and zeros."""
        blocks = self._blocks()
        scales = _halves(blocks, 0)
        if self.type == "Q4_0":
            return Factors(scales.T, None)
        minima = _halves(blocks, 2)
        if self.type == "Q4_1":
            return Factors(scales.T, (minima + OFFSET * scales).T)
        of_scales, of_minima = _six_bits(blocks[..., 4:16])
        scales = (scales[..., None] * of_scales).reshape(self.n, -1)
        minima = (minima[..., None] * of_minima).reshape(self.n, -1)
        note = "scales are products of a half and 6 bits: fp16 rounds them"
        return Factors(scales.T, (OFFSET * scales - minima).T, (note,))


def rotated_rows(n: int, heads: int) -> Indices:
    """Return the rows of attn_q or attn_k in the order that models of transformers have.

    Files hold the two halves of a head's rotary pairs side by side: row 2 j + s of a head is row s * d / 2 + j of the
    model's, for a head of d rows.

    Args:
        n: rows.
        heads: heads that they belong to.

    Returns:
        The row of the file for each row of the model, intp [n].

    Raises:
        InvalidValueError: if the rows are no heads of an even size.
    """
    if heads <= 0 or n % (2 * heads) != 0:
        raise InvalidValueError(f"{n} rows cannot be {heads} heads of an even size")
    return np.arange(n).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _halves(blocks: Bytes, place: int) -> Double:
    """Return the halves at a place of each block, float64 [n, blocks of a row]."""
    return np.ascontiguousarray(blocks[..., place : place + 2]).view("<f2")[..., 0].astype(np.float64)


def _six_bits(packed: Bytes) -> tuple[Double, Double]:
    """Return the factors of scales and of minima, float64 [..., 8] each, out of uint8 [..., 12]."""
    first, second, third = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = np.concatenate([first & 63, (third & 15) | (first >> 6) << 4], axis=-1)
    minima = np.concatenate([second & 63, (third >> 4) | (second >> 6) << 4], axis=-1)
    return scales.astype(np.float64), minima.astype(np.float64)
