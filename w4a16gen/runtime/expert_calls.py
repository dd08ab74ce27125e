"""The options of a call of `moe`, and the checks of calls of experts that arrays in any memory share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.config import Target, shown
from w4a16gen.kernels.epilogue import Activation
from w4a16gen.kernels.integers import integer
from w4a16gen.runtime.calls import checked_launch
from w4a16gen.runtime.typing import DependentLaunch
from w4a16gen.weights.experts import PackedExperts
from w4a16gen.weights.packed import LAYOUT_TARGETS, checked_flag

GATED_ACTIVATIONS = {"silu": Activation.SWIGLU, "gelu": Activation.GEGLU, "gelu_tanh": Activation.GEGLU_TANH}
"""The functions of the gate that kernels compute, by name."""
MAX_EXPERTS = 1024
"""Experts that grouped kernels serve: routing has a thread for each, in one CTA."""


class MoeScalars(NamedTuple):
    """The options of a call of `moe` that are no arrays, checked."""

    gate: Activation
    weight_on_input: bool
    invariant: bool
    launch: int
    """The library's number of the kind of launch."""


@dataclass(frozen=True, eq=False)
class MoeOptions:
    """Everything of a call of `moe` beside its hidden states, experts and routes; see `Library.moe`."""

    expert_map: Any = None
    activation: str = "silu"
    weight_on_input: bool = False
    invariant: bool = False
    out: Any = None
    workspace: Any = None
    stream: Any = None
    dependent_launch: DependentLaunch = False

    def scalars(self) -> MoeScalars:
        """Return the options that are no arrays, checked.

        Raises:
            InvalidValueError: if one of them is not what it must be.
        """
        return MoeScalars(
            gate_function(self.activation),
            checked_flag("weight_on_input", self.weight_on_input),
            checked_flag("invariant", self.invariant),
            checked_launch(self.dependent_launch),
        )


def check_packed(name: str, w: Any) -> None:
    """Raise unless grouped kernels can read packed experts.

    Raises:
        InvalidValueError: if they are no packed experts for native kernels, or too many.
    """
    if not isinstance(w, PackedExperts):
        raise InvalidValueError(f"{name} of type {type(w).__name__} must be PackedExperts: see pack_experts")
    if LAYOUT_TARGETS[w.layout] is not Target.NATIVE:
        raise InvalidValueError(f"{name} is packed as {w.layout}, but grouped kernels are native: pack it for them")
    checked_experts(w.experts)


def check_pair(w13: PackedExperts, w2: PackedExperts) -> None:
    """Raise unless two projections are of the same experts, and the second is packed without gated=True.

    Raises:
        InvalidValueError: naming both.
    """
    if w13.order is None:
        raise InvalidValueError("w13 must hold gate and up projections: see pack_experts(gate, up)")
    if w2.gated:
        raise InvalidValueError("w2 is packed with gated=True, but has no gate: pack the down projections without it")
    found, wanted = (w13.experts, w13.n, w13.k), (w2.experts, 2 * w2.k, w2.n)
    if found != wanted:
        raise InvalidValueError(
            f"w13 of {found[0]} experts of {list(found[1:])} must be of {wanted[0]} experts of "
            f"{list(wanted[1:])}, for w2"
        )
    if w13.mode is not w2.mode:
        raise InvalidValueError(f"w13 of mode {w13.mode} must be of mode {w2.mode}, as w2 is")


def check_activation(applied: Activation, w: PackedExperts) -> None:
    """Raise unless experts are packed for an activation.

    Raises:
        InvalidValueError: naming both.
    """
    if applied.is_gated != w.gated or (applied is not Activation.NONE and not applied.is_gated):
        kinds = ", ".join(str(one) for one in GATED_ACTIVATIONS.values()) if w.gated else Activation.NONE
        packed = "for gated activations" if w.gated else "without gated=True"
        raise InvalidValueError(f"activation {applied} must be one of {kinds}: the experts are packed {packed}")


def gate_function(name: Any) -> Activation:
    """Return the gated activation of a function's name.

    Raises:
        InvalidValueError: if kernels do not compute it.
    """
    if not isinstance(name, str) or name not in GATED_ACTIVATIONS:
        raise InvalidValueError(f"activation {shown(name)} must be one of {', '.join(GATED_ACTIVATIONS)}")
    return GATED_ACTIVATIONS[name]


def checked_experts(count: Any) -> int:
    """Return a number of experts.

    Raises:
        InvalidValueError: if grouped kernels do not serve as many.
    """
    number = integer("experts", count)
    if not 0 < number <= MAX_EXPERTS:
        raise InvalidValueError(f"experts of {number} must be 1 to {MAX_EXPERTS}")
    return number


def positive(name: str, value: Any) -> int:
    """Return a number of 1 or more.

    Raises:
        InvalidValueError: if it is none.
    """
    number = integer(name, value)
    if number < 1:
        raise InvalidValueError(f"{name} of {number} must be 1 or more")
    return number
