"""The choice of grouped kernels: what a routing gives them to do on average, and how long each takes for it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import NamedTuple

from w4a16gen.choose.cards import Card
from w4a16gen.choose.cost_model import default_cost_model
from w4a16gen.errors import NotBuiltError, UnsupportedProblemError
from w4a16gen.kernels.arrangement import MAX_UNSORTED_ROUTES, UNSORTED_TOKENS, tail_tokens
from w4a16gen.kernels.config import Epilogue, KernelConfig, QuantMode, Scheduler
from w4a16gen.kernels.problem import Problem, why_cannot_run

SAME_TIME = 1.01
"""Estimates that differ by less do not tell pairs of kernels apart. The smaller tile multiplies less padding."""


@dataclass(frozen=True)
class Routing:
    """The sizes of a routing. Each token is taken to choose its experts at random, each of them once."""

    tokens: int
    slots: int
    """Experts of a token."""
    experts: int
    """Experts whose weights are here."""
    global_experts: int
    """All experts that tokens choose from."""

    @property
    def share(self) -> float:
        """The share of the tokens that an expert gets."""
        return min(1.0, self.slots / max(1, self.global_experts))

    @property
    def rows(self) -> float:
        """Rows of all experts here, on average."""
        return self.tokens * self.share * self.experts


def are_few(tokens: int, slots: int) -> bool:
    """Return whether products can find their experts in the ids themselves.

    Args:
        tokens: the tokens of the layer.
        slots: experts of a token.
    """
    return tokens <= UNSORTED_TOKENS and tokens * slots <= MAX_UNSORTED_ROUTES


class Load(NamedTuple):
    """What a routing gives grouped kernels to do, on average."""

    experts: float
    """Experts with at least one row, whose weights are read."""
    token_tiles: float
    """Token tiles of all experts."""
    tails: float
    """Those of them with at most `tail_tokens(tile)` rows, which kernels multiply faster."""


@lru_cache(maxsize=1 << 14)
def expected_load(routing: Routing, tile_tokens: int) -> Load:
    """Return the load of a routing.

    The rows of an expert have a binomial distribution. Numbers of rows that are more than ten standard deviations from
    the mean are left out. An expert of x rows has ceil(x / tile) tiles. The last of them is a tail if it has at most
    `tail_tokens(tile)` rows.

    Example:
        >>> load = expected_load(Routing(tokens=16, slots=8, experts=128, global_experts=128), 8)
        >>> round(load.experts, 1), round(load.token_tiles, 1)
        (82.4, 82.4)
    """
    tokens, share, tail = routing.tokens, routing.share, tail_tokens(tile_tokens)
    tiles = tails = 0.0
    for rows, chance in _chances_of_rows(tokens, share):
        tiles += chance * -(-rows // tile_tokens)
        if tail < tile_tokens and 1 <= rows % tile_tokens <= tail:
            tails += chance
    hit = 1 - (1 - share) ** tokens
    return Load(routing.experts * hit, routing.experts * tiles, routing.experts * tails)


def _chances_of_rows(tokens: int, share: float) -> Iterator[tuple[int, float]]:
    """Yield numbers of rows that an expert may have, and how likely each is."""
    if share in (0, 1):
        yield round(tokens * share), 1.0
        return
    mean, spread = tokens * share, 10 * math.sqrt(tokens * share * (1 - share)) + 10
    first, last = max(0, math.floor(mean - spread)), min(tokens, math.ceil(mean + spread))
    others = tokens - first
    logarithm = math.lgamma(tokens + 1) - math.lgamma(first + 1) - math.lgamma(others + 1)
    logarithm += first * math.log(share) + others * math.log1p(-share)
    for rows in range(first, last + 1):
        yield rows, math.exp(logarithm)
        if rows < tokens:
            logarithm += math.log((tokens - rows) / (rows + 1) * share / (1 - share))


def microseconds(config: KernelConfig, problem: Problem, routing: Routing, card: Card) -> float:
    """Return the estimated microseconds of a grouped product, its launch included.

    A grouped kernel takes as long for a tile as the persistent kernel that it is like.

    Args:
        config: the kernel.
        problem: n, k and group size of one expert; m does not matter.
        routing: the sizes of the routing.
        card: the GPU.
    """
    model, load = default_cost_model(), expected_load(routing, config.cta.tokens)
    like = replace(config, scheduler=Scheduler.PERSISTENT, epilogue=Epilogue.NONE)
    whole = replace(problem, m=max(1, round(routing.rows)))
    fewest = max(1, math.floor(load.token_tiles))
    more = min(1.0, max(0.0, load.token_tiles - fewest))  # the share of routings with one tile more
    rates = model.rates_of(like)
    if load.tails > 0:
        saved = (1 - _share_of_tail(like)) * load.tails / load.token_tiles
        rates = rates._replace(block_cycles=rates.block_cycles * (1 - saved))
    cycles = 0.0
    for tiles, share in ((fewest, 1 - more), (fewest + 1, more)):
        # Grids are not padded, so a kernel's first CTAs share the SMs that the previous kernel leaves first.
        work = model.work_on_tiles(like, whole, tiles, load.experts, card, fills_sms_first=False)
        cycles += share * model.cycles(rates, work, card)
    return cycles / model.constants.cycles_per_microsecond


@cache
def _share_of_tail(like: KernelConfig) -> float:
    """Return how long a kernel takes for a block of K in a tail, as a share of what it takes in a whole tile."""
    model, tokens = default_cost_model(), like.cta.tokens
    fewer = replace(like, cta=replace(like.cta, tokens=tail_tokens(tokens)))
    share = fewer.cta.tokens / tokens
    if fewer.shape_name in model.rates:
        share = max(share, model.rates_of(fewer).block_cycles / model.rates_of(like).block_cycles)
    return min(1.0, share)


def choose_pair(
    configs: Iterable[KernelConfig],
    mode: QuantMode,
    gate_up: tuple[Problem, Epilogue],
    down: Problem,
    routing: Routing,
    card: Card,
) -> tuple[KernelConfig, KernelConfig]:
    """Return the kernels of a layer of experts. They have equal CTA tokens, because one list of tiles serves both.

    Few tokens get tiles of 8 tokens if both products can have them: these need no launch that sorts routes. Of pairs
    that are estimated to take the same time, within 1 %, the one with the smallest tile is chosen.

    Args:
        configs: the grouped kernels that are built.
        mode: the quantisation mode of both weights.
        gate_up: the first product of one expert, and the epilogue that its kernels have.
        down: the second product of one expert.
        routing: the sizes of the routing.
        card: the GPU.

    Raises:
        NotBuiltError: if the build has no grouped kernel of the mode with the epilogue, or none without one.
        UnsupportedProblemError: if no kernel can run a product.
    """
    every = list(configs)
    first = _able(every, mode, *gate_up)
    second = _able(every, mode, down, Epilogue.NONE)
    tiles = {config.cta.tokens for config in first} & {config.cta.tokens for config in second}
    if are_few(routing.tokens, routing.slots) and UNSORTED_TOKENS in tiles:
        tiles = {UNSORTED_TOKENS}
    pairs = []
    for tokens in sorted(tiles):
        times = [
            min(
                (microseconds(config, problem, routing, card), config) for config in able if config.cta.tokens == tokens
            )
            for able, problem in ((first, gate_up[0]), (second, down))
        ]
        pairs.append((times[0][0] + times[1][0], (times[0][1], times[1][1])))
    if not pairs:
        raise NotBuiltError(
            f"the grouped kernels of mode {mode} with and without epilogue {gate_up[1]} have no tile in common: run "
            f"`w4a16gen build --space default --space experts --epilogue none --epilogue {gate_up[1]}`"
        )
    fastest = min(pairs)[0]
    return next(kernels for microseconds, kernels in pairs if microseconds <= SAME_TIME * fastest)


def choose_kernel(
    configs: Iterable[KernelConfig],
    mode: QuantMode,
    problem: Problem,
    epilogue: Epilogue,
    routing: Routing,
    card: Card,
    tile_tokens: int | None = None,
) -> KernelConfig:
    """Return the kernel of one grouped product.

    Args:
        configs: the grouped kernels that are built.
        mode: the quantisation mode.
        problem: n, k and group size of one expert; m does not matter.
        epilogue: that of the kernels.
        routing: the sizes of the routing.
        card: the GPU.
        tile_tokens: CTA tokens that the kernel must have, for a list of tiles that exists; None allows all.

    Raises:
        NotBuiltError: if the build has no such kernel.
        UnsupportedProblemError: if no kernel can run the product.
    """
    able = _able(list(configs), mode, problem, epilogue)
    fitting = [config for config in able if tile_tokens in (None, config.cta.tokens)]
    if not fitting:
        tiles = ", ".join(map(str, sorted({config.cta.tokens for config in able})))
        raise NotBuiltError(f"no grouped kernel has CTA tokens of {tile_tokens}: the build has {tiles}")
    return min(fitting, key=lambda config: (microseconds(config, problem, routing, card), config))


def _able(configs: list[KernelConfig], mode: QuantMode, problem: Problem, epilogue: Epilogue) -> list[KernelConfig]:
    """Return the kernels of a mode and an epilogue that can run a product.

    Raises:
        NotBuiltError: if none is built.
        UnsupportedProblemError: if none can run it.
    """
    built = [config for config in configs if config.mode is mode and config.epilogue is epilogue]
    if not built:
        raise NotBuiltError(why_not_built(mode, epilogue))
    reasons = {config: why_cannot_run(config, problem) for config in built}
    able = [config for config, reason in reasons.items() if reason is None]
    if not able:
        raise UnsupportedProblemError(f"no grouped kernel can run {problem}: {next(iter(reasons.values()))}")
    return able


def why_not_built(mode: QuantMode, epilogue: Epilogue) -> str:
    """Return the sentence about a build without grouped kernels of a mode and an epilogue."""
    extra = "" if epilogue is Epilogue.NONE else f" --epilogue none --epilogue {epilogue}"
    kind = "" if epilogue is Epilogue.NONE else f" with epilogue {epilogue}"
    return (
        f"the build has no grouped kernel of mode {mode}{kind}: run "
        f"`w4a16gen build --space default --space experts{extra}`"
    )
