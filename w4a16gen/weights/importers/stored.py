"""A layer as a checkpoint stores it, in the form that every format can give: exact values, before any rounding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from w4a16gen.errors import InvalidValueError
from w4a16gen.weights.importers.mapped import shown_name
from w4a16gen.weights.importers.tensors import FLOATS, Tensors
from w4a16gen.weights.quantized import OFFSET, Nibbles

Double = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]


EXPERT_RANK = 3
MAX_EXPERTS = 4096


class UnsupportedLayerError(InvalidValueError):
    """A layer is well-formed, but is no uint4 weight with groups along K; the other layers can be read."""


@dataclass(frozen=True, eq=False)
class Factors:
    """Scales and zeros of a layer: a weight is (q - 8) * scale + zero.

    Attributes:
        scales: float64 [k / group_size, n].
        zeros: float64 [k / group_size, n], to be added; None for symmetric weights.
        notes: what a reader of the checkpoint should know about these factors.
    """

    scales: Double
    zeros: Double | None
    notes: tuple[str, ...] = ()


class StoredLayer(ABC):
    """A layer in one format. Its sizes are known from headers; its values are read on demand.

    Attributes:
        name: path of the module in the model.
        n: output channels.
        k: reduction length.
        group_size: values of K that share a scale.
    """

    format: ClassVar[str]
    """Name of the format, as `CheckpointLayer.format` shows it."""
    parts: ClassVar[tuple[str, ...]]
    """Last parts of the names of the layer's tensors, without the bias."""
    expert: int | None = None
    """Number of the expert, of those that are stored together."""

    def __init__(self, tensors: Tensors, name: str, n: int, k: int, groups: int) -> None:
        """Take the sizes, which the subclass has checked against the headers.

        Raises:
            InvalidValueError: if the number of groups does not divide k.
        """
        if groups <= 0 or k % groups != 0:
            raise UnsupportedLayerError(
                f"layer {shown_name(name)}: {groups} groups do not divide k = {k}: "
                "quantize it with a group size that does"
            )
        self.tensors = tensors
        self.name = name
        self.n = n
        self.k = k
        self.group_size = k // groups

    @property
    def groups(self) -> int:
        """Groups along K."""
        return self.k // self.group_size

    @property
    def module(self) -> str:
        """Path of the module that holds the tensors; experts that are stored together share one."""
        return self.name if self.expert is None else self.name.rpartition(".")[0]

    @property
    def tensor_names(self) -> set[str]:
        """Names of the tensors that belong to the layer; they need not all exist."""
        return {f"{self.module}.{part}" for part in (*self.parts, "bias")}

    @property
    def input_scale_name(self) -> str | None:
        """Name of the tensor that activations are multiplied by, or None."""
        return None

    @property
    def note(self) -> str | None:
        """What a user of the layer must know beside its values, or None: here, that activations have factors."""
        return "multiply the activations by input_scale" if self.input_scale_name in self.tensors else None

    @abstractmethod
    def values(self) -> Nibbles:
        """Return q, uint8 [n, k], in the order of the file along K."""

    @abstractmethod
    def factors(self) -> Factors:
        """Return scales and zeros, exactly."""

    @abstractmethod
    def is_symmetric(self) -> bool:
        """Return whether all zeros are 0. It may read zero points, but neither values nor scales."""

    def group_index(self) -> npt.NDArray[np.int64] | None:
        """Return the group of each value of K, int64 [k], or None if groups follow one another."""
        return None

    def permutation(self) -> Indices | None:
        """Return the order that sorts K by groups, intp [k], or None if it is sorted already.

        Raises:
            UnsupportedLayerError: if the groups have different sizes.
        """
        index = self.group_index()
        if index is None:
            return None
        in_order = np.arange(self.k) // self.group_size
        if np.array_equal(index, in_order):
            return None
        order = np.argsort(index, kind="stable")
        if not np.array_equal(index[order], in_order):
            raise UnsupportedLayerError(
                f"layer {shown_name(self.name)}: g_idx must name each of {self.groups} groups {self.group_size} times: "
                "groups of unequal size cannot be packed"
            )
        return order

    def bias(self) -> Double | None:
        """Return the bias, float64 [n], or None.

        Raises:
            InvalidValueError: if it has another shape, or is not finite.
        """
        name = f"{self.module}.bias"
        if name not in self.tensors:
            return None
        if self.expert is None:
            self.tensors.need(name, FLOATS, (self.n,))
            return self.tensors.double(name)
        experts, _ = self.tensors.need(name, FLOATS, (None, self.n))
        if self.expert >= experts:
            raise InvalidValueError(f"tensor {shown_name(name)} has {experts} rows, none of expert {self.expert}")
        row: Double = self.tensors.double(name)[self.expert]
        return row

    def input_scale(self) -> Double | None:
        """Return the factors of the activations, float64 [k], or None.

        Raises:
            InvalidValueError: if they have another shape, or are not finite.
        """
        if self.input_scale_name is None or self.input_scale_name not in self.tensors:
            return None
        self.tensors.need(self.input_scale_name, FLOATS, (self.k,))
        return self.tensors.double(self.input_scale_name)


def expert_numbers(shape: tuple[int, ...]) -> list[int | None]:
    """Return the numbers of the experts in a tensor of some shape: None alone if it is a matrix.

    A tensor of too many experts counts as one layer, which is then refused.
    """
    is_several = len(shape) == EXPERT_RANK and 0 < shape[0] <= MAX_EXPERTS
    return list(range(shape[0])) if is_several else [None]


def check_matrix(name: str, shape: tuple[int, ...], expert: int | None) -> None:
    """Raise unless a tensor is a matrix, or several where an expert is named.

    Raises:
        UnsupportedLayerError: naming the shape.
    """
    if len(shape) != (EXPERT_RANK - 1 if expert is None else EXPERT_RANK):
        raise UnsupportedLayerError(
            f"tensor {shown_name(name)} of shape {list(shape)} must be a matrix, or at most {MAX_EXPERTS} of them"
        )


def zeros_of_points(zero_points: npt.NDArray[np.uint8], scales: Double) -> Double:
    """Return (8 - zero point) * scale in float64, exactly."""
    return (OFFSET - zero_points.astype(np.float64)) * scales
