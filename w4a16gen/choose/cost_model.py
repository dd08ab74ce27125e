"""What a kernel and a dense product are estimated to take: constants fitted to timings, and their model."""

from __future__ import annotations

from collections.abc import Iterable

from w4a16gen.kernels.arrangement import native_arrangement
from w4a16gen.kernels.config import KernelConfig, QuantMode, Scheduler, Target
from w4a16gen.kernels.problem import Problem, runnable

SM_COUNT = 132
"""Multiprocessors of H100, H800 and H200 with SXM sockets; the PCIe H100 has 114, which changes few choices."""
CLUSTERS_OF_4 = 30
"""Clusters of four CTAs that fit on the GPU at once (one CTA to an SM)."""

# SM cycles of native kernels, fitted to 8,900 timings: 375 kernels in 35 cells of five layer shapes and 1 to 256
# tokens, 26 kernels of large tiles in 25 cells of 512 to 8,192 tokens, and space `default` in 325 cells of 27 layer
# shapes and 1 to 8,192 tokens; mode fgs, group 128 (NVIDIA H100 80GB HBM3, 2026-11). Single estimates are off by 13 %
# (root mean square).
CYCLES_PER_MICROSECOND = 1755.0
"""The clock that the timings were turned into cycles with."""
LAUNCH_CYCLES = 4730.0
"""What every launch takes: until the first bytes are there, and for the last store."""
BLOCK_CYCLES = 125.0
"""A packed block of 64 channels x 128 k at least."""
PRODUCT_CYCLES = 196.0
TOKEN_CYCLES = 2.5
"""A packed block times activations: this and so much for each token of the tile."""
TENSOR_CYCLES = 4.09
"""At least so much for each token: eight WGMMAs of half a cycle, at 98 % of their peak."""
SM_BYTES_PER_CYCLE = 44.0
"""What an SM takes in of weights and activations."""
SUM_CYCLES = 764.0
"""Adding up the sums of a tile's warpgroups."""
EXCHANGE_CYCLES = 376.0
EXCHANGE_TOKEN_CYCLES = 12.1
"""Adding up the sums of a cluster's CTAs: this and so much for each token and 64 channels of the tile."""
HANDOVER_CYCLES = 2810.0
HANDOVER_TOKEN_CYCLES = 12.9
"""The same through the workspace, once in a launch, and the latter as often as CTAs share a tile: one adds for all."""
PAIRED_SHARE = 0.75
"""Where two CTAs share an SM: how far tiles come in pairs, of which an SM has two or none. Chosen by what the choice
loses in each of the shipped table's 57 layers without that layer's times: 0.41 % in geometric mean, with 0 in its place
0.60 %."""
STREAM_K_LOSS = 0.03
"""How much longer stream-K reads and works, for being at many places of K at once."""
PACKED_BYTES_PER_CYCLE = 2630.0
"""What the whole GPU reads of the packed weights in an SM cycle."""
OVERLAP_LOSS = 0.363
"""Share of the shorter of reading and working that the longer one does not hide."""
MULTICAST_CYCLES = 1600.0
"""What CTAs that share operands lose by waiting for each other."""
LONG_FLOPS = 1e11
"""Problems of more work run at the power limit."""
LONG_SLOWDOWN = 1.14
POWER_CYCLES_PER_BYTE = 0.00626
"""There: how much lower the clock is, and what moving a byte from L2 into an SM costs, since it takes power from the
tensor cores. CTAs that share operands move fewer."""

# Dense FP16, fitted to cuBLAS in 185 problems of 13 layers (NVIDIA H100 80GB HBM3, 2026-11-25); off by 5.0 % (root mean
# square) and 12 % at most, but for one problem in which cuBLAS took 1.37 times as long. The launch is fitted to 105 of
# them that were measured again a day later: off by 4.6 and 10.5 % there, and by 4.7 and 10.1 % of a day before.
DENSE_LAUNCH_MICROSECONDS = 3.3
DENSE_BYTES_PER_MICROSECOND = 2.9e6
DENSE_FLOPS_PER_MICROSECOND = 770e6
DENSE_LONG_FLOPS_PER_MICROSECOND = 680e6
"""At the power limit."""
DENSE_OVERLAP_LOSS = 0.15


def is_long(problem: Problem) -> bool:
    """Whether a problem takes so long, 130 us and more, that power limits it."""
    return problem.flops > LONG_FLOPS


