"""Torchao's Int4Tensor (plain) and Int4TilePackedTo4dTensor, as its safetensors files hold them.

- plain: `_weight_qdata` int8 [n, k / 2], two's complement, even k in the lower bits; `_weight_scale` and
  `_weight_zero_point` [groups, n], the latter added to the product.
- tile packed: `_weight_qdata` int32 [n / 8, k / 128, 32, 4], k padded to 1024 and n to 8; `_weight_scale_and_zero`
  [groups, n, 2].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from w4a16gen.errors import InvalidValueError
from w4a16gen.weights.importers.config import layer_names, section
from w4a16gen.weights.importers.mapped import parse_json, shown_name
from w4a16gen.weights.importers.stored import Factors, StoredLayer, UnsupportedLayerError
from w4a16gen.weights.importers.tensors import FLOATS, Tensors
from w4a16gen.weights.importers.words import SIGN_BIT, nibbles
from w4a16gen.weights.quantized import Nibbles, unpack_nibbles

_QDATA = "_weight_qdata"


def stored_layers(tensors: Tensors) -> dict[str, Callable[[], StoredLayer]]:
    """Return what makes each layer of a torchao checkpoint, by the layer's name."""
    found: dict[str, Callable[[], StoredLayer]] = {}
    for name in layer_names(tensors, _QDATA):
        kind, attributes = _described(tensors, name)
        if kind == "Int4Tensor":
            found[name] = partial(TorchaoPlainLayer, tensors, name)
        elif kind == "Int4TilePackedTo4dTensor":
            found[name] = partial(TorchaoTileLayer, tensors, name, attributes.get("shape"))
        else:
            found[name] = partial(_refuse, name, kind)
    return found


def _described(tensors: Tensors, name: str) -> tuple[str, dict[str, Any]]:
    """Return the class and the attributes of a weight, out of the metadata, or else by its tensors."""
    text = tensors.metadata.get(f"{name}.weight")
    if isinstance(text, str):
        facts = parse_json(text.encode(), f"the metadata of layer {shown_name(name)}")
        return str(facts.get("_type")), section(facts, "_data")
    return "Int4TilePackedTo4dTensor" if f"{name}._weight_scale_and_zero" in tensors else "Int4Tensor", {}


def _refuse(name: str, kind: str) -> StoredLayer:
    """Raise for another class of weight."""
    raise UnsupportedLayerError(
        f"layer {shown_name(name)} is a torchao {shown_name(kind)}, which has an undocumented order or no 4-bit "
        'integers: quantize it with Int4WeightOnlyConfig(int4_packing_format="plain")'
    )


class _TorchaoLayer(StoredLayer):
    """What both classes share."""

    parts = tuple(f"_weight_{part}" for part in ("qdata", "scale", "zero_point", "scale_and_zero", "act_pre_scale"))

    @property
    def input_scale_name(self) -> str | None:
        """Name of the factors of the activations."""
        return f"{self.name}._weight_act_pre_scale"

    def is_symmetric(self) -> bool:
        """Return whether all zeros are 0."""
        zeros = self.factors().zeros
        return zeros is None or not zeros.any()


class TorchaoPlainLayer(_TorchaoLayer):
    """A weight of the class Int4Tensor."""

    format = "torchao-plain"

    def __init__(self, tensors: Tensors, name: str) -> None:
        """Check the headers of a layer.

        Raises:
            InvalidValueError: if they contradict each other.
        """
        n, half = tensors.need(f"{name}.{_QDATA}", ("I8", "U8"), (None, None))
        groups, _ = tensors.need(f"{name}._weight_scale", FLOATS, (None, n))
        tensors.need(f"{name}._weight_zero_point", FLOATS, (groups, n))
        super().__init__(tensors, name, n, 2 * half, groups)

    def values(self) -> Nibbles:
        """Return q, uint8 [n, k]."""
        return unpack_nibbles(self.tensors.array(f"{self.name}.{_QDATA}").view(np.uint8)) ^ SIGN_BIT

    def factors(self) -> Factors:
        """Return scales and zeros."""
        zeros = self.tensors.double(f"{self.name}._weight_zero_point")
        return Factors(self.tensors.double(f"{self.name}._weight_scale"), zeros if zeros.any() else None)


class TorchaoTileLayer(_TorchaoLayer):
    """A weight of the class Int4TilePackedTo4dTensor."""

    format = "torchao-tile_packed"

    def __init__(self, tensors: Tensors, name: str, shape: Any) -> None:
        """Check the headers of a layer.

        Raises:
            InvalidValueError: if they contradict each other.
        """
        eights, blocks, _, _ = tensors.need(f"{name}.{_QDATA}", ("I32",), (None, None, 32, 4))
        padded_n, padded_k = 8 * eights, 128 * blocks
        groups, _, _ = tensors.need(f"{name}._weight_scale_and_zero", FLOATS, (None, padded_n, 2))
        n, k = _true_shape(name, shape, (padded_n, padded_k))
        size, rest = divmod(padded_k, groups)
        if rest or k % size != 0:
            raise UnsupportedLayerError(f"layer {shown_name(name)}: {groups} groups do not divide k = {k}")
        super().__init__(tensors, name, n, k, k // size)

    def values(self) -> Nibbles:
        """Return q, uint8 [n, k]."""
        words = self.tensors.array(f"{self.name}.{_QDATA}")
        eights, blocks = words.shape[:2]
        parts = nibbles(words).reshape(eights, blocks, 8, 4, 4, 2, 4)  # row, column, word, odd k, step of 4 columns
        rows = parts.transpose(0, 2, 1, 4, 6, 3, 5).reshape(8 * eights, 128 * blocks)
        return np.ascontiguousarray(rows[: self.n, : self.k])

    def factors(self) -> Factors:
        """Return scales and zeros."""
        both = self.tensors.double(f"{self.name}._weight_scale_and_zero")[: self.groups, : self.n]
        zeros = both[..., 1]
        return Factors(both[..., 0], zeros if zeros.any() else None)


def _true_shape(name: str, shape: Any, padded: tuple[int, int]) -> tuple[int, int]:
    """Return n and k without padding: those of the metadata, or the padded ones if it has none."""
    if shape is None:
        return padded
    is_pair = isinstance(shape, list) and len(shape) == 2 and all(type(size) is int for size in shape)  # noqa: PLR2004
    if not is_pair or not all(0 < size <= most for size, most in zip(shape, padded, strict=True)):
        raise InvalidValueError(
            f"layer {shown_name(name)}: its shape of {shown_name(shape)} must be at most {list(padded)}"
        )
    return int(shape[0]), int(shape[1])
