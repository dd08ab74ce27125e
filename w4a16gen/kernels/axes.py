"""The axes of a kernel: shapes, quantisation mode, schedules, epilogue. Their texts are parts of kernel names."""

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


TRIPLE_PATTERN = re.compile(r"([1-9][0-9]{0,8})x([1-9][0-9]{0,8})x([1-9][0-9]{0,8})")
"""Three positive integers, as they stand in kernel names."""


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
        match = TRIPLE_PATTERN.fullmatch(text) if isinstance(text, str) else None
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
class OrderedEnum(Enum):
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


class QuantMode(OrderedEnum):
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


class Schedule(OrderedEnum):
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


class Scheduler(OrderedEnum):
    """The assignment of output tiles to CTAs."""

    PERSISTENT = "persistent"
    """One wave of CTAs, each of which computes several whole tiles."""
    STREAM_K = "streamk"
    """Tiles are split along K so that all CTAs get equal work. The workspace holds partial sums."""
    GROUPED = "grouped"
    """Tiles of the products of several experts. A list on the device says which token tiles each expert has."""


class Target(OrderedEnum):
    """The kernel family that a configuration is rendered for."""

    CUTLASS = "cutlass"
    """CUTLASS's SM90 mixed-input collective."""
    NATIVE = "native"
    """This package's own kernel."""


class Epilogue(OrderedEnum):
    """The code of a kernel behind the product alpha * A x W + bias. A kernel has the code of one epilogue only."""

    NONE = "none"
    """The product alone. Names of these kernels do not mention it."""
    ELEMENTWISE = "elementwise"
    """An activation of each value, a residual, or both, as each call asks."""
    GATED = "gated"
    """The activation of one half of the channels times the other half, as each call asks, and perhaps a residual."""

    @property
    def number(self) -> int:
        """The number by which the library knows it: `w4a16_epilogue` in cuda/w4a16.h."""
        return list(Epilogue).index(self)

    @property
    def suffix(self) -> str:
        """The end of kernel names."""
        return "" if self is Epilogue.NONE else f"_{self}"
