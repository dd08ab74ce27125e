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


_FOUR, _TWO, _EIGHT_WARPS = Schedule.FOUR_WARPGROUPS, Schedule.TWO_WARPGROUPS, Schedule.EIGHT_WARPS
_DEFAULT_SHAPES = frozenset(
    {
        *((f"64x{tokens}x128", cluster, _EIGHT_WARPS) for tokens in (8, 16) for cluster in ("1x1x1", "1x1x2")),
        *(("64x16x128", cluster, _FOUR) for cluster in ("1x1x1", "1x1x2")),
        *((f"64x{tokens}x128", cluster, _TWO) for tokens in (32, 64) for cluster in ("1x1x1", "1x1x2")),
        ("64x128x64", "1x1x2", _TWO),
        *(("128x128x64", cluster, _TWO) for cluster in ("1x1x2", "1x2x1")),
        ("256x8x128", "1x1x1", _FOUR),
        *((f"256x{tokens}x128", "1x1x1", _TWO) for tokens in (16, 32, 64)),
        *(("256x128x64", cluster, _TWO) for cluster in ("1x1x1", "2x1x1")),
    }
)
_DEFAULT_STREAM_K = ("256x64x128", "1x1x1", _TWO)
"""With `_DEFAULT_SHAPES`, a smallest set that keeps one kernel within 3 % of the fastest native kernel on each of 60
problems: five layer shapes, 1 to 8,192 tokens, mode fgs, group size 128 (H100 80GB HBM3, 2026-11). The command
`w4a16gen bench --smallest-set 3` finds such sets."""


def _not_in_default(config: KernelConfig) -> str | None:
    """Say why the default space leaves the configuration out, or None if it contains it."""
    if config.target is not Target.NATIVE:
        return "the default space contains native kernels only: they are faster and compile in a second"
    shape = (str(config.cta), str(config.cluster), config.schedule)
    chosen = _DEFAULT_SHAPES if config.scheduler is Scheduler.PERSISTENT else (_DEFAULT_STREAM_K,)
    if shape not in chosen:
        return "the default space contains the fewest native kernels that stay near the fastest for every problem"
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


SPACES: Mapping[str, Space] = {
    "default": Space("the small set for production", (Target.NATIVE,), _not_in_default),
    "trtllm-native": Space("TensorRT-LLM's 63 shapes as native kernels", (Target.NATIVE,), _not_in_trtllm_native),
    "trtllm": Space("TensorRT-LLM's own 63 CUTLASS kernels", (Target.CUTLASS,), _not_in_trtllm),
    "native": Space(
        "every legal native kernel",
        (Target.NATIVE,),
        lambda config: None if config.target is Target.NATIVE else "this space contains native kernels only",
    ),
    "all": Space("every legal kernel", tuple(Target), lambda _: None),
}
"""The named spaces, in the order in which filters without `--space` look for kernels."""
