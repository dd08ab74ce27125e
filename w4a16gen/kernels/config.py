"""A kernel as a value: shapes, quantisation mode, schedule, and the canonical name that encodes all of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from functools import total_ordering
from typing import TYPE_CHECKING

from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.integers import integer

if TYPE_CHECKING:
    from typing_extensions import Self


PREFIX = "w4a16_sm90_"
"""Beginning of every canonical kernel name."""
_TRIPLE = re.compile(r"([1-9][0-9]{0,8})x([1-9][0-9]{0,8})x([1-9][0-9]{0,8})")


def shown(value: object) -> str:
    """Return a text in quotes; of anything else the type, for it may have no printable form."""
    return repr(value) if isinstance(value, str) else f"a value of type {type(value).__name__}"


@dataclass(frozen=True, order=True)
class _Triple:
    """Three counts along the axes of the transposed problem: output channels, tokens, k."""

    channels: int
    tokens: int
    k: int

    def __post_init__(self) -> None:
        """Refuse anything but integers."""
        if type(self.channels) is type(self.tokens) is type(self.k) is int:
            return  # the usual case, 87,000 times for the grid of kernels
        for name in ("channels", "tokens", "k"):
            object.__setattr__(self, name, integer(name, getattr(self, name)))

    def __str__(self) -> str:
        return f"{self.channels}x{self.tokens}x{self.k}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `CHANNELSxTOKENSxK`, the exact inverse of `str`.

        Raises:
            InvalidValueError: if the text is anything else.
        """
        match = _TRIPLE.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise InvalidValueError(
                f"{shown(text)} must be CHANNELSxTOKENSxK, three positive integers such as 128x64x64"
            )
        return cls(*(int(part) for part in match.groups()))

    def as_list(self) -> list[int]:
        """Return [channels, tokens, k], the form in JSON."""
        return [self.channels, self.tokens, self.k]


class CtaShape(_Triple):
    """The tile of one CTA and one stage: output channels (WGMMA's M), tokens (WGMMA's N) and values of K."""


class ClusterShape(_Triple):
    """CTAs per cluster: along output channels, along tokens, and along K (these CTAs compute one output tile)."""


@total_ordering
class _OrderedEnum(Enum):
    """An enumeration ordered by definition, so that sorted kernel lists do not depend on spelling."""

    # Members are singletons. Enum's own hash is a Python function, which would run in every call of `gemm`.
    __hash__ = object.__hash__

    def __lt__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        members = list(type(self))
        return members.index(self) < members.index(other)

    def __str__(self) -> str:
        return str(self.value)

    @classmethod
    def parse(cls, value: Self | str) -> Self:
        """Return the member for a member or its text.

        Raises:
            InvalidValueError: if it is neither; the text lists the members.
        """
        if isinstance(value, cls):
            return value
        for member in cls:
            if isinstance(value, str) and member.value == value:
                return member
        raise InvalidValueError(f"{shown(value)} is not one of {', '.join(str(member) for member in cls)}")


class QuantMode(_OrderedEnum):
    """The formula by which a 4-bit value q becomes a weight. The member's value is its tag in kernel names."""

    PER_COLUMN_SCALE_ONLY = "cs"
    """(q - 8) * scale[n]."""
    FINEGRAINED_SCALE_ONLY = "fgs"
    """(q - 8) * scale[g, n]."""
    FINEGRAINED_SCALE_AND_ZEROS = "fgsz"
    """(q - 8) * scale[g, n] + zero[g, n], where zero = (8 - zero point) * scale."""

    @property
    def is_grouped(self) -> bool:
        """Whether scales come per group of K instead of once per output channel."""
        return self is not QuantMode.PER_COLUMN_SCALE_ONLY

    @property
    def has_zeros(self) -> bool:
        """Whether the mode takes zeros beside the scales."""
        return self is QuantMode.FINEGRAINED_SCALE_AND_ZEROS


class Schedule(_OrderedEnum):
    """The division of a CTA's work among its consumer warpgroups."""

    PINGPONG = "pingpong"
    """Two warpgroups with an output tile each, which alternate on the tensor cores (CUTLASS)."""
    COOPERATIVE = "cooperative"
    """Two warpgroups that divide the channels of one output tile (CUTLASS)."""
    TWO_WARPGROUPS = "warpgroups2"
    """Two warpgroups that divide the channels of one output tile. In a tile of 64 channels they split K instead."""
    FOUR_WARPGROUPS = "warpgroups4"
    """Four warpgroups that divide the channels of one output tile, and split K where there are too few channels."""
    EIGHT_WARPS = "warps8"
    """Two warpgroups whose warps multiply independently (mma.sync), for few tokens. Two CTAs share an SM."""


