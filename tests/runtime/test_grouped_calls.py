"""Grouped products and layers of experts on a GPU made of host memory: results, raw calls, plans and refusals."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from fakes.arrays import GpuArray
from fakes.devices import H100, H200, numbered
from fakes.experts import Activating, Call, Combining, Grouped, Listing, Routing
from fakes.library import FakeLibrary
from paths import ROOT

from w4a16gen import (
    Epilogue,
    InvalidValueError,
    KernelConfig,
    NotBuiltError,
    Problem,
    QuantizedWeight,
    QuantMode,
    pack_weight,
    use_kernels,
)
from w4a16gen.choose import experts as choosing
from w4a16gen.choose.cards import card_of
from w4a16gen.errors import CudaError, UnsupportedProblemError, W4A16Error
from w4a16gen.kernels.arrangement import MAX_UNSORTED_ROUTES, UNSORTED_TOKENS
from w4a16gen.kernels.epilogue import Activation
from w4a16gen.kernels.problem import MAX_DIMENSION
from w4a16gen.kernels.spaces import enumerate_space, with_epilogues
from w4a16gen.runtime import expert_arrays
from w4a16gen.runtime.expert_calls import GATED_ACTIVATIONS, MAX_EXPERTS
from w4a16gen.runtime.expert_plan import INVARIANT_TOKENS, MoePlan, chosen_pair, moe_sizes
from w4a16gen.weights.experts import PackedExperts, pack_experts
from w4a16gen.weights.layouts.geometry import ALIGNMENT
from w4a16gen.weights.moe_reference import MoeExpectation, route_reference
from w4a16gen.weights.reference import Expectation, Extra, error_over_bound, random_weight

MODE = QuantMode.FINEGRAINED_SCALE_ONLY
KERNELS = [
    config
    for config in with_epilogues(enumerate_space("experts"), [Epilogue.NONE, Epilogue.GATED])
    if config.mode is MODE and config.cta.tokens in {UNSORTED_TOKENS, 16, 64}
]
LARGE_TILES = [config for config in KERNELS if config.cta.tokens > UNSORTED_TOKENS]
"""Those that need sorted routes."""
UNGATED = [config for config in KERNELS if config.epilogue is Epilogue.NONE]
"""Those that apply no gate."""
HIDDEN, INNER, EXPERTS, TOKENS, SLOTS = 96, 64, 5, 7, 3
ROUTES = TOKENS * SLOTS
Weights = list[QuantizedWeight]


class Layer:
    """A layer of experts, with everything that a call needs, on a library's GPU."""

    def __init__(self, library: FakeLibrary, *, gated: bool = False, ids: str = "<i8", device: int = 0) -> None:
        rng = np.random.default_rng(7)
        self.library, self.device = library, device

        def weights(n: int, k: int) -> Weights:
            return [random_weight(rng, n, k, 32, MODE, size=0.04) for _ in range(EXPERTS)]

        self.gate, self.up, self.down = weights(INNER, HIDDEN), weights(INNER, HIDDEN), weights(HIDDEN, INNER)
        self.w13 = self.moved(pack_experts(self.gate, self.up, gated=gated))
        self.w2 = self.moved(pack_experts(self.down))
        self.hidden = rng.standard_normal((TOKENS, HIDDEN)).astype(np.float16)
        self.ids = rng.integers(-1, EXPERTS + 1, (TOKENS, SLOTS)).astype(ids)
        self.factors = rng.random((TOKENS, SLOTS)).astype(np.float32)

    def moved(self, packed: PackedExperts) -> PackedExperts:
        """Copy packed experts to the GPU."""
        return self.library.to_device(packed, self.device)

    def on(self, array: npt.NDArray[Any]) -> Any:
        """Copy an array to the GPU."""
        return self.library.to_device(array, self.device)

    def arguments(self, **changes: Any) -> dict[str, Any]:
        """Return the arguments of a call of `moe`."""
        operands = {"hidden": self.hidden, "topk_ids": self.ids, "topk_weights": self.factors}
        found: dict[str, Any] = {name: self.on(array) for name, array in operands.items() if name not in changes}
        return found | {"w13": self.w13, "w2": self.w2} | changes

    def moe(self, **changes: Any) -> Any:
        """Call `moe`."""
        return self.library.moe(**self.arguments(**changes))

    def plan(self, tokens: int = TOKENS, *, global_experts: int | None = None, invariant: bool = False) -> MoePlan:
        """Return the plan of a call."""
        sizes = moe_sizes(tokens, SLOTS, self.w13, self.w2, global_experts)
        return self.library.experts.plan(sizes, self.device, invariant=invariant)


@pytest.fixture
def library() -> FakeLibrary:
    """Return grouped kernels on an H200."""
    return FakeLibrary(KERNELS, devices=[H200])


@pytest.fixture
def large_tiles() -> FakeLibrary:
    """Return grouped kernels that need sorted routes."""
    return FakeLibrary(LARGE_TILES, devices=[H200])


@pytest.fixture
def layer(library: FakeLibrary) -> Layer:
    """Return a layer whose kernels do not apply the gate."""
    return Layer(library)


def calls(library: FakeLibrary) -> list[Call]:
    """Return the raw calls so far, and forget them."""
    made = list(library.module.expert_calls)
    library.module.expert_calls.clear()
    return made


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", GATED_ACTIVATIONS)
@pytest.mark.parametrize("on_input", [False, True], ids=["weight on results", "weight on input"])
def test_a_layer_is_within_its_bounds(library: FakeLibrary, gated: bool, activation: str, on_input: bool) -> None:
    layer = Layer(library, gated=gated, ids="<i4" if on_input else "<i8")
    got = layer.moe(activation=activation, weight_on_input=on_input).to_host()
    expected = MoeExpectation(
        layer.hidden,
        *(layer.gate, layer.up, layer.down, layer.ids, layer.factors),
        activation=activation,
        weight_on_input=on_input,
    )
    assert 0 < expected.error_over_bound(got) <= 1


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_a_layer_with_a_map_of_experts_is_within_its_bounds(large_tiles: FakeLibrary, gated: bool) -> None:
    layer = Layer(large_tiles, gated=gated)
    places = np.full(4 * EXPERTS, -1, np.int32)
    places[[1, 4, 9, 13, 19]] = [2, 0, 4, 1, 3]
    layer.ids = np.random.default_rng(3).integers(-1, len(places) + 1, layer.ids.shape)
    got = layer.moe(expert_map=layer.on(places)).to_host()
    expected = MoeExpectation(
        *(layer.hidden, layer.gate, layer.up, layer.down, layer.ids, layer.factors), expert_map=places
    )
    assert 0 < expected.error_over_bound(got) <= 1
    routing = calls(large_tiles)[0]
    assert isinstance(routing, Routing)
    assert (routing.global_experts, routing.experts) == (len(places), EXPERTS)
    assert routing.tile_tokens == layer.plan(global_experts=len(places)).gate_up.cta.tokens


