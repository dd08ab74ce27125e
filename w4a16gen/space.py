"""Which kernels exist: the candidate axes, the one rule of legality, and the named subsets."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from w4a16gen.config import ClusterShape, CtaShape, KernelConfig, QuantMode, Schedule, Scheduler, Target
from w4a16gen.errors import InvalidValueError

CTA_CHANNELS = (64, 128, 256)
CTA_TOKENS = (8, 16, 32, 64, 128, 256)
CTA_K = (32, 64, 128)
CLUSTER_CHANNELS = (1, 2, 4)
CLUSTER_TOKENS = (1, 2, 4)
CLUSTER_K = (1, 2)

WARPGROUP_CHANNELS = 64
"""Rows of one WGMMA instruction (m64nNk16), so channels that one consumer warpgroup computes at a time."""
CONSUMER_WARPGROUPS = 2
"""Consumer warpgroups per CTA in both of CUTLASS's schedules."""
MAX_ACCUMULATORS = 128
"""fp32 accumulators per thread. The next size, 256, exceeds the 255 registers that a thread can address: CUTLASS
compiles 256x256 and pingpong 128x256 with more than 9 KB of spills a thread (nvcc 13.0)."""
MAX_PORTABLE_CLUSTER = 8
"""CTAs per cluster that every GPU of compute capability 9.0 launches (CUDA programming guide, clusters)."""


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


def _forbidden(config: KernelConfig) -> str | None:
    """Say why the hardware or CUTLASS forbids the configuration, or None if it is legal."""
    cta, cluster = config.cta, config.cluster
    for name, value, allowed in (
        ("channels", cta.channels, CTA_CHANNELS),
        ("tokens", cta.tokens, CTA_TOKENS),
        ("k", cta.k, CTA_K),
    ):
        if value not in allowed:
            return f"CTA {name} of {value} is not one of {', '.join(map(str, allowed))}"
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
    for name, value, allowed in (
        ("channels", cluster.channels, CLUSTER_CHANNELS),
        ("tokens", cluster.tokens, CLUSTER_TOKENS),
    ):
        if value not in allowed:
            return f"cluster {name} of {value} is not one of {', '.join(map(str, allowed))}"
    return _forbidden_schedule(config)


def _forbidden_schedule(config: KernelConfig) -> str | None:
    """Say why the schedule cannot run this CTA shape, or None."""
    cta = config.cta
    cooperative = config.schedule is Schedule.COOPERATIVE
    if cooperative and cta.channels < CONSUMER_WARPGROUPS * WARPGROUP_CHANNELS:
        return (
            f"CTA channels of {cta.channels}: the cooperative schedule gives each of its {CONSUMER_WARPGROUPS} "
            f"warpgroups {WARPGROUP_CHANNELS} channels or more"
        )
    if not cooperative and config.scheduler is Scheduler.STREAM_K:
        return "CUTLASS's pingpong schedule has no stream-K"
    threads = 128 * (CONSUMER_WARPGROUPS if cooperative else 1)
    accumulators = cta.channels * cta.tokens // threads
    if accumulators > MAX_ACCUMULATORS:
        return (
            f"CTA {cta.channels}x{cta.tokens} needs {accumulators} accumulators per thread in the {config.schedule} "
            f"schedule; {MAX_ACCUMULATORS} fit into registers"
        )
    return None


def _not_in_trtllm(config: KernelConfig) -> str | None:
    """Say why TensorRT-LLM's generator does not enumerate the configuration, or None if it does."""
    cta, cluster = config.cta, config.cluster
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


_DEFAULT_SHAPES = frozenset(
    {
        ("64x16x64", "1x1x1"),
        ("64x32x64", "1x1x1"),
        ("128x16x64", "1x1x1"),
        ("128x32x64", "1x1x1"),
        ("128x64x64", "1x1x1"),
        ("128x128x64", "1x1x1"),
        ("128x128x64", "2x1x1"),
        ("128x256x64", "2x1x1"),
    }
)


def _not_in_default(config: KernelConfig) -> str | None:
    """Say why the default set leaves the configuration out, or None if it holds it."""
    reason = _not_in_trtllm(config)
    if reason is None and (str(config.cta), str(config.cluster)) not in _DEFAULT_SHAPES:
        return "the default set keeps one or two kernels per token count, to build in minutes"
    return reason and "the default set draws on TensorRT-LLM's shapes, to build in minutes"


SPACES: dict[str, Callable[[KernelConfig], str | None]] = {
    "default": _not_in_default,
    "trtllm": _not_in_trtllm,
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
    sentence = _forbidden(config)
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
    asked = [
        KernelConfig(target, mode, cta, cluster, schedule, scheduler)
        for target, mode, cta, cluster, schedule, scheduler in itertools.product(
            wanted.targets or Target,
            wanted.modes or QuantMode,
            wanted.ctas or sorted({config.cta for config in candidates()}),
            wanted.clusters or sorted({config.cluster for config in candidates()}),
            Schedule,
            Scheduler,
        )
    ]
    if any(why_not(config) is None for config in asked):
        reasons = [reason for config in asked if (reason := why_not(config, space))]
        left_out = sorted({reason.sentence for reason in reasons if reason.kind is ReasonKind.LEFT_OUT})
        return f"{left_out[0]}; it is legal, so `--space all` has it"
    sentences = sorted({reason.sentence for config in asked if (reason := why_not(config))})
    return "; ".join(sentences[:3])
