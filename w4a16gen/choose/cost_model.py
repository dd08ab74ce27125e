"""The time that a native kernel, or a dense FP16 product, is estimated to take: a formula and its fitted constants."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from w4a16gen.choose.cards import H100, Card
from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.arrangement import native_arrangement
from w4a16gen.kernels.config import KernelConfig, QuantMode, Scheduler, Target
from w4a16gen.kernels.legality import CTA_TOKENS
from w4a16gen.kernels.problem import Problem, runnable

MODEL_PATH = Path(__file__).resolve().parent / "data" / "h100_cost_model.json"
"""The file that `tools/fit_cost_model.py` writes."""
SCHEMA = "w4a16gen.cost_model/1"
PACKED_BLOCK_CHANNELS = 64
PACKED_BLOCK_K = 128
PACKED_BLOCK_BYTES = PACKED_BLOCK_CHANNELS * PACKED_BLOCK_K // 2 + 2 * PACKED_BLOCK_CHANNELS
"""4-bit weights and one fp16 scale per channel."""
ACTIVATION_BYTES = 2 * PACKED_BLOCK_K
"""One token's fp16 activations for a packed block."""
CLUSTER_SIZE_THAT_FITS_BADLY = 4


class Work(NamedTuple):
    """The work of a native kernel in a problem, in counts that do not depend on fitted constants."""

    tile_tokens: int
    tile_blocks: int
    """Packed blocks of 64 channels, side by side, in a tile."""
    waves: int
    """Tiles that the busiest SM works through, one after the other."""
    paired_waves: int
    """The same if tiles come in pairs on an SM, so always an even number; 0 where CTAs do not share SMs."""
    k_blocks: float
    """Blocks of 128 values of K that a CTA works through in a wave, on average."""
    ctas_per_tile: float
    """CTAs that share a tile that stream-K divides; 0 if it divides none."""
    activation_bytes: float
    """Activations that come with each packed block into the SM's shared memory."""
    moved_bytes: float
    """Activations and weights that leave L2 for each packed block; a multicast counts once."""
    reduces_warpgroups: bool
    """Whether a CTA's warpgroups divide K."""
    reduces_cluster: bool
    """Whether a cluster's CTAs divide K."""
    multicasts: bool
    """Whether a cluster's CTAs share operands."""
    weight_bytes: float
    """The packed weight, which every launch reads once."""
    is_long: bool
    """Whether the power limit sets the clock."""


