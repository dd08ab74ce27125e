"""The arrangement of a native kernel on an SM: how its warpgroups divide a tile, its stages and its shared memory.

This module owns the numbers that the kernels are generated with. The headers derive the same layout of shared memory
from the template arguments and assert that it fits.
"""

from __future__ import annotations

from dataclasses import dataclass

from w4a16gen.kernels.config import KernelConfig, Schedule

WARPGROUP_THREADS = 128
WARPGROUP_CHANNELS = 64
"""Output channels that one WGMMA computes (the M of m64nNk16), and the channels of a packed block."""
TOKENS_STEP = 8
"""WGMMA multiplies a multiple of this number of tokens."""
PACKED_BLOCK_K = 128
"""Values of K in a packed block. A stage holds a block or half of one."""
NATIVE_WARPGROUPS = {Schedule.TWO_WARPGROUPS: 2, Schedule.FOUR_WARPGROUPS: 4, Schedule.EIGHT_WARPS: 2}
"""Consumer warpgroups of a native kernel's CTA."""

SHARED_BYTES_PER_SM = 228 * 1024
RESERVED_SHARED_BYTES = 1024
"""Shared memory that the driver takes for every CTA that runs on an SM."""
MAX_STAGES = 32
BARRIER_BYTES = 8 * (2 * MAX_STAGES + 2)
"""Two barriers per stage and two for sums from the cluster."""
UNSORTED_TOKENS, MAX_UNSORTED_ROUTES = 8, 64
"""Tokens and routes up to which grouped kernels with tiles of that many tokens find experts in the ids themselves. Each
expert that is chosen then has that many rows."""
EXPERT_NUMBER_BYTES = 2
MAX_STAGES_BESIDE_EXPERTS = ((BARRIER_BYTES - MAX_UNSORTED_ROUTES * EXPERT_NUMBER_BYTES) // 8 - 3) // 2
"""Stages whose barriers, with those for sums and the residual, leave room for the numbers of experts behind them."""

MIN_TOKENS_WITH_TAIL = 80
"""CTA tokens from which a grouped kernel multiplies fewer tokens where a tile has fewer. Tensor cores take about as
long for 64 as for fewer."""

PAIRED_CTAS = 2
"""CTAs that share an SM if their registers allow it. One then fetches while the other finishes, also across dependent
launches."""
PAIRED_WARPGROUPS = 2
"""Consumer warpgroups of a CTA that shares an SM."""
MAX_PAIRED_ACCUMULATORS = {1: 8, 2: 8, 4: 4}
"""fp32 accumulators of a thread up to which two CTAs share an SM, by the CTAs of a cluster that split K. The reduction
among four takes more registers."""
MAX_PAIRED_ACCUMULATORS_OF_WARPS = 8
"""The same where each warp multiplies on its own, whatever the cluster."""

SCALE_ROW_BYTES = 2 * WARPGROUP_CHANNELS
MAX_SCALE_ROWS = 4
"""Rows of scales in a packed block, one for every 32 values of K. Every stage has room for all of them."""
ACTIVATION_BYTES = 2
FLOAT_BYTES = 4

USEFUL_WEIGHT_BYTES = 100 * 1024
"""Bytes of weights in flight beyond which more stages gained nothing and lost up to 8 % (H200, 2026-11)."""

REDUCTION_TOKENS = (32, 24, 16, 8)
"""Tokens whose partial sums the warpgroups along K reduce at a time: the first of these that divides the tile."""
REDUCTION_TOKENS_OF_TWO = 64
"""The same for a tile of 64 tokens and two warpgroups along K, which then reduce in one step."""

OUTPUT_BYTES = 2
DIVIDED_TOKENS = 32
"""CTAs that split K divide the tokens of the output if each gets a multiple of this, otherwise the channels."""
MIN_STORED_TOKENS = 64
"""Tokens from which the output goes through shared memory, so that the copy engine stores it during the next tile."""
MIN_RING_K = 256
"""Values of K that the ring must hold beside the output. Otherwise the output is stored from registers."""


@dataclass(frozen=True)
class Arrangement:
    """The arrangement of a native kernel on an SM."""

    along_channels: int
    """Consumer warpgroups that divide the channels."""
    along_k: int
    """Consumer warpgroups that divide K."""
    accumulators: int
    """fp32 accumulators of one thread."""
    ctas_per_sm: int
    """CTAs that share an SM: two if their registers allow it."""
    stages: int
    """Stages that fit into shared memory and are of use, a multiple of `along_k`."""
    shared_bytes: int
    """Dynamic shared memory of a CTA."""
    stores_through_shared: bool
    """Whether the output of a whole tile has room in shared memory, from which the copy engine stores it."""
    tail_tokens: int
    """Tokens that a tile multiplies if it has no more: see `tail_tokens`. Otherwise all CTA tokens."""

    @property
    def min_stages(self) -> int:
        """Stages that the ring needs: a warpgroup releases a stage while it works on its next one."""
        return 2 * self.along_k


def native_arrangement(config: KernelConfig) -> Arrangement:
    """Return how a native kernel uses an SM.

    The stages may be too few for a configuration that is not legal; see `legality.why_forbidden`.
    """
    cta = config.cta
    warpgroups = NATIVE_WARPGROUPS[config.schedule]
    blocks = cta.channels // WARPGROUP_CHANNELS
    along_channels = min(blocks, warpgroups)
    along_k = warpgroups // along_channels
    accumulators = cta.channels * cta.tokens // (WARPGROUP_THREADS * along_channels)
    ctas_per_sm = _ctas_per_sm(config, warpgroups, accumulators)

    weight_bytes = blocks * (_scale_bytes(config) + cta.k * WARPGROUP_CHANNELS // 2)
    stage_bytes = weight_bytes + cta.k * cta.tokens * ACTIVATION_BYTES
    budget = SHARED_BYTES_PER_SM // ctas_per_sm - RESERVED_SHARED_BYTES
    useful = max(USEFUL_WEIGHT_BYTES // weight_bytes, 2 * along_k)

    finds_experts = config.is_grouped and cta.tokens == UNSORTED_TOKENS
    most = MAX_STAGES_BESIDE_EXPERTS if finds_experts else MAX_STAGES

    def stages_beside(others: int) -> int:
        fitting = min(most, (budget - others) // stage_bytes)
        # A slot of the ring always falls to the same warpgroup along K, which would otherwise mistake its barrier's
        # phase.
        return min(fitting, useful) // along_k * along_k

    beside_ring = BARRIER_BYTES + _reduction_bytes(config, along_k)
    output_bytes = _output_bytes(config, along_k)
    fewest = max(2 * along_k, MIN_RING_K // cta.k)
    through_shared = output_bytes > 0 and stages_beside(beside_ring + output_bytes) >= fewest
    if through_shared:
        beside_ring += output_bytes
    stages = stages_beside(beside_ring)
    shared_bytes = beside_ring + stages * stage_bytes
    tail = tail_tokens(cta.tokens) if config.is_grouped else cta.tokens
    return Arrangement(along_channels, along_k, accumulators, ctas_per_sm, stages, shared_bytes, through_shared, tail)


def tail_tokens(tile_tokens: int) -> int:
    """Return how many tokens a grouped kernel multiplies in a tile that has no more than these.

    Args:
        tile_tokens: the kernel's CTA tokens.

    Example:
        >>> tail_tokens(144), tail_tokens(64)
        (112, 64)
    """
    if tile_tokens < MIN_TOKENS_WITH_TAIL:
        return tile_tokens
    return -(-(tile_tokens * 3 // 4) // TOKENS_STEP) * TOKENS_STEP


def _ctas_per_sm(config: KernelConfig, warpgroups: int, accumulators: int) -> int:
    by_warps = config.schedule is Schedule.EIGHT_WARPS
    most = MAX_PAIRED_ACCUMULATORS_OF_WARPS if by_warps else MAX_PAIRED_ACCUMULATORS[config.cluster.k]
    fits = warpgroups == PAIRED_WARPGROUPS and accumulators <= most
    return PAIRED_CTAS if fits and config.cta.k == PACKED_BLOCK_K else 1


def _scale_bytes(config: KernelConfig) -> int:
    """Return the room for scales and zeros of 64 channels in one stage."""
    rows = MAX_SCALE_ROWS * (2 if config.mode.has_zeros else 1)
    return rows * SCALE_ROW_BYTES if config.mode.is_grouped else 0


def _reduction_bytes(config: KernelConfig, along_k: int) -> int:
    """Return the room for partial sums of warpgroups along K and of the other CTAs of a cluster that splits K."""
    cta, splits = config.cta, config.cluster.k
    phase = next(tokens for tokens in REDUCTION_TOKENS if cta.tokens % tokens == 0)
    if (along_k, cta.tokens) == (2, REDUCTION_TOKENS_OF_TWO):
        phase = REDUCTION_TOKENS_OF_TWO
    of_warpgroups = (along_k - 1) * phase * cta.channels * FLOAT_BYTES
    # Two buffers: sums of the next tile may arrive before those of this one are read.
    of_cluster = 2 * (splits - 1) * cta.tokens * (cta.channels // splits) * FLOAT_BYTES
    return of_warpgroups + of_cluster


def _output_bytes(config: KernelConfig, along_k: int) -> int:
    """Return the bytes of output that a CTA stores of a tile, or 0 if it stores them from registers in any case."""
    splits, tokens = config.cluster.k, config.cta.tokens
    # The copy engine stores whole tiles, also rows behind the last one of an expert, which are those of the next one.
    if tokens < MIN_STORED_TOKENS or config.is_grouped:
        return 0
    if splits > 1 and (along_k > 1 or tokens % (splits * DIVIDED_TOKENS) != 0):
        return 0
    return config.cta.channels * tokens // splits * OUTPUT_BYTES
