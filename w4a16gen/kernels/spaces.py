"""The kernels that exist: the grid of axes, the spaces enumerated, and the rule by which commands select kernels."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache
from typing import Any, NamedTuple

from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.arrangement import NATIVE_WARPGROUPS
from w4a16gen.kernels.config import (
    ClusterShape,
    CtaShape,
    Epilogue,
    KernelConfig,
    QuantMode,
    Schedule,
    Scheduler,
    Target,
)
from w4a16gen.kernels.legality import (
    CLUSTER_CHANNELS,
    CLUSTER_K,
    CLUSTER_TOKENS,
    CTA_CHANNELS,
    CTA_K,
    CTA_TOKENS,
    MAX_NATIVE_MULTICAST,
    NATIVE_CTA_TOKENS,
    NATIVE_K,
    why_forbidden,
)
from w4a16gen.kernels.named_spaces import SPACES, Space

__all__ = [
    "SPACES",
    "Filter",
    "Reason",
    "ReasonKind",
    "Selection",
    "candidates",
    "enumerate_space",
    "select",
    "select_kernels",
    "why_not",
]


class ReasonKind(Enum):
    """Why a configuration is not in a space."""

    FORBIDDEN = "forbidden"
    """The hardware or the target's implementation cannot build or run it."""
    LEFT_OUT = "left out"
    """It is legal, but the space does not contain it."""


@dataclass(frozen=True, order=True)
class Reason:
    """Why a configuration is not in a space: a kind for programs and a sentence for people."""

    kind: ReasonKind
    sentence: str

    def __str__(self) -> str:
        return f"{self.kind.value}: {self.sentence}"


def _space(name: str) -> Space:
    if name not in SPACES:
        raise InvalidValueError(f"space {name!r} is not one of {', '.join(SPACES)}")
    return SPACES[name]


def why_not(config: KernelConfig, space: str = "all") -> Reason | None:
    """Say why a configuration is not in a space; None means that it is.

    Raises:
        InvalidValueError: if there is no space of that name.
    """
    why_left_out = _space(space).why_left_out
    sentence = why_forbidden(config)
    if sentence is not None:
        return Reason(ReasonKind.FORBIDDEN, sentence)
    if config.is_grouped != SPACES[space].is_grouped:
        kind = "grouped kernels" if config.is_grouped else "kernels of one product"
        others = ", ".join(name for name in SPACES if SPACES[name].is_grouped == config.is_grouped)
        return Reason(ReasonKind.LEFT_OUT, f"{kind} are in other spaces: {others}")
    if config.epilogue is not Epilogue.NONE:
        return Reason(ReasonKind.LEFT_OUT, "spaces contain kernels without an epilogue: --epilogue adds one to them")
    sentence = why_left_out(config)
    return None if sentence is None else Reason(ReasonKind.LEFT_OUT, sentence)


class _Axes(NamedTuple):
    """The values that each axis of a kernel family takes."""

    ctas: Sequence[Sequence[int]]
    clusters: Sequence[Sequence[int]]
    schedules: Sequence[Schedule]


_SCHEDULERS = (Scheduler.PERSISTENT, Scheduler.STREAM_K)
"""Those of kernels that compute one product."""
_GRID_CLUSTERS = (CLUSTER_CHANNELS, CLUSTER_TOKENS, CLUSTER_K)
_GRIDS = {
    Target.CUTLASS: _Axes((CTA_CHANNELS, CTA_TOKENS, CTA_K), _GRID_CLUSTERS, (Schedule.PINGPONG, Schedule.COOPERATIVE)),
    Target.NATIVE: _Axes((CTA_CHANNELS, NATIVE_CTA_TOKENS, CTA_K), _GRID_CLUSTERS, tuple(NATIVE_WARPGROUPS)),
}
_SHARING = tuple(count for count in CLUSTER_CHANNELS if count <= MAX_NATIVE_MULTICAST)
_LEGAL_GRIDS = {
    Target.CUTLASS: _GRIDS[Target.CUTLASS],
    Target.NATIVE: _Axes(
        (CTA_CHANNELS, NATIVE_CTA_TOKENS, NATIVE_K), (_SHARING, _SHARING, CLUSTER_K), tuple(NATIVE_WARPGROUPS)
    ),
}
"""A smaller grid that contains every legal kernel of a family: enumeration need not walk the rest."""


