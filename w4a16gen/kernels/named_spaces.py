"""The named spaces: what each contains, and why it leaves out the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from w4a16gen.kernels.arrangement import WARPGROUP_CHANNELS
from w4a16gen.kernels.config import KernelConfig, Schedule, Scheduler, Target
from w4a16gen.kernels.legality import why_forbidden


def _not_in_trtllm(config: KernelConfig) -> str | None:
    """Say why TensorRT-LLM's generator does not enumerate the configuration, or None if it does."""
    cta, cluster = config.cta, config.cluster
    if config.target is not Target.CUTLASS:
        return "TensorRT-LLM's generator enumerates CUTLASS kernels only"
    if cta.k != 64 or cta.channels > 128:  # noqa: PLR2004
        return "TensorRT-LLM has CTA channels of 64 and 128 and CTA k of 64 only"
    if max(cluster.channels, cluster.tokens) > 2:  # noqa: PLR2004
        return "TensorRT-LLM has clusters of 1 or 2 along an axis only"
    if cluster.channels == 2 and cta.channels < 128:  # noqa: PLR2004
        return "TensorRT-LLM clusters along channels only with 128 channels"
    if cluster.tokens == 2 and cta.tokens < 128:  # noqa: PLR2004
        return "TensorRT-LLM clusters along tokens only from 128 tokens on"
    expected = (
        (Schedule.PINGPONG, Scheduler.PERSISTENT)
        if cta.channels == WARPGROUP_CHANNELS
        else (Schedule.COOPERATIVE, Scheduler.STREAM_K)
    )
    if (config.schedule, config.scheduler) != expected:
        return "TensorRT-LLM runs 64 channels pingpong and persistent, 128 channels cooperative and stream-K"
    return None


def _not_in_trtllm_native(config: KernelConfig) -> str | None:
    """Say why a configuration is not one of TensorRT-LLM's shapes as a native kernel, or None if it is."""
    if config.target is not Target.NATIVE:
        return "this space contains native kernels only"
    if config.schedule is not Schedule.TWO_WARPGROUPS:
        return "TensorRT-LLM's kernels have two consumer warpgroups"
    if config.scheduler is not Scheduler.PERSISTENT:
        return "this space contains persistent kernels only"
    narrow = config.cta.channels == WARPGROUP_CHANNELS
    counterpart = replace(
        config,
        target=Target.CUTLASS,
        schedule=Schedule.PINGPONG if narrow else Schedule.COOPERATIVE,
        scheduler=Scheduler.PERSISTENT if narrow else Scheduler.STREAM_K,
    )
    return why_forbidden(counterpart) or _not_in_trtllm(counterpart)


