"""AWQ's packings `gemm`, `gemv` and `gemv_fast`. Zero points are stored as they are, and there is no act-order.

- gemm: `qweight` int32 [k, n / 8], `qzeros` int32 [groups, n / 8], channels in the order 0 2 4 6 1 3 5 7 in a word;
  `scales` [groups, n].
- gemv: `qweight` int32 [n, k / 8], `qzeros` int32 [n, words], `scales` [n, 8 * words], groups in natural order; words
  is groups / 8, rounded up to a multiple of 1, 2 or 4.
- gemv_fast: `qweight` int16 [n / 4, k], shuffled; `scales` and `qzeros` [8 * words, n], qzeros multiplied and negated:
  -(scale * zero point).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from w4a16gen.errors import InvalidValueError
from w4a16gen.weights.importers import marlin
from w4a16gen.weights.importers.config import layer_names, number, text
from w4a16gen.weights.importers.mapped import shown_name
from w4a16gen.weights.importers.stored import Factors, StoredLayer, zeros_of_points
from w4a16gen.weights.importers.tensors import FLOATS, INTEGERS, Tensors
from w4a16gen.weights.importers.words import nibbles
from w4a16gen.weights.quantized import MAX_Q, OFFSET, Nibbles

PARTS = ("qweight", "qzeros", "scales")
PER_WORD = 8
STRIDE = 64
"""Values of K that gemv_fast takes from each of four rows in turn."""
CHANNEL_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)
NIBBLE_OF_CHANNEL = tuple(CHANNEL_OF_NIBBLE.index(channel) for channel in range(PER_WORD))


def stored_layers(tensors: Tensors, config: dict[str, Any]) -> dict[str, Callable[[], StoredLayer]]:
    """Return what makes each layer of an AWQ checkpoint, by the layer's name.

    Raises:
        InvalidValueError: if the configuration names an unknown version.
    """
    version = text(config, "version", "gemm")
    if version == "marlin":
        return marlin.stored_layers(tensors, "qweight", "scales", "awq-marlin")
    names = layer_names(tensors, "qweight")
    if version in {"gemm", "exllama"}:
        return {name: partial(AwqGemmLayer, tensors, name) for name in names}
    size = number(config, ("group_size", "q_group_size"), 128) or 128
    if version == "gemv":
        return {name: partial(AwqGemvLayer, tensors, name, size) for name in names}
    if version == "gemv_fast":
        return {name: partial(AwqGemvFastLayer, tensors, name, size) for name in names}
    raise InvalidValueError(f"AWQ version {shown_name(version)} must be gemm, gemv, gemv_fast or marlin")


def channels(words: np.ndarray) -> Nibbles:
    """Return the channels of words in AWQ's order: integers [rows, n / 8] to uint8 [rows, n]."""
    return nibbles(words).reshape(len(words), -1, PER_WORD)[..., NIBBLE_OF_CHANNEL].reshape(len(words), -1)