def _walk(target: Target, axes: _Axes) -> Iterator[KernelConfig]:
    """Yield a grid in listing order."""
    ctas = [CtaShape(*shape) for shape in itertools.product(*axes.ctas)]
    clusters = [ClusterShape(*shape) for shape in itertools.product(*axes.clusters)]
    for rest in itertools.product(QuantMode, ctas, clusters, axes.schedules, _SCHEDULERS):
        yield KernelConfig(target, *rest)


def candidates() -> Iterator[KernelConfig]:
    """Yield the grid of kernels of one product, legal or not, in listing order; each family with its own schedules."""
    for target, axes in _GRIDS.items():
        yield from _walk(target, axes)


@cache
def _legal(target: Target) -> tuple[KernelConfig, ...]:
    return tuple(config for config in _walk(target, _LEGAL_GRIDS[target]) if why_forbidden(config) is None)


@cache
def _enumerate(name: str) -> tuple[KernelConfig, ...]:
    space = SPACES[name]
    if space.is_grouped:
        like = (replace(config, scheduler=Scheduler.GROUPED) for config in _legal(Target.NATIVE))
        return tuple(sorted({config for config in like if why_not(config, name) is None}))
    legal = itertools.chain.from_iterable(_legal(target) for target in Target if target in space.targets)
    return tuple(config for config in legal if space.why_left_out(config) is None)


def enumerate_space(space: str) -> list[KernelConfig]:
    """Return the configurations of a named space, sorted.

    Raises:
        InvalidValueError: if there is no space of that name.
    """
    _space(space)
    return list(_enumerate(space))


def with_epilogues(configs: Iterable[KernelConfig], epilogues: Sequence[Epilogue]) -> list[KernelConfig]:
    """Return kernels of a space with each of some epilogues, sorted, as far as these are legal.

    Args:
        configs: kernels without an epilogue.
        epilogues: the epilogues; an empty sequence returns the kernels as they are.
    """
    if not set(epilogues) - {Epilogue.NONE}:
        return sorted(configs)
    every = (replace(config, epilogue=epilogue) for config in configs for epilogue in set(epilogues))
    return sorted(config for config in every if why_forbidden(config) is None)


@dataclass(frozen=True)
class Filter:
    """The axis values that a command names; an empty axis means all of it. Of `epilogues`, it means none."""

    ctas: Sequence[CtaShape] = ()
    clusters: Sequence[ClusterShape] = ()
    modes: Sequence[QuantMode] = ()
    targets: Sequence[Target] = ()
    epilogues: Sequence[Epilogue] = ()

    @property
    def values(self) -> list[tuple[str, Any]]:
        """Every named value with the field of its axis."""
        return [(axis, value) for axis, values in vars(self).items() for value in values]

    def matches(self, config: KernelConfig) -> bool:
        """Whether the configuration has a named value on every axis."""
        return (
            (not self.ctas or config.cta in self.ctas)
            and (not self.clusters or config.cluster in self.clusters)
            and (not self.modes or config.mode in self.modes)
            and (not self.targets or config.target in self.targets)
            and (not self.epilogues or config.epilogue in self.epilogues)
        )

    def select(self, configs: Iterable[KernelConfig]) -> list[KernelConfig]:
        """Return the matching configurations, in the order given."""
        return [config for config in configs if self.matches(config)]

    def unmatched(self, configs: Sequence[KernelConfig]) -> list[tuple[str, Any]]:
        """Return the named values that no matching configuration has."""
        matching = self.select(configs)
        return [
            (axis, value)
            for axis, value in self.values
            if not any(getattr(config, axis.removesuffix("s")) == value for config in matching)
        ]

    def __str__(self) -> str:
        return " ".join(_option(axis, value) for axis, value in self.values)


