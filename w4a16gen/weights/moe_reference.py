"""The exact result of a layer of experts, and how far a kernel's fp16 result may lie from it.

For each route of a token to an expert with weight r:

    gate, up = x Wg, x Wu        each rounded to fp16
    h = act(gate) * up           computed in fp32, rounded to fp16
    y = h Wd                     rounded to fp16
    out = sum of r * y           in fp32, in the order of the slots, rounded to fp16

Errors pass on like this. A derivative bounds what the activation makes of the gate's error, and half of its largest
second derivative bounds the rest. The down projection carries the error of h through the magnitudes of its weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.config import shown
from w4a16gen.kernels.integers import integer
from w4a16gen.weights.gate_functions import ACTIVATIONS
from w4a16gen.weights.importers.stored import MAX_EXPERTS
from w4a16gen.weights.quantized import Double, Half, QuantizedWeight
from w4a16gen.weights.reference import FLOAT_TRUNCATION, HALF_ROUNDING, HALF_UNDERFLOW, Expectation

_MATRIX = 2


_EVALUATION_ROUNDINGS = 8
"""fp32 roundings of an activation and of its product with the up projection, beside those of its argument."""
_ARGUMENT_ROUNDINGS = 2
"""fp32 roundings of the argument of the exponential function, each of which changes the result by as much as it is."""


class MoeExpectation:
    """The exact result of a layer of experts in float64, and what rounding may add to it.

    Attributes:
        result: float64 [tokens, hidden].
        bound: float64 [tokens, hidden], the largest error that rounding explains; 0 for tokens without experts.
    """

    def __init__(
        self,
        hidden: Half,
        gate: Sequence[QuantizedWeight],
        up: Sequence[QuantizedWeight],
        down: Sequence[QuantizedWeight],
        topk_ids: npt.NDArray[Any],
        topk_weights: npt.NDArray[np.float32],
        *,
        expert_map: npt.NDArray[Any] | None = None,
        activation: str = "silu",
        weight_on_input: bool = False,
    ) -> None:
        """Compute the result and the bound. Arguments and errors are those of `moe_reference`."""
        shape = _checked_shape(hidden, topk_ids, topk_weights, (gate, up, down))
        if not isinstance(activation, str) or activation not in ACTIVATIONS:
            raise InvalidValueError(f"activation {shown(activation)} must be one of {', '.join(ACTIVATIONS)}")
        ids = local_ids(topk_ids, len(gate), expert_map)
        exact, carried, size = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        for expert in np.unique(ids[ids >= 0]):
            tokens, slots = np.nonzero(ids == expert)
            factors = topk_weights[tokens, slots].astype(np.float64)[:, None]
            x = hidden[tokens].astype(np.float64)
            error = None
            if weight_on_input:  # a product with the factor in 16 bits; one that is applied later rounds less
                x, factors = x * factors, np.ones_like(factors)
                error = HALF_ROUNDING * np.abs(x) + HALF_UNDERFLOW
            h, h_error = _gated(Expectation(x, gate[expert], error), Expectation(x, up[expert], error), activation)
            product = Expectation(h, down[expert], h_error)
            y, y_error = product.result(1.0, None), product.bound(1.0, None)
            # A token may name an expert twice, so that rows are added one by one.
            np.add.at(exact, tokens, factors * y)
            np.add.at(carried, tokens, np.abs(factors) * y_error)
            np.add.at(size, tokens, np.abs(factors) * (np.abs(y) + y_error))
        before_store = carried + (ids.shape[1] + 1) * FLOAT_TRUNCATION * size
        bound = before_store + HALF_ROUNDING * (np.abs(exact) + before_store) + HALF_UNDERFLOW
        self.result: Double = exact
        self.bound: Double = np.where((ids >= 0).any(axis=1, keepdims=True), bound, 0.0)

    def error_over_bound(self, got: npt.NDArray[Any]) -> float:
        """Return the largest error as a multiple of its bound; infinity where a value is not finite.

        Args:
            got: what a kernel has computed, [tokens, hidden].
        """
        error = np.abs(got.astype(np.float64) - self.result)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(error == 0, 0.0, error / self.bound)
        return float("inf") if np.isnan(ratio).any() else float(ratio.max(initial=0.0))


def moe_reference(
    hidden: Half,
    gate: Sequence[QuantizedWeight],
    up: Sequence[QuantizedWeight],
    down: Sequence[QuantizedWeight],
    topk_ids: npt.NDArray[Any],
    topk_weights: npt.NDArray[np.float32],
    *,
    expert_map: npt.NDArray[Any] | None = None,
    activation: str = "silu",
    weight_on_input: bool = False,
) -> Double:
    """Return the result of a layer of experts in float64, [tokens, hidden], exact up to float64.

    The result of a token is the sum over its routes of weight * (act(x Wg) * (x Wu)) Wd. Routes to no expert and to
    experts elsewhere count nothing. An expert that a token names twice counts twice.

    Args:
        hidden: activations, fp16 [tokens, hidden].
        gate: gate projection of each local expert, [intermediate, hidden].
        up: up projection of each local expert, [intermediate, hidden].
        down: down projection of each local expert, [hidden, intermediate].
        topk_ids: number of the expert of each route, int32 or int64 [tokens, slots]. Numbers below 0, and those that
            name no local expert, are skipped.
        topk_weights: weight of each route, fp32 [tokens, slots]. Those of skipped routes may be anything.
        expert_map: number of the local expert for each of all experts, or -1, integers [all experts]; None if ids are
            numbers of local experts already.
        activation: one of `ACTIVATIONS`.
        weight_on_input: whether the weight multiplies the activations, before the first product.

    Raises:
        InvalidValueError: if a dtype or a shape is off, or the activation is unknown.

    Example:
        >>> import numpy as np
        >>> from w4a16gen.weights.quantize import quantize
        >>> gate, up, down = ([quantize(np.eye(64), group_size=32)] for _ in range(3))
        >>> hidden, ids = np.ones((1, 64), np.float16), np.array([[0, -1]])
        >>> weights = np.array([[1, np.nan]], np.float32)
        >>> round(float(moe_reference(hidden, gate, up, down, ids, weights)[0, 0]), 2)  # 1 / (1 + exp(-1))
        0.73
    """
    expectation = MoeExpectation(
        hidden,
        gate,
        up,
        down,
        topk_ids,
        topk_weights,
        expert_map=expert_map,
        activation=activation,
        weight_on_input=weight_on_input,
    )
    return expectation.result


def _gated(gate: Expectation, up: Expectation, activation: str) -> tuple[Double, Double]:
    """Return act(gate) * up, and its error after rounding to fp16."""
    function = ACTIVATIONS[activation]
    g, u = gate.result(1.0, None), up.result(1.0, None)
    g_error, u_error = gate.bound(1.0, None), up.bound(1.0, None)
    value = function.of(g)
    moved = function.slope(g) * g_error + 0.5 * function.curvature * g_error**2
    exact = value * u
    carried = moved * (np.abs(u) + u_error) + np.abs(value) * u_error
    roundings = _EVALUATION_ROUNDINGS + _ARGUMENT_ROUNDINGS * (np.abs(g) + g_error)
    evaluated = roundings * FLOAT_TRUNCATION * (function.rounded(g) + moved) * (np.abs(u) + u_error)
    before_store = carried + evaluated
    error: Double = before_store + HALF_ROUNDING * (np.abs(exact) + before_store) + HALF_UNDERFLOW
    return exact, error


def local_ids(
    topk_ids: npt.NDArray[Any], experts: int, expert_map: npt.NDArray[Any] | None = None
) -> npt.NDArray[np.int64]:
    """Return the number of the local expert of each route, int64 [tokens, slots]; -1 for routes that are skipped.

    Args:
        topk_ids: number of the expert of each route, integers [tokens, slots].
        experts: number of local experts.
        expert_map: number of the local expert for each of all experts, or -1; None if ids are local already.

    Raises:
        InvalidValueError: if ids or map are no integers of these shapes, or the number of experts is out of range.
    """
    if not 1 <= integer("experts", experts) <= MAX_EXPERTS:
        raise InvalidValueError(f"experts of {experts} must be 1 to {MAX_EXPERTS}")
    ids = _integers("topk_ids", topk_ids, _MATRIX)
    if expert_map is not None:
        places = _integers("expert_map", expert_map, 1)
        known = (ids >= 0) & (ids < len(places))
        ids = np.where(known, np.append(places, -1)[np.where(known, ids, len(places))], -1)
    return np.where((ids >= 0) & (ids < experts), ids, -1)


def route_reference(
    topk_ids: npt.NDArray[Any], experts: int, expert_map: npt.NDArray[Any] | None = None
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Return the routes sorted by expert: what a grouped product needs to know of a routing.

    Args:
        topk_ids: number of the expert of each route, int32 or int64 [tokens, slots].
        experts: number of local experts.
        expert_map: number of the local expert for each of all experts, or -1; None if ids are local already.

    Returns:
        `offsets`, int32 [experts + 1]: the routes of expert e are `rows[offsets[e]:offsets[e + 1]]`.
        `rows`, int32 [routes]: token * slots + slot, in ascending order within an expert. Skipped routes are absent.

    Raises:
        InvalidValueError: if ids or map are no integers of these shapes, or the number of experts is out of range.

    Example:
        >>> import numpy as np
        >>> offsets, rows = route_reference(np.array([[2, 0], [0, -1]]), experts=3)
        >>> offsets.tolist(), rows.tolist()
        ([0, 2, 2, 3], [1, 2, 0])
    """
    ids = local_ids(topk_ids, experts, expert_map).reshape(-1)
    rows = np.argsort(ids, kind="stable")
    rows = rows[np.count_nonzero(ids < 0) :]
    counts = np.bincount(ids[ids >= 0], minlength=experts)
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int32), rows.astype(np.int32)


