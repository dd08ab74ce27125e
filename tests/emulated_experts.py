"""Mixtures of experts on the CPU: grouped kernels, and what comes between their products."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from c_structures import (
    CActivateArguments,
    CCombineArguments,
    CExperts,
    CGatherArguments,
    CGemmArguments,
    CIds,
    CListingArguments,
    CProblem,
    CRouteArguments,
)
from emulation import CANARY, MESSAGE_BYTES, Emulation, EmulationError, Half, Launch, aligned, build_for_emulation

from w4a16gen.kernels.config import KernelConfig
from w4a16gen.kernels.epilogue import Activation
from w4a16gen.weights.packed import pack_weight
from w4a16gen.weights.quantized import QuantizedWeight

Ints = npt.NDArray[np.int32]
UNSORTED_TOKENS = 8
"""Rows of each expert that unsorted routes choose."""
ENTRY_INTS = 4
"""int32 numbers of an entry of the list of token tiles; the list begins with its length, in the room of one."""


def at(array: npt.NDArray[Any] | None) -> int | None:
    """Return the address of an array's first element."""
    return None if array is None else int(array.ctypes.data)


@dataclass(frozen=True)
class Unsorted:
    """Routes that nothing has sorted."""

    ids: npt.NDArray[Any]
    expert_map: Ints | None = None
    rows_are_shared: bool = False
    """Whether all experts multiply the same rows."""

    @property
    def structure(self) -> CIds:
        """The argument."""
        places = self.expert_map
        return CIds(at(self.ids), at(places), 0 if places is None else places.size, self.ids.itemsize)

    def rows(self, experts: int) -> int:
        """Return the rows of outputs."""
        return UNSORTED_TOKENS * min(self.ids.size, experts)


@dataclass(frozen=True)
class Routes:
    """What routing writes."""

    offsets: Ints
    routes_of_rows: Ints
    rows_of_routes: Ints
    token_tiles: Ints
    """The list, as it lies in memory."""

    @property
    def tiles(self) -> list[list[int]]:
        """The entries of the list: expert, its first entry, its first row, its end."""
        return entries(self.token_tiles)


def entries(token_tiles: Ints) -> list[list[int]]:
    """Return the entries of a list of token tiles."""
    found: list[list[int]] = token_tiles[ENTRY_INTS:][: token_tiles[0] * ENTRY_INTS].reshape(-1, ENTRY_INTS).tolist()
    return found


def build_experts(configs: Sequence[KernelConfig], folder: Path, optimisation: str = "-O1") -> EmulatedExperts:
    """Compile grouped kernels for the CPU."""
    return EmulatedExperts(build_for_emulation(configs, folder, optimisation=optimisation))