def spans(made: list[Call], layer: Layer) -> dict[str, tuple[int, int]]:
    """Return where the raw calls of a layer have its intermediate arrays, and how long they are."""
    first, last = made[0], made[-1]
    assert isinstance(first, Routing)
    assert isinstance(last, Combining)
    found = {
        "offsets": (first.offsets, 4 * (EXPERTS + 1)),
        "routes_of_rows": (first.routes_of_rows, 4 * ROUTES),
        "rows_of_routes": (first.rows_of_routes, 4 * ROUTES),
        "token_tiles": (first.token_tiles, first.token_tiles_bytes),
        "rows": (first.rows, 2 * ROUTES * HIDDEN),
    }
    gate_up, down = (call for call in made if isinstance(call, Grouped))
    found["gated"] = (down.activations, 2 * ROUTES * INNER)
    if not layer.w13.gated:
        found["products"] = (gate_up.output, 2 * ROUTES * 2 * INNER)
    return found


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("on_input", [False, True], ids=["weight on results", "weight on input"])
def test_a_layer_is_routed_multiplied_and_combined_in_this_order(
    large_tiles: FakeLibrary, gated: bool, on_input: bool
) -> None:
    layer = Layer(large_tiles, gated=gated)
    arguments = layer.arguments(weight_on_input=on_input)
    out = layer.on(np.full((TOKENS, HIDDEN), np.nan, np.float16))
    stream = large_tiles.module.Stream(0)
    assert large_tiles.moe(**arguments, out=out, stream=stream, dependent_launch="auto") is out
    made = calls(large_tiles)
    kinds: list[type[Call]] = [Routing, Grouped, Grouped, Combining] if gated else []
    assert [type(call) for call in made] == (kinds or [Routing, Grouped, Activating, Grouped, Combining])
    assert {call.stream for call in made} == {stream.pointer}
    assert {call.device for call in made} == {0}
    assert [call.dependent for call in made] == [2] + [1] * (len(made) - 1), "the caller decides of the first one"
    plan, at = layer.plan(), spans(made, layer)
    hidden, ids, factors = (arguments[name].buffer.pointer for name in ("hidden", "topk_ids", "topk_weights"))
    first, last = made[0], made[-1]
    assert isinstance(first, Routing)
    assert isinstance(last, Combining)
    assert (first.ids, first.id_bytes, first.expert_map) == (ids, 8, 0)
    assert (first.experts, first.tokens, first.slots) == (EXPERTS, TOKENS, SLOTS)
    assert (first.hidden, first.weights, first.columns) == (hidden, factors if on_input else 0, HIDDEN)
    gate_up, down = (call for call in made if isinstance(call, Grouped))
    assert (gate_up.config, down.config) == (plan.gate_up, plan.down)
    epilogue = Epilogue.GATED if gated else Epilogue.NONE
    assert (gate_up.config.epilogue, down.config.epilogue) == (epilogue, Epilogue.NONE)
    assert gate_up.tile_tokens == down.tile_tokens == first.tile_tokens == plan.gate_up.cta.tokens
    steps = (
        (gate_up, layer.w13, at["rows"], at["gated" if gated else "products"]),
        (down, layer.w2, at["gated"], at["rows"]),
    )
    for call, weights, read, written in steps:
        assert (call.activations, call.output) == (read[0], written[0])
        assert (call.packed, call.packed_bytes) == (weights.data.buffer.pointer, weights.nbytes_of_expert)
        assert (call.experts, call.packed_stride) == (EXPERTS, weights.stride)
        assert (call.problem.m, call.problem.n, call.problem.k) == (ROUTES, weights.n, weights.k)
        assert (call.token_tiles, call.token_tiles_bytes) == (first.token_tiles, plan.token_tiles_bytes)
        assert (call.bias, call.alpha, call.residual) == (0, 1.0, 0)
    assert (gate_up.list_is_complete, down.list_is_complete) == (False, True), "what wrote the list came before"
    assert gate_up.activation is (Activation.SWIGLU if gated else Activation.NONE)
    assert down.activation is Activation.NONE
    for activating in (call for call in made if isinstance(call, Activating)):
        assert (activating.gates_and_factors, activating.output) == (at["products"][0], at["gated"][0])
        assert activating.row_count == first.offsets + 4 * EXPERTS
        assert (activating.rows, activating.columns) == (ROUTES, INNER)
        assert activating.activation_number == Activation.SWIGLU.number
    assert (last.rows, last.rows_of_routes) == (at["rows"][0], at["rows_of_routes"][0])
    assert (last.weights, last.output) == (0 if on_input else factors, out.buffer.pointer)
    assert (last.tokens, last.slots, last.columns) == (TOKENS, SLOTS, HIDDEN)


@pytest.mark.parametrize("is_mapped", [False, True], ids=["all experts", "mapped"])
@pytest.mark.parametrize("activation", GATED_ACTIVATIONS)
@pytest.mark.parametrize("tokens", [1, UNSORTED_TOKENS, 40])
def test_gated_weights_are_served_by_a_build_without_gated_kernels(
    tokens: int, activation: str, is_mapped: bool
) -> None:
    library = FakeLibrary(UNGATED, devices=[H200])
    layer = FewTokens(library, tokens)
    places = np.array([3, -1, 0, 4, 1], np.int32) if is_mapped else None
    needed = library.moe_workspace_bytes(tokens, SLOTS, layer.w13, layer.w2, global_experts=EXPERTS)
    room = layer.on(np.full(needed, 0xFF, np.uint8))
    expert_map = None if places is None else layer.on(places)
    got = layer.moe(activation=activation, expert_map=expert_map, workspace=room).to_host()
    made = calls(library)
    gate_up, down = (call for call in made if isinstance(call, Grouped))
    (activating,) = (call for call in made if isinstance(call, Activating))
    rows = gate_up.rows
    assert isinstance(made[0], Routing) == (tokens > UNSORTED_TOKENS)
    assert (gate_up.activation, gate_up.config.epilogue) == (Activation.NONE, Epilogue.NONE)
    assert (activating.gates_and_factors, activating.output) == (gate_up.output, down.activations)
    assert (activating.rows, activating.columns, activating.row_count) == (rows * INNER // 8, 8, 0)
    assert gate_up.output + 2 * rows * 2 * INNER <= down.activations, "there is room for the products"
    assert 0 < layer.expected(activation=activation, expert_map=places).error_over_bound(got) <= 1


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("mapped", [None, 4 * EXPERTS])
def test_intermediate_arrays_lie_apart_and_aligned_in_the_workspace(
    large_tiles: FakeLibrary, gated: bool, mapped: int | None
) -> None:
    layer = Layer(large_tiles, gated=gated)
    needed = large_tiles.moe_workspace_bytes(TOKENS, SLOTS, layer.w13, layer.w2, global_experts=mapped)
    room = layer.on(np.full(needed, 0xFF, np.uint8))
    expert_map = None if mapped is None else layer.on(np.arange(mapped, dtype=np.int32))
    wanted = layer.moe(expert_map=expert_map).to_host()
    large_tiles.module.expert_calls.clear()
    assert np.array_equal(layer.moe(expert_map=expert_map, workspace=room).to_host(), wanted), "of any content"
    base = room.buffer.pointer
    places = sorted((begin - base, begin - base + size) for begin, size in spans(calls(large_tiles), layer).values())
    assert places[0][0] == 0
    assert all(begin % ALIGNMENT == 0 for begin, _ in places)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(places))
    assert 0 <= needed - places[-1][1] < ALIGNMENT
    with pytest.raises(InvalidValueError, match=f"workspace of {needed - 1} bytes must be at least {needed} bytes"):
        layer.moe(expert_map=expert_map, workspace=layer.on(np.zeros(needed - 1, np.uint8)))
    assert calls(large_tiles) == []


