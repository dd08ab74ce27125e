"""The legal configurations: the values of each axis, and the rules of the hardware and of each target."""

from __future__ import annotations

from collections.abc import Sequence

from w4a16gen.kernels.arrangement import (
    NATIVE_WARPGROUPS,
    PACKED_BLOCK_K,
    WARPGROUP_CHANNELS,
    WARPGROUP_THREADS,
    Arrangement,
    native_arrangement,
)
from w4a16gen.kernels.config import Epilogue, KernelConfig, Schedule, Scheduler, Target, why_not_of_target

CTA_CHANNELS = (64, 128, 256)
CTA_TOKENS = (8, 16, 32, 64, 128, 256)
"""Token tiles of CUTLASS kernels."""
NATIVE_CTA_TOKENS = tuple(range(8, 257, 8))
"""Token tiles of native kernels: any number of tokens that WGMMA multiplies. A step of 8 makes the difference between
one wave and two, or leaves less of the last tile empty."""
CTA_K = (32, 64, 128)
CLUSTER_CHANNELS = (1, 2, 4)
CLUSTER_TOKENS = (1, 2, 4)
CLUSTER_K = (1, 2, 4)
CONSUMER_WARPGROUPS = 2
"""Consumer warpgroups per CTA in both of CUTLASS's schedules."""
MIN_CUTLASS_TOKENS = 16
"""CUTLASS's epilogue does not compile below (nvcc 13.0: "Shape Divisibility Condition")."""
MIN_CUTLASS_K = 64
"""Four k16 steps; CUTLASS's main loop does not compile below (nvcc 13.0: "Consider increasing TileShapeK")."""
MAX_ACCUMULATORS = 128
"""fp32 accumulators per thread. The next size, 256, exceeds the 255 registers that a thread can address: CUTLASS
compiles 256x256 and pingpong 128x256 with more than 9 KB of spills per thread (nvcc 13.0)."""
NATIVE_K = (PACKED_BLOCK_K // 2, PACKED_BLOCK_K)
"""Values of K in a native kernel's stage: half of a packed block, or a whole one, as warps8 needs."""
MAX_NATIVE_ACCUMULATORS = {
    Schedule.TWO_WARPGROUPS: MAX_ACCUMULATORS,
    Schedule.FOUR_WARPGROUPS: 32,
    Schedule.EIGHT_WARPS: 8,
}
"""fp32 accumulators per thread. With four consumer warpgroups a thread has 104 registers, and weight fragments take 32
of them: with 64 accumulators ptxas serialises WGMMAs (C7512). With eight warps a thread keeps four values for each
accumulator, in half of an SM's registers."""
MIN_SPILLING_ACCUMULATORS_OF_FOUR = 20
MIN_SPILLING_STREAM_K_ACCUMULATORS = 92
MAX_STREAM_K_ACCUMULATORS_IN_CLUSTERS = 80
MAX_STREAM_K_ACCUMULATORS_OF_ONE_FRAGMENT_IN_CLUSTERS = 96
"""The most fp32 accumulators per thread with stream-K in clusters. The second is for warpgroups of 64 channels without
zeros, and for tiles of a multiple of LEAN_TOKENS. Beyond, ptxas spills in some modes (nvcc 13.0)."""
LEAN_TOKENS = 32
"""Tiles with a multiple of this many tokens take ptxas fewer registers to exchange sums than the sizes around them."""
MAX_REDUCED_ACCUMULATORS = {1: MAX_ACCUMULATORS, 2: 96, 4: 64}
"""fp32 accumulators per thread from which, or beyond which, ptxas spills: with four warpgroups and stages of 64 k, with
stream-K and warpgroups that split K, and by the CTAs of a cluster that split K. The last and the first hold for tiles
that are no power of two of tokens; ptxas finds registers for the others (nvcc 13.0)."""
MAX_REDUCED_ACCUMULATORS_OF_OTHER_TILES = 80
"""The same for clusters that split K, and tiles of 128 channels and more without a multiple of LEAN_TOKENS. Beyond,
ptxas spills for some numbers of tokens, in some modes (nvcc 13.0)."""
MAX_NATIVE_MULTICAST = 2
"""CTAs of a native kernel's cluster that receive one copy of an operand."""
MAX_PORTABLE_CLUSTER = 8
"""CTAs per cluster that every GPU of compute capability 9.0 launches (CUDA programming guide, clusters)."""


def why_forbidden(config: KernelConfig) -> str | None:
    """Return why the hardware or the target's implementation forbids a configuration, or None if it is legal."""
    tokens = CTA_TOKENS if config.target is Target.CUTLASS else NATIVE_CTA_TOKENS
    for shape, name, value, allowed in (
        ("CTA", "channels", config.cta.channels, CTA_CHANNELS),
        ("CTA", "tokens", config.cta.tokens, tokens),
        ("CTA", "k", config.cta.k, CTA_K),
        ("cluster", "channels", config.cluster.channels, CLUSTER_CHANNELS),
        ("cluster", "tokens", config.cluster.tokens, CLUSTER_TOKENS),
        ("cluster", "k", config.cluster.k, CLUSTER_K),
    ):
        if value not in allowed:
            return f"{shape} {name} of {value} must be {_listed(allowed)}"
    reason = why_not_of_target(config)
    if reason is None and config.is_grouped:
        reason = _forbidden_grouped(config)
    if reason is not None:
        return reason
    return _forbidden_native(config) if config.target is Target.NATIVE else _forbidden_cutlass(config)


def _listed(allowed: Sequence[int]) -> str:
    """Return the values that a rule allows, as the end of a sentence."""
    step, last = allowed[0], allowed[-1]
    if tuple(allowed) == tuple(range(step, last + 1, step)):
        return f"a multiple of {step} up to {last}"
    return f"one of {', '.join(map(str, allowed))}"


def _forbidden_grouped(config: KernelConfig) -> str | None:
    """Return why no grouped kernel can have this configuration, or None if its rules allow it."""
    if config.cluster.tokens > 1:
        return f"cluster {config.cluster}: token tiles of grouped kernels may belong to experts with other weights"
    if config.epilogue is Epilogue.ELEMENTWISE:
        return "epilogue elementwise: grouped kernels compute plain products, or gate them"
    return None


def _forbidden_cutlass(config: KernelConfig) -> str | None:
    """Return why CUTLASS's collective cannot be this kernel, or None."""
    cta, cluster = config.cta, config.cluster
    if config.schedule in NATIVE_WARPGROUPS:
        return "CUTLASS's mixed-input kernels are pingpong or cooperative, persistent or stream-K"
    if cta.tokens < MIN_CUTLASS_TOKENS:
        return f"CTA tokens of {cta.tokens}: CUTLASS's SM90 epilogue does not compile below {MIN_CUTLASS_TOKENS}"
    if cta.k < MIN_CUTLASS_K:
        return f"CTA k of {cta.k}: CUTLASS's mixed-input main loop needs four k16 steps, so at least {MIN_CUTLASS_K}"
    if cluster.k != 1:
        return f"cluster k of {cluster.k}: CUTLASS's SM90 kernels split K through stream-K, not through clusters"
    if cluster.channels * cluster.tokens > MAX_PORTABLE_CLUSTER:
        return (
            f"cluster {cluster} holds {cluster.channels * cluster.tokens} CTAs; the portable limit is "
            f"{MAX_PORTABLE_CLUSTER}"
        )
    cooperative = config.schedule is Schedule.COOPERATIVE
    if cooperative and cta.channels < CONSUMER_WARPGROUPS * WARPGROUP_CHANNELS:
        return (
            f"CTA channels of {cta.channels}: the cooperative schedule gives each of its {CONSUMER_WARPGROUPS} "
            f"warpgroups at least {WARPGROUP_CHANNELS} channels"
        )
    if not cooperative and config.scheduler is Scheduler.STREAM_K:
        return "CUTLASS's pingpong schedule has no stream-K"
    return _forbidden_accumulators(config, CONSUMER_WARPGROUPS if cooperative else 1, MAX_ACCUMULATORS)


def _forbidden_native(config: KernelConfig) -> str | None:
    """Return why no native kernel can have this configuration, or None."""
    cta, cluster = config.cta, config.cluster
    if config.schedule not in NATIVE_WARPGROUPS:
        return "native kernels have the schedules warpgroups2, warpgroups4 and warps8"
    if config.scheduler is Scheduler.STREAM_K and cluster.k > 1:
        return f"cluster {cluster}: native stream-K kernels split K among clusters, not within them"
    stages_k = NATIVE_K[1:] if config.schedule is Schedule.EIGHT_WARPS else NATIVE_K
    if cta.k not in stages_k:
        allowed = " or ".join(map(str, stages_k))
        return f"CTA k of {cta.k}: a stage of a native {config.schedule} kernel holds {allowed} values of K"
    if max(cluster.channels, cluster.tokens) > MAX_NATIVE_MULTICAST:
        return f"cluster {cluster}: native kernels multicast an operand to at most {MAX_NATIVE_MULTICAST} CTAs"
    if cluster.k > 1 and cluster.channels * cluster.tokens > 1:
        return f"cluster {cluster}: a native kernel's cluster multicasts operands or splits K, not both"
    arrangement = native_arrangement(config)
    reason = _lacks_registers(config, arrangement)
    if reason is not None:
        return reason
    reason = _forbidden_accumulators(config, arrangement.along_channels, MAX_NATIVE_ACCUMULATORS[config.schedule])
    if reason is None and arrangement.stages < arrangement.min_stages:
        return (
            f"CTA {cta}: {arrangement.stages} stages fit into shared memory beside the partial sums; "
            f"{arrangement.along_k} warpgroups that split K need two each"
        )
    return reason


def _lacks_registers(config: KernelConfig, arrangement: Arrangement) -> str | None:
    """Return why a native kernel lacks registers beside its accumulators, as compiling showed (nvcc 13.0), or None."""
    cta, cluster = config.cta, config.cluster
    if (config.schedule, cta.channels, cluster.k) == (Schedule.EIGHT_WARPS, 256, 4):
        return f"CTA {cta}: eight warps lack registers to reduce sums of 256 channels among 4 CTAs (ptxas spills)"
    four = config.schedule is Schedule.FOUR_WARPGROUPS
    splits_k = arrangement.along_k > 1
    reason = _lacks_registers_for_tile(config, arrangement)
    reason = reason or _lacks_registers_for_stream_k_in_clusters(config, arrangement)
    if reason is not None:
        return reason
    if four and (cta.tokens, cta.k) == (64, 64):
        if splits_k:
            return f"CTA {cta}: four warpgroups that split K lack registers for 64 tokens (ptxas warning C7512)"
        if cluster.k == max(CLUSTER_K):
            return f"CTA {cta}: four warpgroups lack registers to reduce sums among 4 CTAs (ptxas spills)"
    if config.scheduler is not Scheduler.STREAM_K or not splits_k:
        return None
    if arrangement.accumulators >= MIN_SPILLING_STREAM_K_ACCUMULATORS:
        return (
            f"CTA {cta}: stream-K with warpgroups that split K lacks registers beside {arrangement.accumulators} "
            "accumulators (ptxas spills)"
        )
    if four and (cta.tokens, cta.k) == (32, 64):
        return f"CTA {cta}: stream-K with four warpgroups that split K lacks registers for k 64 (ptxas spills)"
    return None


def _lacks_registers_for_stream_k_in_clusters(config: KernelConfig, arrangement: Arrangement) -> str | None:
    """Return why stream-K in clusters lacks registers, as compiling showed (nvcc 13.0), or None."""
    cta, cluster = config.cta, config.cluster
    one_fragment = cta.channels == arrangement.along_channels * WARPGROUP_CHANNELS
    most = MAX_STREAM_K_ACCUMULATORS_IN_CLUSTERS
    if one_fragment and not config.mode.has_zeros and cta.tokens % LEAN_TOKENS == 0:
        most = MAX_STREAM_K_ACCUMULATORS_OF_ONE_FRAGMENT_IN_CLUSTERS
    in_cluster = config.scheduler is Scheduler.STREAM_K and cluster.channels * cluster.tokens > 1
    if not in_cluster or arrangement.accumulators <= most:
        return None
    return (
        f"CTA {cta}: stream-K in clusters lacks registers beside {arrangement.accumulators} accumulators "
        "(ptxas spills in some modes)"
    )


def _lacks_registers_for_tile(config: KernelConfig, arrangement: Arrangement) -> str | None:
    """Return why a tile lacks registers, above all one that is no power of two of tokens, or None (nvcc 13.0, 13.5)."""
    cta, splits = config.cta, config.cluster.k
    if arrangement.along_k > 1 and splits > 1 and arrangement.accumulators == MAX_ACCUMULATORS:
        return (
            f"CTA {cta}: a thread lacks registers to reduce {MAX_ACCUMULATORS} accumulators among warpgroups and then "
            "among CTAs (ptxas spills)"
        )
    if cta.tokens in CTA_TOKENS:
        return None
    four = config.schedule is Schedule.FOUR_WARPGROUPS
    if four and cta.k < PACKED_BLOCK_K and arrangement.accumulators >= MIN_SPILLING_ACCUMULATORS_OF_FOUR:
        return f"CTA {cta}: four warpgroups lack registers for {cta.tokens} tokens and k {cta.k} (ptxas spills)"
    two_fragments = cta.channels > arrangement.along_channels * WARPGROUP_CHANNELS
    most = MAX_REDUCED_ACCUMULATORS[splits]
    if cta.channels > WARPGROUP_CHANNELS and cta.tokens % LEAN_TOKENS != 0:
        most = min(most, MAX_REDUCED_ACCUMULATORS_OF_OTHER_TILES)
    elif splits == max(CLUSTER_K) and not two_fragments:
        most = MAX_ACCUMULATORS
    if splits > 1 and arrangement.accumulators > most:
        return (
            f"CTA {cta}: a thread lacks registers to reduce {arrangement.accumulators} accumulators among {splits} "
            "CTAs (ptxas spills in some modes)"
        )
    return None


def _forbidden_accumulators(config: KernelConfig, warpgroups: int, limit: int) -> str | None:
    """Return why the accumulators of warpgroups that divide the channels exceed a thread's registers, or None."""
    accumulators = config.cta.channels * config.cta.tokens // (WARPGROUP_THREADS * warpgroups)
    if accumulators <= limit:
        return None
    return (
        f"CTA {config.cta.channels}x{config.cta.tokens} needs {accumulators} accumulators per thread with schedule "
        f"{config.schedule}; {limit} fit into registers"
    )
