"""The reference of experts: what it says of every kind of routing, and that its bound holds and is not wide."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from w4a16gen import InvalidValueError, QuantizedWeight, QuantMode
from w4a16gen.weights.gate_functions import ACTIVATIONS
from w4a16gen.weights.moe_reference import MoeExpectation, moe_reference, route_reference
from w4a16gen.weights.quantized import Half
from w4a16gen.weights.reference import dequantized_half, random_weight

HIDDEN, INTERMEDIATE, EXPERTS = 96, 64, 5
Weights = list[QuantizedWeight]
Projections = tuple[Weights, Weights, Weights]


def projections(
    seed: int = 0, mode: QuantMode = QuantMode.FINEGRAINED_SCALE_AND_ZEROS, size: float = 0.04
) -> Projections:
    rng = np.random.default_rng(seed)

    def made(n: int, k: int) -> Weights:
        return [random_weight(rng, n, k, 32, mode, size=size) for _ in range(EXPERTS)]

    return made(INTERMEDIATE, HIDDEN), made(INTERMEDIATE, HIDDEN), made(HIDDEN, INTERMEDIATE)


GATE, UP, DOWN = projections()


def silu(x: Any) -> Any:
    return x / (1 + np.exp(-x))


def token_by_token(hidden: Any, ids: Any, weights: Any, places: Any, *, on_input: bool) -> Any:
    """Compute in float64, each route for itself, in the plainest way."""
    out = np.zeros(hidden.shape)
    for token in range(len(hidden)):
        for slot in range(ids.shape[1]):
            expert = int(ids[token, slot])
            if places is not None:
                expert = int(places[expert]) if 0 <= expert < len(places) else -1
            if not 0 <= expert < EXPERTS:
                continue
            factor = float(weights[token, slot])
            x = hidden[token].astype(np.float64) * (factor if on_input else 1)
            h = silu(GATE[expert].dequantize() @ x) * (UP[expert].dequantize() @ x)
            out[token] += (DOWN[expert].dequantize() @ h) * (1 if on_input else factor)
    return out


routings = st.tuples(
    st.integers(0, 6), st.integers(1, 4), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 2**32 - 1)
)


@settings(max_examples=60)
@given(routings)
def test_random_routings_are_summed_route_by_route(case: tuple[int, int, bool, bool, bool, int]) -> None:
    tokens, slots, is_mapped, is_wide, on_input, seed = case
    rng = np.random.default_rng(seed)
    every = EXPERTS + 4
    ids: npt.NDArray[Any] = rng.integers(-3, every + 2, (tokens, slots))
    ids = ids.astype(np.int64 if is_wide else np.int32)
    places = None
    if is_mapped:
        places = np.full(every, -1, np.int32)
        places[rng.choice(every, EXPERTS, replace=False)] = rng.permutation(EXPERTS)
    hidden = rng.standard_normal((tokens, HIDDEN)).astype(np.float16)
    weights = rng.random((tokens, slots)).astype(np.float32)
    weights[(ids < 0) | (ids >= every)] = np.nan
    expectation = MoeExpectation(hidden, GATE, UP, DOWN, ids, weights, expert_map=places, weight_on_input=on_input)
    wanted = token_by_token(hidden, ids, weights, places, on_input=on_input)
    np.testing.assert_allclose(expectation.result, wanted, rtol=1e-9, atol=1e-12)
    alone = ~wanted.any(axis=1)
    assert not expectation.bound[alone].any()
    assert (expectation.bound[~alone] > 0).all()
    assert expectation.error_over_bound(wanted.astype(np.float16)) <= 1


@settings(max_examples=100)
@given(routings)
def test_routes_are_sorted_by_expert_and_keep_their_order(case: tuple[int, int, bool, bool, bool, int]) -> None:
    tokens, slots, is_mapped, is_wide, _, seed = case
    rng = np.random.default_rng(seed)
    ids = rng.integers(-3, EXPERTS + 3, (tokens, slots)).astype(np.int64 if is_wide else np.int32)
    places = rng.integers(-1, EXPERTS, EXPERTS + 1).astype(np.int32) if is_mapped else None
    offsets, rows = route_reference(ids, EXPERTS, places)
    wanted: list[list[int]] = [[] for _ in range(EXPERTS)]
    for place, number in enumerate(ids.reshape(-1).tolist()):
        if places is not None:
            number = int(places[number]) if 0 <= number < len(places) else -1  # noqa: PLW2901
        if 0 <= number < EXPERTS:
            wanted[number].append(place)
    assert {offsets.dtype, rows.dtype} == {np.dtype(np.int32)}
    assert [rows[start:end].tolist() for start, end in pairwise(offsets.tolist())] == wanted
    assert len(rows) == offsets[-1]


def fp32(values: Any) -> npt.NDArray[np.float32]:
    result: npt.NDArray[np.float32] = values.astype(np.float32)
    return result


FP32: dict[str, Callable[[Any], Any]] = {
    "silu": lambda x: x / (np.float32(1) + np.exp(-x)),
    "gelu": lambda x: (
        np.float32(0.5) * x * (1 + fp32(np.vectorize(math.erf, otypes=[np.float64])(x * np.float32(0.70710678))))
    ),
    "gelu_tanh": lambda x: (
        np.float32(0.5) * x * (1 + np.tanh(np.float32(0.79788456) * (x + np.float32(0.044715) * x * x * x)))
    ),
    "relu": lambda x: np.maximum(x, np.float32(0)),
}


def emulate(
    hidden: Half,
    ids: Any,
    weights: Any,
    activation: str,
    of: tuple[Weights, Weights, Weights],
    *,
    on_input: bool = False,
) -> Half:
    """Compute as kernels do: fp16 weights, sums in fp32, and a rounding to fp16 of every product."""
    gate, up, down = of

    def product(x: Half, weight: QuantizedWeight) -> Half:
        return (fp32(x) @ fp32(dequantized_half(weight)).T).astype(np.float16)

    out = np.zeros(hidden.shape, np.float32)
    for slot in range(ids.shape[1]):
        for token in range(len(hidden)):
            expert = ids[token, slot]
            if expert >= 0:
                factor = weights[token, slot]
                x = (hidden[token] * factor).astype(np.float16)[None] if on_input else hidden[token][None]
                g, u = fp32(product(x, gate[expert])), fp32(product(x, up[expert]))
                h = (FP32[activation](g) * u).astype(np.float16)
                y = fp32(product(h, down[expert]))[0]
                out[token] += y if on_input else factor * y
    return out.astype(np.float16)


def routing(rng: np.random.Generator, tokens: int = 24, slots: int = 3) -> tuple[Half, Any, Any]:
    hidden = rng.standard_normal((tokens, HIDDEN)).astype(np.float16)
    ids = rng.integers(-1, EXPERTS, (tokens, slots)).astype(np.int32)
    return hidden, ids, rng.random((tokens, slots)).astype(np.float32)


@pytest.mark.parametrize("mode", list(QuantMode)[-2:], ids=str)
@pytest.mark.parametrize("activation", FP32)
@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("size", [0.004, 0.04, 0.2])
def test_emulated_kernels_lie_within_the_bound(
    size: float, activation: str, mode: QuantMode, rng: np.random.Generator, *, on_input: bool
) -> None:
    of = projections(3, mode, size)
    hidden, ids, weights = routing(rng)
    hidden = (hidden * min(1.0, 0.1 / size)).astype(np.float16)
    expectation = MoeExpectation(hidden, *of, ids, weights, activation=activation, weight_on_input=on_input)
    got = emulate(hidden, ids, weights, activation, of, on_input=on_input)
    assert np.abs(expectation.result).max() < 30000
    assert 0.01 < expectation.error_over_bound(got) <= 1


@pytest.mark.parametrize(
    "mistake",
    [
        *("other expert", "gate for up", "no weight", "weight on input", "a slot less", "other activation"),
        *("unwritten", "doubled route once"),
    ],
)
def test_a_mistake_exceeds_the_bound(mistake: str, rng: np.random.Generator) -> None:
    hidden, ids, weights = routing(rng)
    ids[:2, :] = 3
    once = ids.copy()
    once[:2, 1:] = -1
    expectation = MoeExpectation(hidden, GATE, UP, DOWN, ids, weights)
    of = (GATE, UP, DOWN)
    wrong: dict[str, Callable[[], Half]] = {
        "other expert": lambda: emulate(hidden, np.where(ids == 2, 1, ids), weights, "silu", of),
        "gate for up": lambda: emulate(hidden, ids, weights, "silu", (UP, GATE, DOWN)),
        "no weight": lambda: emulate(hidden, ids, np.ones_like(weights), "silu", of),
        "weight on input": lambda: emulate(hidden, ids, weights, "silu", of, on_input=True),
        "a slot less": lambda: emulate(hidden, ids[:, :2], weights, "silu", of),
        "other activation": lambda: emulate(hidden, ids, weights, "gelu_tanh", of),
        "unwritten": lambda: np.full(hidden.shape, np.nan, np.float16),
        "doubled route once": lambda: emulate(hidden, once, weights, "silu", of),
    }
    assert expectation.error_over_bound(wrong[mistake]()) > 1


def test_a_token_without_experts_must_be_exactly_zero() -> None:
    hidden = np.full((1, HIDDEN), np.nan, np.float16)
    expectation = MoeExpectation(hidden, GATE, UP, DOWN, np.array([[-1, 7]]), np.full((1, 2), np.nan, np.float32))
    got = np.zeros((1, HIDDEN), np.float16)
    assert expectation.error_over_bound(got) == 0
    got[0, 3] = 6e-8
    assert expectation.error_over_bound(got) == float("inf")


def test_the_bound_is_no_wider_than_rounding_explains() -> None:
    """One route of one product each: a few halves of a last place, where all values are 1 or silu of it."""
    mode = QuantMode.FINEGRAINED_SCALE_ONLY
    one = [QuantizedWeight(np.full((8, 32), 9, np.uint8), np.full((1, 8), 1 / 32, np.float16), None, 32, mode)]
    down = [QuantizedWeight(np.full((32, 8), 9, np.uint8), np.full((1, 32), 1 / 8, np.float16), None, 8, mode)]
    expectation = MoeExpectation(
        np.ones((1, 32), np.float16), one, one, down, np.zeros((1, 1), np.int32), np.ones((1, 1), np.float32)
    )
    assert expectation.result[0, 0] == pytest.approx(silu(1.0))
    unit = 2.0**-11 * silu(1.0)
    # Weight and product, once for the gate with slope 0.928 / 0.731, once for up; h; weight and product of down; out.
    assert expectation.bound[0, 0] / unit == pytest.approx(2 * 1.269 + 2 + 1 + 2 + 1, rel=0.02)


def constant(rows: int, columns: int, value: float, other: float | None = None) -> list[QuantizedWeight]:
    """Return one expert whose weights are one value, or in turn two of which the second is negative."""
    scale = max(abs(value), abs(other or 0))
    signs = np.where(np.arange(columns) % 2 == 0, 1, 1 if other is None else -1)
    q = np.broadcast_to(8 + signs, (rows, columns)).astype(np.uint8)
    mode = QuantMode.FINEGRAINED_SCALE_ONLY
    return [QuantizedWeight(q, np.full((1, rows), scale, np.float16), None, columns, mode)]


def of_one_token(hidden: Half, gate: Weights, up: Weights, activation: str, factor: float = 1.0, **more: Any) -> Any:
    """Return the expectation of a token, one route, and a down projection that adds all rows."""
    down = constant(hidden.size, gate[0].n, 1.0)
    ids, weights = np.zeros((1, 1), np.int32), np.full((1, 1), factor, np.float32)
    return MoeExpectation(hidden[None], gate, up, down, ids, weights, activation=activation, **more)


def test_errors_of_gate_and_up_multiply() -> None:
    """Weights of 1 and -1 in turn, each off by half of a last place in one direction: both products are off by 1."""
    pairs = constant(8, 32, 1.0, -1.0)
    hidden = np.full(32, 64, np.float16)
    expectation = of_one_token(hidden, pairs, pairs, "silu")
    assert not expectation.result.any()
    off = 32 * 64 * 2.0**-11
    wrong = np.full((1, 32), 8 * silu(off) * off)
    assert 0.9 < expectation.error_over_bound(wrong) <= 1


def test_the_curvature_of_the_activation_counts() -> None:
    """The gate is where silu is least, so that its slope is 0, and off by 1."""
    pairs, one = constant(8, 32, 1.0, -1.0), constant(8, 32, 1 / 32)
    hidden = np.full(32, 64, np.float16)
    hidden[0] -= np.float16(1.28125)
    expectation = of_one_token(hidden, pairs, one, "silu")
    gate, up = float(hidden[0]) - 64, float(hidden.astype(np.float64).sum() / 32)
    assert expectation.result[0, 0] == pytest.approx(8 * silu(gate) * up)
    wrong = np.full((1, 32), 8 * silu(gate + 1) * up)
    assert 0.1 < expectation.error_over_bound(wrong) <= 1


def test_the_cancellation_of_gelu_counts() -> None:
    """fp32 subtracts numbers near 1 where x is about -5, which leaves few bits."""
    gate, up = constant(8, 32, 1 / 32), constant(8, 32, 4.0)
    for value in np.linspace(4.5, 5.4, 19).astype(np.float16):
        expectation = of_one_token(np.full(32, -value), gate, up, "gelu")
        x, factor = np.float32(-value), np.float32(-value) * 128
        normal = np.float32(0.5) * (np.float32(1) + np.float32(math.erf(x / np.sqrt(np.float32(2)))))
        h = np.float16(x * normal * factor)
        got = np.full((1, 32), 8 * np.float64(h)).astype(np.float16)
        assert expectation.error_over_bound(got) <= 1
        cut = 0.5 * np.float64(x * factor) * 2.0**-24  # a last place of erf, which is near -1
        assert expectation.error_over_bound(expectation.result + 8 * cut) <= 1


def test_an_input_that_is_subnormal_after_its_weight_is_half_of_a_step_off() -> None:
    large = constant(8, 32, 4096.0)
    factor = 2.5 * 2.0**-24
    expectation = of_one_token(np.ones(32, np.float16), large, large, "relu", factor, weight_on_input=True)
    stored = np.float64(np.float16(factor))
    assert abs(stored - factor) == 2.0**-25
    wrong = np.full((1, 32), 8 * (32 * 4096 * stored) ** 2)
    assert 0.5 < expectation.error_over_bound(wrong) <= 1


def test_each_of_many_sums_may_be_cut() -> None:
    """Every addition of fp32 is off by a last place in the same direction."""
    slots = 1 << 18
    one, down = constant(8, 8, 1 / 8), constant(8, 8, 2.0**-12)
    ids, weights = np.zeros((1, slots), np.int32), np.ones((1, slots), np.float32)
    expectation = MoeExpectation(np.ones((1, 8), np.float16), one, one, down, ids, weights)
    term = expectation.result[0, 0] / slots
    wrong = np.full((1, 8), (term * (1 - 2.0**-23) ** np.arange(slots, 0, -1)).sum())
    assert 0.2 < expectation.error_over_bound(wrong) <= 1


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slopes_and_curvatures_are_those_of_the_function(activation: str) -> None:
    function = ACTIVATIONS[activation]
    x = np.linspace(-12, 12, 100_001)
    step = x[1] - x[0]
    slope = np.diff(function.of(x)) / step
    middle = (x[1:] + x[:-1]) / 2
    if activation == "relu":
        assert (np.abs(slope) <= function.slope(middle) + 1e-9).all()
        return
    np.testing.assert_allclose(np.abs(slope), function.slope(middle), atol=1e-7)
    curvature = np.abs(np.diff(slope) / step).max()
    assert 0.9 * function.curvature < curvature <= function.curvature


def test_wrong_arguments_are_refused(rng: np.random.Generator) -> None:
    hidden, ids, weights = routing(rng, 4, 2)
    good: dict[str, Any] = {
        "hidden": hidden,
        "gate": GATE,
        "up": UP,
        "down": DOWN,
        "topk_ids": ids,
        "topk_weights": weights,
    }
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {"hidden": hidden.astype(np.float32)},
            r"hidden of dtype float32 and shape \[4, 96\] must be float16 \[tokens, 96\]",
        ),
        ({"hidden": hidden[:, 1:]}, r"hidden of dtype float16 and shape \[4, 95\] must be float16 \[tokens, 96\]"),
        (
            {"topk_weights": weights.astype(np.float16)},
            r"topk_weights of dtype float16 and shape \[4, 2\] must be float32",
        ),
        ({"topk_weights": weights[:3]}, r"topk_ids of shape \[4, 2\] and topk_weights of shape \[3, 2\] must be"),
        ({"topk_ids": ids.astype(np.float32)}, "topk_ids of dtype float32"),
        ({"expert_map": ids}, r"expert_map of dtype int32 and shape \[4, 2\] must be integers \[all experts\]"),
        ({"activation": "tanh"}, "activation 'tanh' must be one of silu, gelu"),
        ({"down": DOWN[:2]}, "gate, up and down of 5, 5, 2 experts"),
        ({"topk_ids": ids.tolist()}, r"topk_ids of type list must be integers \[tokens, slots\]"),
        ({"topk_ids": np.array(0), "topk_weights": np.array(1, np.float32)}, r"topk_ids of .* and shape \[\] must be"),
        ({"activation": ["silu"]}, r"activation a value of type list must be one of silu"),
        ({"gate": None}, "gate of type NoneType must be a sequence of QuantizedWeight"),
        ({"up": (weight for weight in UP)}, "up of type generator must be a sequence"),
        ({"gate": [None, *GATE[1:]]}, "gate of expert 0 of type NoneType must be a QuantizedWeight"),
        ({"up": [*UP[:4], UP[4].q]}, "up of expert 4 of type ndarray must be a QuantizedWeight"),
        ({"down": GATE}, r"down of expert 0 is \[64, 96\], but must be \[96, 64\]"),
    ]
    for changes, message in cases:
        with pytest.raises(InvalidValueError, match=message):
            moe_reference(**{**good, **changes})


@pytest.mark.parametrize(
    ("experts", "message"),
    [(0, "experts of 0 must be 1 to 4096"), (2**40, "must be 1 to 4096"), (2.0, "experts of type float must be")],
)
def test_a_number_of_experts_that_no_layer_has_is_refused(experts: Any, message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        route_reference(np.zeros((1, 1), np.int32), experts)