class FewTokens(Layer):
    """A layer of so few tokens that no launch sorts their routes."""

    def __init__(self, library: FakeLibrary, tokens: int = 7, slots: int = SLOTS, *, gated: bool = True) -> None:
        super().__init__(library, gated=gated)
        rng = np.random.default_rng(11)
        self.hidden = rng.standard_normal((tokens, HIDDEN)).astype(np.float16)
        self.ids = rng.integers(-1, EXPERTS + 1, (tokens, slots))
        self.factors = rng.random((tokens, slots)).astype(np.float32)

    def expected(self, **options: Any) -> MoeExpectation:
        """Return the exact result, with its bounds."""
        return MoeExpectation(self.hidden, *(self.gate, self.up, self.down, self.ids, self.factors), **options)


@pytest.mark.parametrize("mapped", [False, True], ids=["ids", "map of experts"])
@pytest.mark.parametrize("tokens", [1, 7, 8])
def test_few_tokens_are_multiplied_and_combined_without_sorting(
    library: FakeLibrary, tokens: int, mapped: bool
) -> None:
    layer = FewTokens(library, tokens, 8)
    places = np.array([3, -1, 0, 2, 4, 1], np.int32) if mapped else None
    expert_map = None if places is None else layer.on(places)
    stream, arguments = library.module.Stream(0), layer.arguments()
    got = library.moe(**arguments, expert_map=expert_map, stream=stream, dependent_launch="auto")
    gate_up, down, combining = calls(library)
    assert isinstance(gate_up, Grouped)
    assert isinstance(down, Grouped)
    assert isinstance(combining, Combining)
    hidden, ids = (arguments[name].buffer.pointer for name in ("hidden", "topk_ids"))
    address = 0 if expert_map is None else expert_map.buffer.pointer
    for call in (gate_up, down, combining):
        assert (call.ids, call.id_bytes, call.expert_map) == (ids, 8, address)
        assert (call.global_experts, call.slots, call.experts) == (6 if mapped else 0, 8, EXPERTS)
    assert [call.dependent for call in (gate_up, down, combining)] == [2, 1, 1], "the caller decides of the first one"
    assert {call.stream for call in (gate_up, down, combining)} == {stream.pointer}
    assert (gate_up.activations, gate_up.problem.m) == (hidden, tokens)
    assert (gate_up.rows_are_shared, down.rows_are_shared) == (True, False)
    assert (gate_up.list_is_complete, down.list_is_complete) == (False, True)
    assert (down.activations, combining.rows, combining.rows_of_routes) == (gate_up.output, down.output, 0)
    assert 0 < layer.expected(expert_map=places).error_over_bound(got.to_host()) <= 1


