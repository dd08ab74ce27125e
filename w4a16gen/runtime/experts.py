"""Calls of grouped kernels: routing, products of many experts, and whole layers. No call waits for the GPU."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

from w4a16gen.choose import experts as choosing
from w4a16gen.choose.cards import Card
from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.config import Epilogue, KernelConfig, QuantMode, Target, shown
from w4a16gen.kernels.epilogue import Activation
from w4a16gen.kernels.integers import integer
from w4a16gen.kernels.problem import Problem
from w4a16gen.runtime.arrays import ArrayView, check, check_activations_shape, dtype_name, view
from w4a16gen.runtime.bindings import Bindings, numbers_of
from w4a16gen.runtime.calls import checked_alpha
from w4a16gen.runtime.streams import empty_like_library, is_torchs_stream, stream_pointer
from w4a16gen.weights.experts import PackedExperts
from w4a16gen.weights.layouts.geometry import align
from w4a16gen.weights.packed import LAYOUT_TARGETS, checked_flag

GATED_ACTIVATIONS = {"silu": Activation.SWIGLU, "gelu": Activation.GEGLU_ERF, "gelu_tanh": Activation.GEGLU_TANH}
"""The functions of the gate that kernels compute, by name."""
MAX_EXPERTS = 1024
"""Experts that grouped kernels serve: routing has a thread for each, in one CTA."""
INVARIANT_TOKENS = 64
"""The number of tokens that kernels are chosen for where results must not depend on it."""
_HALF_BYTES = 2
_INT_BYTES = 4
_MATRIX = 2
_GATHERS_NOTHING = (0, 0, 0, 0)
ROUTING, GATE_UP, ACTIVATION, DOWN, COMBINING = MOE_PARTS = ("routing", "gate_up", "activation", "down", "combining")
"""The launches of a layer of experts, in order. Routing gathers the rows too. Kernels that apply the gate themselves
leave out the activation."""
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


class MoeSizes(NamedTuple):
    """All that decides how a layer of experts runs."""

    tokens: int
    slots: int
    experts: int
    global_experts: int
    mode: QuantMode
    gate_up: Problem
    """The first product of one expert; m is 1."""
    down: Problem
    gated: bool
    """Whether the kernels of the first product apply the gate."""


class MoePlan(NamedTuple):
    """The kernels of a layer of experts, and where its intermediate arrays are in the workspace."""

    gate_up: KernelConfig
    down: KernelConfig
    offsets: int
    routes_of_rows: int
    rows_of_routes: int
    token_tiles: int
    token_tiles_bytes: int
    rows: int
    """fp16 [routes, hidden]: the inputs of the first product, and then the results of the second one."""
    products: int
    """fp16 [routes, 2 * intermediate]: the first product, if its kernels do not apply the gate."""
    gated: int
    """fp16 [routes, intermediate]."""
    nbytes: int


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
        count, tile = _experts(experts), _positive("tile_tokens", tile_tokens)
        ids = self._ids(topk_ids)
        device = ids.device or 0
        tokens, slots = ids.shape
        routes = tokens * slots
        mapped = self._expert_map(expert_map, device)
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
            *(ids.pointer, _IDS[ids.dtype], 0 if mapped is None else mapped.pointer),
            *(0 if mapped is None else mapped.shape[0], count, tokens, slots, tile),
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
        rows: int,
        tile_tokens: int,
        stream: Any,
        *,
        launch: int,
    ) -> ExpertRows:
        """List the token tiles of experts whose rows are known; see `Library.list_rows`."""
        if (offsets is None) == (counts is None) or (counts is None) != (stride is None):
            raise InvalidValueError("the rows of each expert are given by offsets, or by counts and stride")
        given = counts if offsets is None else offsets
        name = "counts" if offsets is None else "offsets"
        seen = view(name, given, self._bindings.module)
        if len(seen.shape) != 1:
            raise InvalidValueError(f"{name} of shape {list(seen.shape)} must have one dimension")
        device = seen.device or 0
        check(name, seen, dtype="<i4", shape=seen.shape, device=device)
        count = _experts(seen.shape[0] - (offsets is not None))
        length, tile = integer("rows", rows), _positive("tile_tokens", tile_tokens)
        size = self._token_tiles_bytes(length, count, tile)
        address = stream_pointer(stream, given)
        made = self._empty(given, (size,), "|u1", device, address)
        tiles = view("routing", made, self._bindings.module)
        outcome = self._bindings.library.list_token_tiles(
            *((seen.pointer, 0, 0) if counts is None else (0, seen.pointer, _positive("stride", stride))),
            *(count, length, tile, tiles.pointer, size, address, launch, device),
        )
        self._bindings.result_of(outcome)
        return ExpertRows(count, length, tile, made)

    def grouped_gemm(  # noqa: PLR0913  (the options of one call)
        self,
        a: Any,
        w: PackedExperts,
        rows: ExpertRows,
        bias: Any,
        alpha: Any,
        config: KernelConfig | str | None,
        activation: Any,
        out: Any,
        stream: Any,
        *,
        launch: int,
    ) -> Any:
        """Launch the product of each row with its expert; see `Library.grouped_gemm`."""
        packed = self._packed("w", w)
        if not isinstance(rows, ExpertRows):
            raise InvalidValueError(
                f"rows of type {type(rows).__name__} must be ExpertRows: see route_tokens and list_rows"
            )
        if rows.experts != w.experts:
            raise InvalidValueError(f"rows of {rows.experts} experts must be of {w.experts}, as w is")
        device = packed.device or 0
        factor = checked_alpha(alpha)
        kind = Activation.of(activation)
        _check_activation(kind, w)
        activations = view("activations", a, self._bindings.module)
        check_activations_shape(activations.shape, w.k)
        m = rows.rows
        check("activations", activations, dtype="<f2", shape=(m, w.k), device=device)
        added = None if bias is None else view("bias", bias, self._bindings.module)
        if added is not None:
            check("bias", added, dtype="<f2", shape=(w.experts, w.n), device=device)
        problem = Problem(m, w.n, w.k, w.group_size)
        kernel = self._kernel(config, w, problem, rows, device)
        address = stream_pointer(stream, a)
        columns = w.n // 2 if w.gated else w.n
        result = self._empty(a, (m, columns), "<f2", device, address) if out is None else out
        output = view("output", result, self._bindings.module)
        check("output", output, dtype="<f2", shape=(m, columns), device=device, written=True)
        tiles = view("rows", rows.token_tiles, self._bindings.module)
        check("rows", tiles, dtype="|u1", shape=tiles.shape, device=device)
        outcome = self._bindings.library.grouped_gemm(
            *(self._indices[kernel], *numbers_of(problem)),
            *(activations.pointer, packed.pointer, w.nbytes_of_expert),
            *(0 if added is None else added.pointer, output.pointer, factor, kind.number, 0),
            *(w.experts, w.stride, tiles.pointer, tiles.nbytes, rows.tile_tokens, False, address, launch, device),
        )
        self._bindings.result_of(outcome)
        return result

    def _kernel(
        self, config: KernelConfig | str | None, w: PackedExperts, problem: Problem, rows: ExpertRows, device: int
    ) -> KernelConfig:
        epilogue = Epilogue.GATED if w.gated else Epilogue.NONE
        if config is None:
            routing = choosing.Routing(rows.rows, 1, w.experts, w.experts)
            return choosing.choose_kernel(
                self._indices, w.mode, replace(problem, m=1), epilogue, routing, self._card_of(device), rows.tile_tokens
            )
        kernel = KernelConfig.of(config)
        if kernel not in self._indices:
            kind = "is not built" if kernel.is_grouped else "computes one product: call gemm"
            raise InvalidValueError(f"{kernel.name} {kind}")
        if (kernel.mode, kernel.epilogue) != (w.mode, epilogue):
            raise InvalidValueError(
                f"{kernel.name} is of mode {kernel.mode} and epilogue {kernel.epilogue}, but the experts need "
                f"{w.mode} and {epilogue}"
            )
        return kernel

    def moe(  # noqa: PLR0913  (the options of one call)
        self,
        hidden: Any,
        w13: PackedExperts,
        w2: PackedExperts,
        topk_ids: Any,
        topk_weights: Any,
        *,
        expert_map: Any,
        activation: str,
        weight_on_input: bool,
        invariant: bool,
        out: Any,
        workspace: Any,
        stream: Any,
        launch: int,
        parts: Collection[str] = MOE_PARTS,
    ) -> Any:
        """Launch a layer of experts; see `Library.moe`.

        With some of `parts` only, launch those: what they read is in the workspace of an earlier, whole call.
        """
        module, library = self._bindings.module, self._bindings.library
        packed13 = self._packed("w13", w13)
        device = packed13.device or 0
        packed2 = self._packed("w2", w2, device)
        kind = gate_function(activation)
        on_input = checked_flag("weight_on_input", weight_on_input)
        check_pair(w13, w2)
        size = w2.n
        states = view("hidden", hidden, module)
        check_activations_shape(states.shape, size)
        tokens = states.shape[0]
        check("hidden", states, dtype="<f2", shape=(tokens, size), device=device)
        ids = self._ids(topk_ids)
        slots = ids.shape[1]
        check("topk_ids", ids, dtype=ids.dtype, shape=(tokens, slots), device=device)
        weights = view("topk_weights", topk_weights, module)
        check("topk_weights", weights, dtype="<f4", shape=(tokens, slots), device=device)
        mapped = self._expert_map(expert_map, device)
        sizes = moe_sizes(tokens, slots, w13, w2, None if mapped is None else mapped.shape[0])
        plan = self.plan(sizes, device, invariant=checked_flag("invariant", invariant))
        address = stream_pointer(stream, hidden)
        result = self._empty(hidden, (tokens, size), "<f2", device, address) if out is None else out
        output = view("output", result, module)
        check("output", output, dtype="<f2", shape=(tokens, size), device=device, written=True)
        given = self._empty(hidden, (plan.nbytes,), "|u1", device, address) if workspace is None else workspace
        base, routes = self._workspace(given, plan.nbytes, device), tokens * slots
        if routes == 0:
            return result
        on = (address, True, device)
        list_of_tiles = (base + plan.token_tiles, plan.token_tiles_bytes)
        count = base + plan.offsets + _INT_BYTES * w13.experts
        factors, result_of = weights.pointer, self._bindings.result_of
        if ROUTING in parts:
            result_of(
                library.route(
                    *(ids.pointer, _IDS[ids.dtype], 0 if mapped is None else mapped.pointer),
                    *(0 if mapped is None else mapped.shape[0], w13.experts, tokens, slots, plan.gate_up.cta.tokens),
                    *(base + plan.offsets, base + plan.routes_of_rows, base + plan.rows_of_routes, *list_of_tiles),
                    *(states.pointer, factors if on_input else 0, base + plan.rows, size, address, launch, device),
                )
            )
        products, kernel = (plan.gated, kind) if sizes.gated else (plan.products, Activation.NONE)

        def multiply(
            config: KernelConfig, w: PackedExperts, packed: ArrayView, a: int, c: int, act: Activation, *, first: bool
        ) -> None:
            outcome = library.grouped_gemm(
                *(self._indices[config], routes, w.n, w.k, w.group_size),
                *(base + a, packed.pointer, w.nbytes_of_expert, 0, base + c, 1.0, act.number, 0),
                *(w.experts, w.stride, *list_of_tiles, config.cta.tokens, not first, *on),
            )
            result_of(outcome)

        if GATE_UP in parts:
            multiply(plan.gate_up, w13, packed13, plan.rows, products, kernel, first=True)
        if not sizes.gated and ACTIVATION in parts:
            gated, both = base + plan.gated, base + plan.products
            result_of(library.activate_rows(both, count, gated, routes, w2.k, kind.number, *on))
        if DOWN in parts:
            # The list was there before the first product began, so this one may fetch weights while that one ends.
            multiply(plan.down, w2, packed2, plan.gated, plan.rows, Activation.NONE, first=False)
        if COMBINING in parts:
            result_of(
                library.combine_rows(
                    *(base + plan.rows, base + plan.rows_of_routes, 0 if on_input else factors, output.pointer),
                    *(tokens, slots, size, *on),
                )
            )
        return result

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
        every = None if global_experts is None else _positive("global_experts", global_experts)
        sizes = moe_sizes(rows, _positive("slots", slots), w13, w2, every)
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

    def plan(self, sizes: MoeSizes, device: int, *, invariant: bool = False) -> MoePlan:
        """Return how a layer of experts runs on a GPU.

        Args:
            sizes: the sizes of the call.
            device: the CUDA device number.
            invariant: whether the kernels must not depend on the number of tokens.

        Raises:
            NotBuiltError: if the build has not the kernels.
            UnsupportedProblemError: if none can run a product.
        """
        return self._planned(sizes, self._card_of(device), invariant)

    def _plan(self, sizes: MoeSizes, card: Card, invariant: bool) -> MoePlan:
        tokens = INVARIANT_TOKENS if invariant else max(1, sizes.tokens)
        routing = choosing.Routing(tokens, sizes.slots, sizes.experts, sizes.global_experts)
        epilogue = Epilogue.GATED if sizes.gated else Epilogue.NONE
        pair = choosing.choose_pair(self._indices, sizes.mode, (sizes.gate_up, epilogue), sizes.down, routing, card)
        routes = sizes.tokens * sizes.slots
        hidden, intermediate = sizes.down.n, sizes.down.k
        tiles = self._token_tiles_bytes(routes, sizes.experts, pair[0].cta.tokens)
        lengths = {
            "offsets": _INT_BYTES * (sizes.experts + 1),
            "routes_of_rows": _INT_BYTES * routes,
            "rows_of_routes": _INT_BYTES * routes,
            "token_tiles": tiles,
            "rows": _HALF_BYTES * routes * hidden,
            "products": 0 if sizes.gated else _HALF_BYTES * routes * 2 * intermediate,
            "gated": _HALF_BYTES * routes * intermediate,
        }
        ends = list(itertools.accumulate(map(align, lengths.values()), initial=0))
        places = dict(zip(lengths, ends, strict=False))
        return MoePlan(
            gate_up=pair[0],
            down=pair[1],
            offsets=places["offsets"],
            routes_of_rows=places["routes_of_rows"],
            rows_of_routes=places["rows_of_routes"],
            token_tiles=places["token_tiles"],
            token_tiles_bytes=tiles,
            rows=places["rows"],
            products=places["products"],
            gated=places["gated"],
            nbytes=ends[-1],
        )

    def _packed(self, name: str, w: Any, device: int | None = None) -> ArrayView:
        """Return the buffer of packed experts, checked.

        Raises:
            InvalidValueError: if they are no packed experts for native kernels, or not on a GPU, or not on this one.
        """
        check_packed(name, w)
        packed = view(name, w.data, self._bindings.module)
        check(name, packed, dtype="|u1", shape=(w.experts, w.stride), device=device)
        return packed

    def _ids(self, topk_ids: Any) -> ArrayView:
        """Return the ids of a call.

        Raises:
            InvalidValueError: if they are not int32 or int64 [tokens, slots], contiguous.
        """
        ids = view("topk_ids", topk_ids, self._bindings.module)
        if ids.dtype not in _IDS or len(ids.shape) != _MATRIX or ids.shape[1] == 0:
            raise InvalidValueError(
                f"topk_ids of dtype {dtype_name(ids.dtype)} and shape {list(ids.shape)} must be int32 or int64 "
                "[tokens, slots]"
            )
        check("topk_ids", ids, dtype=ids.dtype, shape=ids.shape)
        return ids

    def _expert_map(self, expert_map: Any, device: int) -> ArrayView | None:
        """Return the map of a call, or None.

        Raises:
            InvalidValueError: if it is not int32 [all experts] on the GPU.
        """
        if expert_map is None:
            return None
        mapped = view("expert_map", expert_map, self._bindings.module)
        if len(mapped.shape) != 1 or mapped.shape[0] == 0:
            raise InvalidValueError(f"expert_map of shape {list(mapped.shape)} must be [all experts]")
        check("expert_map", mapped, dtype="<i4", shape=mapped.shape, device=device)
        return mapped

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


def moe_sizes(
    tokens: int, slots: int, w13: PackedExperts, w2: PackedExperts, global_experts: int | None = None
) -> MoeSizes:
    """Return the sizes of a call of `moe`.

    Args:
        tokens: rows of the hidden states.
        slots: experts of a token.
        w13: the gate and up projections.
        w2: the down projections.
        global_experts: entries of the map of experts; None without a map.
    """
    return MoeSizes(
        tokens,
        slots,
        w13.experts,
        w13.experts if global_experts is None else global_experts,
        w13.mode,
        Problem(1, w13.n, w13.k, w13.group_size),
        Problem(1, w2.n, w2.k, w2.group_size),
        w13.gated,
    )


def check_packed(name: str, w: Any) -> None:
    """Raise unless grouped kernels can read packed experts.

    Raises:
        InvalidValueError: if they are no packed experts for native kernels, or too many.
    """
    if not isinstance(w, PackedExperts):
        raise InvalidValueError(f"{name} of type {type(w).__name__} must be PackedExperts: see pack_experts")
    if LAYOUT_TARGETS[w.layout] is not Target.NATIVE:
        raise InvalidValueError(f"{name} is packed as {w.layout}, but grouped kernels are native: pack it for them")
    _experts(w.experts)


def check_pair(w13: PackedExperts, w2: PackedExperts) -> None:
    """Raise unless two projections are of the same experts.

    Raises:
        InvalidValueError: naming both.
    """
    if w13.order is None:
        raise InvalidValueError("w13 must hold gate and up projections: see pack_experts(gate, up)")
    found, wanted = (w13.experts, w13.n, w13.k), (w2.experts, 2 * w2.k, w2.n)
    if found != wanted:
        raise InvalidValueError(
            f"w13 of {found[0]} experts of {list(found[1:])} must be of {wanted[0]} experts of "
            f"{list(wanted[1:])}, for w2"
        )
    if w13.mode is not w2.mode:
        raise InvalidValueError(f"w13 of mode {w13.mode} must be of mode {w2.mode}, as w2 is")


def _check_activation(kind: Activation, w: PackedExperts) -> None:
    """Raise unless experts are packed for an activation.

    Raises:
        InvalidValueError: naming both.
    """
    if kind.is_gated != w.gated or (kind is not Activation.NONE and not kind.is_gated):
        kinds = ", ".join(str(one) for one in GATED_ACTIVATIONS.values()) if w.gated else Activation.NONE
        packed = "for gated activations" if w.gated else "without gated=True"
        raise InvalidValueError(f"activation {kind} must be one of {kinds}: the experts are packed {packed}")


def gate_function(name: Any) -> Activation:
    """Return the gated activation of a function's name.

    Raises:
        InvalidValueError: if kernels do not compute it.
    """
    if not isinstance(name, str) or name not in GATED_ACTIVATIONS:
        raise InvalidValueError(f"activation {shown(name)} must be one of {', '.join(GATED_ACTIVATIONS)}")
    return GATED_ACTIVATIONS[name]


def _experts(count: Any) -> int:
    number = integer("experts", count)
    if not 0 < number <= MAX_EXPERTS:
        raise InvalidValueError(f"experts of {number} must be 1 to {MAX_EXPERTS}")
    return number


def _positive(name: str, value: Any) -> int:
    number = integer(name, value)
    if number < 1:
        raise InvalidValueError(f"{name} of {number} must be 1 or more")
    return number
