"""How a layer of experts runs: its sizes, its kernels, its launches, and where its intermediate arrays lie."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

from w4a16gen.choose import experts as choosing
from w4a16gen.choose.cards import Card
from w4a16gen.kernels.arrangement import UNSORTED_TOKENS
from w4a16gen.kernels.config import Epilogue, KernelConfig, QuantMode
from w4a16gen.kernels.problem import Problem
from w4a16gen.weights.experts import PackedExperts
from w4a16gen.weights.layouts.geometry import align

INVARIANT_TOKENS = 64
"""The number of tokens that kernels are chosen for where results must not depend on it."""
ROUTING, GATE_UP, ACTIVATION, DOWN, COMBINING = MOE_PARTS = ("routing", "gate_up", "activation", "down", "combining")
"""The launches of a layer of experts, in order. Routing gathers the rows too. Kernels that apply the gate themselves
leave out the activation, and with few tokens also the routing."""
HALF_BYTES, INT_BYTES = 2, 4


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
    """Whether the weights of the first product are packed for kernels that apply the gate."""

    @property
    def routes(self) -> int:
        """The rows that there may be where routes are sorted."""
        return self.tokens * self.slots

    @property
    def unsorted_rows(self) -> int:
        """The rows of products whose routes are unsorted."""
        return UNSORTED_TOKENS * min(self.routes, self.experts)


Pair = tuple[KernelConfig, KernelConfig]
"""The kernels of the first and of the second product of a layer of experts."""


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
    can_leave_unsorted: bool = False
    """Whether no launch need sort the routes. Then there is room for the rows of either way."""
    applies_gate: bool = False
    """Whether the kernels of the first product apply the gate. Otherwise a launch between the products does."""


def launched_parts(*, gated: bool, is_sorted: bool) -> list[str]:
    """Return the launches of a layer, in order.

    Args:
        gated: whether the kernels of the first product apply the gate.
        is_sorted: whether a launch sorts the routes.
    """
    left_out = {ROUTING: not is_sorted, ACTIVATION: gated}
    return [part for part in MOE_PARTS if not left_out.get(part, False)]


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


def chosen_pair(configs: Iterable[KernelConfig], sizes: MoeSizes, card: Card, *, invariant: bool) -> Pair:
    """Return the kernels of a layer of experts.

    Args:
        configs: the grouped kernels that are built.
        sizes: the sizes of the call.
        card: the GPU.
        invariant: whether the choice must not depend on the number of tokens.

    Raises:
        NotBuiltError: if the build has not the kernels.
        UnsupportedProblemError: if none can run a product.
    """
    tokens = INVARIANT_TOKENS if invariant else max(1, sizes.tokens)
    routing = choosing.Routing(tokens, sizes.slots, sizes.experts, sizes.global_experts)
    every = list(configs)
    applied = gate_epilogue(every, sizes.mode) if sizes.gated else Epilogue.NONE
    return choosing.choose_pair(every, sizes.mode, (sizes.gate_up, applied), sizes.down, routing, card)


def gate_epilogue(configs: Iterable[KernelConfig], mode: QuantMode) -> Epilogue:
    """Return the epilogue of the kernels that multiply weights which are packed for the gate.

    To kernels without an epilogue they are weights in another order of channels. Those serve where a build has no
    other grouped kernels of the mode; a launch behind the product then applies the gate.

    Args:
        configs: the grouped kernels that are built.
        mode: the mode of the weights.
    """
    built = {config.epilogue for config in configs if config.mode is mode}
    return Epilogue.NONE if built == {Epilogue.NONE} else Epilogue.GATED


def planned(sizes: MoeSizes, pair: Pair, token_tiles_bytes: int) -> MoePlan:
    """Return how a layer of experts runs with two kernels.

    Args:
        sizes: the sizes of the call.
        pair: the kernels.
        token_tiles_bytes: what the list of token tiles may need.
    """
    few = choosing.are_few(sizes.tokens, sizes.slots)
    can_leave_unsorted = few and all(config.cta.tokens == UNSORTED_TOKENS for config in pair)
    rows = max(sizes.routes, sizes.unsorted_rows) if can_leave_unsorted else sizes.routes
    hidden, intermediate = sizes.down.n, sizes.down.k
    applies_gate = sizes.gated and pair[0].epilogue is Epilogue.GATED
    lengths = {
        "offsets": INT_BYTES * (sizes.experts + 1),
        "routes_of_rows": INT_BYTES * sizes.routes,
        "rows_of_routes": INT_BYTES * sizes.routes,
        "token_tiles": token_tiles_bytes,
        "rows": HALF_BYTES * rows * hidden,
        "products": 0 if applies_gate else HALF_BYTES * rows * 2 * intermediate,
        "gated": HALF_BYTES * rows * intermediate,
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
        token_tiles_bytes=token_tiles_bytes,
        rows=places["rows"],
        products=places["products"],
        gated=places["gated"],
        nbytes=ends[-1],
        can_leave_unsorted=can_leave_unsorted,
        applies_gate=applies_gate,
    )
