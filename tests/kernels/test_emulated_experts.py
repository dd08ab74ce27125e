"""Grouped kernels and the kernels between their products, run on the CPU."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from emulated_experts import ENTRY_INTS, UNSORTED_TOKENS, EmulatedExperts, Ints, Unsorted, build_experts, entries
from emulation import EmulationError, Launch, aligned, build_mutant

from w4a16gen import KernelConfig, QuantMode
from w4a16gen.kernels.arrangement import MIN_TOKENS_WITH_TAIL, TOKENS_STEP, native_arrangement
from w4a16gen.kernels.config import Epilogue
from w4a16gen.kernels.epilogue import Activation
from w4a16gen.weights.quantized import Half, QuantizedWeight
from w4a16gen.weights.reference import Expectation, Extra, error_over_bound, random_weight

KERNELS = [
    KernelConfig.parse(f"w4a16_sm90_native_{name}")
    for name in (
        "cs_cta128x32x128_cluster1x1x1_warpgroups4_grouped",
        "fgs_cta64x8x128_cluster1x1x1_warps8_grouped",
        "fgsz_cta128x8x128_cluster1x1x1_warpgroups4_grouped",
        "fgs_cta64x16x128_cluster1x1x2_warps8_grouped",
        "fgs_cta64x64x128_cluster1x1x1_warpgroups2_grouped",
        "fgs_cta128x64x128_cluster2x1x1_warpgroups2_grouped",
        "fgsz_cta256x128x64_cluster1x1x1_warpgroups2_grouped",
        "fgs_cta64x8x128_cluster1x1x1_warps8_grouped_gated",
        "fgs_cta64x16x128_cluster1x1x2_warps8_grouped_gated",
        "fgs_cta128x64x128_cluster2x1x1_warpgroups2_grouped_gated",
        "fgs_cta128x88x128_cluster2x1x1_warpgroups2_grouped_gated",
    )
]
UNSORTED_KERNELS = [config for config in KERNELS if config.cta.tokens == UNSORTED_TOKENS]
WITH_TAILS = [config for config in KERNELS if config.cta.tokens >= MIN_TOKENS_WITH_TAIL]
EXPERTS = 5
NOBODY = (-1, EXPERTS, 1 << 30)
"""Ids that no expert has."""

pytestmark = [pytest.mark.compile, pytest.mark.xdist_group("emulated")]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> EmulatedExperts:
    """Return the kernels, compiled for the CPU."""
    return build_experts(KERNELS, tmp_path_factory.mktemp("experts"))


def routed(ids: npt.NDArray[Any], experts: int, expert_map: Ints | None = None) -> list[list[int]]:
    """Return the routes of each expert, in order."""
    found: list[list[int]] = [[] for _ in range(experts)]
    for route, global_id in enumerate(ids.ravel().tolist()):
        if not 0 <= global_id < (experts if expert_map is None else expert_map.size):
            continue
        expert = global_id if expert_map is None else int(expert_map[global_id])
        if 0 <= expert < experts:
            found[expert].append(route)
    return found


def tiles_of(rows: list[tuple[int, int]], tile_tokens: int) -> list[list[int]]:
    """Return the list of token tiles of experts with these first rows and ends."""
    found: list[list[int]] = []
    for expert, (first, end) in enumerate(rows):
        tiles = -(-(end - first) // tile_tokens)
        found += [[expert, len(found), first, end]] * tiles
    return found


def drawn_ids(rng: np.random.Generator, experts: int, largest: int) -> npt.NDArray[Any]:
    """Draw ids of a few tokens, of many experts or few, with some of nobody."""
    tokens, slots = int(rng.integers(1, largest)), int(rng.integers(1, 9))
    hit = rng.choice(experts, int(rng.integers(1, experts + 1)), replace=False)
    ids = rng.choice(hit, (tokens, slots)).astype("i4" if rng.random() < 0.5 else "i8")
    ids[rng.random(ids.shape) < rng.choice([0, 0.2, 1], p=[0.6, 0.3, 0.1])] = rng.choice(NOBODY)
    return ids


@pytest.mark.parametrize("experts", [1, 2, 31, 128, 512, 1024])
def test_routing_sorts_stably(emulated: EmulatedExperts, experts: int) -> None:
    rng = np.random.default_rng(experts)
    for seed in range(3):
        expert_map = None
        if seed == 2:
            expert_map = np.full(2 * experts, -1, np.int32)
            expert_map[rng.choice(2 * experts, experts, replace=False)] = rng.permutation(experts)
        ids = drawn_ids(rng, experts if expert_map is None else 2 * experts, 300)
        ids[ids == EXPERTS] = -1
        if ids.dtype == np.int64:
            ids[-1, -1] = 1 << 32
        tile_tokens = int(rng.choice([8, 24, 64]))
        routes = emulated.route(ids, experts, tile_tokens, expert_map, seed)
        wanted = routed(ids, experts, expert_map)
        assert routes.offsets.tolist() == np.cumsum([0, *map(len, wanted)]).tolist()
        assert routes.routes_of_rows.tolist() == [route for one in wanted for route in one]
        back = np.full(ids.size, -1)
        back[routes.routes_of_rows] = np.arange(routes.routes_of_rows.size)
        assert routes.rows_of_routes.tolist() == back.tolist()
        rows = list(zip(routes.offsets[:-1].tolist(), routes.offsets[1:].tolist(), strict=True))
        assert routes.tiles == tiles_of(rows, tile_tokens)


@pytest.mark.parametrize("tokens", [1, 5, 70, 1100])
@pytest.mark.parametrize("weighted", [False, True])
def test_routing_gathers_rows_as_a_second_kernel_would(emulated: EmulatedExperts, tokens: int, weighted: bool) -> None:
    rng = np.random.default_rng(tokens)
    slots, columns = 2, 8 * 37  # more than a warp reads at once, and no multiple of that
    ids = rng.integers(-1, EXPERTS, (tokens, slots))
    hidden = aligned(rng.standard_normal((tokens, columns)).astype(np.float16))
    weights = rng.random((tokens, slots)).astype(np.float32) if weighted else None
    gathered = aligned(np.full((ids.size, columns), np.nan, np.float16))
    routes = emulated.route(ids, EXPERTS, 8, seed=1, hidden=hidden, weights=weights, gathered=gathered)
    plain = emulated.route(ids, EXPERTS, 8)
    assert routes.routes_of_rows.tolist() == plain.routes_of_rows.tolist()
    assert routes.tiles == plain.tiles
    wanted = hidden[routes.routes_of_rows // slots]
    if weights is not None:
        wanted = (wanted * weights.reshape(-1)[routes.routes_of_rows][:, None]).astype(np.float16)
    assert np.array_equal(gathered[: len(wanted)], wanted)
    assert np.isnan(gathered[len(wanted) :]).all()


@pytest.mark.parametrize(
    "routes", [2048, 2049, EXPERTS * 513, 9300], ids=["one part of two rounds", "three", "full list", "ten"]
)
def test_many_routes_are_sorted_in_parts(emulated: EmulatedExperts, routes: int) -> None:
    rng = np.random.default_rng(5)
    ids = rng.integers(-1, EXPERTS + 1, (routes, 1))
    is_full = routes == EXPERTS * 513  # the last tile of each expert has one row: the list has no room left
    if is_full:
        ids = rng.permutation(np.repeat(np.arange(EXPERTS), 513))[:, None].copy()
    found = emulated.route(ids, EXPERTS, 64)
    wanted = routed(ids, EXPERTS)
    assert found.routes_of_rows.tolist() == [route for one in wanted for route in one]
    assert np.array_equal(found.offsets, np.cumsum([0, *map(len, wanted)]))
    back = np.full(routes, -1, np.int32)
    back[found.routes_of_rows] = np.arange(len(found.routes_of_rows))
    assert np.array_equal(found.rows_of_routes, back)
    assert found.tiles == tiles_of(list(pairwise(found.offsets.tolist())), 64)
    if is_full:
        counts = found.token_tiles[(len(found.tiles) + 1) * ENTRY_INTS :][: 3 * EXPERTS].reshape(3, EXPERTS)
        assert counts.sum(axis=0).tolist() == [513] * EXPERTS, "the counts of parts begin behind the last entry"


@pytest.mark.parametrize("experts", [384, 512, 896, 1024])
def test_many_routes_of_many_experts_are_sorted_in_parts(emulated: EmulatedExperts, experts: int) -> None:
    rng = np.random.default_rng(experts)
    ids = rng.integers(-1, experts + 1, (190, 16))
    found, wanted = emulated.route(ids, experts, 8, seed=1), routed(ids, experts)
    assert found.routes_of_rows.tolist() == [route for one in wanted for route in one]
    assert np.array_equal(found.offsets, np.cumsum([0, *map(len, wanted)]))
    assert found.tiles == tiles_of(list(pairwise(found.offsets.tolist())), 8)


@pytest.mark.parametrize("tokens", [70, 2100], ids=["one part", "parts, and a kernel that gathers"])
def test_routing_waits_for_what_it_reads(emulated: EmulatedExperts, tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    ids, columns = aligned(rng.integers(0, EXPERTS, (tokens, 1))), 8
    hidden = aligned(rng.standard_normal((tokens, columns)).astype(np.float16))
    found, rows = [], []
    for is_dependent in (False, True):
        rows.append(aligned(np.full((tokens, columns), np.nan, np.float16)))
        routes = emulated.route(ids, EXPERTS, 8, seed=2, hidden=hidden, gathered=rows[-1], is_dependent=is_dependent)
        found.append((routes.routes_of_rows.tolist(), routes.rows_of_routes.tolist(), routes.tiles))
    assert found[0] == found[1]
    assert np.array_equal(rows[0], rows[1])


@pytest.mark.parametrize("source", ["offsets", "counts", "indices"])
def test_listing_waits_for_what_it_reads(emulated: EmulatedExperts, source: str) -> None:
    sources: dict[str, dict[str, Any]] = {
        "offsets": {"offsets": np.array([0, 17, 40], np.int32)},
        "counts": {"counts": np.array([17, 20], np.int32), "stride": 20},
        "indices": {"indices": np.repeat(np.arange(2, dtype=np.int32), 20), "experts": 2},
    }
    given = sources[source]
    wanted = entries(emulated.list_token_tiles(8, 40, **given))
    assert len(wanted) == 6
    assert entries(emulated.list_token_tiles(8, 40, **given, is_dependent=True)) == wanted


@pytest.mark.parametrize("is_sorted", [False, True])
def test_sums_wait_for_what_they_add(emulated: EmulatedExperts, is_sorted: bool) -> None:
    rng = np.random.default_rng(8)
    tokens, slots, columns = 8, 8, 16
    ids = rng.integers(0, EXPERTS, (tokens, slots))
    routes = emulated.route(ids, EXPERTS, 8).rows_of_routes if is_sorted else Unsorted(ids)
    rows = aligned(rng.standard_normal((tokens * slots, columns)).astype(np.float16))
    weights = rng.random((tokens, slots)).astype(np.float32)
    wanted, got = (
        emulated.combine(rows, routes, ids.shape, weights, EXPERTS, seed=3, is_dependent=is_dependent)
        for is_dependent in (False, True)
    )
    assert np.isfinite(wanted).all()
    assert np.array_equal(got, wanted)


def test_tiles_of_given_rows(emulated: EmulatedExperts) -> None:
    offsets = np.array([0, 0, 17, 17, 24, 40], np.int32)
    pairs = list(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))
    assert entries(emulated.list_token_tiles(8, 40, offsets=offsets)) == tiles_of(pairs, 8)
    counts = np.array([0, 3, 16, 9, 99], np.int32)
    listed = emulated.list_token_tiles(8, 5 * 16, counts=counts, stride=16)
    assert entries(listed) == tiles_of([(0, 0), (16, 19), (32, 48), (48, 57), (64, 80)], 8)


@pytest.mark.parametrize("aligned_to", [1, 8, 128])
@pytest.mark.parametrize("experts", [1, 5, 40, 1024])
def test_tiles_of_rows_that_name_their_experts(emulated: EmulatedExperts, experts: int, aligned_to: int) -> None:
    rng = np.random.default_rng(experts + aligned_to)
    counts = rng.integers(0, 40, experts) * (rng.random(experts) < min(1, 200 / experts))
    order = rng.permutation(experts)
    named, rows = [np.full(3, -1)], {}
    first = 3
    for expert in order.tolist():
        length = -(-int(counts[expert]) // aligned_to) * aligned_to
        rows[expert] = (first, first + int(counts[expert])) if counts[expert] else (0, 0)
        named += [np.full(counts[expert], expert), np.full(length - counts[expert], -1)]
        first += length
    named.append(np.array([experts, 1 << 30, -7]))
    indices = np.concatenate(named).astype(np.int32)
    for tile, seed in ((8, 1), (64, 2)):
        listed = emulated.list_token_tiles(tile, indices.size, indices=indices, experts=experts, seed=seed)
        assert entries(listed) == tiles_of([rows[expert] for expert in range(experts)], tile)


def test_experts_whose_rows_are_apart_do_not_leave_the_list(emulated: EmulatedExperts) -> None:
    """Which of its rows are the first and the last one depends on the order of warps."""
    indices = np.tile(np.repeat(np.arange(EXPERTS, dtype=np.int32), 64), 2)
    room = indices.size // 8 + EXPERTS
    found = set()
    for seed in range(16):
        listed = emulated.list_token_tiles(8, indices.size, indices=indices, experts=EXPERTS, seed=seed)
        assert all(0 <= first <= end <= indices.size for _, _, first, end in entries(listed))
        found.add(int(listed[0]))
    assert max(found) == room


def test_rows_outside_the_activations_are_left_out(emulated: EmulatedExperts) -> None:
    offsets = np.array([-5, 3, 1, 2000, 9], np.int32)
    rows = [(0, 3), (3, 3), (1, 40), (40, 40)]
    assert entries(emulated.list_token_tiles(8, 40, offsets=offsets)) == tiles_of(rows, 8)
    counts = np.array([-3, 2000], np.int32)
    assert entries(emulated.list_token_tiles(8, 40, counts=counts, stride=30)) == tiles_of([(0, 0), (30, 40)], 8)


def drawn_weights(rng: np.random.Generator, mode: QuantMode, n: int, k: int, group: int) -> list[QuantizedWeight]:
    """Draw one weight for each expert."""
    return [random_weight(rng, n, k, group if mode.is_grouped else k, mode) for _ in range(EXPERTS)]


@pytest.mark.parametrize("config", KERNELS, ids=lambda config: config.short_name)
def test_each_row_is_multiplied_by_its_expert(emulated: EmulatedExperts, config: KernelConfig) -> None:
    rng = np.random.default_rng(3)
    activation = Activation.SWIGLU if config.epilogue is Epilogue.GATED else Activation.NONE
    for seed, (n, k, group) in enumerate(((208, 192, 64), (80, 352, 32), (336, 256, 128))):
        weights = drawn_weights(rng, config.mode, n, k, group)
        ids = drawn_ids(rng, EXPERTS, 60)
        routes = emulated.route(ids, EXPERTS, config.cta.tokens)
        a = rng.standard_normal((ids.size, k)).astype(np.float16)
        bias = rng.standard_normal((EXPERTS, n)).astype(np.float16) if seed else None
        launch = Launch(0, 3 + seed, 1.5, bias, activation=activation)
        got, again = (
            emulated.grouped_gemm(config, a, weights, routes.token_tiles, replace(launch, seed=number))
            for number in range(2)
        )
        assert np.array_equal(got.view(np.uint16), again.view(np.uint16)), "the order decides the bits"
        for complete in (False, True):
            behind = replace(launch, seed=2, is_dependent=True)
            got_behind = emulated.grouped_gemm(
                config, a, weights, routes.token_tiles, behind, list_is_complete=complete
            )
            assert np.array_equal(got.view(np.uint16), got_behind.view(np.uint16))
        for expert, weight in enumerate(weights):
            rows = slice(routes.offsets[expert], routes.offsets[expert + 1])
            expected = Expectation(a[rows], weight)
            of_expert = None if bias is None else bias[expert]
            assert error_over_bound(got[rows], expected, 1.5, of_expert, Extra(activation)) < 1
        assert np.isnan(got[routes.offsets[-1] :]).all()


@pytest.mark.parametrize("config", WITH_TAILS, ids=lambda config: config.short_name)
def test_tails_multiply_all_of_their_rows(emulated: EmulatedExperts, config: KernelConfig) -> None:
    rng = np.random.default_rng(6)
    activation = Activation.SWIGLU if config.epilogue is Epilogue.GATED else Activation.NONE
    tile, tail = config.cta.tokens, native_arrangement(config).tail_tokens
    assert tail < tile
    counts = (tail, tail + 1, 1, tile + tail, tile + tail + 1)
    weights = drawn_weights(rng, config.mode, 80, 256, 128)
    ids = np.repeat(np.arange(EXPERTS), counts)[:, None].copy()
    routes = emulated.route(ids, EXPERTS, tile)
    a = rng.standard_normal((ids.size, 256)).astype(np.float16)
    got = emulated.grouped_gemm(config, a, weights, routes.token_tiles, Launch(0, 3, 1.0, None, activation=activation))
    for expert, weight in enumerate(weights):
        rows = slice(routes.offsets[expert], routes.offsets[expert + 1])
        assert error_over_bound(got[rows], Expectation(a[rows], weight), 1.0, None, Extra(activation)) < 1
        alone = emulated.route(ids[rows], EXPERTS, tile)
        again = emulated.grouped_gemm(
            config, aligned(a[rows]), weights, alone.token_tiles, Launch(0, 4, 1.0, None, activation=activation)
        )
        assert np.array_equal(got[rows].view(np.uint16), again.view(np.uint16)), "the neighbours decide the bits"


def test_tails_multiply_no_more_than_they_need(tmp_path: Path) -> None:
    config = KernelConfig.parse("w4a16_sm90_native_fgs_cta128x80x128_cluster1x1x1_warpgroups2_grouped")
    tile, tail = config.cta.tokens, native_arrangement(config).tail_tokens
    # Where kernels leave out the last tokens of tails, the results of other tiles stay as they are.
    statement = "consume_stages<S, Rows, S::TailTokens"
    shorter = build_mutant([config], tmp_path, "kernel.cuh", statement, f"{statement} - {TOKENS_STEP}")
    emulated = EmulatedExperts(shorter)
    counts = (tail, tail + 1, tail, tile + tail + 1, tile + tail)
    rng = np.random.default_rng(7)
    weights = drawn_weights(rng, config.mode, 72, 128, 128)
    ids = np.repeat(np.arange(EXPERTS), counts)[:, None].copy()
    routes = emulated.route(ids, EXPERTS, tile)
    a = rng.standard_normal((ids.size, 128)).astype(np.float16)
    got = emulated.grouped_gemm(config, a, weights, routes.token_tiles, Launch())
    left_out = [end for end, count in zip(np.cumsum(counts), counts, strict=True) if count % tile == tail]
    wanted = [row for end in left_out for row in range(end - TOKENS_STEP, end)]
    assert len(left_out) == 3
    assert np.flatnonzero((got == 0).all(axis=1)).tolist() == wanted


BLOCK_BYTES = [4096, 4096 + 2 * 4 * 128]
"""Of a packed block without scales, and with scales and zeros of groups of 32."""


@pytest.mark.parametrize("block_bytes", BLOCK_BYTES)
@pytest.mark.parametrize(("channel_blocks", "k_blocks"), [(3, 5), (1 << 24, 5), (3, 1 << 23), (1 << 24, 1 << 23)])
def test_rows_of_the_largest_weights_are_found(
    emulated: EmulatedExperts, channel_blocks: int, k_blocks: int, block_bytes: int
) -> None:
    expert_bytes, start = channel_blocks * k_blocks * block_bytes + 128, 1 << 20
    last = channel_blocks - 1
    for channel_block, first_block, expert in ((0, 0, 0), (last - 1, k_blocks - 1, 1), (last, k_blocks // 2, 6)):
        rows = np.zeros(2, np.uint64)
        sizes = (block_bytes, k_blocks, channel_blocks, channel_block, first_block, expert)
        emulated.library.emulation_weight_rows(
            ctypes.c_uint64(start), ctypes.c_int64(expert_bytes), *sizes, ctypes.c_void_p(rows.ctypes.data)
        )
        blocks = [min(channel_block + block, last) * k_blocks + first_block for block in range(2)]
        assert rows.tolist() == [start + expert * expert_bytes + block * block_bytes for block in blocks]


def test_a_layer_equals_its_experts_one_by_one(emulated: EmulatedExperts) -> None:
    config = UNSORTED_KERNELS[0]
    rng = np.random.default_rng(9)
    size, inner = 64, 192
    w13 = drawn_weights(rng, config.mode, 2 * inner, size, 64)
    w2 = drawn_weights(rng, config.mode, size, inner, 64)
    hidden = rng.standard_normal((13, size)).astype(np.float16)
    ids = rng.choice([0, 1, 2, 4, -1], (13, 3)).astype(np.int64)
    ids[5] = -1
    weights = rng.random((13, 3)).astype(np.float32)
    got = emulated.moe(config, hidden, w13, w2, ids, weights)
    wanted = np.zeros((13, size))
    for (token, slot), expert in np.ndenumerate(ids):
        if expert < 0:
            continue
        gate_up = hidden[token].astype(np.float64) @ w13[expert].dequantize().T
        gate, up = gate_up[:inner], gate_up[inner:]
        wanted[token] += weights[token, slot] * (gate / (1 + np.exp(-gate)) * up @ w2[expert].dequantize().T)
    assert np.abs(got - wanted).max() < 2e-3 * np.abs(wanted).max()
    assert (got[5] == 0).all()
    again = emulated.moe(config, hidden, w13, w2, ids, weights, seed=7)
    assert np.array_equal(got.view(np.uint16), again.view(np.uint16))


def summed_products(
    emulated: EmulatedExperts, weights: list[QuantizedWeight], hidden: Half, ids: Any, factors: Any, *, is_sorted: bool
) -> Half:
    """Return the sums of one product of each route, whose routes are sorted or not."""
    config = UNSORTED_KERNELS[0]
    if not is_sorted:
        unsorted = Unsorted(ids, rows_are_shared=True)
        rows = emulated.grouped_gemm(config, hidden, weights, unsorted, Launch(1))
        return emulated.combine(rows, unsorted, ids.shape, factors, EXPERTS)
    gathered = aligned(np.full((ids.size, hidden.shape[1]), np.nan, np.float16))
    routes = emulated.route(ids, EXPERTS, config.cta.tokens, hidden=aligned(hidden), gathered=gathered)
    rows = emulated.grouped_gemm(config, gathered, weights, routes.token_tiles, Launch(1))
    return emulated.combine(rows, routes.rows_of_routes, ids.shape, factors)


@pytest.mark.parametrize("is_sorted", [False, True], ids=["unsorted", "sorted"])
@pytest.mark.parametrize(("tokens", "slots"), [(8, 8), (8, 1), (3, 2), (6, 10), (4, 16)])
def test_a_token_decides_its_own_bits_only(emulated: EmulatedExperts, tokens: int, slots: int, is_sorted: bool) -> None:
    rng = np.random.default_rng(slots)
    weights = drawn_weights(rng, UNSORTED_KERNELS[0].mode, 80, 192, 64)
    hidden = rng.standard_normal((tokens, 192)).astype(np.float16)
    factors = rng.random((tokens, slots)).astype(np.float32)
    ids = rng.integers(0, EXPERTS, (tokens, slots))
    ids[0, -1] = ids[0, 0]  # an expert may be chosen twice
    ids[1] = -1
    wanted = summed_products(emulated, weights, hidden, ids, factors, is_sorted=is_sorted)
    assert np.isfinite(wanted).all()
    order = rng.permutation(tokens)
    others = hidden[order], ids[order], factors[order]
    moved = summed_products(emulated, weights, *others, is_sorted=is_sorted)
    assert np.array_equal(moved.view(np.uint16), wanted[order].view(np.uint16))
    hidden[1], factors[1] = np.nan, np.nan
    again = summed_products(emulated, weights, hidden, ids, factors, is_sorted=is_sorted)
    assert np.array_equal(again.view(np.uint16), wanted.view(np.uint16))
    ids[1] = ids[0]
    hidden[1] = np.inf
    spoiled = summed_products(emulated, weights, hidden, ids, factors, is_sorted=is_sorted)
    assert np.isnan(spoiled[1]).all()
    spoiled[1] = wanted[1]
    assert np.array_equal(spoiled.view(np.uint16), wanted.view(np.uint16))


def numbers_of(routes: list[list[int]]) -> list[int]:
    """Return the experts that have routes, in the order of their first ones."""
    return sorted((expert for expert, own in enumerate(routes) if own), key=lambda expert: routes[expert][0])


def expert_map_before_an_expert() -> Ints:
    """Return a map of six ids, behind which an expert is in memory that no id leads to."""
    return np.array([4, -1, 2, -7, EXPERTS, 1, 0], np.int32)[:6]


@pytest.mark.parametrize("shared", [False, True], ids=["own rows", "shared rows"])
@pytest.mark.parametrize("config", UNSORTED_KERNELS, ids=lambda config: config.short_name)
def test_products_of_few_tokens_find_their_experts(
    emulated: EmulatedExperts, config: KernelConfig, shared: bool
) -> None:
    rng = np.random.default_rng(5)
    activation = Activation.SWIGLU if config.epilogue is Epilogue.GATED else Activation.NONE
    for seed, (tokens, slots, expert_map) in enumerate(
        ((1, 3, None), (3, 2, None), (8, 8, None), (8, 5, expert_map_before_an_expert()))
    ):
        n, k = (208, 192) if seed % 2 else (80, 352)
        weights = drawn_weights(rng, config.mode, n, k, 32)
        ids = rng.integers(-1, EXPERTS + 1, (tokens, slots)).astype("i4" if seed % 2 else "i8")
        if expert_map is not None:
            ids[0] = [expert_map.size, 4, 1, 5, 2]
        if tokens * slots == 64:  # the routes of a warp's second half choose experts that the first half does not
            ids[:4] %= 2
            ids[4, :2] = [4, 3]
            ids[0, 0] = (1 << 32) + 2  # an expert only to who reads 32 bits
        own = routed(ids, EXPERTS, expert_map)
        unsorted = Unsorted(ids, expert_map, shared)
        rows = tokens if shared else unsorted.rows(EXPERTS)
        a = rng.standard_normal((rows, k)).astype(np.float16)
        launch = Launch(0, 3 + seed, 0.5, activation=activation)
        got = emulated.grouped_gemm(config, a, weights, unsorted, launch)
        for number, complete in ((1, False), (2, True)):
            behind = replace(launch, seed=number, is_dependent=True)
            again = emulated.grouped_gemm(config, a, weights, unsorted, behind, list_is_complete=complete)
            assert np.array_equal(got.view(np.uint16), again.view(np.uint16)), "the order decides the bits"
        written = np.zeros(len(got), bool)
        for number, expert in enumerate(numbers_of(own)):
            there = slice(UNSORTED_TOKENS * number, UNSORTED_TOKENS * number + tokens)
            expected = Expectation(a if shared else a[there], weights[expert])
            assert error_over_bound(got[there], expected, 0.5, None, Extra(activation)) < 1
            written[there] = True
        assert (got[~written].view(np.uint16) == 0xFFFF).all(), "rows of no expert are not written, not even NaN"


@pytest.mark.parametrize("config", UNSORTED_KERNELS[:1], ids=lambda config: config.short_name)
def test_unsorted_routes_give_the_bits_of_sorted_ones(emulated: EmulatedExperts, config: KernelConfig) -> None:
    rng = np.random.default_rng(6)
    n, k, tokens, slots = 144, 192, 8, 8
    weights = drawn_weights(rng, config.mode, n, k, 64)
    hidden = rng.standard_normal((tokens, k)).astype(np.float16)
    factors = rng.random((tokens, slots)).astype(np.float32)
    late = rng.integers(-1, EXPERTS + 1, (tokens, slots))
    late[:4] %= 2  # later routes choose other experts
    for ids in (rng.integers(-1, EXPERTS + 1, (tokens, slots)), late, np.full((tokens, slots), -1)):
        routes = emulated.route(ids, EXPERTS, config.cta.tokens)
        gathered = aligned(np.full((ids.size, k), np.nan, np.float16))
        gathered[: routes.offsets[-1]] = hidden[routes.routes_of_rows // slots]
        rows = emulated.grouped_gemm(config, gathered, weights, routes.token_tiles, Launch(0))
        wanted = emulated.combine(rows, routes.rows_of_routes, ids.shape, factors)
        unsorted = Unsorted(ids, rows_are_shared=True)
        found = emulated.grouped_gemm(config, hidden, weights, unsorted, Launch(1))
        got = emulated.combine(found, unsorted, ids.shape, factors, EXPERTS)
        assert np.array_equal(got.view(np.uint16), wanted.view(np.uint16))
        assert np.isfinite(got).all()


@pytest.mark.parametrize(
    ("tokens", "slots", "config", "sentence"),
    [
        (9, 2, UNSORTED_KERNELS[0], "tokens of unsorted routes of 9 must be 0 to 8"),
        (8, 9, UNSORTED_KERNELS[0], "unsorted routes of 72 must be 0 to 64"),
        (2, 2, KERNELS[0], "unsorted routes need a kernel with 8 CTA tokens, but .* has 32"),
    ],
)
def test_unsorted_routes_are_few_and_need_a_small_tile(
    emulated: EmulatedExperts, tokens: int, slots: int, config: KernelConfig, sentence: str
) -> None:
    weights = drawn_weights(np.random.default_rng(0), config.mode, 80, 128, 64)
    ids = np.zeros((tokens, slots), np.int32)
    with pytest.raises(EmulationError, match=sentence):
        emulated.grouped_gemm(config, np.zeros((tokens, 128), np.float16), weights, Unsorted(ids), Launch(0))
    if "kernel" not in sentence:
        rows = np.zeros((8 * EXPERTS, 80), np.float16)
        with pytest.raises(EmulationError, match=sentence):
            emulated.combine(aligned(rows), Unsorted(ids), ids.shape, np.ones(ids.shape, np.float32), EXPERTS)
