"""The rows of each expert for grouped products: routes sorted by expert, and lists of rows that are known already."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.integers import integer
from w4a16gen.runtime.arrays import check, view
from w4a16gen.runtime.bindings import Bindings
from w4a16gen.runtime.expert_arrays import ExpertArrays
from w4a16gen.runtime.expert_calls import checked_experts, positive
from w4a16gen.runtime.streams import stream_pointer

_GATHERS_NOTHING = (0, 0, 0, 0)


@dataclass(frozen=True, eq=False)
class ExpertRows:
    """The rows of each expert, as grouped products read them: made by `route_tokens` and `list_rows`.

    Attributes:
        experts: number of experts.
        rows: how many rows the activations have.
        tile_tokens: CTA tokens of the kernels that can read the list.
        token_tiles: the list, on the GPU.
        offsets: int32 [experts + 1]: the first row of each expert, then the number of rows; None if not of a routing.
        routes_of_rows: int32 [rows]: token * slots + slot of each row; None if not of a routing.
        rows_of_routes: int32 [rows]: the row of each route, -1 for routes to no expert; None if not of a routing.
    """

    experts: int
    rows: int
    tile_tokens: int
    token_tiles: Any
    offsets: Any = None
    routes_of_rows: Any = None
    rows_of_routes: Any = None


class RowLister:
    """Launches of one build that list rows. Several threads may launch at once, for several GPUs."""

    def __init__(self, bindings: Bindings) -> None:
        """Launch with this build.

        Args:
            bindings: the opened build.
        """
        self._bindings = bindings
        self._arrays = ExpertArrays(bindings.module)

    def route_tokens(
        self, topk_ids: Any, experts: int, tile_tokens: int, expert_map: Any, stream: Any, *, launch: int
    ) -> ExpertRows:
        """Sort routes by expert; see `Library.route_tokens`."""
        count, tile = checked_experts(experts), positive("tile_tokens", tile_tokens)
        choice = self._arrays.choice(topk_ids, expert_map)
        device = choice.ids.device or 0
        tokens, slots = choice.ids.shape
        routes = tokens * slots
        address = stream_pointer(stream, topk_ids)
        size = self._bindings.token_tiles_bytes(routes, count, tile)

        def array(length: int) -> Any:
            return self._arrays.empty(topk_ids, (length,), "<i4", device, address)

        found = ExpertRows(
            count,
            routes,
            tile,
            self._arrays.empty(topk_ids, (size,), "|u1", device, address),
            array(count + 1),
            array(routes),
            array(routes),
        )
        tiles, offsets, by_row, by_route = (
            view("routing", made, self._bindings.module)
            for made in (found.token_tiles, found.offsets, found.routes_of_rows, found.rows_of_routes)
        )
        outcome = self._bindings.library.route(
            *(*choice.arguments, count, tokens, slots, tile),
            *(offsets.pointer, by_row.pointer, by_route.pointer, tiles.pointer, size, *_GATHERS_NOTHING),
            *(address, launch, device),
        )
        self._bindings.result_of(outcome)
        return found

    def list_rows(
        self,
        offsets: Any,
        counts: Any,
        stride: int | None,
        indices: Any,
        experts: int | None,
        rows: int,
        tile_tokens: int,
        stream: Any,
        *,
        launch: int,
    ) -> ExpertRows:
        """List the token tiles of experts whose rows are known; see `Library.list_rows`."""
        sources = {"offsets": offsets, "counts": counts, "indices": indices}
        names = [name for name, source in sources.items() if source is not None]
        if len(names) != 1 or (counts is None) != (stride is None) or (indices is None) != (experts is None):
            raise InvalidValueError(
                "the rows of each expert are given by offsets, or by counts and stride, or by indices and experts"
            )
        (name,) = names
        given = sources[name]
        seen = view(name, given, self._bindings.module)
        if len(seen.shape) != 1:
            raise InvalidValueError(f"{name} of shape {list(seen.shape)} must have one dimension")
        if offsets is not None and seen.shape[0] <= 1:
            raise InvalidValueError(f"offsets of shape {list(seen.shape)} must be [experts + 1], of one expert or more")
        device = seen.device or 0
        length, tile = integer("rows", rows), positive("tile_tokens", tile_tokens)
        check(name, seen, dtype="<i4", shape=seen.shape if indices is None else (length,), device=device)
        count = checked_experts(seen.shape[0] - (offsets is not None) if experts is None else experts)
        size = self._bindings.token_tiles_bytes(length, count, tile)
        address = stream_pointer(stream, given)
        made = self._arrays.empty(given, (size,), "|u1", device, address)
        tiles = view("routing", made, self._bindings.module)
        outcome = self._bindings.library.list_token_tiles(
            *(seen.pointer if name == source else 0 for source in ("offsets", "counts")),
            *(0 if stride is None else positive("stride", stride), 0 if indices is None else seen.pointer),
            *(count, length, tile, tiles.pointer, size, address, launch, device),
        )
        self._bindings.result_of(outcome)
        return ExpertRows(count, length, tile, made)
