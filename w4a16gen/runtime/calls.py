"""Calls of `gemm`: their options, the launch that follows from them, and the fast path for repeated calls."""

from __future__ import annotations

import math
import numbers
import weakref
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from w4a16gen.choose.overrides import is_in_block, of_gemm
from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.config import Epilogue, KernelConfig
from w4a16gen.kernels.epilogue import Activation, CallEpilogue, activation_numbers, check_epilogue, why_not_by
from w4a16gen.kernels.problem import Problem
from w4a16gen.runtime.arrays import DeviceArray
from w4a16gen.runtime.bindings import Bindings
from w4a16gen.runtime.typing import DependentLaunch
from w4a16gen.weights.packed import LAYOUT_TARGETS, TARGET_LAYOUTS, PackedWeight

AUTO: Literal["auto"] = "auto"
"""Leaves the kind of a launch to the library."""
_AUTO_LAUNCH = 2
_FLOAT_MAX = float(np.finfo(np.float32).max)
_WAYS_TO_PACK = {
    "QuantizedWeight": "w4a16gen.pack_weight(w)",
    "CheckpointLayer": "w4a16gen.pack_weight(w.quantized())",
    "PackedLayer": "w.weight",
    "PackedExperts": "w.expert(number), or call w4a16gen.moe",
}
"""What a call of gemm should get instead of a value, by the name of its type."""
_PACK_ARRAYS = "w4a16gen.pack_weight(w4a16gen.quantize(w, group_size=128)), or w4a16gen.pack(q, scales) of 4-bit values"


@dataclass(frozen=True, eq=False)
class GemmOptions:
    """Everything of a call of `gemm` beside its activations and weight; see `Library.gemm`.

    Calls of `grouped_gemm` have them too, except for `workspace`, `residual` and `remembered`.
    """

    bias: Any = None
    alpha: float | np.floating[Any] = 1.0
    config: KernelConfig | str | None = None
    out: Any = None
    workspace: Any = None
    stream: Any = None
    dependent_launch: DependentLaunch = False
    activation: Activation | str | None = None
    residual: Any = None
    remembered: PackedWeight | None = None
    """The weight by which later calls find this one; None is the call's own. One without data serves many weights."""

    @property
    def may_repeat(self) -> bool:
        """Whether a call like this one may take the fast path."""
        return self.config is None and self.workspace is None and self.stream is None

    def scalars(self) -> tuple[float, KernelConfig | None, int]:
        """Return alpha, the kernel and the library's number of the kind of launch, checked.

        Raises:
            InvalidValueError: if one of them is not what it must be.
        """
        kernel = None if self.config is None else KernelConfig.of(self.config)
        return checked_alpha(self.alpha), kernel, checked_launch(self.dependent_launch)

    def epilogue(self, w: PackedWeight) -> CallEpilogue:
        """Return the epilogue of the call, checked against the weight.

        Raises:
            InvalidValueError: if it is no epilogue, or not one for this weight.
        """
        call = CallEpilogue(Activation.of(self.activation), has_residual=self.residual is not None)
        check_epilogue(call, LAYOUT_TARGETS[w.layout], gated_weight=w.gated)
        return call


def checked_alpha(alpha: Any) -> float:
    """Return alpha as the kernels take it.

    Raises:
        InvalidValueError: if it is anything but one finite or infinite number that fp32 holds.
    """
    if isinstance(alpha, (bool, np.timedelta64)) or not isinstance(alpha, numbers.Real):
        raise InvalidValueError(f"alpha of type {type(alpha).__name__} must be one finite or infinite float")
    try:
        value = float(alpha)
    except OverflowError:
        raise InvalidValueError("alpha must fit in fp32: scale the weight instead") from None
    if math.isnan(value):
        raise InvalidValueError("alpha of nan must be one finite or infinite float")
    if abs(value) > _FLOAT_MAX and not (math.isinf(value) and alpha == value):
        raise InvalidValueError(f"alpha of {alpha:.4g} must fit in fp32: scale the weight instead")
    return value


