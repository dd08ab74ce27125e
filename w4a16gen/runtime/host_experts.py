"""Calls of `moe` on the host: the numpy reference, for numpy arrays and torch tensors in host memory."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from w4a16gen.errors import InvalidValueError
from w4a16gen.runtime.arrays import check_activations_shape, refuse_gradients, why_not_contiguous
from w4a16gen.runtime.expert_calls import MoeOptions, check_packed, check_pair
from w4a16gen.runtime.host import operand
from w4a16gen.weights.experts import PackedExperts
from w4a16gen.weights.host import host_array, is_tensor
from w4a16gen.weights.moe_reference import local_ids, moe_reference
from w4a16gen.weights.quantized import Double, QuantizedWeight


def moe_on_host(
    hidden: Any, w13: PackedExperts, w2: PackedExperts, topk_ids: Any, topk_weights: Any, options: MoeOptions
) -> Any:
    """Compute a call of `moe` in float64, rounded once to fp16, behind the checks of a call on a GPU.

    Raises:
        InvalidValueError: if the arrays do not fit together.
    """
    on_input = options.scalars().weight_on_input
    for name, w in (("w13", w13), ("w2", w2)):
        check_packed(name, w)
    check_pair(w13, w2)
    states = operand("hidden", hidden)
    check_activations_shape(states.shape, w2.n, hidden=True)
    result = None if options.out is None else operand("output", options.out, written=True)
    if result is not None and result.shape != states.shape:
        raise InvalidValueError(f"output of shape {list(result.shape)} must be {list(states.shape)}")
    for name, array in (("hidden", states), ("output", result)):
        if array is not None and not array.flags.c_contiguous:
            raise InvalidValueError(why_not_contiguous(name))
    ids, factors = (_array(name, given) for name, given in (("topk_ids", topk_ids), ("topk_weights", topk_weights)))
    places = None if options.expert_map is None else _array("expert_map", options.expert_map)
    with np.errstate(over="ignore", invalid="ignore"):  # beyond 65504 is infinity, as on the GPU
        exact = _exact(states, (w13, w2), local_ids(ids, w13.experts, places), factors, options.activation, on_input)
        rounded = exact.astype(np.float16)
    if result is not None:
        result[...] = rounded
        return options.out
    return sys.modules["torch"].from_numpy(rounded) if is_tensor(hidden) else rounded


def _array(name: str, value: Any) -> npt.NDArray[Any]:
    """Return a numpy array, or a torch tensor in host memory as one.

    Raises:
        InvalidValueError: if it is neither, or a gradient is to be recorded for it.
    """
    if is_tensor(value):
        refuse_gradients(name, value)
    elif not isinstance(value, np.ndarray):
        raise InvalidValueError(f"{name} of type {type(value).__name__} must be a numpy array or a torch tensor")
    return host_array(name, value, must_be="a dtype of numpy")


def _exact(
    states: npt.NDArray[Any],
    packed: tuple[PackedExperts, PackedExperts],
    local: npt.NDArray[np.int64],
    factors: npt.NDArray[Any],
    activation: str,
    on_input: bool,
) -> Double:
    """Return the reference of the experts that are named, which are unpacked one after the other."""
    w13, w2 = packed
    named = np.unique(local[local >= 0])
    used = named if named.size else np.zeros(1, np.int64)  # an expert without rows, for the checks
    gates: list[QuantizedWeight] = []
    ups: list[QuantizedWeight] = []
    for expert in used:
        both = w13.expert(int(expert)).unpack()
        gates.append(both.channels(slice(0, w2.k)))
        ups.append(both.channels(slice(w2.k, 2 * w2.k)))
    downs = [w2.expert(int(expert)).unpack() for expert in used]
    ids = np.where(local >= 0, np.searchsorted(used, local), -1)
    return moe_reference(states, gates, ups, downs, ids, factors, activation=activation, weight_on_input=on_input)
