"""A GEMM problem, and the rule that decides which kernels can run it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.config import Epilogue, KernelConfig, QuantMode, Target
from w4a16gen.kernels.epilogue import why_not_gated
from w4a16gen.kernels.integers import integer

DIMENSION_MULTIPLE = 8
"""n and k are multiples of this: TMA needs row strides of a multiple of 16 bytes, which are 8 fp16 values."""
MAX_DIMENSION = 1 << 30
"""Largest m, n and k: CUTLASS counts in 32-bit signed integers and rounds up to whole tiles."""


@dataclass(frozen=True)
class Problem:
    """The sizes of C[m, n] = alpha * A[m, k] x W[k, n] + bias[n].

    Example:
        >>> Problem(m=16, n=4096, k=4096, group_size=128).groups
        32
    """

    m: int
    """Tokens."""
    n: int
    """Output channels."""
    k: int
    """Length of the reduction."""
    group_size: int
    """Values of K that share one scale of an output channel; k itself in per-column mode."""

    def __post_init__(self) -> None:
        """Check that every field is an integer.

        Raises:
            InvalidValueError: naming the field.
        """
        for field in fields(self):
            object.__setattr__(self, field.name, integer(field.name, getattr(self, field.name)))

    @property
    def groups(self) -> int:
        """Rows of the scale matrix: k / group_size.

        Raises:
            InvalidValueError: if the group size is 0.
        """
        if self.group_size == 0:
            raise InvalidValueError(f"group size 0 must be {self.k} (= k) or a divisor of it")
        return self.k // self.group_size

    @property
    def flops(self) -> int:
        """Multiplications and additions: 2mnk."""
        return 2 * self.m * self.n * self.k

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k}, group size {self.group_size}"


NATIVE_GROUP_MULTIPLE = 32
"""Group sizes of native kernels and of their packed layout are multiples of this, or k."""


def group_multiple(config: KernelConfig) -> int:
    """Return the number that a kernel's group sizes are multiples of. CUTLASS reads one scale per CTA k."""
    return config.cta.k if config.target is Target.CUTLASS else NATIVE_GROUP_MULTIPLE


def why_never_runs(problem: Problem) -> str | None:
    """Return why no kernel can run a problem of these m, n and k, or None if one may."""
    for name, value in (("n", problem.n), ("k", problem.k)):
        if value <= 0 or value % DIMENSION_MULTIPLE != 0:
            return f"{name} of {value} must be a positive multiple of {DIMENSION_MULTIPLE}: pad the layer with zeros"
    if problem.m < 0:
        return f"m of {problem.m} must be 0 or more"
    for name, value in (("m", problem.m), ("n", problem.n), ("k", problem.k)):
        if value > MAX_DIMENSION:
            return f"{name} of {value} must be at most {MAX_DIMENSION}: split the problem"
    return None


def why_cannot_run(config: KernelConfig, problem: Problem) -> str | None:
    """Return why a kernel cannot run a problem, or None if it can.

    The built library states the same rule in the same words (`why_not` in cuda/library/problem.h). A test compares
    the two over a grid of problems.
    """
    if reason := why_never_runs(problem):
        return reason
    group, k = problem.group_size, problem.k
    if group == k:
        return None
    if not config.mode.is_grouped:
        return f"group size {group} must be {k} (= k): per-column mode has one scale per channel"
    multiple = group_multiple(config)
    if group <= 0 or group % multiple != 0 or k % group != 0:
        return f"group size {group} must be {k} (= k) or a multiple of {multiple} that divides k"
    return None


def runnable(
    configs: Iterable[KernelConfig], mode: QuantMode, problem: Problem, epilogue: Epilogue = Epilogue.NONE
) -> list[KernelConfig]:
    """Return the kernels of a mode and an epilogue that can run a problem, sorted. Grouped kernels run no problem."""
    if epilogue is Epilogue.GATED and why_not_gated(problem.n) is not None:
        return []
    return sorted(
        config
        for config in configs
        if config.mode is mode
        and config.epilogue is epilogue
        and not config.is_grouped
        and why_cannot_run(config, problem) is None
    )