@dataclass(frozen=True)
class CostModel:
    """Constants of the estimates. "Cycles" are SM cycles; "per block" is for 64 channels x 128 values of K."""

    cycles_per_microsecond: float
    """The clock that turns cycles into microseconds."""
    clusters_of_4: int
    """Clusters of four CTAs that an H100's 132 SMs hold at once, one CTA per SM."""
    launch_cycles: float
    """Cycles of every launch: until the first bytes arrive, and for the last store."""
    block_cycles: float
    """Fewest cycles per block."""
    product_cycles: float
    """Cycles to dequantise and multiply a block, whatever the tokens."""
    token_cycles: float
    """Cycles per block and token of the tile, beside `product_cycles`."""
    tensor_cycles: float
    """Fewest cycles per block and token: the tensor cores' peak."""
    sm_bytes_per_cycle: float
    """Bytes per cycle that an SM takes in, weights and activations."""
    warpgroup_reduction_cycles: float
    """Cycles to reduce the partial sums of a tile's warpgroups."""
    cluster_reduction_cycles: float
    """Cycles to reduce the partial sums of a cluster's CTAs, whatever the tile."""
    cluster_reduction_token_cycles: float
    """Cycles of the same per token and 64 channels of the tile."""
    fixup_cycles: float
    """Cycles of the stream-K fix-up, once per launch."""
    fixup_token_cycles: float
    """Cycles of the stream-K fix-up per token and 64 channels of the tile, for each CTA that shares a tile."""
    paired_share: float
    """The share of tiles that come in pairs where two CTAs share an SM: 0 none, 1 all."""
    stream_k_loss: float
    """Share by which stream-K reads and works longer."""
    packed_bytes_per_cycle: float
    """Bytes per cycle of packed weights that a whole H100 reads."""
    overlap_loss: float
    """Share of the shorter of reading and working that the longer does not hide."""
    multicast_cycles: float
    """Cycles that CTAs with shared operands lose to each other per launch."""
    long_flops: float
    """Operations above which the power limit sets the clock, about 130 us on an H100."""
    long_slowdown: float
    """Factor by which the power limit lengthens a kernel."""
    power_cycles_per_byte: float
    """Cycles per byte that leaves L2, at the power limit: it takes power from the tensor cores."""
    dense_launch_microseconds: float
    """Microseconds of every launch of a dense FP16 product."""
    dense_bytes_per_microsecond: float
    """Bytes per microsecond that dense FP16 reads and writes."""
    dense_flops_per_microsecond: float
    """Operations per microsecond of dense FP16 below the power limit."""
    dense_long_flops_per_microsecond: float
    """The same at the power limit."""
    dense_overlap_loss: float
    """`overlap_loss` of dense FP16."""

    @classmethod
    def read(cls, path: Path) -> CostModel:
        """Read the constants from a file that `tools/fit_cost_model.py` wrote.

        Raises:
            InvalidValueError: if the file holds anything else.
            OSError: if it cannot be read.
        """
        try:
            value = json.loads(path.read_text())
            if value["schema"] != SCHEMA:
                raise InvalidValueError(f"schema {value['schema']!r} must be {SCHEMA!r}")
            return cls.from_json(value["constants"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidValueError(
                f"{path} is not a cost model ({error}): make it again with tools/fit_cost_model.py"
            ) from None

    @classmethod
    def from_json(cls, constants: dict[str, Any]) -> CostModel:
        """Read the constants by name.

        Raises:
            InvalidValueError: if one is missing, unknown or not a number of 0 or more.
        """
        names = {field.name for field in fields(cls)}
        if constants.keys() != names:
            raise InvalidValueError(f"constants {sorted(constants.keys() ^ names)} are missing or unknown")
        for name, value in constants.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise InvalidValueError(f"{name} of {value!r} must be a number of 0 or more")
        return cls(**constants)

    def is_long(self, problem: Problem) -> bool:
        """Return whether the power limit sets the clock during a problem: 130 us and more on an H100."""
        return problem.flops > self.long_flops

    def estimate(
        self, configs: Iterable[KernelConfig], mode: QuantMode, problem: Problem, card: Card = H100
    ) -> list[tuple[KernelConfig, float]]:
        """Return the native kernels that can run a problem with their estimated microseconds; see `in_preference`."""
        native = [config for config in runnable(configs, mode, problem) if config.target is Target.NATIVE]
        estimated = [
            (config, self.native_cycles(config, problem, card) / self.cycles_per_microsecond) for config in native
        ]
        return in_preference(estimated, problem)

    def native_cycles(self, config: KernelConfig, problem: Problem, card: Card = H100) -> float:
        """Return the estimated SM cycles of a native kernel, its launch included."""
        return self.cycles(self.work(config, problem, card), card)

    def work(self, config: KernelConfig, problem: Problem, card: Card = H100) -> Work:
        """Return what a native kernel does in a problem on a card."""
        cta, cluster = config.cta, config.cluster
        size = cluster.channels * cluster.tokens * cluster.k
        tiles = -(-problem.n // (cta.channels * cluster.channels)) * -(-problem.m // (cta.tokens * cluster.tokens))
        k_blocks = -(-problem.k // PACKED_BLOCK_K)
        at_once = max(1, card.sm_count // size)
        if size == CLUSTER_SIZE_THAT_FITS_BADLY:
            at_once = max(1, self.clusters_of_4 * card.sm_count // H100.sm_count)
        arrangement = native_arrangement(config)
        stream_k = config.scheduler is Scheduler.STREAM_K
        waves = max(1, -(-tiles // at_once))
        is_paired = arrangement.ctas_per_sm > 1 and waves > 1 and not stream_k
        sharing = _clusters_per_split_tile(tiles, at_once * arrangement.ctas_per_sm, k_blocks) if stream_k else 0.0
        activation_bytes = ACTIVATION_BYTES * cta.tokens * PACKED_BLOCK_CHANNELS / cta.channels
        return Work(
            tile_tokens=cta.tokens,
            tile_blocks=cta.channels // PACKED_BLOCK_CHANNELS,
            waves=waves,
            paired_waves=2 * -(-tiles // (2 * at_once)) if is_paired else 0,
            k_blocks=-(-tiles * k_blocks // at_once) / waves if stream_k else -(-k_blocks // cluster.k),
            ctas_per_tile=sharing,
            activation_bytes=activation_bytes,
            moved_bytes=activation_bytes / cluster.channels + PACKED_BLOCK_BYTES / cluster.tokens,
            reduces_warpgroups=arrangement.along_k > 1,
            reduces_cluster=cluster.k > 1,
            multicasts=size > cluster.k,
            weight_bytes=problem.n * problem.k / 2 + 2 * problem.groups * problem.n,
            is_long=self.is_long(problem),
        )

    def cycles(self, work: Work, card: Card = H100) -> float:
        """Return the SM cycles of some work: waves of tiles, beside reading the weights."""
        memory = card.memory_bandwidth / H100.memory_bandwidth
        slower = 1 + self.stream_k_loss if work.ctas_per_tile else 1.0
        waves: float = work.waves
        if work.paired_waves:
            waves += self.paired_share * (work.paired_waves - work.waves)
        working = waves * slower * work.k_blocks * work.tile_blocks * self._block_cycles(work, card)
        # In a pair, one CTA reduces while the other works.
        working += self._reduction_cycles(work) * (1 if work.paired_waves else waves) + self._fixup_cycles(work)
        reading = slower * work.weight_bytes / (self.packed_bytes_per_cycle * memory)
        cycles = self.launch_cycles + max(working, reading) + self.overlap_loss * min(working, reading)
        if work.multicasts:
            cycles += self.multicast_cycles
        return cycles * (self.long_slowdown if work.is_long else 1.0)

    def _block_cycles(self, work: Work, card: Card) -> float:
        """Return the cycles of one packed block: the slowest of what a block needs."""
        tensor = card.tensor_rate / card.sm_count / (H100.tensor_rate / H100.sm_count)
        return max(
            self.block_cycles,
            self.product_cycles + self.token_cycles * work.tile_tokens,
            self.tensor_cycles / tensor * work.tile_tokens
            + (self.power_cycles_per_byte * work.moved_bytes if work.is_long else 0.0),
            (work.activation_bytes + PACKED_BLOCK_BYTES) / self.sm_bytes_per_cycle,
        )

    def _reduction_cycles(self, work: Work) -> float:
        """Return the cycles that a tile's partial sums take within a CTA and a cluster."""
        area = work.tile_tokens * work.tile_blocks
        cycles = self.warpgroup_reduction_cycles if work.reduces_warpgroups else 0.0
        if work.reduces_cluster:
            cycles += self.cluster_reduction_cycles + self.cluster_reduction_token_cycles * area
        return cycles

    def _fixup_cycles(self, work: Work) -> float:
        """Return the cycles that stream-K's partial sums take through the workspace."""
        if not work.ctas_per_tile:
            return 0.0
        return self.fixup_cycles + self.fixup_token_cycles * work.tile_tokens * work.tile_blocks * work.ctas_per_tile

    def dense_microseconds(self, problem: Problem, card: Card = H100) -> float:
        """Return the estimated microseconds of cuBLAS for the same product with fp16 weights."""
        m, n, k = problem.m, problem.n, problem.k
        memory = card.memory_bandwidth / H100.memory_bandwidth
        tensor = card.tensor_rate / H100.tensor_rate
        reading = 2 * (n * k + m * k + m * n) / (self.dense_bytes_per_microsecond * memory)
        is_long = self.is_long(problem)
        rate = self.dense_long_flops_per_microsecond if is_long else self.dense_flops_per_microsecond
        working = problem.flops / (rate * tensor)
        hidden = min(reading, working)
        return self.dense_launch_microseconds + max(reading, working) + self.dense_overlap_loss * hidden


def _clusters_per_split_tile(tiles: int, clusters: int, k_blocks: int) -> float:
    """Return how many clusters share a tile that stream-K divides; see `scheduler::streamk` in native/tiles.h."""
    if tiles <= clusters:
        return min(clusters / max(tiles, 1), float(k_blocks))
    return 2.0 if tiles % clusters else 0.0


def in_preference(
    estimated: Iterable[tuple[KernelConfig, float]], problem: Problem
) -> list[tuple[KernelConfig, float]]:
    """Return estimates fastest first, but those of oversized tiles last.

    A tile is oversized if tokens fill at most half of it. `tune` and `bench` time no such kernels, because a smaller
    tile does the same with less padding. So no estimate of them was ever checked.
    """
    fitting_tokens = 2 * max(problem.m, CTA_TOKENS[0])
    return sorted(estimated, key=lambda pair: (pair[0].cta.tokens >= fitting_tokens, pair[1], pair[0]))


@cache
def default_cost_model() -> CostModel:
    """Return the model with the constants that come with the package."""
    return CostModel.read(MODEL_PATH)
