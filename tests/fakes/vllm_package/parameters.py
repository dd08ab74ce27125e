"""Parameters that know along which dimension a rank's share lies, and load it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class World:
    """The ranks of this stand-in: one process plays them one after the other."""

    rank = 0
    size = 1


class BasevLLMParameter(torch.nn.Parameter):  # type: ignore[misc]
    """A parameter with a loader. Without a dimension, all of it is on every rank."""

    def __new__(cls, data: Any, **_: Any) -> Any:
        return super().__new__(cls, data=data, requires_grad=False)

    def __init__(self, data: Any, weight_loader: Callable[..., Any]) -> None:
        del data
        self.weight_loader = weight_loader
        self.tp_rank, self.tp_size = World.rank, World.size

    def load_all(self, loaded: Any) -> None:
        assert self.data.shape == loaded.shape, (self.data.shape, loaded.shape)
        self.data.copy_(loaded)

    def load_row_parallel_weight(self, loaded_weight: Any) -> None:
        self.load_all(loaded_weight)

    def load_merged_column_weight(self, loaded_weight: Any, **_: Any) -> None:
        self.load_all(loaded_weight)


class _Column(BasevLLMParameter):
    """A rank holds a share of the output."""

    def __init__(self, output_dim: int, **options: Any) -> None:
        self._output_dim = output_dim
        super().__init__(**options)

    @property
    def output_dim(self) -> int:
        return self._output_dim

    def load_merged_column_weight(self, loaded_weight: Any, **options: Any) -> None:
        size, offset = options["shard_size"], options["shard_offset"]
        if getattr(self, "packed_dim", None) == self.output_dim:
            size, offset = size // self.packed_factor, offset // self.packed_factor
        share = loaded_weight.narrow(self.output_dim, self.tp_rank * size, size)
        self.data.narrow(self.output_dim, offset, size).copy_(share)


class RowvLLMParameter(BasevLLMParameter):
    """A rank holds a share of the input."""

    def __init__(self, input_dim: int, **options: Any) -> None:
        self._input_dim = input_dim
        super().__init__(**options)

    @property
    def input_dim(self) -> int:
        return self._input_dim

    def load_row_parallel_weight(self, loaded_weight: Any) -> None:
        size = self.data.shape[self.input_dim]
        self.load_all(loaded_weight.narrow(self.input_dim, self.tp_rank * size, size))


class GroupQuantScaleParameter(_Column, RowvLLMParameter):
    """Scales of groups."""


class ChannelQuantScaleParameter(_Column):
    """Scales that all ranks of a row-parallel layer share."""


class _Packed:
    """Words along one dimension."""

    def __init__(self, packed_factor: int, packed_dim: int, **options: Any) -> None:
        self.packed_factor = packed_factor
        self._packed_dim = packed_dim
        super().__init__(**options)

    @property
    def packed_dim(self) -> int:
        return self._packed_dim


class PackedColumnParameter(_Packed, _Column):
    """Words of which all ranks of a row-parallel layer hold all."""


class PackedvLLMParameter(_Packed, _Column, RowvLLMParameter):
    """Words that are divided among ranks."""


def permute_param_layout_(param: Any, input_dim: int, output_dim: int, **options: Any) -> Any:
    """Transpose a parameter if its dimensions are in another order."""
    if getattr(param, "output_dim", None) != output_dim:
        param.data = param.data.t()
        param._input_dim, param._output_dim = input_dim, output_dim  # noqa: SLF001
        if "packed_dim" in options:
            param._packed_dim = options["packed_dim"]  # noqa: SLF001
    return param