@dataclass(frozen=True)
class Selection:
    """The kernels that a command works on."""

    configs: Sequence[KernelConfig]
    spaces: Sequence[str]
    """The spaces that they were selected from."""


def select_kernels(wanted: Filter, spaces: Sequence[str] = ()) -> Selection:
    """Select kernels: the one rule that `list`, `emit`, `build` and `build-and-verify` share.

    Spaces contain kernels without an epilogue. The filter's epilogues replace it: each kernel of the spaces is selected
    with each of them.

    Args:
        wanted: the filter. Every value that it names must have a matching kernel.
        spaces: the spaces to select from, as a union. If empty, `default` without a filter; with one, the first space
            of `SPACES` in which every named value has a matching kernel.

    Raises:
        InvalidValueError: if a named value has no matching kernel; the text says why and which space has one.
    """
    for tried in [tuple(spaces)] if spaces else [(name,) for name in SPACES]:
        union = _union(tried, wanted)
        if not wanted.unmatched(union):
            return Selection(wanted.select(union), tried)
    raise InvalidValueError(_explain_nothing(wanted, spaces))


def _union(spaces: Iterable[str], wanted: Filter) -> list[KernelConfig]:
    """Return the kernels of spaces with the epilogues of a filter."""
    return with_epilogues(set().union(*map(enumerate_space, spaces)), wanted.epilogues)


def select(space: str, wanted: Filter) -> list[KernelConfig]:
    """Return the configurations of a space that a filter names; see `select_kernels`.

    Raises:
        InvalidValueError: if a named value has no matching kernel.
    """
    return list(select_kernels(wanted, [space]).configs)


def _explain_nothing(wanted: Filter, spaces: Sequence[str]) -> str:
    """Say which named values have no kernel, why, and which space has one."""
    illegal = wanted.unmatched(_union(["all"], wanted))
    if illegal:
        combinations = {
            str(narrowed): narrowed for axis, value in illegal if (narrowed := _narrow(wanted, axis, value))
        }
        return "; ".join(map(_why_illegal, combinations.values()))
    found = next(name for name in SPACES if not wanted.unmatched(_union([name], wanted)))
    missing = wanted.unmatched(_union(spaces, wanted))
    values = ", ".join(_option(axis, value) for axis, value in missing)
    axes = {axis for axis, _ in missing}
    others = " ".join(_option(axis, value) for axis, value in wanted.values if axis not in axes)
    together = f" with {others}" if others else ""
    return f"{values}{together} is legal, but not in space {' + '.join(spaces)}: use --space {found}"


def _narrow(wanted: Filter, axis: str, value: Any) -> Filter:
    return replace(wanted, **{axis: [value]})


def _why_illegal(wanted: Filter) -> str:
    """Say why no legal kernel matches a filter: the most frequent reason of each family.

    If no cluster is named, kernels without one give the reason: a cluster only adds limits.
    """
    reasons: dict[str, list[str]] = {}
    for target in wanted.targets or Target:
        axes = _GRIDS[target]
        grid = itertools.product(
            wanted.modes or QuantMode,
            wanted.ctas or [CtaShape(*shape) for shape in itertools.product(*axes.ctas)],
            wanted.clusters or [ClusterShape(1, 1, 1)],
            axes.schedules,
            _SCHEDULERS,
            wanted.epilogues or [Epilogue.NONE],
        )
        counts = Counter(reason for rest in grid if (reason := why_forbidden(KernelConfig(target, *rest))))
        reasons.setdefault(counts.most_common(1)[0][0], []).append(str(target))
    if len(reasons) == 1:
        return f"no legal kernel matches {wanted}: {next(iter(reasons))}"
    sentences = (f"{', '.join(targets)}: {sentence}" for sentence, targets in reasons.items())
    return f"no legal kernel matches {wanted}: {'; '.join(sentences)}"


def _option(axis: str, value: Any) -> str:
    return f"--{axis.removesuffix('s')} {value}"