def _kind_of(values: Any) -> str:
    """Return what messages say of a value."""
    if not isinstance(values, np.ndarray):
        return f"type {type(values).__name__}"
    return f"dtype {values.dtype} and shape {list(values.shape)}"


def _integers(name: str, values: Any, rank: int) -> npt.NDArray[np.int64]:
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "iu" or values.ndim != rank:
        wanted = "[tokens, slots]" if rank == _MATRIX else "[all experts]"
        raise InvalidValueError(f"{name} of {_kind_of(values)} must be integers {wanted}")
    return values.astype(np.int64)


def _weight(name: str, value: Any) -> QuantizedWeight:
    if not isinstance(value, QuantizedWeight):
        raise InvalidValueError(f"{name} of type {type(value).__name__} must be a QuantizedWeight")
    return value


def _checked_shape(
    hidden: Any, topk_ids: Any, topk_weights: Any, projections: tuple[Sequence[QuantizedWeight], ...]
) -> tuple[int, int]:
    """Return tokens and hidden size.

    Raises:
        InvalidValueError: if a dtype or a shape is off.
    """
    gate, up, down = projections
    for name, of_role in zip(("gate", "up", "down"), projections, strict=True):
        if not isinstance(of_role, Sequence):
            raise InvalidValueError(f"{name} of type {type(of_role).__name__} must be a sequence of QuantizedWeight")
    if not gate or len({len(of_role) for of_role in projections}) != 1:
        counts = ", ".join(str(len(of_role)) for of_role in projections)
        raise InvalidValueError(f"gate, up and down of {counts} experts must be of the same experts, one or more")
    first = _weight("gate of expert 0", gate[0])
    intermediate, size = first.n, first.k
    for name, of_role, wanted in (
        ("gate", gate, (intermediate, size)),
        ("up", up, (intermediate, size)),
        ("down", down, (size, intermediate)),
    ):
        for index, given in enumerate(of_role):
            weight = _weight(f"{name} of expert {index}", given)
            if (weight.n, weight.k) != wanted:
                raise InvalidValueError(
                    f"{name} of expert {index} is {[weight.n, weight.k]}, but must be {list(wanted)}"
                )
    if not isinstance(hidden, np.ndarray) or hidden.dtype != np.float16 or hidden.shape[1:] != (size,):
        raise InvalidValueError(f"hidden of {_kind_of(hidden)} must be float16 [tokens, {size}]")
    if not isinstance(topk_weights, np.ndarray) or topk_weights.dtype != np.float32:
        raise InvalidValueError(f"topk_weights of {_kind_of(topk_weights)} must be float32 [tokens, slots]")
    ids = _integers("topk_ids", topk_ids, _MATRIX)
    if ids.shape != topk_weights.shape or len(ids) != len(hidden):
        raise InvalidValueError(
            f"topk_ids of shape {list(ids.shape)} and topk_weights of shape {list(topk_weights.shape)} must "
            f"be [{len(hidden)}, slots]"
        )
    return len(hidden), size
