"""Mixtures of experts on the CPU: grouped kernels, and what comes between their products."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from c_structures import CGemmArguments, CProblem
from emulation import CANARY, Emulation, EmulationError, Half, Launch, aligned, build_for_emulation

from w4a16gen.kernels import render
from w4a16gen.kernels.config import KernelConfig, Scheduler
from w4a16gen.weights.packed import pack_weight
from w4a16gen.weights.quantized import QuantizedWeight

Ints = npt.NDArray[np.int32]
ENTRY_INTS = 4
"""int32 numbers of an entry of the list of token tiles; the list begins with its length, in the room of one."""


class _Struct(ctypes.Structure):
    """A structure whose pointers are given as arrays."""

    def __init__(self, **values: Any) -> None:
        plain = {name: at(value) if isinstance(value, np.ndarray) else value for name, value in values.items()}
        super().__init__(**plain)


def at(array: npt.NDArray[Any]) -> int:
    """Return the address of an array's first element."""
    return int(array.ctypes.data)


def _fields(pointers: str, ints: str) -> list[tuple[str, Any]]:
    return [(name, ctypes.c_void_p) for name in pointers.split()] + [(name, ctypes.c_int) for name in ints.split()]


class _Routing(_Struct):
    _fields_: ClassVar = [
        *_fields("experts32 experts64 expert_map", "global_experts experts routes tile_tokens"),
        *_fields("offsets routes_of_rows rows_of_routes token_tiles", ""),
    ]


class _Listing(_Struct):
    _fields_: ClassVar = [*_fields("offsets counts", "stride experts rows tile_tokens"), *_fields("token_tiles", "")]


class _Gather(_Struct):
    _fields_: ClassVar = _fields("hidden row_count routes_of_rows weights rows", "slots vectors")


class _Activation(_Struct):
    _fields_: ClassVar = _fields("gate_up row_count rows", "vectors gate")


class _Combine(_Struct):
    _fields_: ClassVar = _fields("rows rows_of_routes weights output", "tokens slots vectors")


class _Experts(_Struct):
    _fields_: ClassVar = [("count", ctypes.c_int64), ("packed_bytes", ctypes.c_int64), ("token_tiles", ctypes.c_void_p)]


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


def build_experts(configs: Sequence[KernelConfig], folder: Path) -> EmulatedExperts:
    """Compile kernels for the CPU, with another scheduler: each is named as the persistent kernel that it is like."""
    assert all(config.scheduler is Scheduler.PERSISTENT for config in configs)
    ordinary = render.render_kernel

    def grouped(config: KernelConfig) -> str:
        text = ordinary(config).replace("scheduler::persistent", "scheduler::grouped")
        return text.replace("StoresThroughShared=*/true", "StoresThroughShared=*/false")

    return EmulatedExperts(build_for_emulation(configs, folder, rendered=grouped))


