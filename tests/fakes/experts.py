"""The module's calls of experts, computed in host memory. Fields are the arguments, in the order of the module's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fakes.memory import memory_at
from w4a16gen import Epilogue, KernelConfig, PackedWeight, Problem
from w4a16gen.kernels.arrangement import UNSORTED_TOKENS
from w4a16gen.kernels.epilogue import Activation
from w4a16gen.kernels.problem import MAX_DIMENSION
from w4a16gen.weights.activations import activated
from w4a16gen.weights.moe_reference import local_ids, route_reference
from w4a16gen.weights.packed import layout_for
from w4a16gen.weights.reference import gemm_reference

ENTRY_INTS = 4
"""int32 numbers of an entry of the list of token tiles; the list begins with its length, in the room of one."""
NOBODY = -1
QUIETLY = np.errstate(all="ignore")
"""GPUs warn of nothing."""


class Work(Protocol):
    """What a stream runs."""

    @property
    def stream(self) -> int:
        """The address of the stream."""

    @property
    def dependent(self) -> int:
        """The kind of launch."""

    def run(self) -> None:
        """Compute in host memory."""


def tiles_bytes(rows: int, experts: int, tile_tokens: int) -> int:
    """Return the bytes of a list of token tiles."""
    return 4 * ENTRY_INTS * (rows // tile_tokens + min(experts, rows) + 1)


def write_tiles(pointer: int, nbytes: int, tile_tokens: int, rows_of: Sequence[tuple[int, int]]) -> None:
    """Write a list of token tiles: the expert of each, its first entry, its first row and its end."""
    found: list[tuple[int, int, int, int]] = []
    for expert, (first, end) in enumerate(rows_of):
        found += [(expert, len(found), first, end)] * -(-max(0, end - first) // tile_tokens)
    memory = memory_at(pointer, (nbytes // 4,), "<i4")
    assert len(memory) >= ENTRY_INTS * (len(found) + 1), "the list of token tiles is too short"
    memory[0] = len(found)
    memory[ENTRY_INTS : ENTRY_INTS * (len(found) + 1)] = np.array(found, np.int32).reshape(-1)


class Chooses(Protocol):
    """A call with ids of unsorted routes."""

    @property
    def ids(self) -> int:
        """Their address."""

    @property
    def id_bytes(self) -> int:
        """Bytes of each."""

    @property
    def expert_map(self) -> int:
        """The address of the map of experts, or 0."""

    @property
    def global_experts(self) -> int:
        """The entries of the map."""

    @property
    def experts(self) -> int:
        """Experts here."""


def chosen_experts(call: Chooses, tokens: int, slots: int) -> npt.NDArray[np.int64]:
    """Return the expert here of each route, below 0 for none."""
    ids = memory_at(call.ids, (tokens, slots), f"<i{call.id_bytes}")
    places = memory_at(call.expert_map, (call.global_experts,), "<i4") if call.expert_map else None
    return local_ids(ids, call.experts, places)


def numbers_of_experts(call: Chooses, tokens: int, slots: int) -> dict[int, int]:
    """Return the number of each expert that is chosen, in the order in which routes first choose them."""
    chosen = [int(expert) for expert in chosen_experts(call, tokens, slots).flat if expert >= 0]
    return {expert: number for number, expert in enumerate(dict.fromkeys(chosen))}


def rows_of_tiles(pointer: int, nbytes: int) -> dict[int, slice]:
    """Return the rows of each expert that a list of token tiles names."""
    memory = memory_at(pointer, (nbytes // 4,), "<i4")
    entries = memory[ENTRY_INTS : ENTRY_INTS * (memory[0] + 1)].reshape(-1, ENTRY_INTS)
    return {int(expert): slice(int(first), int(end)) for expert, _, first, end in entries}


@dataclass(frozen=True)
class Routing:
    """A call of `route`."""

    ids: int
    id_bytes: int
    expert_map: int
    global_experts: int
    experts: int
    tokens: int
    slots: int
    tile_tokens: int
    offsets: int
    routes_of_rows: int
    rows_of_routes: int
    token_tiles: int
    token_tiles_bytes: int
    hidden: int
    weights: int
    rows: int
    columns: int
    stream: int
    dependent: int
    device: int

    @QUIETLY
    def run(self) -> None:
        """Sort the routes, and gather their rows."""
        routes = self.tokens * self.slots
        ids = memory_at(self.ids, (self.tokens, self.slots), f"<i{self.id_bytes}")
        places = memory_at(self.expert_map, (self.global_experts,), "<i4") if self.expert_map else None
        offsets, rows = route_reference(ids, self.experts, places)
        memory_at(self.offsets, offsets.shape, "<i4")[:] = offsets
        memory_at(self.routes_of_rows, (routes,), "<i4")[: len(rows)] = rows
        back = memory_at(self.rows_of_routes, (routes,), "<i4")
        back[:] = NOBODY
        back[rows] = np.arange(len(rows))
        write_tiles(self.token_tiles, self.token_tiles_bytes, self.tile_tokens, list(pairwise(offsets.tolist())))
        assert (local_ids(ids, self.experts, places) >= 0).sum() == len(rows)
        if self.hidden:
            gathered = memory_at(self.hidden, (self.tokens, self.columns), "<f2")[rows // self.slots]
            if self.weights:
                factors = memory_at(self.weights, (routes,), "<f4")[rows]
                gathered = (gathered.astype(np.float32) * factors[:, None]).astype(np.float16)
            memory_at(self.rows, (routes, self.columns), "<f2")[: len(rows)] = gathered


@dataclass(frozen=True)
class Listing:
    """A call of `list_token_tiles`."""

    offsets: int
    counts: int
    stride: int
    indices: int
    experts: int
    rows: int
    tile_tokens: int
    token_tiles: int
    token_tiles_bytes: int
    stream: int
    dependent: int
    device: int

    def run(self) -> None:
        """List the tiles."""
        if self.offsets:
            bounds = list(pairwise(memory_at(self.offsets, (self.experts + 1,), "<i4").tolist()))
        elif not self.counts:
            indices = memory_at(self.indices, (self.rows,), "<i4")
            rows_of = [np.flatnonzero(indices == expert).tolist() for expert in range(self.experts)]
            bounds = [(rows[0], rows[-1] + 1) if rows else (0, 0) for rows in rows_of]
        else:
            counts = memory_at(self.counts, (self.experts,), "<i4").tolist()
            bounds = [
                (expert * self.stride, expert * self.stride + min(count, self.stride))
                for expert, count in enumerate(counts)
            ]
        inside = [(min(max(0, first), self.rows), min(max(0, end), self.rows)) for first, end in bounds]
        write_tiles(self.token_tiles, self.token_tiles_bytes, self.tile_tokens, inside)


@dataclass(frozen=True)
class Grouped:
    """A call of `grouped_gemm`."""

    config: KernelConfig
    problem: Problem
    activations: int
    packed: int
    packed_bytes: int
    bias: int
    output: int
    alpha: float
    activation_number: int
    residual: int
    experts: int
    packed_stride: int
    token_tiles: int
    token_tiles_bytes: int
    tile_tokens: int
    list_is_complete: bool
    ids: int
    id_bytes: int
    expert_map: int
    global_experts: int
    slots: int
    rows_are_shared: bool
    stream: int
    dependent: int
    device: int

    @property
    def activation(self) -> Activation:
        """The activation."""
        return list(Activation)[self.activation_number]

    def weight(self, expert: int) -> PackedWeight:
        """Return a copy of one packed expert."""
        data = memory_at(self.packed + expert * self.packed_stride, (self.packed_bytes,), "|u1").copy()
        _, n, k, group_size = vars(self.problem).values()
        layout = layout_for(self.config.target, gated=self.activation.is_gated)
        return PackedWeight(data, layout, n, k, group_size, self.config.mode)

    @property
    def rows(self) -> int:
        """The rows of the output."""
        m = self.problem.m
        return UNSORTED_TOKENS * min(m * self.slots, self.experts) if self.ids else m

    def rows_of_experts(self) -> Mapping[int, Any]:
        """Return the rows of each expert that has some, as an index."""
        if not self.ids:
            return rows_of_tiles(self.token_tiles, self.token_tiles_bytes)
        tokens = np.arange(self.problem.m)
        numbers = numbers_of_experts(self, self.problem.m, self.slots)
        return {expert: UNSORTED_TOKENS * number + tokens for expert, number in numbers.items()}

    @QUIETLY
    def run(self) -> None:
        """Multiply the rows of each expert."""
        m, n, k, _ = vars(self.problem).values()
        a = memory_at(self.activations, (m if self.rows_are_shared else self.rows, k), "<f2")
        out = memory_at(self.output, (self.rows, n // 2 if self.activation.is_gated else n), "<f2")
        bias = memory_at(self.bias, (self.experts, n), "<f2") if self.bias else None
        for expert, own in self.rows_of_experts().items():
            product = gemm_reference(
                a if self.rows_are_shared else a[own],
                self.weight(expert).unpack(),
                alpha=self.alpha,
                bias=None if bias is None else bias[expert],
                activation=self.activation,
            )
            out[own] = product.astype(np.float16)


@dataclass(frozen=True)
class Activating:
    """A call of `activate_rows`."""

    gates_and_factors: int
    row_count: int
    output: int
    rows: int
    columns: int
    activation_number: int
    stream: int
    dependent: int
    device: int

    @QUIETLY
    def run(self) -> None:
        """Apply the gates."""
        count = int(memory_at(self.row_count, (1,), "<i4")[0]) if self.row_count else self.rows
        both = memory_at(self.gates_and_factors, (count, 2 * self.columns), "<f2")
        result = activated(list(Activation)[self.activation_number], both.astype(np.float64))
        memory_at(self.output, (count, self.columns), "<f2")[:] = result.astype(np.float16)


@dataclass(frozen=True)
class Combining:
    """A call of `combine_rows`."""

    rows: int
    rows_of_routes: int
    weights: int
    output: int
    tokens: int
    slots: int
    columns: int
    ids: int
    id_bytes: int
    expert_map: int
    global_experts: int
    experts: int
    stream: int
    dependent: int
    device: int

    @QUIETLY
    def run(self) -> None:
        """Add the rows of each token."""
        routes = self.tokens * self.slots
        count = routes if self.rows_of_routes else UNSORTED_TOKENS * min(routes, self.experts)
        rows = memory_at(self.rows, (count, self.columns), "<f2")
        if self.rows_of_routes:
            places = memory_at(self.rows_of_routes, (self.tokens, self.slots), "<i4")
        else:
            numbers = numbers_of_experts(self, self.tokens, self.slots)
            chosen = chosen_experts(self, self.tokens, self.slots)
            places = np.full(chosen.shape, -1, np.int32)
            for (token, slot), expert in np.ndenumerate(chosen):
                if expert >= 0:
                    places[token, slot] = UNSORTED_TOKENS * numbers[int(expert)] + token
        factors = memory_at(self.weights, (self.tokens, self.slots), "<f4") if self.weights else None
        result: npt.NDArray[np.float32] = np.zeros((self.tokens, self.columns), np.float32)
        for slot in range(self.slots):
            there = places[:, slot] >= 0
            added = rows[places[there, slot]].astype(np.float32)
            result[there] += added if factors is None else added * factors[there, slot][:, None]
        memory_at(self.output, result.shape, "<f2")[:] = result.astype(np.float16)


Call = Routing | Listing | Grouped | Activating | Combining
NEEDS_GROUPED = "this build holds no grouped kernel: run `w4a16gen build --space experts`"


class ExpertCalls:
    """The calls of experts, with the interface of the module's `KernelLibrary`."""

    configs: Sequence[KernelConfig]
    accept: Callable[[Call], tuple[Any, ...]]
    """Takes a call that is right, and returns its outcome."""
    invalid: int
    unsupported: int

    def token_tiles_bytes(self, rows: int, experts: int, tile_tokens: int) -> tuple[Any, ...]:
        if rows < 0:
            return self.invalid, f"rows of {rows} must be 0 to {MAX_DIMENSION}", 0
        return 0, "", tiles_bytes(rows, experts, tile_tokens)

    def _made(self, call: Call) -> tuple[Any, ...]:
        if not any(config.is_grouped for config in self.configs):
            return self.unsupported, NEEDS_GROUPED
        return self.accept(call)

    def route(self, *given: int) -> tuple[Any, ...]:
        return self._made(Routing(*given))

    def list_token_tiles(self, *given: int) -> tuple[Any, ...]:
        return self._made(Listing(*given))

    def activate_rows(self, *given: int) -> tuple[Any, ...]:
        return self._made(Activating(*given))

    def combine_rows(self, *given: int) -> tuple[Any, ...]:
        return self._made(Combining(*given))

    def grouped_gemm(self, kernel: int, m: int, n: int, k: int, group_size: int, *given: Any) -> tuple[Any, ...]:
        call = Grouped(self.configs[kernel], Problem(m, n, k, group_size), *given)
        assert call.config.is_grouped, "index of a grouped kernel"
        tile = call.config.cta.tokens
        if call.tile_tokens != tile:
            return self.invalid, f"tile_tokens of {call.tile_tokens} must be {tile}: make another list"
        assert call.activation.is_gated == (call.config.epilogue is Epilogue.GATED), "a kernel with the epilogue"
        assert call.packed_stride >= call.packed_bytes
        return self._made(call) if m else (0, "")