def checked_launch(value: Any) -> int:
    """Return the library's number of a kind of launch: a `w4a16_launch`.

    Raises:
        InvalidValueError: if it is not True, False or "auto".
    """
    if isinstance(value, str) and value == AUTO:
        return _AUTO_LAUNCH
    if isinstance(value, str):
        raise InvalidValueError(f'dependent_launch of {value!r} must be True, False or "{AUTO}"')
    if not isinstance(value, (bool, np.bool_)):
        raise InvalidValueError(f'dependent_launch of type {type(value).__name__} must be True, False or "{AUTO}"')
    return int(value)


def checked_weight(w: Any) -> PackedWeight:
    """Return the weight of a call.

    Raises:
        InvalidValueError: if it is not a packed weight; the text says how to get one.
    """
    if isinstance(w, PackedWeight):
        return w
    kind = type(w).__name__
    raise InvalidValueError(f"w of type {kind} must be a PackedWeight: pass {_WAYS_TO_PACK.get(kind, _PACK_ARRAYS)}")


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
        """Start with no call to repeat."""
        self._bindings = bindings
        self._calls: dict[int, tuple[weakref.ref[PackedWeight], Any]] = {}
        """By the id of a packed weight, until that weight is freed."""

    def has(self, w: PackedWeight) -> bool:
        """Return whether some call with this weight can be repeated."""
        return id(w) in self._calls

    def add(self, w: PackedWeight, launch: Launch, device: int, epilogue: Epilogue = Epilogue.NONE) -> None:
        """Allow calls with a weight, as many tokens and the same need to be repeated, if the launch can be.

        Args:
            w: the weight.
            launch: the launch that was validated.
            device: its GPU.
            epilogue: what such calls need.
        """
        problem = launch.problem
        if problem.m == 0 or launch.workspace_bytes > 0 or is_in_block():
            return
        key = id(w)
        if key not in self._calls:
            calls = self._bindings.module.CallCache(
                self._bindings.library,
                *(problem.n, problem.k, problem.group_size),
                *(launch.packed_bytes, device),
                w.data.buffer.pointer if isinstance(w.data, DeviceArray) else 0,  # a tensor's memory may be replaced
                *(w.outputs, activation_numbers(gated_weight=w.gated)),
            )
            self._calls[key] = weakref.ref(w, lambda _: self._calls.pop(key, None)), calls
        self._calls[key][1].add(problem.m, launch.kernel_index, epilogue.number)

    def try_fast_path(
        self,
        a: Any,
        w: PackedWeight,
        bias: Any,
        out: Any,
        alpha: Any,
        dependent_launch: DependentLaunch,
        activation: Any = None,
        residual: Any = None,
        *,
        data: Any = None,
    ) -> Any:
        """Repeat a call that has been validated.

        Args:
            a: the activations.
            w: the weight by which the call was remembered.
            bias: the bias, or None.
            out: where to write, or None.
            alpha: factor of the product.
            dependent_launch: the kind of launch.
            activation: the name of an activation, or None.
            residual: what to add, or None.
            data: the packed bytes if the weight has none of its own.

        Returns:
            The output; or None, without side effects, if the call does not match one that has been validated. The
            caller then takes the slow path, which reports what is wrong.
        """
        known = self._calls.get(id(w))
        if known is None or is_in_block():
            return None
        packed = w.data if data is None else data
        return known[1].try_launch(a, packed, bias, out, alpha, dependent_launch, activation, residual)


def check_kernel(kernel: KernelConfig, w: PackedWeight, call: CallEpilogue) -> None:
    """Raise unless a kernel reads weights of this mode and layout, and computes the call.

    Raises:
        InvalidValueError: naming both.
    """
    check_weight(kernel, w)
    reason = why_not_by(kernel.epilogue, call)
    if reason is not None:
        raise InvalidValueError(f"{kernel.name}: {reason}")


def check_weight(kernel: KernelConfig, w: PackedWeight) -> None:
    """Raise unless a kernel of `gemm` reads weights of this mode and layout.

    Raises:
        InvalidValueError: naming both.
    """
    of_gemm(kernel)
    if kernel.mode is not w.mode:
        raise InvalidValueError(f"the weight is of mode {w.mode}, but {kernel.name} is of mode {kernel.mode}")
    if LAYOUT_TARGETS[w.layout] is not kernel.target:
        raise InvalidValueError(
            f"the weight is packed as {w.layout}, but {kernel.name} reads {TARGET_LAYOUTS[kernel.target]}: "
            f'pack it with target="{kernel.target}"'
        )
