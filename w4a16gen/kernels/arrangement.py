"""How a native kernel uses an SM: how its warpgroups divide a tile, its stages, registers and shared memory."""

from __future__ import annotations

from typing import NamedTuple

from w4a16gen.kernels.config import KernelConfig, Schedule

WARPGROUP_CHANNELS = 64
"""Rows of one WGMMA instruction (m64nNk16), so channels that one consumer warpgroup computes at a time."""
NATIVE_WARPGROUPS = {Schedule.TWO_WARPGROUPS: 2, Schedule.FOUR_WARPGROUPS: 4, Schedule.EIGHT_WARPS: 2}
"""Consumer warpgroups of a native kernel's CTA."""


class NativeArrangement(NamedTuple):
    """What follows from a native kernel's configuration."""

    along_channels: int
    """Consumer warpgroups that divide the channels."""
    along_k: int
    """Consumer warpgroups that divide K."""
    sums: int
    """fp32 sums of one thread."""
    ctas_per_sm: int
    """CTAs that share an SM: two if their registers allow it."""
    stages: int
    """Stages that fit into shared memory, a multiple of `along_k`."""


def native_arrangement(config: KernelConfig) -> NativeArrangement:
    """Give what follows from a native kernel's configuration; `Shape` in cuda/native/shape.h says why."""
    cta, cluster = config.cta, config.cluster
    warpgroups = NATIVE_WARPGROUPS[config.schedule]
    blocks = cta.channels // WARPGROUP_CHANNELS
    along_channels = min(blocks, warpgroups)
    along_k = warpgroups // along_channels
    sums = blocks // along_channels * cta.tokens // 2
    most_sharing = 4 if cluster.k == 4 and config.schedule is not Schedule.EIGHT_WARPS else 8  # noqa: PLR2004
    ctas_per_sm = 2 if warpgroups == 2 and sums <= most_sharing and cta.k == 128 else 1  # noqa: PLR2004
    header = 512 * (2 if config.mode.has_zeros else 1) if config.mode.is_grouped else 0
    weights = blocks * (header + cta.k * 32)
    phase = 64 if along_k == 2 and cta.tokens == 64 else min(cta.tokens, 32)  # noqa: PLR2004
    partials = (along_k - 1) * phase * cta.channels * 4
    received = 2 * (cluster.k - 1) * cta.tokens * (cta.channels // cluster.k) * 4
    boxes = along_k == 1 and cta.tokens >= max(64, 32 * cluster.k if cluster.k > 1 else 0)
    output = warpgroups * 8192 if boxes else 0
    budget = 233472 // 2 - 1024 if ctas_per_sm == 2 else 232448  # noqa: PLR2004
    fitting = min(32, (budget - 528 - partials - received - output) // (weights + cta.k * cta.tokens * 2))
    useful = max(100 * 1024 // weights, 2 * along_k)
    return NativeArrangement(along_channels, along_k, sums, ctas_per_sm, min(fitting, useful) // along_k * along_k)