_DEFAULT_SHAPES = frozenset(
    {
        "cta64x8x128_cluster1x1x1_warpgroups4_persistent",
        "cta64x8x128_cluster1x1x1_warps8_persistent",
        "cta64x8x128_cluster1x1x1_warps8_streamk",
        "cta64x8x128_cluster1x1x2_warpgroups4_persistent",
        "cta64x8x128_cluster1x1x2_warps8_persistent",
        "cta64x8x128_cluster1x1x4_warps8_persistent",
        "cta64x16x128_cluster1x1x1_warpgroups4_persistent",
        "cta64x16x128_cluster1x1x1_warps8_persistent",
        "cta64x16x128_cluster1x1x2_warpgroups4_persistent",
        "cta64x16x128_cluster1x1x2_warps8_persistent",
        "cta64x16x128_cluster1x1x4_warps8_persistent",
        "cta64x24x128_cluster1x1x2_warpgroups4_persistent",
        "cta64x24x128_cluster1x1x4_warpgroups4_persistent",
        "cta64x32x128_cluster1x1x1_warpgroups4_persistent",
        "cta64x32x128_cluster1x1x2_warpgroups2_persistent",
        "cta64x32x128_cluster1x1x4_warpgroups2_persistent",
        "cta64x40x128_cluster1x1x1_warpgroups2_persistent",
        "cta64x40x128_cluster1x1x2_warpgroups2_persistent",
        "cta64x48x128_cluster1x1x1_warpgroups2_persistent",
        "cta64x48x128_cluster1x1x2_warpgroups2_persistent",
        "cta64x48x128_cluster1x1x4_warpgroups2_persistent",
        "cta64x56x128_cluster1x1x1_warpgroups2_persistent",
        "cta64x64x128_cluster1x1x1_warpgroups2_persistent",
        "cta64x64x128_cluster1x1x2_warpgroups2_persistent",
        "cta64x64x128_cluster1x1x4_warpgroups2_persistent",
        "cta64x80x128_cluster1x1x1_warpgroups2_persistent",
        "cta64x80x128_cluster1x1x2_warpgroups2_persistent",
        "cta64x88x128_cluster1x1x1_warpgroups2_persistent",
        "cta64x96x128_cluster1x1x1_warpgroups2_persistent",
        "cta64x96x128_cluster1x1x2_warpgroups2_persistent",
        "cta64x112x128_cluster1x1x1_warpgroups2_persistent",
        "cta64x128x64_cluster1x1x2_warpgroups2_persistent",
        "cta64x160x64_cluster1x1x1_warpgroups2_persistent",
        "cta128x8x128_cluster1x1x1_warpgroups4_persistent",
        "cta128x8x128_cluster1x1x2_warpgroups4_persistent",
        "cta128x16x128_cluster1x1x1_warpgroups4_persistent",
        "cta128x32x128_cluster1x1x1_warpgroups4_persistent",
        "cta128x40x128_cluster1x1x1_warpgroups2_streamk",
        "cta128x48x128_cluster1x1x1_warpgroups4_persistent",
        "cta128x64x128_cluster1x1x1_warpgroups2_persistent",
        "cta128x64x128_cluster1x1x1_warpgroups2_streamk",
        "cta128x72x128_cluster1x1x1_warpgroups2_persistent",
        "cta128x80x128_cluster2x1x1_warpgroups2_streamk",
        "cta128x88x128_cluster1x1x1_warpgroups2_persistent",
        "cta128x96x128_cluster1x1x1_warpgroups2_persistent",
        "cta128x96x128_cluster2x1x1_warpgroups2_streamk",
        "cta128x104x128_cluster1x1x1_warpgroups2_persistent",
        "cta128x104x128_cluster2x1x1_warpgroups2_streamk",
        "cta128x112x128_cluster1x1x1_warpgroups2_persistent",
        "cta128x112x128_cluster2x1x1_warpgroups2_streamk",
        "cta128x120x128_cluster1x1x1_warpgroups2_persistent",
        "cta128x120x128_cluster2x1x1_warpgroups2_streamk",
        "cta128x128x64_cluster1x1x1_warpgroups2_persistent",
        "cta128x128x64_cluster1x1x2_warpgroups2_persistent",
        "cta128x128x64_cluster2x1x1_warpgroups2_streamk",
        "cta128x136x64_cluster1x1x1_warpgroups2_persistent",
        "cta128x136x64_cluster2x1x1_warpgroups2_streamk",
        "cta128x144x64_cluster1x1x1_warpgroups2_persistent",
        "cta128x144x64_cluster2x1x1_warpgroups2_streamk",
        "cta128x152x64_cluster1x1x1_warpgroups2_persistent",
        "cta128x160x64_cluster1x1x1_warpgroups2_persistent",
        "cta128x160x64_cluster2x1x1_warpgroups2_streamk",
        "cta128x168x64_cluster2x1x1_warpgroups2_persistent",
        "cta128x176x64_cluster2x1x1_warpgroups2_persistent",
        "cta128x184x64_cluster1x1x1_warpgroups2_persistent",
        "cta128x192x64_cluster1x1x1_warpgroups2_persistent",
        "cta128x192x64_cluster1x1x1_warpgroups2_streamk",
        "cta128x200x64_cluster1x1x1_warpgroups2_persistent",
        "cta256x8x128_cluster1x1x1_warpgroups4_persistent",
        "cta256x24x128_cluster1x1x1_warpgroups4_streamk",
        "cta256x40x128_cluster1x1x1_warpgroups2_streamk",
        "cta256x56x128_cluster1x1x1_warpgroups2_streamk",
        "cta256x64x128_cluster1x1x1_warpgroups2_persistent",
        "cta256x64x128_cluster1x1x1_warpgroups2_streamk",
        "cta256x72x128_cluster1x1x1_warpgroups2_persistent",
        "cta256x112x64_cluster1x1x1_warpgroups2_persistent",
        "cta256x120x64_cluster2x1x1_warpgroups2_persistent",
        "cta256x128x64_cluster1x1x1_warpgroups2_persistent",
        "cta256x128x64_cluster2x1x1_warpgroups2_persistent",
    }
)
"""The kernels of space `default`, by `KernelConfig.shape_name`: a set that loses little to the kernels that H200s timed
on some 1,400 problems, a third of them with the token counts of CUDA graphs (2026-11). Estimates for 1,400 problems of
an H100 and an H200 count too. Kernels of up to 16 tokens are there for chains of dependent launches, the largest tile
for problems that power limits, and three more for layers of the first set."""


