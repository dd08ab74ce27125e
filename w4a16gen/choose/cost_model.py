"""The time that a native kernel, or a dense FP16 product, is estimated to take: a formula and measured constants."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from w4a16gen.choose.cards import H100, Card
from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.arrangement import native_arrangement
from w4a16gen.kernels.config import Epilogue, KernelConfig, QuantMode, Scheduler, Target
from w4a16gen.kernels.legality import CTA_TOKENS
from w4a16gen.kernels.problem import Problem, runnable

MODEL_PATH = Path(__file__).resolve().parent / "data" / "cost_model.json"
"""The file that `tools/fit_cost_model.py` writes."""
SCHEMA = "w4a16gen.cost_model/3"
PACKED_BLOCK_CHANNELS = 64
PACKED_BLOCK_K = 128
CLUSTER_SIZE_THAT_FITS_BADLY = 4


class Rates(NamedTuple):
    """The measured constants of one kernel, whatever the mode. Cycles are SM cycles at the model's clock."""

    launch_cycles: float
    """Cycles of every launch: until the first bytes arrive, and for the last store."""
    tile_cycles: float
    """Cycles of a tile beside its main loop."""
    block_cycles: float
    """Cycles of the main loop for 128 values of K of a tile."""
    split_cycles: float
    """Cycles of the fix-up of stream-K for each cluster that shares a tile."""
    long_factor: float
    """Factor by which the power limit lengthens this kernel's work."""


class Work(NamedTuple):
    """The work of a native kernel in a problem, in counts that depend on no rate."""

    tiles: float
    """Tiles that the busiest SM works through, one after the other."""
    blocks: float
    """Blocks of 128 values of K that it works through in all of them."""
    clusters_per_split_tile: float
    """Clusters that share a tile that stream-K divides; 0 if it divides none."""
    tile_area: int
    """Tokens of a tile times its blocks of 64 channels."""
    weight_bytes: float
    """The packed weight, which every launch reads once."""
    read_apart_bytes: float
    """Bytes of tiles that stream-K divides which other tiles read too, at other times; L2 does not keep them."""
    is_long: bool
    """Whether the power limit sets the clock."""


@dataclass(frozen=True)
class Constants:
    """The constants of the estimates that all kernels share. "Cycles" are SM cycles."""

    cycles_per_microsecond: float
    """The clock that turns cycles into microseconds."""
    clusters_of_4: int
    """Clusters of four CTAs that an H100's 132 SMs hold at once, one CTA per SM."""
    paired_share: float
    """The share of tiles that come in pairs where two CTAs without a cluster share an SM: 0 none, 1 all."""
    paired_share_of_clusters: float
    """The same of CTAs in clusters, whose last tiles spread over more SMs."""
    tensor_cycles: float
    """Fewest cycles for 64 channels x 128 values of K, per token of the tile: the tensor cores' peak."""
    packed_bytes_per_cycle: float
    """Bytes per cycle of packed weights that a whole H100 reads."""
    l2_bytes: float
    """Bytes of operands that L2 keeps."""
    overlap_loss: float
    """Share of the shorter of reading and working that the longer does not hide."""
    long_flops: float
    """Operations above which the power limit sets the clock, about 130 us on an H100."""
    sustained_factor: float
    """Factor by which kernels at the power limit take longer for seconds than in the short bursts of the rates."""
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
    def from_json(cls, values: Mapping[str, Any]) -> Constants:
        """Read the constants by name.

        Raises:
            InvalidValueError: if one is missing, unknown or not a number of 0 or more, or a divisor is 0.
        """
        names = {field.name for field in fields(cls)}
        if values.keys() != names:
            raise InvalidValueError(f"constants {sorted(values.keys() ^ names)} are missing or unknown")
        for name, value in values.items():
            _check_number(name, value)
            if name in _DIVISORS and value == 0:
                raise InvalidValueError(f"{name} of 0 must be above 0")
        return cls(**values)


_DIVISORS = {
    "cycles_per_microsecond",
    "packed_bytes_per_cycle",
    "dense_bytes_per_microsecond",
    "dense_flops_per_microsecond",
    "dense_long_flops_per_microsecond",
}


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise InvalidValueError(f"{name} of {value!r} must be a number of 0 or more")