class EmulatedExperts:
    """The kernels of a mixture of experts, on the CPU."""

    def __init__(self, emulation: Emulation) -> None:
        """Take the library."""
        self.path, self.library = emulation.path, emulation.library
        self._written_before: list[npt.NDArray[Any]] = []

    def call(self, name: str, *given: Any) -> None:
        """Call a function of the C interface.

        Raises:
            EmulationError: if it fails, with its status and its sentence.
        """
        message = ctypes.create_string_buffer(MESSAGE_BYTES)
        status = getattr(self.library, name)(*given, message, ctypes.c_size_t(MESSAGE_BYTES))
        if status:
            raise EmulationError(f"{status}: {message.value.decode()}")

    def _begin(self, seed: int, late: Sequence[npt.NDArray[Any] | None] = ()) -> None:
        """Set how the next launches run.

        Args:
            seed: of the order in which threads run.
            late: what the kernel before them still writes. Its bytes are 0xFF until then.
        """
        self.library.emulation_set(seed, 4)
        self._written_before = []
        for array in late:
            if array is not None:
                self._written_before.append(array.copy())
                array.view(np.uint8)[...] = 0xFF
                self.library.emulation_add_previous(at(array), at(self._written_before[-1]), array.nbytes)

    def _room_for_tiles(self, rows: int, experts: int, tile_tokens: int) -> Ints:
        needed = ctypes.c_size_t()
        sizes = map(ctypes.c_int64, (rows, experts, tile_tokens))
        self.call("w4a16_token_tiles_bytes", *sizes, ctypes.byref(needed))
        return aligned(np.full(needed.value // 4 + CANARY, -7, np.int32))

    def route(
        self,
        ids: npt.NDArray[Any],
        experts: int,
        tile_tokens: int,
        expert_map: Ints | None = None,
        seed: int = 0,
        *,
        hidden: Half | None = None,
        weights: npt.NDArray[np.float32] | None = None,
        gathered: Half | None = None,
        is_dependent: bool = False,
    ) -> Routes:
        """Route int32 or int64 ids [tokens, slots]; with hidden states, copy those of each row to `gathered`.

        Before a dependent launch, a kernel still writes all that is read.
        """
        self._begin(seed, (ids, expert_map, hidden, weights) if is_dependent else ())
        (tokens, slots), routes = ids.shape, ids.size
        written = [aligned(np.full(count + CANARY, -7, np.int32)) for count in (experts + 1, routes, routes)]
        tiles = self._room_for_tiles(routes, experts, tile_tokens)
        arguments = CRouteArguments(
            ids=at(ids),
            id_bytes=ids.itemsize,
            expert_map=at(expert_map),
            global_experts=0 if expert_map is None else expert_map.size,
            experts=experts,
            tokens=tokens,
            slots=slots,
            tile_tokens=tile_tokens,
            offsets=at(written[0]),
            routes_of_rows=at(written[1]),
            rows_of_routes=at(written[2]),
            token_tiles=at(tiles),
            token_tiles_bytes=tiles.nbytes - CANARY * tiles.itemsize,
            hidden=at(hidden),
            weights=at(weights),
            rows=at(gathered),
            columns=0 if hidden is None else hidden.shape[1],
        )
        self.call("w4a16_route", ctypes.byref(arguments))
        for array in (*written, tiles):
            assert (array[-CANARY:] == -7).all(), "routing wrote behind an array"
        offsets, rows, back = (array[:-CANARY] for array in written)
        assert (rows[offsets[-1] :] == -7).all(), "routing wrote a row of no route"
        return Routes(offsets, rows[: offsets[-1]], back, tiles[:-CANARY])

    def list_token_tiles(self, tile_tokens: int, rows: int, **given: Any) -> Ints:
        """List the tiles of experts with `offsets`, or `counts` and `stride`, or `indices` and `experts`."""
        late = [array for array in given.values() if isinstance(array, np.ndarray)] if given.get("is_dependent") else []
        self._begin(given.get("seed", 0), late)
        experts = given.get("experts") or (given["counts"].size if "counts" in given else given["offsets"].size - 1)
        tiles = self._room_for_tiles(rows, experts, tile_tokens)
        arguments = CListingArguments(
            offsets=at(given.get("offsets")),
            counts=at(given.get("counts")),
            stride=given.get("stride", 0),
            indices=at(given.get("indices")),
            experts=experts,
            rows=rows,
            tile_tokens=tile_tokens,
            token_tiles=at(tiles),
            token_tiles_bytes=tiles.nbytes - CANARY * tiles.itemsize,
        )
        self.call("w4a16_list_token_tiles", ctypes.byref(arguments))
        assert (tiles[-CANARY:] == -7).all(), "listing wrote behind the list"
        return tiles[:-CANARY]

    def grouped_gemm(
        self,
        config: KernelConfig,
        a: Half,
        weights: Sequence[QuantizedWeight],
        token_tiles: Ints | Unsorted,
        launch: Launch,
        *,
        list_is_complete: bool = False,
    ) -> Half:
        """Return activation(a [rows, k] times each row's expert); rows of no expert stay NaN.

        The bias is [experts, n]. Before a dependent launch, a kernel still writes the activations, and the list or the
        ids too unless they are complete.
        """
        (m, k), n = a.shape, weights[0].n
        rows, unsorted = m, None
        if isinstance(token_tiles, Unsorted):
            unsorted, m = token_tiles, len(token_tiles.ids)
            rows, token_tiles = unsorted.rows(len(weights)), unsorted.ids
        gated = launch.activation.is_gated
        columns = n // 2 if gated else n
        packed = [pack_weight(weight, gated=gated).data for weight in weights]
        stride = -(-packed[0].size // 128) * 128
        every = np.full((len(packed), stride), 0xFF, np.uint8)
        for place, one in enumerate(packed):
            every[place, : one.size] = one
        everything = aligned(every)
        activations, bias = aligned(a), None if launch.bias is None else aligned(launch.bias)
        output = aligned(np.full(rows * columns * 2 + CANARY, 0xFF, np.uint8))
        self.library.emulation_set(launch.seed, launch.sm_count)
        for buffer in (activations, everything, bias):
            if buffer is not None:
                self.library.emulation_add_buffer(buffer.ctypes.data, buffer.nbytes)
        late = []
        if launch.is_dependent:
            token_tiles = aligned(token_tiles)
            late = [(array, array.copy()) for array in (activations, *([] if list_is_complete else [token_tiles]))]
            for array, values in late:
                array.view(np.uint8)[:] = 0xFF
                self.library.emulation_add_previous(at(array), at(values), array.nbytes)
        arguments = CGemmArguments(
            activations=at(activations),
            packed=at(everything),
            packed_bytes=packed[0].size,
            bias=at(bias),
            output=at(output),
            alpha=launch.alpha,
            dependent_launch=int(launch.is_dependent),
            activation=launch.activation.number,
        )
        problem = CProblem(m, n, k, weights[0].group_size)
        experts = CExperts(
            count=len(weights),
            packed_stride=stride,
            tile_tokens=config.cta.tokens,
            list_is_complete=list_is_complete,
        )
        if unsorted is None:
            experts.token_tiles, experts.token_tiles_bytes = at(token_tiles), token_tiles.nbytes
        else:
            experts.unsorted = replace(unsorted, ids=token_tiles).structure
            experts.slots, experts.rows_are_shared = token_tiles.shape[1], unsorted.rows_are_shared
        kernel = self.library.w4a16_find_kernel(config.name.encode())
        self.call("w4a16_grouped_gemm", kernel, *map(ctypes.byref, (problem, arguments, experts)))
        if not (output[-CANARY:] == 0xFF).all():
            raise EmulationError("the kernel wrote behind its output")
        return output[:-CANARY].view(np.float16).reshape(rows, columns)

    def combine(
        self,
        rows: Half,
        routes: Ints | Unsorted,
        shape: tuple[int, int],
        weights: npt.NDArray[Any],
        experts: int = 0,
        *,
        seed: int = 0,
        is_dependent: bool = False,
    ) -> Half:
        """Return the sums over the slots of tokens of a shape [tokens, slots].

        Before a dependent launch, a kernel still writes the rows, their routes and weights, but not the ids.
        """
        by_route = None if isinstance(routes, Unsorted) else routes
        self._begin(seed, (rows, by_route, weights) if is_dependent else ())
        (tokens, slots), columns = shape, rows.shape[1]
        out = aligned(np.full((tokens, columns), np.nan, np.float16))
        combine = CCombineArguments(
            rows=at(rows), weights=at(weights), output=at(out), tokens=tokens, slots=slots, columns=columns
        )
        if isinstance(routes, Unsorted):
            combine.unsorted, combine.experts = routes.structure, experts
        else:
            combine.rows_of_routes = at(routes)
        self.call("w4a16_combine_rows", ctypes.byref(combine))
        return out

    def moe(
        self,
        config: KernelConfig,
        hidden: Half,
        w13: Sequence[QuantizedWeight],
        w2: Sequence[QuantizedWeight],
        ids: npt.NDArray[Any],
        weights: npt.NDArray[np.float32],
        *,
        seed: int = 0,
    ) -> Half:
        """Return the output of a whole layer with SiLU."""
        tokens, slots = ids.shape
        size, inner = hidden.shape[1], w2[0].k
        launch = Launch(seed)
        routes = self.route(ids, len(w13), config.cta.tokens, seed=seed)
        count = routes.offsets[-1:].copy()
        rows = aligned(np.full((ids.size, size), np.nan, np.float16))
        state = aligned(hidden)
        gather = CGatherArguments(
            hidden=at(state),
            row_count=at(count),
            routes_of_rows=at(routes.routes_of_rows),
            rows=at(rows),
            tokens=tokens,
            slots=slots,
            columns=size,
        )
        self.call("w4a16_gather_rows", ctypes.byref(gather))
        gate_up = self.grouped_gemm(config, rows, w13, routes.token_tiles, launch)
        act = aligned(np.full((ids.size, inner), np.nan, np.float16))
        activate = CActivateArguments(
            gates_and_factors=at(gate_up),
            row_count=at(count),
            output=at(act),
            rows=ids.size,
            columns=inner,
            activation=Activation.SWIGLU.number,
        )
        self.call("w4a16_activate_rows", ctypes.byref(activate))
        down = self.grouped_gemm(config, act, w2, routes.token_tiles, launch)
        return self.combine(down, routes.rows_of_routes, (tokens, slots), weights, seed=seed)
