"""Which kernels exist: the candidate axes, the one rule of legality, and the named subsets."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.arrangement import WARPGROUP_CHANNELS
from w4a16gen.kernels.config import ClusterShape, CtaShape, KernelConfig, QuantMode, Schedule, Scheduler, Target
from w4a16gen.kernels.legality import (
    CLUSTER_CHANNELS,
    CLUSTER_K,
    CLUSTER_TOKENS,
    CTA_CHANNELS,
    CTA_K,
    CTA_TOKENS,
    why_forbidden,
)


class ReasonKind(Enum):
    """Why a configuration is not in a space."""

    FORBIDDEN = "forbidden"
    """The hardware or CUTLASS cannot build or run it."""
    LEFT_OUT = "left out"
    """It would work; the space leaves it out."""


@dataclass(frozen=True, order=True)
class Reason:
    """Why a configuration is not in a space, as a sentence for people and a kind for programs."""

    kind: ReasonKind
    sentence: str

    def __str__(self) -> str:
        return f"{self.kind.value}: {self.sentence}"


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
        return "this space holds native kernels"
    if config.schedule is not Schedule.TWO_WARPGROUPS:
        return "TensorRT-LLM's kernels have two consumer warpgroups"
    if config.scheduler is not Scheduler.PERSISTENT:
        return "in this space every shape is persistent, as native kernels are by default"
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
"""A smallest set of which one is within 3 % of the fastest native kernel in each of 60 cells: five layer shapes, 1 to
8,192 tokens, mode fgs, group 128; up to 256 tokens 375 kernels were timed, beyond that 26 of large tiles (NVIDIA H100
80GB HBM3, 2026-11; `w4a16gen bench --smallest-set 3` finds such sets). Since then its kernels of 64 channels with 8 and
16 tokens were timed beside those of eight warps in 272 problems of 57 layers, up to 64 tokens: it was up to 21 % slower
(9216x3072, one token) than the fastest of both, and with those of eight warps is within 2.8 %, also without 64x8x128
with four warpgroups, which so had to go. Of 256x8x128, with two and with four warpgroups as fast, it holds the one
whose chains of dependent launches are not slower than its single ones (28672x4096, one token: with two 26.4 us, with
four 21.9)."""


def _not_in_default(config: KernelConfig) -> str | None:
    """Say why the default set leaves the configuration out, or None if it holds it."""
    if config.target is not Target.NATIVE:
        return "the default set holds native kernels, which are faster and compile in a second"
    shape = (str(config.cta), str(config.cluster), config.schedule)
    chosen = _DEFAULT_SHAPES if config.scheduler is Scheduler.PERSISTENT else (_DEFAULT_STREAM_K,)
    if shape not in chosen:
        return "the default set keeps the fewest native kernels that stay near the fastest for every problem"
    return None


SPACES: dict[str, Callable[[KernelConfig], str | None]] = {
    "default": _not_in_default,
    "trtllm": _not_in_trtllm,
    "trtllm-native": _not_in_trtllm_native,
    "native": lambda config: None if config.target is Target.NATIVE else "this space holds native kernels",
    "all": lambda _: None,
}
"""Named spaces: each says why it leaves a legal configuration out, or None where it holds it."""


def why_not(config: KernelConfig, space: str = "all") -> Reason | None:
    """Say why a configuration is not in a space; None means that it is. The only statement of what is legal.

    Raises:
        InvalidValueError: if there is no space of that name.
    """
    if space not in SPACES:
        raise InvalidValueError(f"space {space!r} is not one of {', '.join(SPACES)}")
    sentence = why_forbidden(config)
    if sentence is not None:
        return Reason(ReasonKind.FORBIDDEN, sentence)
    sentence = SPACES[space](config)
    return None if sentence is None else Reason(ReasonKind.LEFT_OUT, sentence)


def candidates() -> Iterator[KernelConfig]:
    """Give the whole grid of axes, legal or not, in listing order."""
    for target, mode, *cta, channels, tokens, k, schedule, scheduler in itertools.product(
        Target,
        QuantMode,
        CTA_CHANNELS,
        CTA_TOKENS,
        CTA_K,
        CLUSTER_CHANNELS,
        CLUSTER_TOKENS,
        CLUSTER_K,
        Schedule,
        Scheduler,
    ):
        yield KernelConfig(target, mode, CtaShape(*cta), ClusterShape(channels, tokens, k), schedule, scheduler)


def enumerate_space(space: str) -> list[KernelConfig]:
    """Give the configurations of a named space, sorted.

    Raises:
        InvalidValueError: if there is no space of that name.
    """
    return [config for config in candidates() if why_not(config, space) is None]


@dataclass(frozen=True)
class Filter:
    """Which configurations of a space are meant; an empty axis means all of it."""

    ctas: Sequence[CtaShape] = ()
    clusters: Sequence[ClusterShape] = ()
    modes: Sequence[QuantMode] = ()
    targets: Sequence[Target] = ()

    def matches(self, config: KernelConfig) -> bool:
        """Whether the configuration lies on every named axis value."""
        return (
            (not self.ctas or config.cta in self.ctas)
            and (not self.clusters or config.cluster in self.clusters)
            and (not self.modes or config.mode in self.modes)
            and (not self.targets or config.target in self.targets)
        )

    def select(self, configs: Iterable[KernelConfig]) -> list[KernelConfig]:
        """Give the matching configurations, in the order given."""
        return [config for config in configs if self.matches(config)]


def select(space: str, wanted: Filter) -> list[KernelConfig]:
    """Give the configurations of a space that a filter names.

    Raises:
        InvalidValueError: if nothing matches; the text says why the shapes asked for are not there.
    """
    found = wanted.select(enumerate_space(space))
    if found:
        return found
    raise InvalidValueError(f"no kernel of space {space!r} matches: {_explain_nothing(space, wanted)}")


def _explain_nothing(space: str, wanted: Filter) -> str:
    """Say why a filter selects nothing of a space: the reasons that stand in the way, and the way out."""
    # Schedules that a target has nowhere would only add sentences that are beside the point.
    families = sorted({(config.target, config.schedule, config.scheduler) for config in enumerate_space("all")})
    asked = [
        KernelConfig(target, mode, cta, cluster, schedule, scheduler)
        for (target, schedule, scheduler), mode, cta, cluster in itertools.product(
            [family for family in families if not wanted.targets or family[0] in wanted.targets],
            wanted.modes or QuantMode,
            wanted.ctas or sorted({config.cta for config in candidates()}),
            wanted.clusters or sorted({config.cluster for config in candidates()}),
        )
    ]
    if any(why_not(config) is None for config in asked):
        reasons = [reason for config in asked if (reason := why_not(config, space))]
        left_out = sorted({reason.sentence for reason in reasons if reason.kind is ReasonKind.LEFT_OUT})
        return f"{left_out[0]}; it is legal, so `--space all` has it"
    sentences = Counter(f"{config.target}: {reason.sentence}" for config in asked if (reason := why_not(config)))
    return "; ".join(sentence for sentence, _ in sentences.most_common(4))
