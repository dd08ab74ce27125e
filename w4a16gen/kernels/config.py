"""A kernel as a value: the axes, and the canonical name that encodes all of them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.axes import (
    TRIPLE_PATTERN,
    ClusterShape,
    CtaShape,
    Epilogue,
    OrderedEnum,
    QuantMode,
    Schedule,
    Scheduler,
    Target,
    shown,
)

__all__ = [
    "NAME_PATTERN",
    "PREFIX",
    "ClusterShape",
    "CtaShape",
    "Epilogue",
    "KernelConfig",
    "OrderedEnum",
    "QuantMode",
    "Schedule",
    "Scheduler",
    "Target",
    "shown",
    "why_not_of_target",
]

PREFIX = "w4a16_sm90_"
"""Beginning of every canonical kernel name."""


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
    epilogue: Epilogue = Epilogue.NONE

    @property
    def name(self) -> str:
        """The canonical name: file stem, C++ symbol, cache key and test id."""
        return PREFIX + self.short_name

    @property
    def short_name(self) -> str:
        """The canonical name without its prefix, for tables."""
        return f"{self.target}_{self.mode}_{self.shape_name}{self.epilogue.suffix}"

    @property
    def shape_name(self) -> str:
        """The canonical name from the CTA shape to the scheduler: the same for all modes and epilogues of a kernel."""
        return f"cta{self.cta}_cluster{self.cluster}_{self.schedule}_{self.scheduler}"

    @property
    def is_grouped(self) -> bool:
        """Whether it computes the products of several experts instead of one product."""
        return self.scheduler is Scheduler.GROUPED

    def __str__(self) -> str:
        return self.name

    @classmethod
    def parse(cls, name: str) -> KernelConfig:
        """Read a canonical name, the exact inverse of `name`.

        Raises:
            InvalidValueError: if the text is not a canonical name, or its target has no such kernels.
        """
        match = NAME_PATTERN.fullmatch(name) if isinstance(name, str) else None
        if match is None:
            example = f"{PREFIX}native_fgs_cta64x16x128_cluster1x1x1_warps8_persistent"
            raise InvalidValueError(f"{shown(name)} is not a kernel name such as {example}")
        config = cls(
            target=Target(match["target"]),
            mode=QuantMode(match["mode"]),
            cta=CtaShape.parse(match["cta"]),
            cluster=ClusterShape.parse(match["cluster"]),
            schedule=Schedule(match["schedule"]),
            scheduler=Scheduler(match["scheduler"]),
            epilogue=Epilogue(match["epilogue"] or Epilogue.NONE),
        )
        reason = why_not_of_target(config)
        if reason is not None:
            raise InvalidValueError(f"{shown(name)} is no kernel: {reason}")
        return config

    @classmethod
    def of(cls, value: KernelConfig | str) -> KernelConfig:
        """Return the kernel for a kernel or its name.

        Raises:
            InvalidValueError: if it is neither.
        """
        if not isinstance(value, KernelConfig):
            return cls.parse(value)
        members = {"target": Target, "mode": QuantMode, "schedule": Schedule, "scheduler": Scheduler}
        for field, kind in (members | {"epilogue": Epilogue, "cta": CtaShape, "cluster": ClusterShape}).items():
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
            "epilogue": self.epilogue.value,
        }


def why_not_of_target(config: KernelConfig) -> str | None:
    """Return why no kernel of the target is like this configuration, or None; sdk/cost_model.h says the same."""
    if config.target is Target.NATIVE:
        return None
    if config.is_grouped:
        return "scheduler grouped: only native kernels compute the products of several experts"
    if config.epilogue is not Epilogue.NONE:
        return f"epilogue {config.epilogue}: only native kernels have epilogues, CUTLASS's compute the plain product"
    return None


def _alternatives(members: type[OrderedEnum]) -> str:
    return "|".join(re.escape(str(member)) for member in members)


_SUFFIXES = "|".join(re.escape(str(epilogue)) for epilogue in Epilogue if epilogue is not Epilogue.NONE)
NAME_PATTERN = re.compile(
    rf"{PREFIX}(?P<target>{_alternatives(Target)})_(?P<mode>{_alternatives(QuantMode)})"
    rf"_cta(?P<cta>{TRIPLE_PATTERN.pattern})_cluster(?P<cluster>{TRIPLE_PATTERN.pattern})"
    rf"_(?P<schedule>{_alternatives(Schedule)})_(?P<scheduler>{_alternatives(Scheduler)})"
    rf"(?:_(?P<epilogue>{_SUFFIXES}))?"
)
"""The words of canonical names."""