def test_few_tokens_take_tiles_of_8_tokens_whatever_the_estimates_say(
    library: FakeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = FewTokens(library, 8, 8)

    def prefers_large_tiles(config: KernelConfig, *_: Any) -> float:
        return 1.0 / config.cta.tokens

    monkeypatch.setattr(choosing, "microseconds", prefers_large_tiles)
    for tokens, slots, invariant, is_few in ((1, 1, False, True), (8, 8, False, True), (8, 8, True, False)):
        sizes = moe_sizes(tokens, slots, layer.w13, layer.w2)
        plan = library.experts.plan(sizes, 0, invariant=invariant)
        assert (plan.gate_up.cta.tokens == plan.down.cta.tokens == UNSORTED_TOKENS) == is_few
    for tokens, slots in ((9, 1), (8, 9)):
        assert library.experts.plan(moe_sizes(tokens, slots, layer.w13, layer.w2), 0).down.cta.tokens > UNSORTED_TOKENS


def test_few_tokens_take_larger_tiles_where_those_of_8_cannot_compute_both_products(library: FakeLibrary) -> None:
    layer = FewTokens(library, 8, 8)
    sizes = moe_sizes(8, 8, layer.w13, layer.w2)
    small = [config for config in KERNELS if config.cta.tokens == UNSORTED_TOKENS]
    for built in (
        [replace(config, mode=QuantMode.PER_COLUMN_SCALE_ONLY) for config in small],
        [config for config in small if config.epilogue is Epilogue.NONE],
        [config for config in small if config.epilogue is Epilogue.GATED],
        [],
    ):
        gate_up, down = chosen_pair(built + LARGE_TILES, sizes, card_of(H100), invariant=False)
        assert (gate_up.mode, gate_up.epilogue) == (MODE, Epilogue.GATED)
        assert (down.mode, down.epilogue) == (MODE, Epilogue.NONE)
    gate_up, down = chosen_pair(KERNELS, sizes, card_of(H100), invariant=False)
    assert gate_up.cta.tokens == down.cta.tokens == UNSORTED_TOKENS


@pytest.mark.parametrize("tokens", [1, 8])
def test_few_tokens_need_no_sorting_without_gated_kernels_either(library: FakeLibrary, tokens: int) -> None:
    layer = FewTokens(library, tokens, 8, gated=False)
    needed = library.moe_workspace_bytes(tokens, 8, layer.w13, layer.w2)
    room = layer.on(np.full(needed, 0xFF, np.uint8))
    got = layer.moe(workspace=room).to_host()
    gate_up, activating, down, _ = calls(library)
    assert isinstance(gate_up, Grouped)
    assert isinstance(activating, Activating)
    assert isinstance(down, Grouped)
    rows = 8 * min(8 * tokens, EXPERTS)
    assert (activating.rows, activating.row_count) == (rows, 0), "no launch has counted the rows"
    assert (activating.gates_and_factors, activating.output) == (gate_up.output, down.activations)
    places = sorted(
        (begin - room.buffer.pointer, 2 * rows * columns)
        for begin, columns in ((gate_up.output, 2 * INNER), (down.activations, INNER), (down.output, HIDDEN))
    )
    assert all(begin + size <= after for (begin, size), (after, _) in pairwise([*places, (needed, 0)]))
    assert 0 < layer.expected().error_over_bound(got) <= 1


def test_intermediate_arrays_of_few_tokens_lie_apart_in_the_workspace(library: FakeLibrary) -> None:
    layer = FewTokens(library, 8, 8)
    needed = library.moe_workspace_bytes(8, 8, layer.w13, layer.w2)
    room = layer.on(np.full(needed, 0xFF, np.uint8))
    got = layer.moe(workspace=room).to_host()
    gate_up, down, _ = calls(library)
    assert isinstance(gate_up, Grouped)
    assert isinstance(down, Grouped)
    base, rows = room.buffer.pointer, 8 * EXPERTS
    places = sorted([(gate_up.output - base, 2 * rows * INNER), (down.output - base, 2 * rows * HIDDEN)])
    assert all(begin % ALIGNMENT == 0 for begin, _ in places)
    assert 0 <= places[0][0] <= places[0][0] + places[0][1] <= places[1][0]
    assert places[1][0] + places[1][1] <= needed
    one_route = library.moe_workspace_bytes(1, 1, layer.w13, layer.w2)
    assert 0 < one_route - 2 * UNSORTED_TOKENS * (INNER + HIDDEN) < 6 * ALIGNMENT, (
        "the rows of one expert, and the rest"
    )
    assert 0 < layer.expected().error_over_bound(got) <= 1
    with pytest.raises(InvalidValueError, match=f"workspace of {needed - 1} bytes must be at least {needed} bytes"):
        layer.moe(workspace=layer.on(np.zeros(needed - 1, np.uint8)))


@pytest.mark.parametrize(
    ("tokens", "slots", "options", "gated"),
    [
        (9, 2, {}, True),
        (8, 9, {}, True),
        (2, 2, {"weight_on_input": True}, True),
        (8, 8, {"weight_on_input": True}, True),
        (9, 2, {}, False),
    ],
    ids=[
        "nine tokens",
        "72 routes",
        "weight on input",
        "weight on input, more routes than rows of unsorted ones",
        "nine tokens, kernels without the gate",
    ],
)
def test_other_layers_are_sorted(
    library: FakeLibrary, tokens: int, slots: int, options: dict[str, Any], gated: bool
) -> None:
    layer = FewTokens(library, tokens, slots, gated=gated)
    needed = library.moe_workspace_bytes(tokens, slots, layer.w13, layer.w2)
    got = layer.moe(**options, workspace=layer.on(np.full(needed, 0xFF, np.uint8))).to_host()
    assert isinstance(calls(library)[0], Routing)
    assert 0 < layer.expected(**options).error_over_bound(got) <= 1


def test_kernels_with_larger_tiles_are_sorted(library: FakeLibrary, large_tiles: FakeLibrary) -> None:
    layer = FewTokens(large_tiles, 2, 2)
    assert 0 < layer.expected().error_over_bound(layer.moe().to_host()) <= 1
    assert isinstance(calls(large_tiles)[0], Routing)
    assert layer.plan(2).can_leave_unsorted is False
    assert FewTokens(library, 2, 2).plan(2).can_leave_unsorted is True


def test_experts_that_are_packed_for_gated_kernels_need_no_room_for_products(library: FakeLibrary) -> None:
    plain, gated = (Layer(library, gated=gated).plan() for gated in (False, True))
    assert plain.gated - plain.products >= 2 * ROUTES * 2 * INNER
    assert gated.gated == gated.products, "nothing lies there"


def test_invariant_plans_have_the_same_kernels_for_every_number_of_tokens(library: FakeLibrary) -> None:
    layer = Layer(library, gated=True)
    counts = (0, 1, 8, 64, 500, 4096)
    plans = [layer.plan(tokens, invariant=True) for tokens in counts]
    assert {(plan.gate_up, plan.down) for plan in plans} == {(plans[3].gate_up, plans[3].down)}
    assert (plans[3].gate_up, plans[3].down) == (layer.plan(64).gate_up, layer.plan(64).down)
    assert len({layer.plan(tokens).gate_up for tokens in counts}) > 1, "the choice depends on it otherwise"
    assert [plan.nbytes for plan in plans] == sorted(plan.nbytes for plan in plans)
    tokens = 4096
    for invariant in (False, True):
        needed = library.moe_workspace_bytes(tokens, SLOTS, layer.w13, layer.w2, invariant=invariant)
        assert needed == layer.plan(tokens, invariant=invariant).nbytes
    layer.moe(invariant=True)
    assert [call.config for call in calls(library) if isinstance(call, Grouped)] == [plans[0].gate_up, plans[0].down]


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_kernels_are_chosen_for_the_routing_of_the_call(
    library: FakeLibrary, gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, asked = Layer(library, gated=gated), []
    pair = layer.plan()[:2]

    def choose_pair(_configs: object, *given: Any) -> Any:
        asked.append(given)
        return pair

    monkeypatch.setattr(choosing, "choose_pair", choose_pair)
    kernels = MODE, (Problem(1, 2 * INNER, HIDDEN, 32), Epilogue.GATED if gated else Epilogue.NONE)
    for tokens, mapped, invariant in ((9, None, False), (0, None, False), (9, 40, False), (9, None, True)):
        layer.plan(tokens, global_experts=mapped, invariant=invariant)
        routing = choosing.Routing(INVARIANT_TOKENS if invariant else max(1, tokens), SLOTS, EXPERTS, mapped or EXPERTS)
        assert asked.pop() == (*kernels, Problem(1, HIDDEN, INNER, 32), routing, card_of(H200))


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_no_tokens_launch_nothing(library: FakeLibrary, gated: bool) -> None:
    layer = Layer(library, gated=gated)
    layer.hidden, layer.ids, layer.factors = layer.hidden[:0], layer.ids[:0], layer.factors[:0]
    assert layer.moe().shape == (0, HIDDEN)
    assert calls(library) == []
    rows = library.route_tokens(layer.on(layer.ids), EXPERTS, 8)
    assert rows.offsets.to_host().tolist() == [0] * (EXPERTS + 1)
    a = layer.on(np.zeros((0, HIDDEN), np.float16))
    result = library.grouped_gemm(a, layer.w13, rows, activation="swiglu" if gated else None)
    assert result.shape == (0, INNER if gated else 2 * INNER)


def test_tokens_without_experts_get_zeros(layer: Layer) -> None:
    layer.ids[:] = [-1, EXPERTS, 1 << 40]
    layer.factors[:] = np.nan
    out = layer.on(np.full((TOKENS, HIDDEN), np.nan, np.float16))
    assert not layer.moe(out=out).to_host().any()


def test_memory_of_torchs_own_stream_is_allocated_in_a_capture_too(
    library: FakeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, stream = Layer(library), library.module.Stream(0)
    arguments = layer.arguments(stream=stream)
    monkeypatch.setattr(expert_arrays, "is_torchs_stream", lambda *_: True)
    stream.begin_capture()
    assert library.moe(**arguments).shape == (TOKENS, HIDDEN)
    stream.end_capture()


def test_as_many_experts_are_routed_as_may_be(library: FakeLibrary, layer: Layer) -> None:
    assert library.route_tokens(layer.on(layer.ids), MAX_EXPERTS, 8).experts == MAX_EXPERTS


def test_a_captured_layer_is_replayed_with_other_inputs(library: FakeLibrary) -> None:
    layer = Layer(library, gated=True)
    stream = library.module.Stream(0)
    arguments = layer.arguments(stream=stream)
    out = layer.on(np.zeros((TOKENS, HIDDEN), np.float16))
    room = layer.on(np.zeros(library.moe_workspace_bytes(TOKENS, SLOTS, layer.w13, layer.w2), np.uint8))
    stream.begin_capture()
    for missing in ("out", "workspace"):
        given = {name: array for name, array in {"out": out, "workspace": room}.items() if name != missing}
        with pytest.raises(InvalidValueError, match="pass out= and workspace= in a capture"):
            library.moe(**arguments, **given)
    assert calls(library) == []
    library.moe(**arguments, out=out, workspace=room)
    stream.end_capture()
    assert not out.to_host().any()
    rng = np.random.default_rng(8)
    for _ in range(2):
        layer.ids = rng.integers(-1, EXPERTS, layer.ids.shape)
        layer.hidden = rng.standard_normal(layer.hidden.shape).astype(np.float16)
        for name, values in (("topk_ids", layer.ids), ("hidden", layer.hidden)):
            arguments[name].buffer.upload(values)
        stream.replay()
        expected = MoeExpectation(layer.hidden, layer.gate, layer.up, layer.down, layer.ids, layer.factors)
        assert expected.error_over_bound(out.to_host()) <= 1


def test_rows_of_routes_are_sorted_by_expert(library: FakeLibrary) -> None:
    layer = Layer(library)
    rows = library.route_tokens(layer.on(layer.ids), EXPERTS, 16, dependent_launch=True)
    offsets, order = route_reference(layer.ids, EXPERTS)
    assert (rows.experts, rows.rows, rows.tile_tokens) == (EXPERTS, ROUTES, 16)
    assert np.array_equal(rows.offsets.to_host(), offsets)
    assert np.array_equal(rows.routes_of_rows.to_host()[: offsets[-1]], order)
    back = rows.rows_of_routes.to_host()
    assert np.array_equal(np.flatnonzero(back < 0), np.setdiff1d(np.arange(ROUTES), order))
    (routing,) = calls(library)
    assert isinstance(routing, Routing)
    assert (routing.hidden, routing.weights, routing.rows, routing.columns) == (0, 0, 0, 0), "it gathers nothing"
    assert routing.dependent == 1
    assert routing.token_tiles_bytes == rows.token_tiles.shape[0]


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("source", ["routing", "offsets", "counts", "indices"])
def test_each_row_is_multiplied_by_its_expert(
    library: FakeLibrary, rng: np.random.Generator, gated: bool, source: str
) -> None:
    layer = Layer(library, gated=gated)
    kernel = next(config for config in KERNELS if (config.epilogue is Epilogue.GATED) == gated)
    tile = kernel.cta.tokens
    counts, stride = np.array([3, 0, 9, 1, 4], np.int32), 10
    bounds = {
        "routing": route_reference(layer.ids, EXPERTS)[0],
        "offsets": np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
    }.get(source, np.zeros(0))
    own = (
        [slice(at * stride, at * stride + count) for at, count in enumerate(counts)]
        if source in ("counts", "indices")
        else [slice(*pair) for pair in pairwise(bounds.tolist())]
    )
    m = {"routing": ROUTES, "offsets": 20}.get(source, stride * EXPERTS)
    named = np.full(m, -1, np.int32)
    for expert, rows_of_expert in enumerate(own):
        named[rows_of_expert] = expert
    rows = {
        "routing": lambda: library.route_tokens(layer.on(layer.ids), EXPERTS, tile),
        "offsets": lambda: library.list_rows(m, tile, offsets=layer.on(bounds)),
        "counts": lambda: library.list_rows(m, tile, counts=layer.on(counts), stride=stride),
        "indices": lambda: library.list_rows(m, tile, indices=layer.on(named), experts=EXPERTS),
    }[source]()
    if source != "routing":
        assert (rows.offsets, rows.routes_of_rows, rows.rows_of_routes) == (None, None, None)
    a = rng.standard_normal((m, HIDDEN)).astype(np.float16)
    bias = rng.standard_normal((EXPERTS, 2 * INNER)).astype(np.float16)
    activation = Activation.GEGLU_TANH if gated else Activation.NONE
    out = layer.on(np.full((m, INNER if gated else 2 * INNER), np.nan, np.float16))
    given: dict[str, Any] = {"bias": layer.on(bias), "alpha": -0.5, "activation": str(activation), "out": out}
    result = library.grouped_gemm(layer.on(a), layer.w13, rows, config=kernel.name, dependent_launch="auto", **given)
    assert result is out
    listing, product = calls(library)
    assert isinstance(listing, Routing if source == "routing" else Listing)
    assert isinstance(product, Grouped)
    assert (product.config, product.dependent, product.alpha) == (kernel, 2, -0.5)
    assert not product.list_is_complete
    host, written = out.to_host(), np.zeros(m, bool)
    for expert, (rows_of_expert, gate, up) in enumerate(zip(own, layer.gate, layer.up, strict=True)):
        written[rows_of_expert] = True
        both = pack_experts([gate], [up]).expert(0).unpack()
        expected = Expectation(a[rows_of_expert], both)
        ratio = error_over_bound(host[rows_of_expert], expected, -0.5, bias[expert], Extra(activation))
        assert ratio <= 1
    assert np.isnan(host[~written]).all(), "rows of no expert are not written"


def test_the_kernel_of_a_product_has_the_tiles_of_its_list(layer: Layer) -> None:
    a = layer.on(np.zeros((ROUTES, HIDDEN), np.float16))
    for tile in (8, 16, 64):
        rows = layer.library.route_tokens(layer.on(layer.ids), EXPERTS, tile)
        assert layer.library.grouped_gemm(a, layer.w13, rows).shape == (ROUTES, 2 * INNER)
        product = calls(layer.library)[-1]
        assert isinstance(product, Grouped)
        assert (product.config.cta.tokens, product.config.epilogue) == (tile, Epilogue.NONE)
    rows = layer.library.route_tokens(layer.on(layer.ids), EXPERTS, 24)
    with pytest.raises(NotBuiltError, match="no grouped kernel has CTA tokens of 24: the build has 8, 16, 64"):
        layer.library.grouped_gemm(a, layer.w13, rows)
    wide = next(config for config in KERNELS if config.cta.tokens == 64 and config.epilogue is Epilogue.NONE)
    with pytest.raises(InvalidValueError, match="tile_tokens of 24 must be 64: make another list"):
        layer.library.grouped_gemm(a, layer.w13, rows, config=wide)


def test_grouped_kernels_are_listed_apart(library: FakeLibrary) -> None:
    ordinary = enumerate_space("default")[:2]
    both = FakeLibrary([*KERNELS, *ordinary])
    assert both.configs() == ordinary
    assert both.grouped_configs() == both.experts.configs == sorted(KERNELS)
    assert library.configs() == []


def test_limits_are_the_librarys() -> None:
    headers = ROOT / "w4a16gen" / "cuda"
    assert re.findall(r"kMaxExperts = (\d+);", (headers / "library" / "experts.h").read_text()) == [str(MAX_EXPERTS)]
    unsorted = re.findall(r"#define W4A16_MAX_UNSORTED_\w+ (\d+)", (headers / "w4a16.h").read_text())
    assert unsorted == [str(UNSORTED_TOKENS), str(MAX_UNSORTED_ROUTES)]


IDS = GpuArray((TOKENS, SLOTS), "<i8")
ROUTE: list[tuple[str, dict[str, Any], str]] = [
    (
        "ids on the host",
        {"topk_ids": np.zeros((2, 2), np.int64)},
        "topk_ids of type ndarray must be on a GPU like the other arrays: move it with w4a16gen.to_device. gemm, moe",
    ),
    (
        "ids of 16 bits",
        {"topk_ids": GpuArray((TOKENS, SLOTS), "<i2")},
        r"topk_ids of dtype int16 and shape \[7, 3\] must be int32 or int64 \[tokens, slots\]",
    ),
    ("ids of floats", {"topk_ids": GpuArray((TOKENS, SLOTS), "<f4")}, "topk_ids of dtype float32 and shape"),
    ("ids of one axis", {"topk_ids": GpuArray((TOKENS,), "<i8")}, r"topk_ids of dtype int64 and shape \[7\] must be"),
    ("no slots", {"topk_ids": GpuArray((TOKENS, 0), "<i8")}, r"topk_ids of dtype int64 and shape \[7, 0\] must be"),
    (
        "ids transposed",
        {"topk_ids": GpuArray((TOKENS, SLOTS), "<i8", (8, 8 * TOKENS))},
        "topk_ids must be contiguous, row-major: make a contiguous copy",
    ),
    ("no experts", {"experts": 0}, "experts of 0 must be 1 to 1024"),
    ("too many experts", {"experts": 1025}, "experts of 1025 must be 1 to 1024"),
    ("experts of text", {"experts": "8"}, "experts of type str must be an integer"),
    ("no tile", {"tile_tokens": 0}, "tile_tokens of 0 must be 1 or more"),
    ("a tile of a fraction", {"tile_tokens": 8.0}, "tile_tokens of type float must be an integer"),
    ("a map of two axes", {"expert_map": GpuArray((2, 3), "<i4")}, r"expert_map of shape \[2, 3\] must be \[all exp"),
    ("an empty map", {"expert_map": GpuArray((0,), "<i4")}, r"expert_map of shape \[0\] must be \[all experts\]"),
    ("a map of 64 bits", {"expert_map": GpuArray((9,), "<i8")}, "expert_map of dtype int64 must be int32"),
    ("a map on the host", {"expert_map": np.zeros(9, np.int32)}, "expert_map of type ndarray must be on a GPU"),
    ("not a stream", {"stream": "fast"}, "stream of type str must be a CUDA stream object or its address"),
    ("not a launch", {"dependent_launch": "soon"}, "dependent_launch of 'soon' must be True, False or \"auto\""),
    ("a number", {"dependent_launch": 1}, "dependent_launch of type int must be True, False"),
]


def refused(function: Any, arguments: dict[str, Any], text: str, error: type[W4A16Error] = InvalidValueError) -> None:
    """Check that a call is refused with a sentence."""
    with pytest.raises(error, match=text):
        function(**arguments)


@pytest.mark.parametrize(("change", "text"), [row[1:] for row in ROUTE], ids=[row[0] for row in ROUTE])
def test_a_wrong_routing_is_refused(library: FakeLibrary, change: dict[str, Any], text: str) -> None:
    refused(library.route_tokens, {"topk_ids": IDS, "experts": EXPERTS, "tile_tokens": 8} | change, text)
    assert calls(library) == []


OFFSETS, COUNTS = GpuArray((EXPERTS + 1,), "<i4"), GpuArray((EXPERTS,), "<i4")
INDICES = GpuArray((20,), "<i4")
ONE_SOURCE = "the rows of each expert are given by offsets, or by counts and stride, or by indices and experts"
LISTING: list[tuple[str, dict[str, Any], str]] = [
    ("nothing", {"offsets": None}, ONE_SOURCE),
    ("both", {"counts": COUNTS}, ONE_SOURCE),
    ("both with a stride", {"counts": COUNTS, "stride": 4}, ONE_SOURCE),
    ("a stride of offsets", {"stride": 4}, ONE_SOURCE),
    ("counts without a stride", {"offsets": None, "counts": COUNTS}, ONE_SOURCE),
    ("offsets and indices", {"indices": INDICES, "experts": 4}, ONE_SOURCE),
    ("indices of no experts", {"offsets": None, "indices": INDICES}, ONE_SOURCE),
    ("experts of offsets", {"experts": EXPERTS}, ONE_SOURCE),
    ("fewer indices", {"offsets": None, "indices": INDICES, "experts": 4, "rows": 21}, r"indices of shape \[20\] must"),
    ("indices of 64 bits", {"offsets": None, "indices": GpuArray((20,), "<i8"), "experts": 4}, "must be int32"),
    ("more experts", {"offsets": None, "indices": INDICES, "experts": 1025}, "experts of 1025 must be 1 to 1024"),
    ("experts of text", {"offsets": None, "indices": INDICES, "experts": "4"}, "experts of type str must be"),
    ("no stride", {"offsets": None, "counts": COUNTS, "stride": 0}, "stride of 0 must be 1 or more"),
    ("offsets of no expert", {"offsets": GpuArray((0,), "<i4")}, r"offsets of shape \[0\] must be \[experts \+ 1\]"),
    ("offsets of one end", {"offsets": GpuArray((1,), "<i4")}, r"offsets of shape \[1\] must be \[experts \+ 1\]"),
    ("offsets of two axes", {"offsets": GpuArray((2, 3), "<i4")}, r"offsets of shape \[2, 3\] must have one dimension"),
    ("offsets of 64 bits", {"offsets": GpuArray((6,), "<i8")}, "offsets of dtype int64 must be int32"),
    ("offsets apart", {"offsets": GpuArray((6,), "<i4", (8,))}, "offsets must be contiguous"),
    ("offsets on the host", {"offsets": np.zeros(6, np.int32)}, "offsets of type ndarray must be on a GPU"),
    ("too many", {"offsets": None, "counts": GpuArray((1025,), "<i4"), "stride": 1}, "experts of 1025 must be 1 to"),
    ("rows below 0", {"rows": -1}, "rows of -1 must be 0 to"),
    ("rows of text", {"rows": "20"}, "rows of type str must be an integer"),
    ("no tile", {"tile_tokens": 0}, "tile_tokens of 0 must be 1 or more"),
    ("not a launch", {"dependent_launch": None}, "dependent_launch of type NoneType must be"),
]


def test_no_indices_are_no_rows(library: FakeLibrary) -> None:
    rows = library.list_rows(0, 8, indices=library.to_device(np.zeros(0, np.int32)), experts=EXPERTS)
    assert (rows.rows, rows.experts) == (0, EXPERTS)


@pytest.mark.parametrize(("change", "text"), [row[1:] for row in LISTING], ids=[row[0] for row in LISTING])
def test_a_wrong_listing_is_refused(library: FakeLibrary, change: dict[str, Any], text: str) -> None:
    refused(library.list_rows, {"rows": 20, "tile_tokens": 8, "offsets": OFFSETS} | change, text)
    assert calls(library) == []


PLAIN = next(config for config in KERNELS if config.epilogue is Epilogue.NONE)
GATED = replace(PLAIN, epilogue=Epilogue.GATED)
PRODUCT: list[tuple[str, dict[str, Any], str]] = [
    ("one weight", {"w": "expert 0"}, "w of type PackedWeight must be PackedExperts: see pack_experts"),
    ("experts for cutlass", {"w": "cutlass"}, "w is packed as kmajor_.*, but grouped kernels are native: pack it for"),
    ("experts on the host", {"w": "host"}, "w of type ndarray must be on a GPU"),
    ("ids for rows", {"rows": IDS}, "rows of type GpuArray must be ExpertRows: see route_tokens and list_rows"),
    ("rows of fewer experts", {"rows": "fewer"}, "rows of 4 experts must be of 5, as w is"),
    ("alpha of text", {"alpha": "1"}, "alpha of type str must be one finite or infinite float"),
    ("activations of another k", {"a": GpuArray((ROUTES, 64))}, r"activations of shape \[21, 64\] must be \[m, 96\]"),
    ("activations of fewer rows", {"a": GpuArray((9, HIDDEN))}, r"activations of shape \[9, 96\] must be \[21, 96\]"),
    ("activations of fp32", {"a": GpuArray((ROUTES, HIDDEN), "<f4")}, "activations of dtype float32 must be float16"),
    ("activations on the host", {"a": np.zeros((ROUTES, HIDDEN), np.float16)}, "activations of type ndarray must be"),
    ("a bias for all", {"bias": GpuArray((128,))}, r"bias of shape \[128\] must be \[5, 128\]"),
    ("a bias of fp32", {"bias": GpuArray((5, 128), "<f4")}, "bias of dtype float32 must be float16"),
    ("an output of n / 2", {"out": GpuArray((ROUTES, INNER))}, r"output of shape \[21, 64\] must be \[21, 128\]"),
    ("an output of fp32", {"out": GpuArray((ROUTES, 2 * INNER), "<f4")}, "output of dtype float32 must be float16"),
    ("no activation's name", {"activation": "mish"}, "'mish' is not one of none, silu"),
    (
        "a gate of plain experts",
        {"activation": "swiglu"},
        "activation swiglu must be one of none: the experts are packed without gated=True",
    ),
    ("silu", {"activation": "silu"}, "activation silu must be one of none: the experts are packed without gated=True"),
    (
        "gated experts without a gate",
        {"w": "gated"},
        "activation none must be one of swiglu, geglu, geglu_tanh: the experts are packed for gated activations",
    ),
    ("not a kernel", {"config": "fast"}, "'fast' is not a kernel name"),
    ("a kernel of another epilogue", {"config": GATED}, f"{GATED.name} is of mode fgs and epilogue gated, but .* fgs"),
    (
        "a kernel of one product",
        {"config": enumerate_space("default")[60].name},
        "computes one product: call gemm",
    ),
    (
        "a kernel not built",
        {"config": PLAIN.name.replace("fgs_", "fgsz_")},
        f"{PLAIN.name.replace('fgs_', 'fgsz_')} is not built",
    ),
    ("not a stream", {"stream": "fast"}, "stream of type str must be"),
    ("not a launch", {"dependent_launch": "soon"}, "dependent_launch of 'soon' must be"),
]


@pytest.mark.parametrize(("change", "text"), [row[1:] for row in PRODUCT], ids=[row[0] for row in PRODUCT])
def test_a_wrong_product_is_refused(library: FakeLibrary, change: dict[str, Any], text: str) -> None:
    layer = Layer(library)
    on_host = pack_experts(layer.gate, layer.up)
    named = {
        "expert 0": on_host.expert(0),
        "cutlass": layer.moved(pack_experts(layer.gate, layer.up, target="cutlass")),
        "host": on_host,
        "gated": layer.moved(pack_experts(layer.gate, layer.up, gated=True)),
        "fewer": library.list_rows(ROUTES, 8, counts=layer.on(np.ones(4, np.int32)), stride=1),
    }
    arguments = {
        "a": GpuArray((ROUTES, HIDDEN)),
        "w": layer.w13,
        "rows": library.list_rows(ROUTES, 8, offsets=layer.on(np.arange(EXPERTS + 1, dtype=np.int32))),
    }
    library.module.expert_calls.clear()
    change = {
        name: named[value] if name in {"w", "rows"} and isinstance(value, str) else value
        for name, value in change.items()
    }
    refused(library.grouped_gemm, arguments | change, text)
    assert calls(library) == []


MOE: list[tuple[str, dict[str, Any], str]] = [
    ("one weight", {"w13": None}, "w13 of type NoneType must be PackedExperts: see pack_experts"),
    ("a list", {"w2": []}, "w2 of type list must be PackedExperts: see pack_experts"),
    ("experts for cutlass", {"w2": "cutlass"}, "w2 is packed as kmajor_.*, but grouped kernels are native"),
    ("experts on the host", {"w13": "host"}, "w13 of type ndarray must be on a GPU"),
    ("gates alone", {"w13": "gates"}, r"w13 must hold gate and up projections: see pack_experts\(gate, up\)"),
    (
        "gated down projections",
        {"w2": "gated"},
        "w2 is packed with gated=True, but has no gate: pack the down projections without it",
    ),
    (
        "fewer experts",
        {"w2": "fewer"},
        r"w13 of 5 experts of \[128, 96\] must be of 4 experts of \[128, 96\], for w2",
    ),
    (
        "projections of others",
        {"w2": "other"},
        r"w13 of 5 experts of \[128, 96\] must be of 5 experts of \[192, 64\], for w2",
    ),
    ("another mode", {"w2": "mode"}, "w13 of mode fgs must be of mode fgsz, as w2 is"),
    ("relu", {"activation": "relu"}, "activation 'relu' must be one of silu, gelu, gelu_tanh"),
    ("no activation", {"activation": None}, "activation a value of type NoneType must be one of silu"),
    ("a number for a flag", {"weight_on_input": 1}, "weight_on_input of type int must be True or False"),
    ("text for a flag", {"invariant": "yes"}, "invariant of type str must be True or False"),
    ("hidden of another size", {"hidden": GpuArray((TOKENS, 64))}, r"hidden of shape \[7, 64\] must be \[tokens, 96\]"),
    ("hidden of fp32", {"hidden": GpuArray((TOKENS, HIDDEN), "<f4")}, "hidden of dtype float32 must be float16"),
    ("hidden on the host", {"hidden": np.zeros((7, 96), np.float16)}, "hidden of type ndarray must be on a GPU"),
    ("hidden transposed", {"hidden": GpuArray((7, 96), strides=(2, 14))}, "hidden must be contiguous"),
    ("ids of fp32", {"topk_ids": GpuArray((7, 3), "<f4")}, "topk_ids of dtype float32 and shape"),
    ("ids of fewer tokens", {"topk_ids": GpuArray((6, 3), "<i8")}, r"topk_ids of shape \[6, 3\] must be \[7, 3\]"),
    ("weights of fp16", {"topk_weights": GpuArray((7, 3))}, "topk_weights of dtype float16 must be float32"),
    ("weights of fewer slots", {"topk_weights": GpuArray((7, 2), "<f4")}, r"topk_weights of shape \[7, 2\] must be"),
    ("a map of 64 bits", {"expert_map": GpuArray((9,), "<i8")}, "expert_map of dtype int64 must be int32"),
    ("an output of others", {"out": GpuArray((8, 96))}, r"output of shape \[8, 96\] must be \[7, 96\]"),
    ("an output of fp32", {"out": GpuArray((7, 96), "<f4")}, "output of dtype float32 must be float16"),
    ("a workspace of fp16", {"workspace": GpuArray((1 << 20,))}, "workspace of dtype float16 must be uint8"),
    ("a short workspace", {"workspace": GpuArray((9,), "|u1")}, r"workspace of 9 bytes must be at least \d+ bytes"),
    ("not a stream", {"stream": "fast"}, "stream of type str must be"),
    ("not a launch", {"dependent_launch": "soon"}, "dependent_launch of 'soon' must be"),
]


def other_experts(layer: Layer) -> dict[str, PackedExperts]:
    """Return experts that do not fit a layer."""
    rng = np.random.default_rng(9)
    zeros = [random_weight(rng, HIDDEN, INNER, 32, QuantMode.FINEGRAINED_SCALE_AND_ZEROS) for _ in range(EXPERTS)]
    return {
        "cutlass": layer.moved(pack_experts(layer.down, target="cutlass")),
        "host": pack_experts(layer.gate, layer.up),
        "gates": layer.moved(pack_experts(layer.gate)),
        "gated": layer.moved(pack_experts(layer.down, gate_up=True, gated=True)),
        "fewer": layer.moved(pack_experts(layer.down[:4])),
        "other": layer.moved(pack_experts(layer.gate)),
        "mode": layer.moved(pack_experts(zeros)),
    }


@pytest.mark.parametrize(("change", "text"), [row[1:] for row in MOE], ids=[row[0] for row in MOE])
def test_a_wrong_layer_is_refused(layer: Layer, change: dict[str, Any], text: str) -> None:
    others: dict[str, Any] = dict(other_experts(layer))
    change = {
        name: others[value] if name in {"w13", "w2"} and isinstance(value, str) else value
        for name, value in change.items()
    }
    if change.get("w2") is others["other"]:
        change["hidden"] = GpuArray((TOKENS, INNER))
    refused(layer.moe, change, text)
    assert calls(layer.library) == []


SIZES: list[tuple[str, dict[str, Any], str]] = [
    ("tokens below 0", {"tokens": -1}, "tokens of -1 must be 0 or more"),
    ("tokens of a fraction", {"tokens": 1.5}, "tokens of type float must be an integer"),
    ("no slots", {"slots": 0}, "slots of 0 must be 1 or more"),
    ("tokens of 62 bits", {"tokens": 1 << 62}, r"tokens \* slots of 13835058055282163712 must be at most"),
    (
        "too many routes",
        {"tokens": 1, "slots": (1 << 30) + 1},
        r"slots of 1073741825 must be at most 1073741824: split",
    ),
    ("no experts anywhere", {"global_experts": 0}, "global_experts of 0 must be 1 or more"),
    ("experts of text", {"global_experts": "9"}, "global_experts of type str must be an integer"),
    ("no experts", {"w13": None}, "w13 of type NoneType must be PackedExperts"),
    ("fewer experts", {"w2": "fewer"}, "w13 of 5 experts"),
    ("a number for a flag", {"invariant": 1}, "invariant of type int must be True or False"),
    ("a GPU of text", {"device": "cuda"}, "device of type str must be an integer"),
]


@pytest.mark.parametrize(("change", "text"), [row[1:] for row in SIZES], ids=[row[0] for row in SIZES])
def test_wrong_sizes_have_no_workspace(layer: Layer, change: dict[str, Any], text: str) -> None:
    others: dict[str, Any] = dict(other_experts(layer))
    change = {name: others.get(value, value) if name == "w2" else value for name, value in change.items()}
    arguments: dict[str, Any] = {"tokens": TOKENS, "slots": SLOTS, "w13": layer.w13, "w2": layer.w2}
    refused(layer.library.moe_workspace_bytes, arguments | change, text)
    assert layer.library.moe_workspace_bytes(**arguments) == layer.plan().nbytes


def test_as_many_routes_have_a_workspace_as_kernels_count(layer: Layer) -> None:
    nbytes = layer.library.moe_workspace_bytes(1, MAX_DIMENSION, layer.w13, layer.w2)
    assert nbytes > MAX_DIMENSION * (HIDDEN + INNER) * 2


def test_arrays_of_one_call_are_on_one_gpu() -> None:
    library = FakeLibrary(KERNELS, devices=numbered(H100, H200))
    here, there = Layer(library), Layer(library, device=1)
    assert there.moe().device == 1
    assert {call.device for call in calls(library)} == {1}
    other = there.arguments()
    names = ("w2", "hidden", "topk_ids", "topk_weights")
    more: dict[str, Any] = {
        "expert_map": np.arange(9, dtype=np.int32),
        "out": there.hidden,
        "workspace": np.zeros(1 << 20, np.uint8),
    }
    changes = {name: other[name] for name in names} | {name: there.on(array) for name, array in more.items()}
    for name, value in changes.items():
        refused(here.moe, {name: value}, r"on GPU 1 must be on GPU 0, like the packed weight")
    ids = here.on(here.ids)
    refused(
        library.route_tokens,
        {"topk_ids": ids, "experts": 5, "tile_tokens": 8} | {"expert_map": changes["expert_map"]},
        "expert_map on GPU 1 must be on GPU 0",
    )
    rows = library.route_tokens(there.on(there.ids), EXPERTS, 8)
    refused(
        library.grouped_gemm,
        {"a": here.on(np.zeros((ROUTES, HIDDEN), np.float16)), "w": here.w13, "rows": rows},
        "rows on GPU 1 must be on GPU 0",
    )


def of(*epilogues: Epilogue, tokens: set[int]) -> list[KernelConfig]:
    """Return kernels with these epilogues and tiles."""
    return [config for config in KERNELS if config.epilogue in epilogues and config.cta.tokens in tokens]


COMMAND = "run `w4a16gen build --space default --space experts"
WITH_GATE = f"{COMMAND} --epilogue none --epilogue gated`"


def test_a_build_without_the_kernels_names_the_command() -> None:
    none = FakeLibrary(enumerate_space("default")[:9])
    layer = Layer(none)
    refused(layer.moe, {}, f"the build has no grouped kernel of mode fgs: {COMMAND}`", NotBuiltError)
    refused(
        Layer(none, gated=True).moe,
        {},
        f"no grouped kernel of mode fgs with epilogue gated: {WITH_GATE}",
        NotBuiltError,
    )
    ids = layer.on(layer.ids)
    missing = "this build holds no grouped kernel: run `w4a16gen build --space experts`"
    with pytest.raises(UnsupportedProblemError, match=missing):
        none.route_tokens(ids, EXPERTS, 8)
    with pytest.raises(UnsupportedProblemError, match=missing):
        none.list_rows(9, 8, offsets=layer.on(np.arange(EXPERTS + 1, dtype=np.int32)))
    plain = FakeLibrary(of(Epilogue.NONE, tokens={8}))
    assert Layer(plain).moe().shape == (TOKENS, HIDDEN)
    other_mode = [replace(config, mode=QuantMode.FINEGRAINED_SCALE_AND_ZEROS) for config in plain.configs()]
    refused(Layer(FakeLibrary(other_mode), gated=True).moe, {}, f"with epilogue gated: {WITH_GATE}", NotBuiltError)
    gated = FakeLibrary(of(Epilogue.GATED, tokens={8}))
    refused(Layer(gated, gated=True).moe, {}, f"no grouped kernel of mode fgs: {COMMAND}`", NotBuiltError)
    other_modes = [replace(config, mode=QuantMode.FINEGRAINED_SCALE_AND_ZEROS) for config in KERNELS]
    mixed = FakeLibrary([*of(Epilogue.NONE, tokens={8}), *other_modes])
    assert Layer(mixed, gated=True).moe().shape == (TOKENS, HIDDEN), "kernels of another mode do not count"
    apart = FakeLibrary([*of(Epilogue.GATED, tokens={8}), *of(Epilogue.NONE, tokens={16})])
    refused(
        Layer(apart, gated=True).moe,
        {},
        f"with and without epilogue gated have no tile in common: {WITH_GATE}",
        NotBuiltError,
    )


def test_a_product_that_no_kernel_can_run_is_refused(library: FakeLibrary) -> None:
    layer = Layer(library)
    weight = random_weight(np.random.default_rng(1), 100, HIDDEN, 32, MODE)
    odd = layer.moved(pack_experts([weight] * EXPERTS))
    rows = library.route_tokens(layer.on(layer.ids), EXPERTS, 8)
    a = layer.on(np.zeros((ROUTES, HIDDEN), np.float16))
    with pytest.raises(
        UnsupportedProblemError, match=r"no grouped kernel can run .*n of 100 must be a positive multiple"
    ):
        library.grouped_gemm(a, odd, rows)


def test_a_launch_that_fails_is_raised_with_its_sentence(layer: Layer) -> None:
    arguments = layer.arguments()
    layer.library.module.refusal = (layer.library.module.CUDA_ERROR, "out of luck")
    for call in (
        lambda: layer.library.moe(**arguments),
        lambda: layer.library.route_tokens(arguments["topk_ids"], EXPERTS, 8),
    ):
        with pytest.raises(CudaError, match="out of luck"):
            call()


def test_gemm_and_overrides_refuse_grouped_kernels(layer: Layer) -> None:
    weight = layer.library.to_device(pack_weight(layer.down[0]))
    a = layer.on(np.zeros((3, INNER), np.float16))
    with pytest.raises(InvalidValueError, match=f"{PLAIN.name} computes grouped products: name it in the call of"):
        layer.library.gemm(a, weight, config=PLAIN)
    with pytest.raises(InvalidValueError, match="name it in the call of grouped_gemm"), use_kernels(PLAIN):
        pass
