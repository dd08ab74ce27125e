"""Calls of grouped kernels: routing, products of many experts, and whole layers. No call waits for the GPU."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

from w4a16gen.choose import experts as choosing
from w4a16gen.choose.cards import Card
from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.config import Epilogue, KernelConfig
from w4a16gen.kernels.epilogue import Activation
from w4a16gen.kernels.integers import integer
from w4a16gen.kernels.problem import Problem
from w4a16gen.runtime.arrays import ArrayView, check, check_activations_shape, dtype_name, view
from w4a16gen.runtime.bindings import Bindings, numbers_of
from w4a16gen.runtime.calls import GemmOptions
from w4a16gen.runtime.expert_calls import (
    MoeOptions,
    MoeScalars,
    check_activation,
    check_packed,
    check_pair,
    checked_experts,
    positive,
)
from w4a16gen.runtime.expert_plan import (
    ACTIVATION,
    COMBINING,
    DOWN,
    GATE_UP,
    INT_BYTES,
    MOE_PARTS,
    ROUTING,
    MoePlan,
    MoeSizes,
    Pair,
    chosen_pair,
    launched_parts,
    moe_sizes,
    planned,
)
from w4a16gen.runtime.streams import empty_like_library, is_torchs_stream, stream_pointer
from w4a16gen.weights.experts import PackedExperts
from w4a16gen.weights.packed import checked_flag

_MATRIX = 2
_GATHERS_NOTHING = (0, 0, 0, 0)
_NO_IDS = (0, 0, 0, 0)
"""The arguments of ids where routes are sorted."""
_IDS = {"<i4": 4, "<i8": 8}
"""Bytes of the dtypes of ids."""


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


class _ExpertChoice(NamedTuple):
    """The expert of each route, as routing reads it."""

    ids: ArrayView
    expert_map: ArrayView | None

    @property
    def global_experts(self) -> int | None:
        """Entries of the map of experts; None without a map."""
        return None if self.expert_map is None else self.expert_map.shape[0]

    @property
    def arguments(self) -> tuple[int, int, int, int]:
        """The arguments with which the module's `route` begins."""
        mapped = self.expert_map
        return self.ids.pointer, _IDS[self.ids.dtype], 0 if mapped is None else mapped.pointer, self.global_experts or 0


class _Weights(NamedTuple):
    """The packed experts of a product, and where they are."""

    experts: PackedExperts
    pointer: int


class _Layer(NamedTuple):
    """What the launches of a call of `moe` read and write, checked. Arrays are addresses."""

    sizes: MoeSizes
    plan: MoePlan
    scalars: MoeScalars
    gate_up: _Weights
    down: _Weights
    choice: _ExpertChoice
    hidden: int
    weights: int
    """Of the routes."""
    output: int
    workspace: int
    stream: int
    device: int
    out: Any
    """What the call returns."""
    room: Any
    """The workspace. It must not be freed before all is launched."""

    @property
    def routes(self) -> int:
        """The rows that there may be: tokens * slots."""
        return self.sizes.tokens * self.sizes.slots

    @property
    def is_sorted(self) -> bool:
        """Whether a launch sorts the routes and gathers their rows: weights on the input need rows of their own."""
        return not self.plan.can_leave_unsorted or self.scalars.weight_on_input

    @property
    def token_tiles(self) -> tuple[int, int]:
        """The list of token tiles, and its bytes."""
        return (self.workspace + self.plan.token_tiles, self.plan.token_tiles_bytes) if self.is_sorted else (0, 0)

    @property
    def behind(self) -> tuple[int, int, int]:
        """The last arguments of launches behind the first one, on which they are dependent."""
        return self.stream, int(True), self.device


