"""What is legal: the axes, and the one rule that says what the hardware and each target's implementation can be."""

from __future__ import annotations

from w4a16gen.kernels.arrangement import NATIVE_WARPGROUPS, WARPGROUP_CHANNELS, NativeArrangement, native_arrangement
from w4a16gen.kernels.config import KernelConfig, Schedule, Scheduler, Target

CTA_CHANNELS = (64, 128, 256)
CTA_TOKENS = (8, 16, 32, 64, 128, 256)
CTA_K = (32, 64, 128)
CLUSTER_CHANNELS = (1, 2, 4)
CLUSTER_TOKENS = (1, 2, 4)
CLUSTER_K = (1, 2, 4)
CONSUMER_WARPGROUPS = 2
"""Consumer warpgroups per CTA in both of CUTLASS's schedules."""
MAX_ACCUMULATORS = 128
"""fp32 accumulators per thread. The next size, 256, exceeds the 255 registers that a thread can address: CUTLASS
compiles 256x256 and pingpong 128x256 with more than 9 KB of spills a thread (nvcc 13.0)."""
NATIVE_K = (64, 128)
"""k of a native kernel's stage: a packed block, or half of it."""
MAX_NATIVE_ACCUMULATORS = {
    Schedule.TWO_WARPGROUPS: MAX_ACCUMULATORS,
    Schedule.FOUR_WARPGROUPS: 32,
    Schedule.EIGHT_WARPS: 8,
}
"""fp32 accumulators per thread. Four consumer warpgroups and a producer leave a thread 104 registers, of which the
fragments of weights take 32 (compiled: with 64 accumulators ptxas serialises WGMMAs, C7512). Eight warps that multiply
by themselves have four of each, and half of an SM's registers."""
MAX_NATIVE_SHARERS = 2
"""CTAs of a cluster that share one operand of a native kernel."""
MAX_PORTABLE_CLUSTER = 8
"""CTAs per cluster that every GPU of compute capability 9.0 launches (CUDA programming guide, clusters)."""


def why_forbidden(config: KernelConfig) -> str | None:
    """Say why the hardware or the target's implementation forbids the configuration, or None if it is legal."""
    for shape, name, value, allowed in (
        ("CTA", "channels", config.cta.channels, CTA_CHANNELS),
        ("CTA", "tokens", config.cta.tokens, CTA_TOKENS),
        ("CTA", "k", config.cta.k, CTA_K),
        ("cluster", "channels", config.cluster.channels, CLUSTER_CHANNELS),
        ("cluster", "tokens", config.cluster.tokens, CLUSTER_TOKENS),
        ("cluster", "k", config.cluster.k, CLUSTER_K),
    ):
        if value not in allowed:
            return f"{shape} {name} of {value} is not one of {', '.join(map(str, allowed))}"
    return _forbidden_cutlass(config) if config.target is Target.CUTLASS else _forbidden_native(config)


def _forbidden_cutlass(config: KernelConfig) -> str | None:
    """Say why CUTLASS's collective cannot be this kernel, or None."""
    cta, cluster = config.cta, config.cluster
    if config.schedule in NATIVE_WARPGROUPS:
        return "CUTLASS's mixed-input kernels are pingpong or cooperative, persistent or stream-K"
    if cta.tokens < 16:  # noqa: PLR2004  (compiled: "Shape Divisibility Condition" in the epilogue's tiler)
        return f"CTA tokens of {cta.tokens}: CUTLASS's SM90 epilogue does not compile below 16"
    if cta.k < 64:  # noqa: PLR2004  (compiled: "Consider increasing TileShapeK")
        return f"CTA k of {cta.k}: CUTLASS's mixed-input main loop needs at least four k16 steps, so 64"
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
            f"warpgroups {WARPGROUP_CHANNELS} channels or more"
        )
    if not cooperative and config.scheduler is Scheduler.STREAM_K:
        return "CUTLASS's pingpong schedule has no stream-K"
    return _forbidden_accumulators(config, CONSUMER_WARPGROUPS if cooperative else 1, MAX_ACCUMULATORS)


