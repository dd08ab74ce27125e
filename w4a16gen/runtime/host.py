"""Calls of `gemm` on the host: the numpy reference, for numpy arrays and torch tensors in host memory."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from w4a16gen.errors import InvalidValueError, UnsupportedProblemError
from w4a16gen.kernels.config import KernelConfig
from w4a16gen.kernels.legality import why_forbidden
from w4a16gen.kernels.problem import Problem, why_cannot_run, why_never_runs
from w4a16gen.runtime.arrays import (
    READ_ONLY,
    check_activations_shape,
    refuse_gradients,
    why_not_contiguous,
    why_overlaps,
)
from w4a16gen.runtime.calls import GemmOptions, check_kernel
from w4a16gen.weights.host import host_array, is_tensor
from w4a16gen.weights.packed import PackedWeight
from w4a16gen.weights.reference import gemm_reference


def gemm_on_host(a: Any, w: PackedWeight, options: GemmOptions) -> Any:
    """Compute a call of `gemm` in float64, behind the checks that a kernel would make.

    Raises:
        InvalidValueError: if the arrays do not fit together.
        UnsupportedProblemError: if the kernel that is named cannot run the problem.
    """
    alpha, kernel, _ = options.scalars()
    epilogue = options.epilogue(w)
    activations = operand("activations", a)
    check_activations_shape(activations.shape, w.k)
    shape = activations.shape[0], epilogue.outputs(w.n)
    bias = None if options.bias is None else operand("bias", options.bias)
    residual = None if options.residual is None else operand("residual", options.residual)
    out = None if options.out is None else operand("output", options.out, written=True)
    for name, array, wanted in (("bias", bias, (w.n,)), ("residual", residual, shape), ("output", out, shape)):
        if array is not None and array.shape != wanted:
            raise InvalidValueError(f"{name} of shape {list(array.shape)} must be {list(wanted)}")
    for name, array in (("activations", activations), ("bias", bias), ("residual", residual), ("output", out)):
        if array is not None and not array.flags.c_contiguous:
            raise InvalidValueError(why_not_contiguous(name))
    in_place = out is not None and residual is not None and out.ctypes.data == residual.ctypes.data
    apart = None if in_place else residual
    for name, read in (
        *(("activations", activations), ("packed weight", w.host_data())),
        *(("bias", bias), ("residual", apart)),
    ):
        if out is not None and read is not None and np.may_share_memory(out, read):
            raise InvalidValueError(why_overlaps(name))
    problem = Problem(shape[0], w.n, w.k, w.group_size)
    if kernel is not None:
        _check_can_be_built(kernel)
        check_kernel(kernel, w, epilogue)
    reason = why_never_runs(problem) if kernel is None else why_cannot_run(kernel, problem)
    if reason is not None:
        raise UnsupportedProblemError(reason)
    with np.errstate(over="ignore", invalid="ignore"):  # beyond 65504 is infinity, as on the GPU
        exact = gemm_reference(
            activations, w.unpack(), alpha=alpha, bias=bias, activation=epilogue.activation, residual=residual
        )
        result = exact.astype(np.float16)
    if out is None:
        return _like(result, a)
    out[...] = result
    return options.out


def _check_can_be_built(kernel: KernelConfig) -> None:
    """Raise unless a build can hold a kernel.

    Raises:
        InvalidValueError: naming the kernel and the rule.
    """
    forbidden = why_forbidden(kernel)
    if forbidden is not None:
        raise InvalidValueError(f"{kernel.name}: {forbidden}")


def operand(name: str, array: Any, *, written: bool = False) -> npt.NDArray[Any]:
    """Return a numpy array, or a torch tensor in host memory, as the fp16 numpy array that shares its memory.

    Raises:
        InvalidValueError: if it is anything else, or may not be written though it must.
    """
    if is_tensor(array):
        refuse_gradients(name, array)
        if str(array.dtype) != "torch.float16":
            raise InvalidValueError(
                f"{name} of dtype {str(array.dtype).removeprefix('torch.')} must be float16: convert it first"
            )
        array = host_array(name, array)
    if not isinstance(array, np.ndarray) or isinstance(array, np.ma.MaskedArray):
        raise InvalidValueError(
            f"{name} of type {type(array).__name__} must be a numpy array or a torch tensor, all on the host or all on "
            "one GPU"
        )
    if array.dtype != np.float16:
        raise InvalidValueError(f"{name} of dtype {array.dtype} must be float16: convert it first")
    if written and not array.flags.writeable:
        raise InvalidValueError(f"{name} {READ_ONLY}")
    return np.asarray(array)


def _like(result: npt.NDArray[Any], array: Any) -> Any:
    """Return a result as a torch tensor if the array is one, without a copy."""
    return sys.modules["torch"].from_numpy(result) if is_tensor(array) else result
