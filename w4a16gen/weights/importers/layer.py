"""One layer of a checkpoint, as `open_checkpoint` returns it."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.config import QuantMode
from w4a16gen.weights.importers.mapped import shown_name
from w4a16gen.weights.importers.rounding import LARGEST_HALF, Exactness, Rounded, round_factors
from w4a16gen.weights.importers.stored import Indices, StoredLayer
from w4a16gen.weights.quantized import Half, QuantizedWeight


class CheckpointLayer:
    """A 4-bit layer of a checkpoint. The values are read when they are asked for, and are not kept.

    The layer computes `alpha * gemm(a, w) + bias`, where a holds the activations of the model. Before the product,
    multiply a by `input_scale` and take its columns in the order of `permutation`, where these are not None.

    Attributes:
        name: path of the module in the model, for example `model.layers.0.mlp.down_proj`.
        format: name of the format, for example `gptq`.
        n: output channels.
        k: reduction length.
        group_size: values of K that share a scale; k itself if a channel has one scale.

    Example:
        checkpoint = w4a16gen.open_checkpoint("Qwen3-8B-GPTQ")
        layer = checkpoint["model.layers.0.self_attn.q_proj"]
        packed = w4a16gen.pack_weight(layer.quantized())
        if layer.permutation is not None:
            a = a[:, layer.permutation]
        c = w4a16gen.gemm(a, packed, bias=layer.bias, alpha=layer.alpha)
    """

    def __init__(self, stored: StoredLayer) -> None:
        """Take a layer in its stored form; `open_checkpoint` makes layers."""
        self.stored = stored
        """The layer as its file holds it, for readers that decode it by other means."""
        self.name = stored.name
        self.format = stored.format
        self.n = stored.n
        self.k = stored.k
        self.group_size = stored.group_size

    def __repr__(self) -> str:
        sizes = f"n={self.n}, k={self.k}, group_size={self.group_size}"
        return f"CheckpointLayer({self.name!r}, format={self.format!r}, {sizes})"

    @cached_property
    def mode(self) -> QuantMode:
        """The quantisation mode. Reads the zero points of asymmetric formats."""
        if not self.stored.is_symmetric():
            return QuantMode.FINEGRAINED_SCALE_AND_ZEROS
        if self.group_size == self.k:
            return QuantMode.PER_COLUMN_SCALE_ONLY
        return QuantMode.FINEGRAINED_SCALE_ONLY

    @cached_property
    def permutation(self) -> Indices | None:
        """The columns of the activations in the order of the weight, intp [k], or None if the order is the same.

        Raises:
            InvalidValueError: if the groups of an act-order checkpoint have different sizes.
        """
        return self.stored.permutation()

    @property
    def bias(self) -> Half | None:
        """The bias rounded to fp16, [n], or None.

        Raises:
            InvalidValueError: if it does not fit fp16.
        """
        return self._half("bias", self.stored.bias())

    @property
    def input_scale(self) -> Half | None:
        """What activations are multiplied by before the product, rounded to fp16, [k], or None.

        Raises:
            InvalidValueError: if it does not fit fp16.
        """
        return self._half("the scale of its activations", self.stored.input_scale())

    @property
    def alpha(self) -> float:
        """The factor to pass to `gemm`: a power of two, and 1 unless the scales do not fit fp16."""
        return self.exactness.alpha

    @cached_property
    def exactness(self) -> Exactness:
        """What the weight loses, if anything. Reads scales and zero points.

        Raises:
            InvalidValueError: if scales or zeros are not finite.
        """
        return self._rounded().exactness

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user of the layer should know, one sentence each. Reads scales and zero points."""
        own = () if self.stored.note is None else (self.stored.note,)
        return (*own, *self.exactness.notes)

    @property
    def tensor_names(self) -> frozenset[str]:
        """Names of the layer's tensors in the checkpoint."""
        return frozenset(name for name in self.stored.tensor_names if name in self.stored.tensors)

    def quantized(self) -> QuantizedWeight:
        """Read the layer.

        Returns:
            The weight, with K in the order of `permutation`, and with scales and zeros divided by `alpha`.

        Raises:
            InvalidValueError: if scales or zeros are not finite, or the file has changed.
        """
        rounded = self._rounded()
        values = self.stored.values()
        if self.permutation is not None:
            values = values[:, self.permutation]
        per_column = self.mode is QuantMode.PER_COLUMN_SCALE_ONLY
        scales = rounded.scales[0] if per_column else rounded.scales
        zeros = rounded.zeros if self.mode.has_zeros else None
        return QuantizedWeight(values, scales, zeros, self.group_size, self.mode)

    def _rounded(self) -> Rounded:
        rounded = round_factors(self.stored.factors(), name=shown_name(self.name))
        self.__dict__["exactness"] = rounded.exactness
        return rounded

    def _half(self, what: str, values: np.ndarray | None) -> Half | None:
        if values is None:
            return None
        if float(np.abs(values).max()) > LARGEST_HALF:
            raise InvalidValueError(f"layer {shown_name(self.name)}: {what} exceeds fp16's 65504")
        return values.astype(np.float16)