class EmulatedExperts:
    """The kernels of a mixture of experts, on the CPU."""

    def __init__(self, emulation: Emulation) -> None:
        """Take the library."""
        self._emulation = emulation
        self._library = emulation.library
        self._library.emulated_max_token_tiles.restype = ctypes.c_int64
        self._library.emulated_max_token_tiles.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_int]
        self._library.emulation_error.restype = ctypes.c_char_p

    def _check(self, status: int) -> None:
        if status:
            raise EmulationError(f"{status}: {self._library.emulation_error().decode()}")

    def _room_for_tiles(self, rows: int, experts: int, tile_tokens: int) -> Ints:
        most = self._library.emulated_max_token_tiles(rows, experts, tile_tokens)
        return aligned(np.full((most + 1) * ENTRY_INTS + CANARY, -7, np.int32))

    def route(
        self, ids: npt.NDArray[Any], experts: int, tile_tokens: int, expert_map: Ints | None = None, seed: int = 0
    ) -> Routes:
        """Route int32 or int64 ids [tokens, slots]."""
        self._library.emulation_set(seed, 4)
        routes = ids.size
        written = [aligned(np.full(count + CANARY, -7, np.int32)) for count in (experts + 1, routes, routes)]
        tiles = self._room_for_tiles(routes, experts, tile_tokens)
        wide = ids.dtype == np.int64
        self._check(
            self._library.emulated_route(
                ctypes.byref(
                    _Routing(
                        experts32=None if wide else ids,
                        experts64=ids if wide else None,
                        expert_map=expert_map,
                        global_experts=experts if expert_map is None else expert_map.size,
                        experts=experts,
                        routes=routes,
                        tile_tokens=tile_tokens,
                        offsets=written[0],
                        routes_of_rows=written[1],
                        rows_of_routes=written[2],
                        token_tiles=tiles,
                    )
                )
            )
        )
        for array in (*written, tiles):
            assert (array[-CANARY:] == -7).all(), "routing wrote behind an array"
        offsets, rows, back = (array[:-CANARY] for array in written)
        assert (rows[offsets[-1] :] == -7).all(), "routing wrote a row of no route"
        return Routes(offsets, rows[: offsets[-1]], back, tiles[:-CANARY])

    def list_token_tiles(self, tile_tokens: int, rows: int, **given: Any) -> Ints:
        """List the tiles of experts with `offsets`, or `counts` and `stride`."""
        experts = given["counts"].size if "counts" in given else given["offsets"].size - 1
        tiles = self._room_for_tiles(rows, experts, tile_tokens)
        values = _Listing(experts=experts, rows=rows, tile_tokens=tile_tokens, token_tiles=tiles, **given)
        self._check(self._library.emulated_list_token_tiles(ctypes.byref(values)))
        assert (tiles[-CANARY:] == -7).all(), "listing wrote behind the list"
        return tiles[:-CANARY]

    def grouped_gemm(
        self,
        config: KernelConfig,
        a: Half,
        weights: Sequence[QuantizedWeight],
        token_tiles: Ints,
        launch: Launch,
    ) -> Half:
        """Return activation(a [rows, k] times each row's expert); rows of no expert stay NaN.

        The bias is [experts, n].
        """
        (rows, k), n = a.shape, weights[0].n
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
        self._library.emulation_set(launch.seed, launch.sm_count)
        for buffer in (activations, everything, bias):
            if buffer is not None:
                self._library.emulation_add_buffer(buffer.ctypes.data, buffer.nbytes)
        arguments = CGemmArguments(
            activations=at(activations),
            packed=at(everything),
            packed_bytes=packed[0].size,
            bias=None if bias is None else at(bias),
            output=at(output),
            alpha=launch.alpha,
            dependent_launch=int(launch.is_dependent),
            activation=launch.activation.number,
        )
        problem = CProblem(rows, n, k, weights[0].group_size)
        experts = _Experts(count=len(weights), packed_bytes=stride, token_tiles=token_tiles)
        given = (ctypes.byref(value) for value in (problem, arguments, experts))
        self._check(self._library.emulated_grouped(config.name.encode(), *given, launch.sm_count))
        if not (output[-CANARY:] == 0xFF).all():
            raise EmulationError("the kernel wrote behind its output")
        return output[:-CANARY].view(np.float16).reshape(rows, columns)

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
        self._check(
            self._library.emulated_gather(
                ctypes.byref(
                    _Gather(
                        hidden=state,
                        row_count=count,
                        routes_of_rows=routes.routes_of_rows,
                        weights=None,
                        rows=rows,
                        slots=slots,
                        vectors=size // 8,
                    )
                )
            )
        )
        gate_up = self.grouped_gemm(config, rows, w13, routes.token_tiles, launch)
        act = aligned(np.full((ids.size, inner), np.nan, np.float16))
        values = _Activation(gate_up=gate_up, row_count=count, rows=act, vectors=inner // 8, gate=0)
        self._check(self._library.emulated_activate(ctypes.byref(values)))
        down = self.grouped_gemm(config, act, w2, routes.token_tiles, launch)
        out = aligned(np.full((tokens, size), np.nan, np.float16))
        self._check(
            self._library.emulated_combine(
                ctypes.byref(
                    _Combine(
                        rows=down,
                        rows_of_routes=routes.rows_of_routes,
                        weights=weights,
                        output=out,
                        tokens=tokens,
                        slots=slots,
                        vectors=size // 8,
                    )
                )
            )
        )
        return out
