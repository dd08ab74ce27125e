"""What a call computes beside the product, before the one rounding to fp16, and which kernels can."""

from __future__ import annotations

from dataclasses import dataclass

from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.config import Epilogue, OrderedEnum, QuantMode, Target

SIDE_BY_SIDE = 8
"""Gates, and then their factors, that lie side by side in a weight that is packed for gated activations."""
GATED_MULTIPLE = 2 * SIDE_BY_SIDE
"""Channels of a weight for gated activations are a multiple of this."""


class Activation(OrderedEnum):
    """A function of x = alpha * A x W + bias. The order is that of `w4a16_activation` in cuda/w4a16.h.

    The gated ones take the first half of the channels as gates of the second half.
    """

    NONE = "none"
    """x."""
    SILU = "silu"
    """x / (1 + e^-x)."""
    GELU_TANH = "gelu_tanh"
    """GELU, approximated by tanh."""
    GELU = "gelu"
    """GELU: x * Phi(x), with the normal distribution's Phi."""
    RELU2 = "relu2"
    """max(x, 0)^2."""
    SWIGLU = "swiglu"
    """silu(gate) * factor."""
    GEGLU_TANH = "geglu_tanh"
    """gelu_tanh(gate) * factor."""
    GEGLU = "geglu"
    """gelu(gate) * factor."""

    @classmethod
    def of(cls, name: Activation | str | None) -> Activation:
        """Return the activation of an argument; None is `none`.

        Raises:
            InvalidValueError: if it is no activation; the text lists them.
        """
        return cls.NONE if name is None else cls.parse(name)

    @property
    def number(self) -> int:
        """The number by which the library knows it."""
        return list(Activation).index(self)

    @property
    def function(self) -> Activation:
        """The function of the gates, or of all channels."""
        return _FUNCTIONS.get(self, self)

    @property
    def is_gated(self) -> bool:
        """Whether one half of the channels gates the other."""
        return self in _FUNCTIONS


_FUNCTIONS = {
    Activation.SWIGLU: Activation.SILU,
    Activation.GEGLU_TANH: Activation.GELU_TANH,
    Activation.GEGLU: Activation.GELU,
}


@dataclass(frozen=True)
class CallEpilogue:
    """What a call computes: activation(alpha * A x W + bias) + residual.

    Example:
        >>> call = CallEpilogue(Activation.SWIGLU, has_residual=True)
        >>> call.outputs(1024), str(call.kernels)
        (512, 'gated')
    """

    activation: Activation = Activation.NONE
    has_residual: bool = False

    @property
    def kernels(self) -> Epilogue:
        """The epilogue of the kernels that are chosen for it."""
        if self.activation.is_gated:
            return Epilogue.GATED
        return Epilogue.NONE if self.activation is Activation.NONE and not self.has_residual else Epilogue.ELEMENTWISE

    def outputs(self, n: int) -> int:
        """Return the columns of the output of a weight with n channels."""
        return n // 2 if self.activation.is_gated else n

    def __str__(self) -> str:
        return f"{self.activation}{' + residual' if self.has_residual else ''}"


def check_epilogue(call: CallEpilogue, target: Target, *, gated_weight: bool) -> None:
    """Raise unless kernels of a target have an epilogue for a call, and the weight is packed for it.

    Raises:
        InvalidValueError: naming the way out.
    """
    if call.kernels is not Epilogue.NONE and target is not Target.NATIVE:
        raise InvalidValueError(why_no_epilogue(target))
    if call.activation.is_gated and not gated_weight:
        raise InvalidValueError(
            f"activation {call.activation} needs a weight whose gates and factors are interleaved: pack it with "
            "gated=True"
        )
    if gated_weight and not call.activation.is_gated:
        gated = ", ".join(str(activation) for activation in _FUNCTIONS)
        raise InvalidValueError(
            f"activation {call.activation} does not fit a weight that was packed with gated=True: pass one of "
            f"{gated}, or pack without gated"
        )


def why_no_epilogue(target: Target | str) -> str:
    """Return the sentence about a target without epilogues; the library says the same."""
    return f"kernels of target {target} compute no activations and add no residual: pack the weight for target native"


def why_not_by(kernel: Epilogue, call: CallEpilogue) -> str | None:
    """Return why kernels with an epilogue cannot compute a call, or None if they can; the library says the same.

    A kernel with epilogue `elementwise` also computes plain products.

    Args:
        kernel: the epilogue that a kernel was generated with.
        call: what the call computes.

    Example:
        >>> why_not_by(Epilogue.NONE, CallEpilogue(Activation.SILU))
        'kernels with epilogue none cannot: the call needs `w4a16gen build --epilogue none --epilogue elementwise`'
    """
    needed = call.kernels
    if needed is kernel or (needed is Epilogue.NONE and kernel is Epilogue.ELEMENTWISE):
        return None
    return f"kernels with epilogue {kernel} cannot: the call needs `{build_command(needed)}`"


def build_command(epilogue: Epilogue) -> str:
    """Return the command that builds kernels with an epilogue beside the plain ones.

    Example:
        >>> build_command(Epilogue.GATED)
        'w4a16gen build --epilogue none --epilogue gated'
    """
    if epilogue is Epilogue.NONE:
        return "w4a16gen build"
    return f"w4a16gen build --epilogue {Epilogue.NONE} --epilogue {epilogue}"


def why_not_built(mode: QuantMode, epilogue: Epilogue) -> str:
    """Return the sentence about a build without kernels of a mode for a call; sdk/chooser.h says the same.

    Example:
        >>> why_not_built(QuantMode.PER_COLUMN_SCALE_ONLY, Epilogue.NONE)
        'the build holds no kernel of mode cs without an epilogue: run `w4a16gen build`'
    """
    kind = "without an epilogue" if epilogue is Epilogue.NONE else f"with epilogue {epilogue}"
    return f"the build holds no kernel of mode {mode} {kind}: run `{build_command(epilogue)}`"


def why_not_gated(n: int) -> str | None:
    """Return why a weight with n channels cannot be packed for gated activations, or None; the library says the same.

    Example:
        >>> why_not_gated(24)
        'n of 24 must be a multiple of 16 for gated activations: pad both halves with zeros'
    """
    if n % GATED_MULTIPLE == 0:
        return None
    return f"n of {n} must be a multiple of {GATED_MULTIPLE} for gated activations: pad both halves with zeros"


def activation_numbers(*, gated_weight: bool) -> dict[str | Activation | None, int]:
    """Return the numbers of all arguments `activation` that calls with a weight may have."""
    names: dict[str | Activation | None, int] = {} if gated_weight else {None: Activation.NONE.number}
    for activation in Activation:
        if activation.is_gated == gated_weight:
            names |= {activation: activation.number, str(activation): activation.number}
    return names