def _forbidden_native(config: KernelConfig) -> str | None:
    """Say why the native kernel cannot be this kernel, or None."""
    cta, cluster = config.cta, config.cluster
    if config.schedule not in NATIVE_WARPGROUPS:
        return "native kernels have the schedules warpgroups2, warpgroups4 and warps8"
    if config.scheduler is Scheduler.STREAM_K and (cluster.channels, cluster.tokens, cluster.k) != (1, 1, 1):
        return f"cluster {cluster}: stream-K, which divides K among CTAs, has no clusters in native kernels"
    if cta.k not in (NATIVE_K[-1:] if config.schedule is Schedule.EIGHT_WARPS else NATIVE_K):
        return f"CTA k of {cta.k}: a native kernel's stage is a packed block's 128 k, or half but of eight warps"
    if max(cluster.channels, cluster.tokens) > MAX_NATIVE_SHARERS:
        return f"cluster {cluster}: native kernels share an operand between {MAX_NATIVE_SHARERS} CTAs at most"
    if cluster.k > 1 and cluster.channels * cluster.tokens > 1:
        return f"cluster {cluster}: the CTAs of a native kernel's cluster share operands or divide K, not both"
    arrangement = native_arrangement(config)
    reason = _lacks_registers(config, arrangement)
    if reason is not None:
        return reason
    reason = _forbidden_accumulators(config, arrangement.along_channels, MAX_NATIVE_ACCUMULATORS[config.schedule])
    if reason is None and arrangement.stages < 2 * arrangement.along_k:
        return (
            f"{arrangement.stages} stages fit the shared memory beside the partial sums; warpgroups that divide K in "
            f"{arrangement.along_k} need two each"
        )
    return reason


def _lacks_registers(config: KernelConfig, arrangement: NativeArrangement) -> str | None:
    """Say why a native kernel's registers do not suffice beside its accumulators, as compiling showed (nvcc 13.0)."""
    cta = config.cta
    if config.schedule is Schedule.EIGHT_WARPS and cta.channels == 256 and config.cluster.k == 4:  # noqa: PLR2004
        return f"CTA {cta}: eight warps lack registers to exchange sums of 256 channels among 4 CTAs (compiled: spills)"
    four = config.schedule is Schedule.FOUR_WARPGROUPS
    if four and cta.k == 64 and cta.tokens == 64:  # noqa: PLR2004
        if arrangement.along_k > 1:
            return f"CTA {cta}: four warpgroups that divide K lack registers for 64 tokens (compiled: C7512)"
        if config.cluster.k == 4:  # noqa: PLR2004
            return f"CTA {cta}: four warpgroups lack registers to exchange sums among 4 CTAs (compiled: spills)"
    stream_k = config.scheduler is Scheduler.STREAM_K
    if stream_k and arrangement.sums == MAX_ACCUMULATORS and arrangement.along_k > 1:
        return f"CTA {cta}: stream-K and warpgroups that divide K lack registers beside 128 sums (compiled: spills)"
    if stream_k and four and cta.k == 64 and cta.tokens == 32 and arrangement.along_k > 1:  # noqa: PLR2004
        return f"CTA {cta}: stream-K and four warpgroups that divide K lack registers for 64 of k (compiled: spills)"
    return None


def _forbidden_accumulators(config: KernelConfig, warpgroups: int, limit: int) -> str | None:
    """Say whether the accumulators of warpgroups that divide the channels exceed a thread's registers."""
    accumulators = config.cta.channels * config.cta.tokens // (128 * warpgroups)
    if accumulators <= limit:
        return None
    return (
        f"CTA {config.cta.channels}x{config.cta.tokens} needs {accumulators} accumulators per thread in the "
        f"{config.schedule} schedule; {limit} fit into registers"
    )
