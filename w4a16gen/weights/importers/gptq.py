"""GPTQ's packing: eight 4-bit values along K in an int32, zero points in two versions, and act-order.

Tensors of a layer: `qweight` int32 [k / 8, n], `qzeros` int32 [groups, n / 8], `scales` [groups, n], and `g_idx`
int32 [k], the group of each value of K. Words of other widths hold more or fewer values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from w4a16gen.errors import InvalidValueError
from w4a16gen.weights.importers.config import flag, layer_names, number, text
from w4a16gen.weights.importers.mapped import shown_name
from w4a16gen.weights.importers.stored import Factors, StoredLayer, UnsupportedLayerError, zeros_of_points
from w4a16gen.weights.importers.tensors import FLOATS, INTEGERS, Tensors
from w4a16gen.weights.importers.words import nibbles, values_per_word
from w4a16gen.weights.quantized import MAX_Q, OFFSET, Nibbles

WORDS = (*INTEGERS, "I64", "I16", "I8", "U8")
BITS = 4
ONE_IN_EACH_NIBBLE = 0x11
VERSIONS = {"gptq": 1, "gptq_v2": 2, "gptq_p": 2}
"""The version of the zero points by `checkpoint_format`; words of 4 bits are the same in all."""


def gptq_words(q: Nibbles, axis: int) -> npt.NDArray[np.int32]:
    """Pack eight values of 0 to 15 along an axis into an int32, the first lowest, as GPTQ's checkpoints do."""
    moved = np.moveaxis(q, axis, -1)
    eights = moved.reshape(*moved.shape[:-1], -1, 8).astype(np.uint32)
    words = (eights << np.arange(0, 32, 4, dtype=np.uint32)).sum(axis=-1, dtype=np.uint32)
    return np.ascontiguousarray(np.moveaxis(words, -1, axis)).view(np.int32)


@dataclass(frozen=True)
class ZeroPointRules:
    """How a checkpoint stores zero points.

    Attributes:
        version: 1 if the file stores zero point - 1, 2 if it stores the zero point.
        carries: whether 1 was subtracted from each nibble of a word with borrows, as GPTQModel does.
        symmetric: whether the configuration says that all zero points are 8.
        clamped: whether the writer stored zero point 0 as 1, as AutoRound does in version 1.
        bits: bits of a value that the configuration names, for layers whose tensors do not show them.
    """

    version: int
    carries: bool = False
    symmetric: bool = True
    clamped: bool = False
    bits: int = BITS


def rules_of(config: dict[str, Any]) -> ZeroPointRules:
    """Return the rules of zero points of a GPTQ configuration.

    Raises:
        InvalidValueError: if it names an unknown form.
    """
    meta = config.get("meta")
    writers = meta.get("quantizer") if isinstance(meta, dict) else None
    writer = str(writers[0] if isinstance(writers, list) and writers else writers).lower()
    label = text(config, "checkpoint_format", "gptq")
    if label not in VERSIONS:
        raise InvalidValueError(
            f"checkpoint_format {shown_name(label)} must be marlin or one of {', '.join(VERSIONS)}: "
            "save the model in the format gptq"
        )
    version = VERSIONS[label]
    return ZeroPointRules(
        version,
        carries=version == 1 and writer.startswith("gptqmodel"),
        symmetric=flag(config, "sym", default=True),
        clamped=version == 1 and writer.startswith("auto"),
        bits=number(config, ("bits",), BITS) or BITS,
    )


def stored_layers(tensors: Tensors, rules: ZeroPointRules) -> dict[str, Callable[[], StoredLayer]]:
    """Return what makes each layer of a GPTQ checkpoint, by the layer's name."""
    return {name: partial(GptqLayer, tensors, name, rules) for name in layer_names(tensors, "qweight")}


