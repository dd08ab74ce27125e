"""Which kernels exist: the candidate axes, the one rule of legality, and the named subsets."""

from __future__ import annotations

import itertools
from collections import Counter
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
CLUSTER_K = (1, 2, 4)

WARPGROUP_CHANNELS = 64
"""Rows of one WGMMA instruction (m64nNk16), so channels that one consumer warpgroup computes at a time."""
CONSUMER_WARPGROUPS = 2
"""Consumer warpgroups per CTA in both of CUTLASS's schedules."""
MAX_ACCUMULATORS = 128
"""fp32 accumulators per thread. The next size, 256, exceeds the 255 registers that a thread can address: CUTLASS
compiles 256x256 and pingpong 128x256 with more than 9 KB of spills a thread (nvcc 13.0)."""
NATIVE_K = 128
"""k of one packed block, and so of one stage of a native kernel."""
NATIVE_SPLIT_TOKENS = 64
"""Most tokens of a CTA with four consumer warpgroups: 640 threads leave each 112 registers."""
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
    if config.schedule is Schedule.SPLIT_K or config.scheduler is Scheduler.SINGLE_TILE:
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
    return _forbidden_accumulators(config, CONSUMER_WARPGROUPS if cooperative else 1)


def _forbidden_native(config: KernelConfig) -> str | None:
    """Say why the native kernel cannot be this kernel, or None."""
    cta, cluster = config.cta, config.cluster
    pairs = ((Schedule.COOPERATIVE, Scheduler.PERSISTENT), (Schedule.SPLIT_K, Scheduler.SINGLE_TILE))
    if (config.schedule, config.scheduler) not in pairs:
        return "native kernels are cooperative and persistent, or split K and take a single tile"
    if cta.k != NATIVE_K:
        return f"CTA k of {cta.k}: a native kernel's stage is one packed block of {NATIVE_K} k"
    if (cluster.channels, cluster.tokens) != (1, 1):
        return f"cluster {cluster}: native kernels do not multicast, their clusters only divide K"
    if config.schedule is Schedule.COOPERATIVE:
        if cluster.k != 1:
            return f"cluster k of {cluster.k}: only native kernels that split K within the CTA divide it in a cluster"
        if cta.channels < CONSUMER_WARPGROUPS * WARPGROUP_CHANNELS:
            return f"CTA channels of {cta.channels}: two warpgroups or more need {WARPGROUP_CHANNELS} channels each"
    elif cta.channels > 2 * WARPGROUP_CHANNELS or cta.tokens > NATIVE_SPLIT_TOKENS:
        return (
            f"CTA {cta.channels}x{cta.tokens}: kernels that split K among four warpgroups hold at most "
            f"{2 * WARPGROUP_CHANNELS} channels and {NATIVE_SPLIT_TOKENS} tokens in registers"
        )
    return _forbidden_accumulators(config, native_warpgroups(config)[0])


def _forbidden_accumulators(config: KernelConfig, warpgroups: int) -> str | None:
    """Say whether the accumulators of warpgroups that divide the channels exceed a thread's registers."""
    accumulators = config.cta.channels * config.cta.tokens // (128 * warpgroups)
    if accumulators <= MAX_ACCUMULATORS:
        return None
    return (
        f"CTA {config.cta.channels}x{config.cta.tokens} needs {accumulators} accumulators per thread in the "
        f"{config.schedule} schedule; {MAX_ACCUMULATORS} fit into registers"
    )


def native_warpgroups(config: KernelConfig) -> tuple[int, int]:
    """Give a native kernel's consumer warpgroups along channels and along K.

    Four warpgroups hide the dequantisation of few tokens best, but leave each thread 112 registers; from 128 tokens on
    the accumulators need two warpgroups of 240.
    """
    along_channels = config.cta.channels // WARPGROUP_CHANNELS
    if config.schedule is Schedule.SPLIT_K:
        return along_channels, 4 // along_channels
    return (along_channels if config.cta.tokens <= NATIVE_SPLIT_TOKENS else CONSUMER_WARPGROUPS), 1


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


_DEFAULT_SHAPES = frozenset(
    {
        *((f"64x{tokens}x128", "1x1x2", Schedule.SPLIT_K) for tokens in (8, 16, 32, 64)),
        *((f"128x{tokens}x128", "1x1x2", Schedule.SPLIT_K) for tokens in (8, 16, 32, 64)),
        *((cta, "1x1x1", Schedule.SPLIT_K) for cta in ("64x64x128", "128x64x128")),
        *((cta, "1x1x1", Schedule.COOPERATIVE) for cta in ("128x128x128", "128x256x128")),
        *((f"256x{tokens}x128", "1x1x1", Schedule.COOPERATIVE) for tokens in (8, 16, 32, 64, 128)),
    }
)
"""The native kernels that were fastest in at least one cell of five layer shapes and 1 to 4096 tokens, mode fgs, group
128 (NVIDIA H200, 2026-11)."""


def _not_in_default(config: KernelConfig) -> str | None:
    """Say why the default set leaves the configuration out, or None if it holds it."""
    if config.target is not Target.NATIVE:
        return "the default set holds native kernels, which are faster and compile in a second"
    if (str(config.cta), str(config.cluster), config.schedule) not in _DEFAULT_SHAPES:
        return "the default set keeps the native kernels that were fastest for some problem"
    return None


SPACES: dict[str, Callable[[KernelConfig], str | None]] = {
    "default": _not_in_default,
    "trtllm": _not_in_trtllm,
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