class ExpertLauncher:
    """Launches of the grouped kernels of one build. Several threads may launch at once, for several GPUs."""

    def __init__(self, bindings: Bindings, card_of: Any) -> None:
        """Launch with this build.

        Args:
            bindings: the opened build.
            card_of: returns the card of a CUDA device number.
        """
        self._bindings = bindings
        self._indices = {info.config: index for index, info in enumerate(bindings.kernels) if info.config.is_grouped}
        self._card_of = card_of
        self._planned = lru_cache(maxsize=1 << 14)(self._plan)

    @property
    def configs(self) -> list[KernelConfig]:
        """The grouped kernels that are built, sorted."""
        return sorted(self._indices)

    def route_tokens(
        self, topk_ids: Any, experts: int, tile_tokens: int, expert_map: Any, stream: Any, *, launch: int
    ) -> ExpertRows:
        """Sort routes by expert; see `Library.route_tokens`."""
        count, tile = checked_experts(experts), positive("tile_tokens", tile_tokens)
        choice = self._choice(topk_ids, expert_map)
        device = choice.ids.device or 0
        tokens, slots = choice.ids.shape
        routes = tokens * slots
        address = stream_pointer(stream, topk_ids)
        size = self._token_tiles_bytes(routes, count, tile)

        def array(length: int) -> Any:
            return self._empty(topk_ids, (length,), "<i4", device, address)

        found = ExpertRows(
            count,
            routes,
            tile,
            self._empty(topk_ids, (size,), "|u1", device, address),
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
        device = seen.device or 0
        length, tile = integer("rows", rows), positive("tile_tokens", tile_tokens)
        check(name, seen, dtype="<i4", shape=seen.shape if indices is None else (length,), device=device)
        count = checked_experts(seen.shape[0] - (offsets is not None) if experts is None else experts)
        size = self._token_tiles_bytes(length, count, tile)
        address = stream_pointer(stream, given)
        made = self._empty(given, (size,), "|u1", device, address)
        tiles = view("routing", made, self._bindings.module)
        outcome = self._bindings.library.list_token_tiles(
            *(seen.pointer if name == source else 0 for source in ("offsets", "counts")),
            *(0 if stride is None else positive("stride", stride), 0 if indices is None else seen.pointer),
            *(count, length, tile, tiles.pointer, size, address, launch, device),
        )
        self._bindings.result_of(outcome)
        return ExpertRows(count, length, tile, made)

    def grouped_gemm(self, a: Any, w: PackedExperts, rows: ExpertRows, options: GemmOptions) -> Any:
        """Launch the product of each row with its expert; see `Library.grouped_gemm`."""
        factor, named, launch = options.scalars()
        packed = self._packed("w", w)
        if not isinstance(rows, ExpertRows):
            raise InvalidValueError(
                f"rows of type {type(rows).__name__} must be ExpertRows: see route_tokens and list_rows"
            )
        if rows.experts != w.experts:
            raise InvalidValueError(f"rows of {rows.experts} experts must be of {w.experts}, as w is")
        device = packed.device or 0
        applied = Activation.of(options.activation)
        check_activation(applied, w)
        activations = view("activations", a, self._bindings.module)
        check_activations_shape(activations.shape, w.k)
        m = rows.rows
        check("activations", activations, dtype="<f2", shape=(m, w.k), device=device)
        bias = None if options.bias is None else view("bias", options.bias, self._bindings.module)
        if bias is not None:
            check("bias", bias, dtype="<f2", shape=(w.experts, w.n), device=device)
        problem = Problem(m, w.n, w.k, w.group_size)
        kernel = self._kernel(named, w, problem, rows, device)
        stream = stream_pointer(options.stream, a)
        shape = m, w.n // 2 if w.gated else w.n
        out = self._empty(a, shape, "<f2", device, stream) if options.out is None else options.out
        output = view("output", out, self._bindings.module)
        check("output", output, dtype="<f2", shape=shape, device=device, written=True)
        tiles = view("rows", rows.token_tiles, self._bindings.module)
        check("rows", tiles, dtype="|u1", shape=tiles.shape, device=device)
        outcome = self._bindings.library.grouped_gemm(
            *(self._indices[kernel], *numbers_of(problem)),
            *(activations.pointer, packed.pointer, w.nbytes_of_expert),
            *(0 if bias is None else bias.pointer, output.pointer, factor, applied.number, 0),
            *(w.experts, w.stride, tiles.pointer, tiles.nbytes, rows.tile_tokens, False),
            *(*_NO_IDS, 0, False, stream, launch, device),
        )
        self._bindings.result_of(outcome)
        return out

    def _kernel(
        self, named: KernelConfig | None, w: PackedExperts, problem: Problem, rows: ExpertRows, device: int
    ) -> KernelConfig:
        epilogue = Epilogue.GATED if w.gated else Epilogue.NONE
        if named is None:
            routing = choosing.Routing(rows.rows, 1, w.experts, w.experts)
            return choosing.choose_kernel(
                self._indices, w.mode, replace(problem, m=1), epilogue, routing, self._card_of(device), rows.tile_tokens
            )
        if named not in self._indices:
            kind = "is not built" if named.is_grouped else "computes one product: call gemm"
            raise InvalidValueError(f"{named.name} {kind}")
        if (named.mode, named.epilogue) != (w.mode, epilogue):
            raise InvalidValueError(
                f"{named.name} is of mode {named.mode} and epilogue {named.epilogue}, but the experts need "
                f"{w.mode} and {epilogue}"
            )
        return named

    def moe(
        self,
        hidden: Any,
        w13: PackedExperts,
        w2: PackedExperts,
        topk_ids: Any,
        topk_weights: Any,
        options: MoeOptions,
        *,
        parts: Collection[str] = MOE_PARTS,
        pair: Pair | None = None,
    ) -> Any:
        """Launch a layer of experts; see `Library.moe`.

        Args:
            hidden: as there, and the following ones.
            w13: the gate and up projections.
            w2: the down projections.
            topk_ids: the experts of each token.
            topk_weights: their weights.
            options: the options.
            parts: those to launch. What they read is in the workspace of an earlier, whole call.
            pair: the kernels of both products; None chooses them.
        """
        layer = self._checked_layer(hidden, w13, w2, topk_ids, topk_weights, options, pair)
        if layer.routes > 0:
            for part, step in (
                (ROUTING, self._route),
                (GATE_UP, self._multiply_gate_up),
                (ACTIVATION, self._activate),
                (DOWN, self._multiply_down),
                (COMBINING, self._combine),
            ):
                if part in parts and part in launched_parts(gated=layer.sizes.gated, is_sorted=layer.is_sorted):
                    step(layer)
        return layer.out

    def _checked_layer(
        self,
        hidden: Any,
        w13: PackedExperts,
        w2: PackedExperts,
        topk_ids: Any,
        topk_weights: Any,
        options: MoeOptions,
        pair: Pair | None,
    ) -> _Layer:
        """Return what the launches of a call read and write, checked.

        Raises:
            InvalidValueError: if an argument is not what it must be, or the arrays do not fit together.
        """
        module, scalars = self._bindings.module, options.scalars()
        packed13 = self._packed("w13", w13)
        device = packed13.device or 0
        packed2 = self._packed("w2", w2, device)
        check_pair(w13, w2)
        states = view("hidden", hidden, module)
        check_activations_shape(states.shape, w2.n)
        check("hidden", states, dtype="<f2", shape=states.shape, device=device)
        tokens = states.shape[0]
        choice = self._choice(topk_ids, options.expert_map, device, tokens)
        slots = choice.ids.shape[1]
        weights = view("topk_weights", topk_weights, module)
        check("topk_weights", weights, dtype="<f4", shape=(tokens, slots), device=device)
        sizes = moe_sizes(tokens, slots, w13, w2, choice.global_experts)
        plan = self.plan(sizes, device, invariant=scalars.invariant, pair=pair)
        stream = stream_pointer(options.stream, hidden)
        out = self._empty(hidden, states.shape, "<f2", device, stream) if options.out is None else options.out
        output = view("output", out, module)
        check("output", output, dtype="<f2", shape=states.shape, device=device, written=True)
        given = options.workspace
        room = self._empty(hidden, (plan.nbytes,), "|u1", device, stream) if given is None else given
        base = self._workspace(room, plan.nbytes, device)
        first, second = _Weights(w13, packed13.pointer), _Weights(w2, packed2.pointer)
        arrays = states.pointer, weights.pointer, output.pointer, base
        return _Layer(sizes, plan, scalars, first, second, choice, *arrays, stream, device, out, room)

    def _route(self, layer: _Layer) -> None:
        """Launch the sorting of the routes by expert, and the gathering of their rows."""
        sizes, plan, base = layer.sizes, layer.plan, layer.workspace
        outcome = self._bindings.library.route(
            *(*layer.choice.arguments, sizes.experts, sizes.tokens, sizes.slots, plan.gate_up.cta.tokens),
            *(base + plan.offsets, base + plan.routes_of_rows, base + plan.rows_of_routes, *layer.token_tiles),
            *(layer.hidden, layer.weights if layer.scalars.weight_on_input else 0, base + plan.rows, sizes.down.n),
            *(layer.stream, layer.scalars.launch, layer.device),
        )
        self._bindings.result_of(outcome)

    def _multiply_gate_up(self, layer: _Layer) -> None:
        """Launch the first product, with the gate if its kernels apply it."""
        plan, base = layer.plan, layer.workspace
        products, applied = (plan.gated, layer.scalars.gate) if layer.sizes.gated else (plan.products, Activation.NONE)
        read = base + plan.rows if layer.is_sorted else layer.hidden
        self._multiply(layer, plan.gate_up, layer.gate_up, (read, base + products), applied, is_first=True)

    def _multiply_down(self, layer: _Layer) -> None:
        """Launch the second product."""
        plan, base = layer.plan, layer.workspace
        places = base + plan.gated, base + plan.rows
        self._multiply(layer, plan.down, layer.down, places, Activation.NONE, is_first=False)

    def _multiply(
        self,
        layer: _Layer,
        kernel: KernelConfig,
        weights: _Weights,
        places: tuple[int, int],
        applied: Activation,
        *,
        is_first: bool,
    ) -> None:
        """Launch a product from one address to another."""
        w, (read, written) = weights.experts, places
        rows, ids, slots = layer.routes, _NO_IDS, 0
        if not layer.is_sorted:
            rows, ids, slots = layer.sizes.tokens, layer.choice.arguments, layer.sizes.slots
        launch = (
            (layer.stream, layer.scalars.launch, layer.device) if (is_first and not layer.is_sorted) else layer.behind
        )
        # The list, or the ids, were there before the first product began, so the second one may fetch weights while
        # that one ends.
        outcome = self._bindings.library.grouped_gemm(
            *(self._indices[kernel], rows, w.n, w.k, w.group_size),
            *(read, weights.pointer, w.nbytes_of_expert, 0, written, 1.0, applied.number, 0),
            *(w.experts, w.stride, *layer.token_tiles, kernel.cta.tokens, not is_first),
            *(*ids, slots, is_first and not layer.is_sorted, *launch),
        )
        self._bindings.result_of(outcome)

    def _activate(self, layer: _Layer) -> None:
        """Launch the gates behind a first product whose kernels do not apply them."""
        plan, base = layer.plan, layer.workspace
        rows, row_count = layer.routes, base + plan.offsets + INT_BYTES * layer.sizes.experts
        if not layer.is_sorted:  # rows of no expert hold anything, and nobody reads what becomes of them
            rows, row_count = layer.sizes.unsorted_rows, 0
        outcome = self._bindings.library.activate_rows(
            *(base + plan.products, row_count, base + plan.gated, rows, layer.sizes.down.k),
            *(layer.scalars.gate.number, *layer.behind),
        )
        self._bindings.result_of(outcome)

    def _combine(self, layer: _Layer) -> None:
        """Launch the sums over the slots of each token."""
        sizes, plan, base = layer.sizes, layer.plan, layer.workspace
        weights = 0 if layer.scalars.weight_on_input else layer.weights
        by_route, ids = (base + plan.rows_of_routes, _NO_IDS) if layer.is_sorted else (0, layer.choice.arguments)
        outcome = self._bindings.library.combine_rows(
            *(base + plan.rows, by_route, weights, layer.output),
            *(sizes.tokens, sizes.slots, sizes.down.n, *ids, sizes.experts, *layer.behind),
        )
        self._bindings.result_of(outcome)

    def workspace_bytes(
        self,
        tokens: int,
        slots: int,
        w13: PackedExperts,
        w2: PackedExperts,
        *,
        global_experts: int | None,
        invariant: bool,
        device: int,
    ) -> int:
        """Return the workspace of a layer of experts; see `Library.moe_workspace_bytes`."""
        for name, w in (("w13", w13), ("w2", w2)):
            check_packed(name, w)
        check_pair(w13, w2)
        rows = integer("tokens", tokens)
        if rows < 0:
            raise InvalidValueError(f"tokens of {rows} must be 0 or more")
        every = None if global_experts is None else positive("global_experts", global_experts)
        sizes = moe_sizes(rows, positive("slots", slots), w13, w2, every)
        return self.plan(sizes, integer("device", device), invariant=checked_flag("invariant", invariant)).nbytes

    def _workspace(self, given: Any, needed: int, device: int) -> int:
        """Return the address of a workspace.

        Raises:
            InvalidValueError: if it is no array of bytes on the GPU, or too short.
        """
        room = view("workspace", given, self._bindings.module)
        check("workspace", room, dtype="|u1", shape=room.shape, device=device, written=True)
        if room.nbytes < needed:
            raise InvalidValueError(f"workspace of {room.nbytes} bytes must be at least {needed} bytes")
        return room.pointer

    def plan(self, sizes: MoeSizes, device: int, *, invariant: bool = False, pair: Pair | None = None) -> MoePlan:
        """Return how a layer of experts runs on a GPU.

        Args:
            sizes: the sizes of the call.
            device: the CUDA device number.
            invariant: whether the kernels must not depend on the number of tokens.
            pair: the kernels of both products, of equal CTA tokens; None chooses them.

        Raises:
            NotBuiltError: if the build has not the kernels.
            UnsupportedProblemError: if none can run a product.
        """
        return self._planned(sizes, self._card_of(device), invariant, pair)

    def _plan(self, sizes: MoeSizes, card: Card, invariant: bool, pair: Pair | None) -> MoePlan:
        if pair is None:
            pair = chosen_pair(self._indices, sizes, card, invariant=invariant)
        return planned(sizes, pair, self._token_tiles_bytes(sizes.routes, sizes.experts, pair[0].cta.tokens))

    def _packed(self, name: str, w: Any, device: int | None = None) -> ArrayView:
        """Return the buffer of packed experts, checked.

        Raises:
            InvalidValueError: if they are no packed experts for native kernels, or not on a GPU, or not on this one.
        """
        check_packed(name, w)
        packed = view(name, w.data, self._bindings.module)
        check(name, packed, dtype="|u1", shape=(w.experts, w.stride), device=device)
        return packed

    def _choice(
        self, topk_ids: Any, expert_map: Any, device: int | None = None, tokens: int | None = None
    ) -> _ExpertChoice:
        """Return the experts of a call's routes, checked.

        Args:
            topk_ids: the ids.
            expert_map: the map, or None.
            device: where both must be; None is where the ids are.
            tokens: their number; None is that of the ids.

        Raises:
            InvalidValueError: if the ids are not int32 or int64 [tokens, slots], contiguous, or the map is not int32
                [all experts] on the same GPU.
        """
        ids = view("topk_ids", topk_ids, self._bindings.module)
        if ids.dtype not in _IDS or len(ids.shape) != _MATRIX or ids.shape[1] == 0:
            raise InvalidValueError(
                f"topk_ids of dtype {dtype_name(ids.dtype)} and shape {list(ids.shape)} must be int32 or int64 "
                "[tokens, slots]"
            )
        shape = ids.shape[0] if tokens is None else tokens, ids.shape[1]
        check("topk_ids", ids, dtype=ids.dtype, shape=shape, device=device)
        if expert_map is None:
            return _ExpertChoice(ids, None)
        mapped = view("expert_map", expert_map, self._bindings.module)
        if len(mapped.shape) != 1 or mapped.shape[0] == 0:
            raise InvalidValueError(f"expert_map of shape {list(mapped.shape)} must be [all experts]")
        there = ids.device or 0 if device is None else device
        check("expert_map", mapped, dtype="<i4", shape=mapped.shape, device=there)
        return _ExpertChoice(ids, mapped)

    def _token_tiles_bytes(self, rows: int, experts: int, tile_tokens: int) -> int:
        return int(self._bindings.result_of(self._bindings.library.token_tiles_bytes(rows, experts, tile_tokens)))

    def _empty(self, like: Any, shape: tuple[int, ...], dtype: str, device: int, stream: int) -> Any:
        """Allocate in the order of the stream.

        Raises:
            InvalidValueError: if a graph would write to memory that is freed with the array.
        """
        module = self._bindings.module
        if not is_torchs_stream(like, stream) and module.is_capturing(stream, device):
            raise InvalidValueError("pass out= and workspace= in a capture: the graph writes there at every replay")
        return empty_like_library(like, module, shape, dtype, device, stream=stream)