def estimate(configs: Iterable[KernelConfig], mode: QuantMode, problem: Problem) -> list[tuple[KernelConfig, float]]:
    """Give the native kernels that can run a problem with their estimated microseconds, in the order of preference."""
    native = [config for config in runnable(configs, mode, problem) if config.target is Target.NATIVE]
    estimated = [(config, native_cycles(config, problem) / CYCLES_PER_MICROSECOND) for config in native]
    return sorted(estimated, key=lambda pair: (pair[1], pair[0]))


def native_cycles(config: KernelConfig, problem: Problem) -> float:
    """Estimate the SM cycles of a native kernel: waves of CTAs times their packed blocks, and reading the weights."""
    cta, cluster = config.cta, config.cluster
    size = cluster.channels * cluster.tokens * cluster.k
    tiles = -(-problem.n // (cta.channels * cluster.channels)) * -(-problem.m // (cta.tokens * cluster.tokens))
    k_blocks = -(-problem.k // 128)
    area = cta.tokens * cta.channels / 64
    stream_k = config.scheduler is Scheduler.STREAM_K
    at_once = CLUSTERS_OF_4 if size == 4 else SM_COUNT // size  # noqa: PLR2004
    arrangement = native_arrangement(config)
    waves: float = 1 if stream_k else max(1, -(-tiles // at_once))
    pairs = arrangement.ctas_per_sm == 2 and waves > 1  # noqa: PLR2004
    if pairs:
        waves += PAIRED_SHARE * (2 * -(-tiles // (2 * at_once)) - waves)
    rows = -(-tiles * k_blocks // SM_COUNT) if stream_k else -(-k_blocks // cluster.k)
    activation_bytes, weight_bytes = 128 * 2 * cta.tokens * 64 / cta.channels, 128 * 64 / 2 + 2 * 64
    long = is_long(problem)
    moved = activation_bytes / cluster.channels + weight_bytes / cluster.tokens
    block = max(
        BLOCK_CYCLES,
        PRODUCT_CYCLES + TOKEN_CYCLES * cta.tokens,
        TENSOR_CYCLES * cta.tokens + (POWER_CYCLES_PER_BYTE * moved if long else 0.0),
        (activation_bytes + weight_bytes) / SM_BYTES_PER_CYCLE,
    )
    slower = 1 + STREAM_K_LOSS if stream_k else 1.0
    meeting = SUM_CYCLES if arrangement.along_k > 1 else 0.0
    if cluster.k > 1:
        meeting += EXCHANGE_CYCLES + EXCHANGE_TOKEN_CYCLES * area
    if stream_k:
        meeting += HANDOVER_CYCLES + HANDOVER_TOKEN_CYCLES * area * max(1.0, k_blocks / max(rows, 1))
    work = waves * slower * rows * cta.channels / 64 * block
    work += meeting if pairs else waves * meeting  # one CTA's sums meet while the other works
    reading = slower * (problem.n * problem.k / 2 + 2 * problem.groups * problem.n) / PACKED_BYTES_PER_CYCLE
    longer, shorter = max(work, reading), min(work, reading)
    cycles = LAUNCH_CYCLES + longer + OVERLAP_LOSS * shorter + (MULTICAST_CYCLES if size > cluster.k else 0.0)
    return cycles * (LONG_SLOWDOWN if long else 1.0)


def dense_microseconds(problem: Problem) -> float:
    """Estimate what cuBLAS takes for the same product of fp16 weights."""
    m, n, k = problem.m, problem.n, problem.k
    reading = 2 * (n * k + m * k + m * n) / DENSE_BYTES_PER_MICROSECOND
    rate = DENSE_LONG_FLOPS_PER_MICROSECOND if is_long(problem) else DENSE_FLOPS_PER_MICROSECOND
    working = problem.flops / rate
    return DENSE_LAUNCH_MICROSECONDS + max(reading, working) + DENSE_OVERLAP_LOSS * min(reading, working)


def choose_cutlass(found: list[KernelConfig], problem: Problem) -> KernelConfig:
    """Pick one of CUTLASS's kernels by a rule of thumb.

    The token tile is the smallest that covers m, or the largest there is: padding tokens cost tensor-core time, and
    more token tiles read the weights again. Then stream-K, which keeps all SMs busy when tiles are few, then the larger
    cluster once there are several token tiles to share activations, then the listing order.
    """
    largest = max(config.cta.tokens for config in found)

    def preference(config: KernelConfig) -> tuple[object, ...]:
        tokens = config.cta.tokens if config.cta.tokens >= problem.m else 2 * largest - config.cta.tokens
        cluster = config.cluster.channels * config.cluster.tokens
        wide = problem.m > config.cta.tokens
        return (tokens, config.scheduler is not Scheduler.STREAM_K, -cluster if wide else cluster, config)

    return min(found, key=preference)
