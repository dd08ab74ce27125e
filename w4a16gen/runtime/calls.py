"""Calls of `gemm`: their options, the launch that follows from them, and the fast path for repeated calls."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, NamedTuple

from w4a16gen.choose.overrides import is_in_block
from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.config import KernelConfig, Target
from w4a16gen.kernels.problem import Problem
from w4a16gen.runtime.bindings import Bindings
from w4a16gen.weights.packed import TARGET_LAYOUTS, PackedWeight

LAYOUT_TARGETS: dict[str, Target] = {layout: target for target, layout in TARGET_LAYOUTS.items()}
"""The kernel family that reads each layout."""


@dataclass(frozen=True)
class GemmOptions:
    """Everything of a call of `gemm` beside its activations and weight; see `Library.gemm`."""

    bias: Any = None
    alpha: float = 1.0
    config: KernelConfig | str | None = None
    out: Any = None
    workspace: Any = None
    stream: Any = None
    dependent_launch: bool = False

    @property
    def may_repeat(self) -> bool:
        """Whether a call like this one may take the fast path."""
        return self.config is None and self.workspace is None and self.stream is None


class Launch(NamedTuple):
    """The kernel and the sizes of a launch, which all calls with the same shapes share."""

    kernel: KernelConfig
    kernel_index: int
    """The kernel's number in the library."""
    problem: Problem
    packed_bytes: int
    workspace_bytes: int


class CallCache:
    """The fast path: launches that were validated once are repeated with little around them.

    It serves tensors of libraries with DLPack's C exchange API (torch from 2.10 on), for kernels without a workspace.
    """

    def __init__(self, bindings: Bindings) -> None:
        """Begin without any known call."""
        self._bindings = bindings
        self._calls: dict[int, tuple[weakref.ref[PackedWeight], Any]] = {}
        """By the id of a packed weight, until that weight is gone."""

    def has(self, w: PackedWeight) -> bool:
        """Whether some call with this weight can be repeated."""
        return id(w) in self._calls

    def add(self, w: PackedWeight, launch: Launch, device: int) -> None:
        """Allow calls with this weight and as many tokens to be repeated, if the launch is of a kind that can be."""
        problem = launch.problem
        if problem.m == 0 or launch.workspace_bytes > 0 or is_in_block():
            return
        key = id(w)
        if key not in self._calls:
            calls = self._bindings.module.KnownCalls(
                self._bindings.library, problem.n, problem.k, problem.group_size, launch.packed_bytes, device
            )
            self._calls[key] = weakref.ref(w, lambda _: self._calls.pop(key, None)), calls
        self._calls[key][1].add(problem.m, launch.kernel_index)

    def try_fast_path(self, a: Any, w: PackedWeight, bias: Any, out: Any, alpha: float, dependent_launch: bool) -> Any:
        """Repeat a call that has been validated.

        Returns:
            The output; or None, without side effects, if the call does not match one that has been validated. The
            caller then takes the slow path, which reports what is wrong.
        """
        known = self._calls.get(id(w))
        if known is None or is_in_block():
            return None
        return known[1].gemm(a, w.data, bias, out, alpha, dependent_launch)


def check_weight(kernel: KernelConfig, w: PackedWeight) -> None:
    """Raise unless a kernel reads weights of this mode and layout.

    Raises:
        InvalidValueError: naming both.
    """
    if kernel.mode is not w.mode:
        raise InvalidValueError(f"the weight is of mode {w.mode}, but {kernel.name} is of mode {kernel.mode}")
    if w.layout != TARGET_LAYOUTS[kernel.target]:
        raise InvalidValueError(
            f"the weight is packed as {w.layout}, but {kernel.name} reads {TARGET_LAYOUTS[kernel.target]}: "
            "pack it for that target"
        )