@dataclass(frozen=True)
class CostModel:
    """Estimates of native kernels, by the rates of each, and of dense FP16."""

    constants: Constants
    rates: Mapping[str, Rates]
    """By `KernelConfig.shape_name`: all modes and epilogues of a kernel share them."""
    stream_k_has_heads: bool = True
    """Whether stream-K gives tiles heads where L2 cannot keep the operands; see `split_of`."""

    @classmethod
    def read(cls, path: Path) -> CostModel:
        """Read a file that `tools/fit_cost_model.py` wrote.

        Raises:
            InvalidValueError: if the file holds anything else.
            OSError: if it cannot be read.
        """
        try:
            value = json.loads(path.read_text())
            if value["schema"] != SCHEMA:
                raise InvalidValueError(f"schema {value['schema']!r} must be {SCHEMA!r}")
            rates = {name: Rates(*numbers) for name, numbers in value["rates"].items()}
            for name, numbers in rates.items():
                for number in numbers:
                    _check_number(f"a rate of {name}", number)
            return cls(Constants.from_json(value["constants"]), rates)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InvalidValueError(
                f"{path} is not a cost model ({error}): make it again with tools/fit_cost_model.py"
            ) from None

    def is_long(self, problem: Problem) -> bool:
        """Return whether the power limit sets the clock during a problem: 130 us and more on an H100."""
        return problem.flops > self.constants.long_flops

    def is_compute_bound(self, problem: Problem) -> bool:
        """Return whether an H100 multiplies longer than it reads the weights in FP16: about 280 tokens and more."""
        shared = self.constants
        reading = 2 * problem.n * problem.k / shared.dense_bytes_per_microsecond
        return problem.flops / shared.dense_flops_per_microsecond > reading

    def rates_of(self, config: KernelConfig) -> Rates:
        """Return the rates of a native kernel.

        Raises:
            InvalidValueError: if there are none.
        """
        try:
            return self.rates[config.shape_name]
        except KeyError:
            raise InvalidValueError(f"{config.name} has no rates: run tools/fit_cost_model.py") from None

    def estimate(
        self,
        configs: Iterable[KernelConfig],
        mode: QuantMode,
        problem: Problem,
        card: Card = H100,
        epilogue: Epilogue = Epilogue.NONE,
    ) -> list[tuple[KernelConfig, float]]:
        """Return the native kernels that can run a problem with their estimated microseconds; see `in_preference`.

        Kernels that differ in the epilogue have the same estimate: that of the plain product.
        """
        able = runnable(configs, mode, problem, epilogue)
        native = [config for config in able if config.target is Target.NATIVE]
        return in_preference([(config, self.microseconds(config, problem, card)) for config in native], problem)

    def microseconds(self, config: KernelConfig, problem: Problem, card: Card = H100) -> float:
        """Return the estimated microseconds of a native kernel, its launch included."""
        cycles = self.cycles(self.rates_of(config), self.work(config, problem, card), card)
        return cycles / self.constants.cycles_per_microsecond

    def work(self, config: KernelConfig, problem: Problem, card: Card = H100) -> Work:
        """Return what a native kernel does in a problem on a card."""
        token_tiles = -(-problem.m // (config.cta.tokens * config.cluster.tokens))
        return self.work_on_tiles(config, problem, token_tiles, 1, card)

    def work_on_tiles(
        self,
        config: KernelConfig,
        problem: Problem,
        token_tiles: int,
        weights: float,
        card: Card = H100,
        *,
        fills_sms_first: bool = True,
    ) -> Work:
        """Return what a native kernel does in a number of token tiles.

        Args:
            config: the kernel.
            problem: the problem; of m, only its operations matter here.
            token_tiles: tiles of `cta.tokens` x `cluster.tokens` tokens.
            weights: how many weights of these sizes are read.
            card: the GPU.
            fills_sms_first: whether no SM gets a second tile while another one has none.
        """
        cta, cluster, shared = config.cta, config.cluster, self.constants
        size = cluster.channels * cluster.tokens * cluster.k
        tiles = -(-problem.n // (cta.channels * cluster.channels)) * token_tiles
        k_blocks = -(-problem.k // PACKED_BLOCK_K)
        at_once = max(1, card.sm_count // size)
        if size == CLUSTER_SIZE_THAT_FITS_BADLY:
            at_once = max(1, int(shared.clusters_of_4) * card.sm_count // H100.sm_count)
        ctas_per_sm = native_arrangement(config).ctas_per_sm
        sharing = read_apart = 0.0
        if config.scheduler is Scheduler.STREAM_K:
            own_tiles = max(1.0, tiles / at_once)
            blocks = tiles * k_blocks / at_once
            channels = PACKED_BLOCK_CHANNELS * -(-problem.n // PACKED_BLOCK_CHANNELS)
            operand_bytes = PACKED_BLOCK_K * k_blocks * (2 * problem.m + channels / 2)
            exceeds_l2 = token_tiles > 1 and operand_bytes > shared.l2_bytes
            may_have_heads = exceeds_l2 and self.stream_k_has_heads
            clusters = at_once * ctas_per_sm
            split = split_of(tiles, clusters, k_blocks, may_have_heads=may_have_heads)
            if split.head_blocks:
                blocks = float(ctas_per_sm * (tiles // clusters * k_blocks + split.head_blocks))
            sharing = split.clusters_per_tile
            read_apart = self._read_apart(config, problem, tiles, k_blocks, split)
        else:
            own_tiles = float(max(1, -(-tiles // at_once)))
            if ctas_per_sm > 1 and (own_tiles > 1 or not fills_sms_first):
                share = shared.paired_share if size == 1 else shared.paired_share_of_clusters
                in_pairs = 2 * -(-tiles // (2 * at_once))
                own_tiles += share * (in_pairs - own_tiles)
            blocks = own_tiles * -(-k_blocks // cluster.k)
        return Work(
            tiles=own_tiles,
            blocks=blocks,
            clusters_per_split_tile=sharing,
            tile_area=cta.tokens * (cta.channels // PACKED_BLOCK_CHANNELS),
            weight_bytes=weights * (problem.n * problem.k / 2 + 2 * problem.groups * problem.n),
            read_apart_bytes=read_apart,
            is_long=self.is_long(problem),
        )

    def _read_apart(self, config: KernelConfig, problem: Problem, tiles: int, k_blocks: int, split: Split) -> float:
        """Return the bytes that split tiles read from memory although other tiles read them too.

        Whole tiles of a wave read the same operands at the same time, and heads of tiles too. Clusters that begin at
        different places of K find in L2 only what it keeps.
        """
        if split.tiles == 0:
            return 0.0
        cta, cluster, l2_bytes = config.cta, config.cluster, self.constants.l2_bytes
        k = problem.k * (1 - split.head_blocks / k_blocks)
        activations, weight = 2 * problem.m * k, problem.n * k / 2
        if activations == 0:
            return 0.0
        read_by_tiles = (
            2 * cta.tokens * cluster.tokens * k - activations / tiles,
            cta.channels * cluster.channels * k / 2 - weight / tiles,
        )
        missed = (max(0.0, 1 - l2_bytes / activations), max(0.0, 1 - l2_bytes / (activations + weight)))
        return split.tiles * sum(share * nbytes for share, nbytes in zip(missed, read_by_tiles, strict=True))

    def cycles(self, rates: Rates, work: Work, card: Card = H100) -> float:
        """Return the SM cycles of some work: tile after tile, beside reading the weights."""
        shared = self.constants
        tensor = card.tensor_rate / H100.tensor_rate
        block = max(rates.block_cycles, shared.tensor_cycles / tensor * work.tile_area if tensor < 1 else 0.0)
        working = work.tiles * rates.tile_cycles + work.blocks * block
        working += rates.split_cycles * work.clusters_per_split_tile
        if work.is_long:
            working *= rates.long_factor * shared.sustained_factor
        memory = card.memory_bandwidth / H100.memory_bandwidth
        reading = (work.weight_bytes + work.read_apart_bytes) / (shared.packed_bytes_per_cycle * memory)
        return rates.launch_cycles + max(working, reading) + shared.overlap_loss * min(working, reading)

    def dense_microseconds(self, problem: Problem, card: Card = H100) -> float:
        """Return the estimated microseconds of cuBLAS for the same product with fp16 weights."""
        shared = self.constants
        m, n, k = problem.m, problem.n, problem.k
        memory = card.memory_bandwidth / H100.memory_bandwidth
        tensor = card.tensor_rate * card.sm_count / (H100.tensor_rate * H100.sm_count)
        reading = 2 * (n * k + m * k + m * n) / (shared.dense_bytes_per_microsecond * memory)
        is_long = self.is_long(problem)
        rate = shared.dense_long_flops_per_microsecond if is_long else shared.dense_flops_per_microsecond
        working = problem.flops / (rate * tensor)
        hidden = min(reading, working)
        return shared.dense_launch_microseconds + max(reading, working) + shared.dense_overlap_loss * hidden


class Split(NamedTuple):
    """How stream-K divides tiles along K."""

    tiles: int
    """How many tiles it divides."""
    clusters_per_tile: float
    """Clusters that share one of them."""
    head_blocks: int = 0
    """K blocks of a head, 0 without heads. No cluster sums more K blocks of the divided tiles."""


_FEWEST_CLUSTERS_PER_HEAD = 3
_BLOCKS_PER_CLUSTER_OF_HEAD = 16
_BLOCKS_OF_SUMS = 3


def split_of(tiles: int, clusters: int, k_blocks: int, *, may_have_heads: bool) -> Split:
    """Return how stream-K divides tiles among clusters, as `scheduler::streamk` of native/tiles.h does.

    Args:
        tiles: how many there are.
        clusters: how many run at once.
        k_blocks: blocks of 128 values of K.
        may_have_heads: whether several token tiles read operands that L2 cannot keep.
    """
    clusters = max(1, min(clusters, tiles * k_blocks))  # those that have work
    rest = tiles % clusters
    if rest == 0:
        return Split(0, 0.0)
    most_clusters_per_head = max(_FEWEST_CLUSTERS_PER_HEAD, k_blocks // _BLOCKS_PER_CLUSTER_OF_HEAD)
    if may_have_heads and rest * most_clusters_per_head >= clusters:
        head_blocks = min(k_blocks, -(-rest * (k_blocks + _BLOCKS_OF_SUMS) // clusters))
        return Split(rest, clusters / rest, head_blocks)
    if tiles < clusters:
        return Split(tiles, clusters / tiles)
    return Split(clusters + rest, 2.0)


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
    """Return the model that comes with the package."""
    return CostModel.read(MODEL_PATH)