def groups_of(k: int, group_size: int) -> int:
    """Return the groups of k values; a group size of -1 stands for k."""
    return max(1, -(-k // group_size)) if group_size > 0 else 1


def padded_groups(groups: int, group_size: int) -> int:
    """Return the groups that gemv stores: whole words, a multiple of 1, 2 or 4 of them."""
    multiple = 1 if group_size <= 0 or group_size >= 128 else 2 if group_size == 64 else 4  # noqa: PLR2004
    words = -(-groups // PER_WORD)
    return -(-words // multiple) * multiple * PER_WORD


class _WithZeroPoints(StoredLayer):
    """A layer that stores integer zero points."""

    def zero_points(self) -> Nibbles:
        """Return the zero points, uint8 [groups, n]."""
        raise NotImplementedError

    def scales(self) -> np.ndarray:
        """Return the scales, float64 [groups, n]."""
        raise NotImplementedError

    def is_symmetric(self) -> bool:
        """Return whether all zero points are 8."""
        return bool((self.zero_points() == OFFSET).all())

    def factors(self) -> Factors:
        """Return scales and zeros."""
        scales, points = self.scales(), self.zero_points()
        return Factors(scales, None if (points == OFFSET).all() else zeros_of_points(points, scales))


class AwqGemmLayer(_WithZeroPoints):
    """A layer of AWQ's version `gemm`."""

    format = "awq-gemm"
    parts = PARTS

    def __init__(self, tensors: Tensors, name: str) -> None:
        """Check the headers of a layer.

        Raises:
            InvalidValueError: if they contradict each other.
        """
        k, words = tensors.need(f"{name}.qweight", INTEGERS, (None, None))
        groups, n = tensors.need(f"{name}.scales", FLOATS, (None, words * PER_WORD))
        if f"{name}.qzeros" in tensors:
            tensors.need(f"{name}.qzeros", INTEGERS, (groups, words))
        super().__init__(tensors, name, n, k, groups)

    def values(self) -> Nibbles:
        """Return q, uint8 [n, k]."""
        return np.ascontiguousarray(channels(self.tensors.array(f"{self.name}.qweight")).T)

    def zero_points(self) -> Nibbles:
        """Return the zero points; all 8 if the layer has none."""
        name = f"{self.name}.qzeros"
        if name not in self.tensors:
            return np.full((self.groups, self.n), OFFSET, np.uint8)
        return channels(self.tensors.array(name))

    def scales(self) -> np.ndarray:
        """Return the scales."""
        return self.tensors.double(f"{self.name}.scales")


class AwqGemvLayer(_WithZeroPoints):
    """A layer of AWQ's version `gemv`."""

    format = "awq-gemv"
    parts = PARTS

    def __init__(self, tensors: Tensors, name: str, group_size: int) -> None:
        """Check the headers of a layer.

        Raises:
            InvalidValueError: if they contradict each other.
        """
        n, words = tensors.need(f"{name}.qweight", INTEGERS, (None, None))
        k = words * PER_WORD
        groups = groups_of(k, group_size)
        stored = padded_groups(groups, group_size)
        tensors.need(f"{name}.scales", FLOATS, (n, stored))
        tensors.need(f"{name}.qzeros", INTEGERS, (n, stored // PER_WORD))
        super().__init__(tensors, name, n, k, groups)

    def values(self) -> Nibbles:
        """Return q, uint8 [n, k]."""
        return nibbles(self.tensors.array(f"{self.name}.qweight"))

    def zero_points(self) -> Nibbles:
        """Return the zero points."""
        return np.ascontiguousarray(nibbles(self.tensors.array(f"{self.name}.qzeros"))[:, : self.groups].T)

    def scales(self) -> np.ndarray:
        """Return the scales."""
        return self.tensors.double(f"{self.name}.scales")[:, : self.groups].T


class AwqGemvFastLayer(StoredLayer):
    """A layer of AWQ's version `gemv_fast`, which is also the second version of llm-awq."""

    format = "awq-gemv_fast"
    parts = PARTS

    def __init__(self, tensors: Tensors, name: str, group_size: int) -> None:
        """Check the headers of a layer.

        Raises:
            InvalidValueError: if they contradict each other.
        """
        fours, k = tensors.need(f"{name}.qweight", ("I16", "U16"), (None, None))
        n = 4 * fours
        if k % STRIDE != 0:
            raise InvalidValueError(f"layer {shown_name(name)}: k = {k} of gemv_fast must be a multiple of {STRIDE}")
        groups = groups_of(k, group_size)
        for part in ("scales", "qzeros"):
            tensors.need(f"{name}.{part}", FLOATS, (padded_groups(groups, group_size), n))
        super().__init__(tensors, name, n, k, groups)

    def values(self) -> Nibbles:
        """Return q, uint8 [n, k]."""
        stored = nibbles(self.tensors.array(f"{self.name}.qweight")).reshape(self.n // 4, self.k // STRIDE, 4, STRIDE)
        rows = stored.transpose(0, 2, 1, 3).reshape(self.n, self.k)
        halves = rows.reshape(self.n, -1, 2, 4).swapaxes(-1, -2)  # even and odd values of each eight
        runs = halves.reshape(self.n, -1, 4, 4, 2).swapaxes(-2, -3)
        return np.ascontiguousarray(runs.reshape(self.n, self.k))

    def _parts(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the scales and the products -(scale * zero point), float64 [groups, n]."""
        scales, products = (self.tensors.double(f"{self.name}.{part}")[: self.groups] for part in ("scales", "qzeros"))
        return scales, products

    def _zero_points(self) -> Nibbles | None:
        """Return the integers that the products come from, or None if they come from no integers of 0 to 15."""
        scales, products = self._parts()
        with np.errstate(divide="ignore", invalid="ignore"):
            points = np.where(scales == 0, OFFSET, np.rint(-products / scales))
        if not ((points >= 0) & (points <= MAX_Q)).all():
            return None
        expected = -(scales.astype(np.float16) * points.astype(np.float16))
        close = np.abs(expected.astype(np.float64) - products) <= 2.0**-10 * np.abs(products) + 2.0**-24
        return points.astype(np.uint8) if close.all() else None

    def is_symmetric(self) -> bool:
        """Return whether all zero points are 8."""
        points = self._zero_points()
        return points is not None and bool((points == OFFSET).all())

    def factors(self) -> Factors:
        """Return scales and zeros, from the integers that were multiplied if they can be recovered."""
        scales, products = self._parts()
        points = self._zero_points()
        if points is None:
            note = "qzeros are no multiples of the scales: they are used as they are"
            return Factors(scales, OFFSET * scales + products, (note,))
        return Factors(scales, None if (points == OFFSET).all() else zeros_of_points(points, scales))
