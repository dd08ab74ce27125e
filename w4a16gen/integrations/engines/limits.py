"""Which layers of an engine are served: the reasons against one, as sentences that users read in the engine's log."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from w4a16gen.errors import W4A16Error
from w4a16gen.integrations.engines.switch import FLOAT16, PLUGINS_VARIABLE, switch, why_off
from w4a16gen.kernels.config import Epilogue, QuantMode, Target
from w4a16gen.kernels.problem import NATIVE_GROUP_MULTIPLE, Problem, why_cannot_run, why_never_runs
from w4a16gen.runtime.default import library_in_use
from w4a16gen.runtime.expert_calls import GATED_ACTIVATIONS, MAX_EXPERTS
from w4a16gen.runtime.expert_plan import gate_epilogue

HOPPER = (9, 0)
_DTYPES = ("float16", "bfloat16")
_SYMMETRIC, _ASYMMETRIC = (4, 8), (4, 0)
"""Bits and bias of the engines' types uint4b8 and uint4; a type without a bias may say None."""


@dataclass(frozen=True)
class LayerRequest:
    """A linear layer as an engine describes it, on one rank.

    Attributes:
        n: output channels on this rank.
        k: reduction length on this rank.
        group_size: values of K that share a scale; -1 for one scale per channel.
        has_zeros: whether the weight has zero points that differ from 8.
        dtype: the dtype of activations, as torch prints it, with or without `torch.`.
        capability: the GPU's compute capability, or None if the engine has no CUDA GPU.
        regroups: whether groups may be divided: the caller packs with `plan_order`.
    """

    n: int
    k: int
    group_size: int
    has_zeros: bool
    dtype: str
    capability: tuple[int, int] | None
    regroups: bool = False

    @property
    def group(self) -> int:
        """The group size; k itself for one scale per channel."""
        return self.k if self.group_size == -1 else self.group_size

    @property
    def mode(self) -> QuantMode:
        """The quantisation mode that the packed weight gets."""
        return mode_of(self.k, self.group, has_zeros=self.has_zeros)


@dataclass(frozen=True)
class ExpertsRequest:
    """A layer of experts as an engine describes it, on one rank.

    Attributes:
        experts: number of experts on this rank.
        hidden: length of the activations.
        intermediate: output channels of a gate, and of an up projection, on this rank.
        group_size: values of K that share a scale; -1 for one scale per channel.
        has_zeros: whether weights have zero points that differ from 8.
        activation: name of the function of the gate.
        dtype: the dtype of activations, as torch prints it, with or without `torch.`.
        capability: the GPU's compute capability, or None if the engine has no CUDA GPU.
    """

    experts: int
    hidden: int
    intermediate: int
    group_size: int
    has_zeros: bool
    activation: str
    dtype: str
    capability: tuple[int, int] | None

    @property
    def problems(self) -> tuple[Problem, Problem]:
        """The products of one row: gate and up together, and down."""
        shapes = (2 * self.intermediate, self.hidden), (self.hidden, self.intermediate)
        first, second = (Problem(1, n, k, k if self.group_size == -1 else self.group_size) for n, k in shapes)
        return first, second

    @property
    def mode(self) -> QuantMode:
        """The quantisation mode that both packed weights get."""
        modes = {mode_of(problem.k, problem.group_size, has_zeros=self.has_zeros) for problem in self.problems}
        return modes.pop() if len(modes) == 1 else QuantMode.FINEGRAINED_SCALE_ONLY


def mode_of(k: int, group_size: int, *, has_zeros: bool) -> QuantMode:
    """Return the mode of a weight with these groups.

    Args:
        k: reduction length.
        group_size: values of K that share a scale.
        has_zeros: whether it has zeros.
    """
    if has_zeros:
        return QuantMode.FINEGRAINED_SCALE_AND_ZEROS
    return QuantMode.PER_COLUMN_SCALE_ONLY if group_size == k else QuantMode.FINEGRAINED_SCALE_ONLY


def why_not_type(kind: Any, *, has_zeros: bool) -> str | None:
    """Return why weights of an engine's type are not read, or None.

    Args:
        kind: vLLM's or SGLang's scalar type.
        has_zeros: whether the layer has zero points.
    """
    stored = getattr(kind, "size_bits", None), getattr(kind, "bias", None) or 0
    if stored not in (_SYMMETRIC, _ASYMMETRIC):
        return f"weights of type {kind} must be uint4b8 or uint4: the kernels read 4-bit values"
    if bool(has_zeros) is not (stored == _ASYMMETRIC):
        return f"weights of type {kind} {'take no' if has_zeros else 'need'} zero points"
    return None


def why_not_served(request: LayerRequest) -> str | None:
    """Return why a layer is left to the engine's own kernels, or None if it is served. Compiles nothing.

    Args:
        request: the layer.
    """
    return why_off() or _why_not_dtype(request.dtype) or _why_not_gpu(request.capability) or _why_not_shape(request)


