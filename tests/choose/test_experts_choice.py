"""The choice of grouped kernels: loads against sampled routings, estimates against measured layers, and refusals."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fakes.devices import H100, H200

from w4a16gen import Epilogue, KernelConfig, Problem, QuantMode
from w4a16gen.choose import experts as choosing
from w4a16gen.choose.cards import card_of
from w4a16gen.choose.cost_model import default_cost_model
from w4a16gen.choose.experts import (
    SAME_TIME,
    Load,
    Routing,
    choose_kernel,
    choose_pair,
    expected_load,
    microseconds,
    why_not_built,
)
from w4a16gen.errors import NotBuiltError, UnsupportedProblemError
from w4a16gen.kernels.arrangement import native_arrangement, tail_tokens
from w4a16gen.kernels.config import Scheduler
from w4a16gen.kernels.spaces import enumerate_space, with_epilogues

FGS = QuantMode.FINEGRAINED_SCALE_ONLY
EVERY = with_epilogues(enumerate_space("experts"), [Epilogue.NONE, Epilogue.GATED])
KERNELS = [config for config in EVERY if config.mode is FGS]
PLAIN = [config for config in KERNELS if config.epilogue is Epilogue.NONE]
CARD = card_of(H200)
SAMPLES = 300


def sampled_load(rng: np.random.Generator, routing: Routing, tile_tokens: int) -> np.ndarray[Any, Any]:
    """Return the experts with rows, the token tiles and the tails of random routings, [samples, 3]."""
    found, tail = [], tail_tokens(tile_tokens)
    for _ in range(SAMPLES):
        order = rng.random((routing.tokens, routing.global_experts)).argsort(axis=1)[:, : routing.slots]
        rows = np.bincount(order.reshape(-1), minlength=routing.global_experts)[: routing.experts]
        last = rows % tile_tokens
        tails = np.count_nonzero((last > 0) & (last <= tail)) if tail < tile_tokens else 0
        found.append((np.count_nonzero(rows), (-(-rows // tile_tokens)).sum(), tails))
    return np.array(found)


@pytest.mark.parametrize("tile_tokens", [8, 24, 64, 80, 152])
@pytest.mark.parametrize(
    "routing",
    [
        Routing(1, 8, 128, 128),
        Routing(16, 8, 128, 128),
        Routing(300, 8, 128, 128),
        Routing(64, 2, 8, 8),
        Routing(48, 8, 24, 96),
        Routing(5, 1, 1, 4),
        Routing(1000, 2, 8, 8),
    ],
    ids=str,
)
def test_the_load_is_the_mean_of_random_routings(rng: np.random.Generator, routing: Routing, tile_tokens: int) -> None:
    drawn = sampled_load(rng, routing, tile_tokens)
    slack = 4 * drawn.std(axis=0) / np.sqrt(SAMPLES) + 1 / SAMPLES  # samples miss what is rarer
    assert (np.abs(drawn.mean(axis=0) - expected_load(routing, tile_tokens)) <= slack).all()


@pytest.mark.parametrize("tile_tokens", [8, 80])
@pytest.mark.parametrize(
    "routing",
    [
        Routing(40, 1, 1000, 1000),
        Routing(1, 1, 1024, 1 << 30),
        Routing(64, 2, 8, 8),
        Routing(900, 1, 2, 2),
        Routing(500, 99, 100, 100),
    ],
    ids=str,
)
def test_the_load_leaves_out_only_what_never_happens(routing: Routing, tile_tokens: int) -> None:
    tokens, share, tail = routing.tokens, routing.share, tail_tokens(tile_tokens)
    tiles = tails = 0.0
    for rows in range(tokens + 1):
        chance = math.comb(tokens, rows) * share**rows * (1 - share) ** (tokens - rows)
        tiles += chance * math.ceil(rows / tile_tokens)
        tails += chance * (tail < tile_tokens and 1 <= rows % tile_tokens <= tail)
    load = expected_load(routing, tile_tokens)
    assert load.token_tiles == pytest.approx(routing.experts * tiles, rel=1e-10)
    assert load.tails == pytest.approx(routing.experts * tails, rel=1e-10)


def test_loads_at_the_ends() -> None:
    for routing in (Routing(0, 8, 128, 128), Routing(9, 0, 4, 4)):
        assert expected_load(routing, 8) == (0, 0, 0)
    assert expected_load(Routing(9, 4, 4, 4), 8) == (4, 8, 0), "every token goes to every expert"
    ends = [expected_load(Routing(tokens, 4, 4, 4), 80).tails for tokens in (64, 65, 80, 144, 145)]
    assert ends == [4, 0, 0, 4, 0], "a tail has 1 to 64 of 80 rows"
    one = expected_load(Routing(1, 8, 128, 128), 8)
    assert one == pytest.approx((8, 8, 0))
    for tokens in (1 << 12, 1 << 20):
        load = expected_load(Routing(tokens, 8, 128, 128), 64)
        assert load.experts == pytest.approx(128)
        assert load.token_tiles == pytest.approx(tokens * 8 / 64 + 64, rel=0.01), "half a tile each is empty"
    assert Routing(64, 8, 16, 128).rows == 64


QWEN, MIXTRAL = (2048, 768, 128, 8), (4096, 14336, 8, 2)
"""Hidden size, intermediate size, experts and experts of a token."""
MEASURED = [
    *((QWEN, tokens, layer) for tokens, layer in ((16, 66.4), (64, 93), (256, 119))),
    *((MIXTRAL, tokens, layer) for tokens, layer in ((16, 196), (64, 225), (256, 483), (1024, 1406))),
]
"""Microseconds of whole layers in groups of 128 (`bench --moe`, H200, 2026-11)."""


def layer_of(
    model: tuple[int, int, int, int], tokens: int, group: int = 128
) -> tuple[tuple[Problem, Epilogue], Problem, Routing]:
    hidden, inner, experts, slots = model
    gate_up = Problem(1, 2 * inner, hidden, group)
    return (gate_up, Epilogue.GATED), Problem(1, hidden, inner, group), Routing(tokens, slots, experts, experts)


@pytest.mark.parametrize(("model", "tokens", "layer"), MEASURED, ids=str)
def test_products_take_most_of_a_measured_layer(model: tuple[int, int, int, int], tokens: int, layer: float) -> None:
    gate_up, down, routing = layer_of(model, tokens)
    first, second = choose_pair(KERNELS, FGS, gate_up, down, routing, CARD)
    products = microseconds(first, gate_up[0], routing, CARD) + microseconds(second, down, routing, CARD)
    assert 0.7 <= products / layer <= 1.15


def test_estimates_follow_the_work() -> None:
    (problem, _), _, _ = layer_of(QWEN, 1)
    for config in PLAIN:
        times = [microseconds(config, problem, Routing(tokens, 8, 128, 128), CARD) for tokens in (1, 16, 512, 8192)]
        assert times == sorted(times)
        routing = Routing(64, 8, 128, 128)
        assert microseconds(config, replace(problem, m=999), routing, CARD) == microseconds(
            config, problem, routing, CARD
        ), "m does not matter"
        gated = replace(config, epilogue=Epilogue.GATED)
        assert microseconds(gated, problem, routing, CARD) == microseconds(config, problem, routing, CARD)
    best = {
        card.name: min(microseconds(config, problem, routing, card_of(card)) for config in PLAIN)
        for card in (H100, H200)
    }
    assert best[H200.name] < best[H100.name], "an H200 reads faster"


def test_a_part_of_a_tile_is_a_share_of_routings_with_one_tile_more(monkeypatch: pytest.MonkeyPatch) -> None:
    (problem, _), _, routing = layer_of(MIXTRAL, 256)
    config = next(config for config in PLAIN if config.cta.tokens == 144)

    def time(token_tiles: float) -> float:
        monkeypatch.setattr(choosing, "expected_load", lambda *_: Load(8.0, token_tiles, 0.0))
        return microseconds(config, problem, routing, CARD)

    assert time(20) < time(21) - 1
    assert time(20.25) == pytest.approx(0.75 * time(20) + 0.25 * time(21))
    assert time(0.25) == time(1), "a launch computes a tile at least"


def test_tails_take_less() -> None:
    (problem, _), _, _ = layer_of(MIXTRAL, 1)
    config = next(config for config in PLAIN if config.cta.tokens == 144)
    rows = (112, 113, 144, 144 + 112, 144 + 113, 288)
    times = [microseconds(config, problem, Routing(tokens, 1, 1, 1), CARD) for tokens in rows]
    nothing = microseconds(config, problem, Routing(0, 1, 1, 1), CARD)
    assert 0 < nothing <= times[1], "no tokens have no tail"
    assert times == sorted(times)
    assert times[0] < 0.9 * times[1] == pytest.approx(0.9 * times[2])
    assert times[3] < 0.95 * times[4] == pytest.approx(0.95 * times[5])
    assert times[4] - times[3] == pytest.approx(times[1] - times[0]), "whole tiles before a tail take their own time"


def test_few_ctas_share_sms_where_a_kernel_lets_two_of_them() -> None:
    model, problem, one_expert = default_cost_model(), Problem(1, 1024, 2048, 128), Routing(1, 1, 1, 1)
    counts = set()
    for config in PLAIN:
        like = replace(config, scheduler=Scheduler.PERSISTENT)
        alone = model.cycles(model.rates_of(like), model.work_on_tiles(like, problem, 1, 1, CARD), CARD)
        is_longer = microseconds(config, problem, one_expert, CARD) > alone / model.constants.cycles_per_microsecond
        counts.add(native_arrangement(config).ctas_per_sm)
        assert is_longer is (native_arrangement(config).ctas_per_sm > 1)
    assert counts == {1, 2}


@pytest.mark.parametrize("tokens", [1, 16, 64, 500, 5000])
@pytest.mark.parametrize("model", [QWEN, MIXTRAL])
def test_a_pair_is_the_fastest_with_equal_tiles(model: tuple[int, int, int, int], tokens: int) -> None:
    gate_up, down, routing = layer_of(model, tokens)
    first, second = choose_pair(reversed(EVERY), FGS, gate_up, down, routing, CARD)
    assert {first.mode, second.mode} == {FGS}
    assert (first.epilogue, second.epilogue) == (Epilogue.GATED, Epilogue.NONE)
    assert first.cta.tokens == second.cta.tokens

    def time(one: KernelConfig, problem: Problem) -> float:
        return microseconds(one, problem, routing, CARD)

    others = [
        time(one, gate_up[0]) + time(other, down)
        for one in KERNELS
        for other in PLAIN
        if one.epilogue is Epilogue.GATED and one.cta.tokens == other.cta.tokens
    ]
    assert time(first, gate_up[0]) + time(second, down) == min(others)


@pytest.mark.parametrize(
    ("estimates", "chosen"),
    [
        ({8: 1.02, 64: 1.009, 80: 1.0}, 64),
        ({8: 1.009, 64: 1.0, 80: 1.009}, 8),
        ({8: 1.011, 64: 1.0, 80: 0.995}, 64),
        ({8: 1.0, 64: 1.0, 80: 1.0}, 8),
        ({8: 2.0, 64: 1.02, 80: 1.0}, 80),
    ],
    ids=str,
)
def test_of_pairs_that_take_the_same_time_the_smallest_tile_is_chosen(
    monkeypatch: pytest.MonkeyPatch, estimates: dict[int, float], chosen: int
) -> None:
    assert SAME_TIME == 1.01, "the estimates are beside it"
    gate_up, down, routing = layer_of(MIXTRAL, 256)
    monkeypatch.setattr(choosing, "microseconds", lambda config, *_: estimates.get(config.cta.tokens, 3.0))
    first, second = choose_pair(reversed(KERNELS), FGS, gate_up, down, routing, CARD)
    assert (first.cta.tokens, second.cta.tokens) == (chosen, chosen)


def test_more_rows_get_larger_tiles() -> None:
    tiles = []
    for tokens in (1, 64, 256, 4096):
        gate_up, down, routing = layer_of(MIXTRAL, tokens)
        tiles.append(choose_pair(KERNELS, FGS, gate_up, down, routing, CARD)[0].cta.tokens)
    assert tiles == sorted(tiles)
    assert tiles[0] == 8
    assert tiles[-1] > 64


def test_one_product_gets_the_fastest_kernel_with_the_tiles_of_its_list() -> None:
    problem, routing = Problem(1, 4096, 14336, 128), Routing(256, 1, 8, 8)
    chosen = choose_kernel(reversed(KERNELS), FGS, problem, Epilogue.NONE, routing, CARD)
    assert chosen == min(PLAIN, key=lambda config: (microseconds(config, problem, routing, CARD), config))
    for tile in sorted({config.cta.tokens for config in PLAIN}):
        found = choose_kernel(KERNELS, FGS, problem, Epilogue.GATED, routing, CARD, tile)
        assert (found.cta.tokens, found.epilogue) == (tile, Epilogue.GATED)


COMMAND = "run `w4a16gen build --space default --space experts"


def test_kernels_that_are_not_built_are_named_with_the_command() -> None:
    gate_up, down, routing = layer_of(QWEN, 16)
    gated = [config for config in KERNELS if config.epilogue is Epilogue.GATED]
    cases: tuple[tuple[list[KernelConfig], QuantMode, str], ...] = (
        ([], FGS, why_not_built(FGS, Epilogue.GATED)),
        (PLAIN, FGS, why_not_built(FGS, Epilogue.GATED)),
        (gated, FGS, why_not_built(FGS, Epilogue.NONE)),
        (KERNELS, QuantMode.PER_COLUMN_SCALE_ONLY, why_not_built(QuantMode.PER_COLUMN_SCALE_ONLY, Epilogue.GATED)),
    )
    for configs, mode, text in cases:
        with pytest.raises(NotBuiltError) as refused:
            choose_pair(configs, mode, gate_up, down, routing, CARD)
        assert str(refused.value) == text
    assert why_not_built(FGS, Epilogue.NONE) == f"the build has no grouped kernel of mode fgs: {COMMAND}`"
    assert why_not_built(FGS, Epilogue.GATED) == (
        f"the build has no grouped kernel of mode fgs with epilogue gated: {COMMAND} --epilogue none --epilogue gated`"
    )
    apart = [config for config in KERNELS if (config.cta.tokens == 8) == (config.epilogue is Epilogue.GATED)]
    with pytest.raises(NotBuiltError, match="of mode fgs with and without epilogue gated have no tile in common: run"):
        choose_pair(apart, FGS, gate_up, down, routing, CARD)
    with pytest.raises(NotBuiltError, match="no grouped kernel has CTA tokens of 40: the build has 8, 16, 24,"):
        choose_kernel(KERNELS, FGS, down, Epilogue.NONE, routing, CARD, 40)


def test_a_product_that_no_kernel_can_run_is_refused() -> None:
    gate_up, down, routing = layer_of(QWEN, 16, group=48)
    with pytest.raises(UnsupportedProblemError, match=r"no grouped kernel can run .*group size 48 must be 2048"):
        choose_pair(KERNELS, FGS, gate_up, down, routing, CARD)
    with pytest.raises(UnsupportedProblemError, match="n of 2044 must be a positive multiple of 8"):
        choose_kernel(KERNELS, FGS, replace(gate_up[0], n=2044, group_size=128), Epilogue.NONE, routing, CARD)