class GptqLayer(StoredLayer):
    """A layer of GPTQ, version 1 or 2."""

    format = "gptq"
    parts = ("qweight", "qzeros", "scales", "g_idx")

    def __init__(self, tensors: Tensors, name: str, rules: ZeroPointRules) -> None:
        """Check the headers of a layer.

        Raises:
            InvalidValueError: if they contradict each other.
        """
        rows, n = tensors.need(f"{name}.qweight", WORDS, (None, None))
        groups, _ = tensors.need(f"{name}.scales", FLOATS, (None, n))
        per_word = tensors[f"{name}.qweight"].size // (rows * n) * 2
        self.rules = rules
        k = rows * per_word
        super().__init__(tensors, name, n, k, groups)
        self._check_zeros(per_word)
        if f"{name}.g_idx" in tensors:
            tensors.need(f"{name}.g_idx", ("I32", "I64"), (k,))

    def _check_zeros(self, per_word: int) -> None:
        """Raise unless the zero points are those of 4-bit values."""
        name = f"{self.name}.qzeros"
        bits: float = self.rules.bits
        if name in self.tensors or not self.rules.symmetric:
            _, columns = self.tensors.need(name, WORDS, (self.groups, None))
            bits = BITS if columns == -(-self.n // per_word) else columns * per_word * BITS / self.n
        if bits != BITS:
            raise UnsupportedLayerError(
                f"layer {shown_name(self.name)} has {bits:.3g} bits, not 4: the kernels read 4-bit values only; "
                "quantize it to 4 bits, or leave it dense"
            )

    @property
    def note(self) -> str | None:
        """Return that activations must be permuted, if they must."""
        return None if self.permutation() is None else "act-order: gather the activations in the order of permutation"

    def values(self) -> Nibbles:
        """Return q, uint8 [n, k]."""
        return nibbles(self.tensors.array(f"{self.name}.qweight").T)

    def group_index(self) -> npt.NDArray[np.int64] | None:
        """Return g_idx."""
        if f"{self.name}.g_idx" not in self.tensors:
            return None
        return self.tensors.array(f"{self.name}.g_idx").astype(np.int64)

    def is_symmetric(self) -> bool:
        """Return whether all zero points are 8."""
        points, _ = self.zero_points()
        return bool((points == OFFSET).all())

    def factors(self) -> Factors:
        """Return scales and zeros."""
        scales = self.tensors.double(f"{self.name}.scales")
        points, notes = self.zero_points()
        zeros = None if (points == OFFSET).all() else zeros_of_points(points, scales)
        return Factors(scales, zeros, notes)

    def zero_points(self) -> tuple[Nibbles, tuple[str, ...]]:
        """Return the zero points, uint8 [groups, n], and what is odd about them."""
        name = f"{self.name}.qzeros"
        if name not in self.tensors:
            return np.full((self.groups, self.n), OFFSET, np.uint8), ("no qzeros: all zero points are 8",)
        words = self.tensors.array(name)
        return decode_zero_points(words, self.n, self.rules)


def decode_zero_points(words: npt.NDArray[Any], n: int, rules: ZeroPointRules) -> tuple[Nibbles, tuple[str, ...]]:
    """Return the zero points of packed words, and what is odd about them.

    Args:
        words: integers [groups, words of n values].
        n: output channels.
        rules: how the file stores zero points.

    Returns:
        uint8 [groups, n], 0 to 15, and one sentence for each doubt.
    """
    fields = nibbles(words)[:, :n]
    if rules.symmetric and (fields == fields[0, 0]).all() and int(fields[0, 0]) in (OFFSET - 1, OFFSET):
        return np.full_like(fields, OFFSET), _notes_of_symmetric(int(fields[0, 0]), rules)
    if rules.version != 1:
        return fields, _notes_of_points(fields, fields, rules)
    one_by_one = ((fields + 1) & MAX_Q).astype(np.uint8)
    if not rules.carries:
        return one_by_one, (*_notes_of_points(fields, one_by_one, rules), *_notes_of_destroyed(words, n))
    ones = np.frombuffer(bytes([ONE_IN_EACH_NIBBLE] * words.dtype.itemsize), words.dtype.newbyteorder("<"))[0]
    with np.errstate(over="ignore"):
        carried = nibbles(np.add(words, ones, dtype=words.dtype))[:, :n]
    notes = _notes_of_points(fields, carried, rules)
    if not np.array_equal(carried, one_by_one):
        notes = (*notes, "some zero points are 0: GPTQModel's carries between channels were undone")
    return carried, notes


def _notes_of_symmetric(field: int, rules: ZeroPointRules) -> tuple[str, ...]:
    """Return the doubts about zero points that are all equal."""
    if field == OFFSET - (rules.version == 1):
        return ()
    return (f"symmetric, with zero points stored as in version {3 - rules.version}: the label of the file is wrong",)


def _notes_of_points(fields: Nibbles, points: Nibbles, rules: ZeroPointRules) -> tuple[str, ...]:
    """Return the doubts about zero points that differ."""
    notes = []
    if rules.symmetric and not (points == OFFSET).all():
        notes.append("the configuration says symmetric, but zero points differ from 8: those of the file are used")
    if (fields == fields[0, 0]).all() and int(points[0, 0]) in (OFFSET - 1, OFFSET + 1):
        notes.append(f"all zero points are {points[0, 0]}: the version of the zero points is probably wrong")
    if rules.clamped and (points == 1).any():
        notes.append("AutoRound stores zero point 0 as 1: some weights may be off by one step")
    return tuple(notes)


def _notes_of_destroyed(words: npt.NDArray[Any], n: int) -> tuple[str, ...]:
    """Return the doubts about zero points that AutoGPTQ's writer destroys: after a 0 all bits of the word are set."""
    per_word = values_per_word(words)
    set_bits = nibbles(words).reshape(len(words), -1, per_word) == MAX_Q
    used = np.arange(set_bits.shape[1] * per_word).reshape(-1, per_word) < n
    tail = np.logical_and.accumulate((set_bits | ~used)[..., ::-1], axis=-1)[..., ::-1] & used
    destroyed = int((tail.sum(axis=-1) > 1).sum())
    notes = []
    if destroyed:
        notes.append(
            f"{destroyed} words of qzeros end in set bits: AutoGPTQ's writer destroys the zero points after a 0, "
            "so these channels may be wrong"
        )
    if (set_bits & used & ~tail).any():
        notes.append("qzeros hold 15 before other values: this fits version 2, not the version 1 of the label")
    return tuple(notes)