class Scheduler(_OrderedEnum):
    """The assignment of output tiles to CTAs."""

    PERSISTENT = "persistent"
    """One wave of CTAs, each of which computes several whole tiles."""
    STREAM_K = "streamk"
    """Tiles are split along K so that all CTAs get equal work. The workspace holds partial sums."""


class Target(_OrderedEnum):
    """The kernel family that a configuration is rendered for."""

    CUTLASS = "cutlass"
    """CUTLASS's SM90 mixed-input collective."""
    NATIVE = "native"
    """This package's own kernel."""


@dataclass(frozen=True, order=True)
class KernelConfig:
    """One kernel. Equal values are the same kernel; kernels are listed in the order of this class.

    Example:
        >>> config = KernelConfig.parse("w4a16_sm90_native_fgs_cta64x16x128_cluster1x1x1_warps8_persistent")
        >>> str(config.cta), config.short_name
        ('64x16x128', 'native_fgs_cta64x16x128_cluster1x1x1_warps8_persistent')
    """

    target: Target
    mode: QuantMode
    cta: CtaShape
    cluster: ClusterShape
    schedule: Schedule
    scheduler: Scheduler

    @property
    def name(self) -> str:
        """The canonical name: file stem, C++ symbol, cache key and test id."""
        return PREFIX + self.short_name

    @property
    def short_name(self) -> str:
        """The canonical name without its prefix, for tables."""
        return f"{self.target}_{self.mode}_{self.shape_name}"

    @property
    def shape_name(self) -> str:
        """The canonical name from the CTA shape on: the same for all modes of a kernel."""
        return f"cta{self.cta}_cluster{self.cluster}_{self.schedule}_{self.scheduler}"

    def __str__(self) -> str:
        return self.name

    @classmethod
    def parse(cls, name: str) -> KernelConfig:
        """Read a canonical name, the exact inverse of `name`.

        Raises:
            InvalidValueError: if the text is not a canonical name.
        """
        match = _NAME.fullmatch(name) if isinstance(name, str) else None
        if match is None:
            example = f"{PREFIX}native_fgs_cta64x16x128_cluster1x1x1_warps8_persistent"
            raise InvalidValueError(f"{shown(name)} is not a kernel name such as {example}")
        return cls(
            target=Target(match["target"]),
            mode=QuantMode(match["mode"]),
            cta=CtaShape.parse(match["cta"]),
            cluster=ClusterShape.parse(match["cluster"]),
            schedule=Schedule(match["schedule"]),
            scheduler=Scheduler(match["scheduler"]),
        )

    @classmethod
    def of(cls, value: KernelConfig | str) -> KernelConfig:
        """Return the kernel for a kernel or its name.

        Raises:
            InvalidValueError: if it is neither.
        """
        if not isinstance(value, KernelConfig):
            return cls.parse(value)
        members = {"target": Target, "mode": QuantMode, "schedule": Schedule, "scheduler": Scheduler}
        for field, kind in (members | {"cta": CtaShape, "cluster": ClusterShape}).items():
            if not isinstance(getattr(value, field), kind):
                raise InvalidValueError(f"{field} of a KernelConfig must be a {kind.__name__}")
        return value

    def as_json(self) -> dict[str, object]:
        """Return the JSON object of listings, manifests and reports."""
        return {
            "name": self.name,
            "target": self.target.value,
            "mode": self.mode.value,
            "cta": self.cta.as_list(),
            "cluster": self.cluster.as_list(),
            "schedule": self.schedule.value,
            "scheduler": self.scheduler.value,
        }


def _alternatives(members: type[_OrderedEnum]) -> str:
    return "|".join(re.escape(str(member)) for member in members)


_NAME = re.compile(
    rf"{PREFIX}(?P<target>{_alternatives(Target)})_(?P<mode>{_alternatives(QuantMode)})"
    rf"_cta(?P<cta>{_TRIPLE.pattern})_cluster(?P<cluster>{_TRIPLE.pattern})"
    rf"_(?P<schedule>{_alternatives(Schedule)})_(?P<scheduler>{_alternatives(Scheduler)})"
)