def why_experts_not_served(request: ExpertsRequest) -> str | None:
    """Return why a layer of experts is left to the engine's own kernels, or None if it is served. Compiles nothing.

    Args:
        request: the layer.
    """
    if reason := why_off() or _why_not_dtype(request.dtype) or _why_not_gpu(request.capability):
        return reason
    if request.activation not in GATED_ACTIVATIONS:
        return f"experts with activation {request.activation} must have one of {', '.join(GATED_ACTIVATIONS)}"
    if not 0 < request.experts <= MAX_EXPERTS:
        return f"experts of {request.experts} on one GPU must be 1 to {MAX_EXPERTS}: use more GPUs"
    return why_no_grouped_kernels(request.problems, request.mode)


def why_not_plain_experts(holders: Sequence[Any], options: Iterable[str], *, has_bias: bool) -> str | None:
    """Return why experts are more than two products and a gate, or None.

    Args:
        holders: objects of the engine that may have the options as attributes.
        options: names of what changes the gate, where it is not None.
        has_bias: whether the projections have biases.
    """
    if has_bias:
        return "experts with biases are not served"
    found = [name for name in options for holder in holders if getattr(holder, name, None) is not None]
    return f"experts with {found[0]} are not served: kernels compute the plain gate" if found else None


def why_no_grouped_kernels(problems: tuple[Problem, Problem], mode: QuantMode) -> str | None:
    """Return why the default build cannot run the products of a layer of experts, or None if it can.

    Args:
        problems: gate and up together, and down, of one expert.
        mode: the mode of the weights.
    """
    try:
        configs = library_in_use().grouped_configs()
    except (W4A16Error, OSError) as error:
        return f"no build can be used: {error}"
    for problem, epilogue in zip(problems, (gate_epilogue(configs, mode), Epilogue.NONE), strict=True):
        kernels = [kernel for kernel in configs if kernel.mode is mode and kernel.epilogue is epilogue]
        if not kernels:
            return (
                f"the build has no grouped kernel of mode {mode} with epilogue {epilogue}: run `w4a16gen build --space "
                "default --space experts --epilogue none --epilogue gated`"
            )
        reasons = [why_cannot_run(kernel, problem) for kernel in kernels]
        if None not in reasons:
            return reasons[0]
    return None


def _why_not_dtype(dtype: str) -> str | None:
    name = dtype.removeprefix("torch.")
    if name not in _DTYPES:
        return f"activations of dtype {name} must be float16 or bfloat16: pass --dtype float16"
    if name != FLOAT16 and switch() == FLOAT16:
        return f"activations of dtype {name} are refused because {PLUGINS_VARIABLE} is {FLOAT16}: pass --dtype float16"
    return None


def _why_not_gpu(capability: tuple[int, int] | None) -> str | None:
    if capability is None:
        return "there is no CUDA GPU: the kernels run on Hopper GPUs, compute capability 9.0"
    if tuple(capability) != HOPPER:
        return f"compute capability {capability[0]}.{capability[1]} must be 9.0: the kernels run on Hopper GPUs only"
    return None


def _why_not_shape(request: LayerRequest) -> str | None:
    if reason := why_never_runs(Problem(0, request.n, request.k, request.k)):
        return reason
    k, group = request.k, request.group
    if group == k:
        return why_no_kernel(Problem(1, request.n, k, k), request.mode)
    if request.regroups:
        smallest = Problem(1, request.n, NATIVE_GROUP_MULTIPLE, NATIVE_GROUP_MULTIPLE)
        return why_no_kernel(smallest, request.mode)
    if group <= 0 or group % NATIVE_GROUP_MULTIPLE != 0:
        return f"group size {group} must be -1, {k} (= k) or a multiple of {NATIVE_GROUP_MULTIPLE}"
    if k % group != 0:
        return f"k of {k} on this rank is no multiple of group size {group}: choose another tensor-parallel size"
    return why_no_kernel(Problem(1, request.n, k, group), request.mode)


def why_no_kernel(problem: Problem, mode: QuantMode) -> str | None:
    """Return why the default build cannot run a problem, or None if one of its native kernels can.

    Args:
        problem: the problem.
        mode: the weight's mode.
    """
    try:
        library = library_in_use()
        plain = [kernel for kernel in library.configs() if kernel.epilogue is Epilogue.NONE]  # engines ask for no other
        kernels = [kernel for kernel in plain if kernel.target is Target.NATIVE and kernel.mode is mode]
        reasons = [library.why_cannot_run(kernel, problem) for kernel in kernels]
    except (W4A16Error, OSError) as error:
        return f"no build can be used: {error}"
    if not reasons:
        return f"the build holds no native kernel of mode {mode}: build one with `w4a16gen build`"
    return None if None in reasons else reasons[0]