def _not_in_default(config: KernelConfig) -> str | None:
    """Say why the default space leaves the configuration out, or None if it contains it."""
    if config.target is not Target.NATIVE:
        return "the default space contains native kernels only: they are faster and compile in a second"
    if config.shape_name not in _DEFAULT_SHAPES:
        return "the default space contains a few native kernels that lose little to the others"
    return None


_EXPERT_SHAPES = frozenset(
    {
        "cta64x8x128_cluster1x1x1_warps8_grouped",
        "cta64x8x128_cluster1x1x2_warps8_grouped",
        "cta128x8x128_cluster1x1x1_warps8_grouped",
        "cta128x16x128_cluster1x1x1_warpgroups2_grouped",
        "cta128x16x128_cluster1x1x1_warpgroups4_grouped",
        "cta128x24x128_cluster1x1x1_warpgroups4_grouped",
        "cta128x48x128_cluster1x1x1_warpgroups4_grouped",
        "cta128x88x128_cluster2x1x1_warpgroups2_grouped",
        "cta128x120x64_cluster1x1x1_warpgroups2_grouped",
        "cta128x136x64_cluster2x1x1_warpgroups2_grouped",
        "cta128x144x128_cluster2x1x1_warpgroups2_grouped",
        "cta128x152x128_cluster2x1x1_warpgroups2_grouped",
        "cta256x8x128_cluster1x1x1_warps8_grouped",
        "cta256x16x128_cluster1x1x1_warpgroups4_grouped",
        "cta256x24x128_cluster1x1x1_warpgroups4_grouped",
        "cta256x32x128_cluster1x1x1_warpgroups4_grouped",
        "cta256x48x128_cluster1x1x1_warpgroups2_grouped",
        "cta256x56x128_cluster1x1x1_warpgroups2_grouped",
        "cta256x64x128_cluster1x1x1_warpgroups2_grouped",
        "cta256x80x128_cluster2x1x1_warpgroups2_grouped",
        "cta256x88x128_cluster1x1x1_warpgroups2_grouped",
        "cta256x104x64_cluster2x1x1_warpgroups2_grouped",
        "cta256x112x64_cluster1x1x1_warpgroups2_grouped",
        "cta256x120x64_cluster2x1x1_warpgroups2_grouped",
    }
)
"""The kernels of space `experts`, by `KernelConfig.shape_name`: the set of this size that loses least to all
grouped kernels, by estimates of 588 layers. The layers are of twelve models with 1 to 8,192 tokens, on an H100 and an
H200. The four kernels of 8 tokens and the one of 80 were chosen by times of layers of Qwen3-30B-A3B and Mixtral-8x7B
(H200, 2026-11)."""


def _not_in_experts(config: KernelConfig) -> str | None:
    """Say why space `experts` leaves a grouped kernel out, or None if it contains it."""
    if config.shape_name not in _EXPERT_SHAPES:
        return "space experts contains a few tiles for each number of rows that an expert may have"
    return None


@dataclass(frozen=True)
class Space:
    """A named set of legal kernels."""

    summary: str
    """One phrase for help texts."""
    targets: tuple[Target, ...]
    """The kernel families that it takes kernels from."""
    why_left_out: Callable[[KernelConfig], str | None]
    """Says why it leaves out a legal configuration, or None if it contains it."""
    is_grouped: bool = False
    """Whether its kernels compute the products of several experts instead of one product."""


SPACES: Mapping[str, Space] = {
    "default": Space("the small set for production", (Target.NATIVE,), _not_in_default),
    "trtllm-native": Space("TensorRT-LLM's 63 shapes as native kernels", (Target.NATIVE,), _not_in_trtllm_native),
    "trtllm": Space("TensorRT-LLM's own 63 CUTLASS kernels", (Target.CUTLASS,), _not_in_trtllm),
    "native": Space(
        "every legal native kernel",
        (Target.NATIVE,),
        lambda config: None if config.target is Target.NATIVE else "this space contains native kernels only",
    ),
    "all": Space("every legal kernel of one product", tuple(Target), lambda _: None),
    "experts": Space("grouped kernels, for mixtures of experts", (Target.NATIVE,), _not_in_experts, is_grouped=True),
}
"""The named spaces, in the order in which filters without `--space` look for kernels."""
GEMM_SPACES = tuple(name for name, space in SPACES.items() if not space.is_grouped)
"""The spaces of kernels that `gemm` calls."""
