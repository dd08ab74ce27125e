"""The error bounds of the proofs: right results pass, small mistakes of every kind do not."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from w4a16gen import QuantMode
from w4a16gen.verify.numeric import cases, compare_exact
from w4a16gen.weights.quantized import Half, Nibbles, QuantizedWeight
from w4a16gen.weights.reference import Expectation, dequantized_half, error_over_bound, random_weight

ALPHA = 0.75


def emulate(a: Half, weight: QuantizedWeight, bias: Half) -> Half:
    """Compute as a kernel does: fp16 weights, products added one by one in truncated fp32, one rounding to fp16."""
    per_column = weight.mode is QuantMode.PER_COLUMN_SCALE_ONLY
    values = weight.q.astype(np.float32) - 8 if per_column else dequantized_half(weight).astype(np.float32)
    total = np.zeros((len(a), weight.n), np.float32)
    for position in range(weight.k):
        exact = total.astype(np.float64) + a[:, position, None].astype(np.float64) * values[:, position]
        total = truncate(exact)
    factor = np.float32(ALPHA) * (weight.scales.astype(np.float32) if per_column else np.float32(1))
    return (total * factor + bias.astype(np.float32)).astype(np.float16)


def truncate(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """Round towards zero to fp32."""
    rounded = values.astype(np.float32)
    too_large = np.abs(rounded.astype(np.float64)) > np.abs(values)
    return np.where(too_large, np.nextafter(rounded, np.float32(0)), rounded)


@pytest.fixture(params=list(QuantMode), ids=str)
def weight(request: pytest.FixtureRequest, rng: np.random.Generator) -> QuantizedWeight:
    """Return a weight of each mode."""
    return random_weight(rng, 24, 512, 128, request.param)


def test_an_emulated_kernel_lies_within_the_bound(weight: QuantizedWeight, rng: np.random.Generator) -> None:
    a = rng.standard_normal((9, weight.k)).astype(np.float16)
    bias = rng.standard_normal(weight.n).astype(np.float16)
    ratio = error_over_bound(emulate(a, weight, bias), Expectation(a, weight), ALPHA, bias)
    assert 0 < ratio <= 1


@pytest.mark.parametrize(
    "mistake", ["scale of the next group", "no bias", "alpha of 1", "values one too large", "unwritten"]
)
def test_a_mistake_exceeds_the_bound(weight: QuantizedWeight, rng: np.random.Generator, mistake: str) -> None:
    a = rng.standard_normal((9, weight.k)).astype(np.float16)
    bias = rng.standard_normal(weight.n).astype(np.float16)
    scales, zeros = weight.scales, weight.zeros

    def changed(q: Nibbles, scales: Half) -> QuantizedWeight:
        return QuantizedWeight(q, scales, zeros, weight.group_size, weight.mode)

    if mistake == "scale of the next group":
        wrong = emulate(a, changed(weight.q, np.roll(scales, 1)), bias)
    elif mistake == "no bias":
        wrong = emulate(a, weight, np.zeros_like(bias))
    elif mistake == "alpha of 1":
        wrong = emulate((a / ALPHA).astype(np.float16), weight, bias)
    elif mistake == "values one too large":
        wrong = emulate(a, changed(np.minimum(weight.q + np.uint8(1), np.uint8(15)), scales), bias)
    else:
        wrong = np.full((9, weight.n), np.nan, np.float16)
    assert error_over_bound(wrong, Expectation(a, weight), ALPHA, bias) > 1


def test_one_hot_comparison_sees_a_single_bit(weight: QuantizedWeight) -> None:
    exact = dequantized_half(weight).T.copy()
    assert compare_exact(exact, weight) is None
    exact.view(np.uint16)[5, 3] ^= 1
    message = compare_exact(exact, weight)
    assert message is not None
    assert "first at k=5 n=3" in message


@pytest.mark.parametrize("mode", QuantMode, ids=str)
def test_no_case_of_the_numerical_proofs_leaves_the_range_of_fp16(mode: QuantMode) -> None:
    rng = np.random.default_rng(0)
    for case in cases(mode, rng):
        a = rng.standard_normal((min(case.rows, 64), case.weight.k)).astype(np.float16)
        expected = Expectation(a, case.weight)
        for alpha, _ in case.options:
            assert np.abs(expected.result(alpha, None)).max() < 30000, str(case)


@pytest.mark.parametrize(
    ("mode", "bound"),
    [
        (QuantMode.PER_COLUMN_SCALE_ONLY, 0.00049642),
        (QuantMode.FINEGRAINED_SCALE_ONLY, 0.00098685),
        (QuantMode.FINEGRAINED_SCALE_AND_ZEROS, 0.00098685),
    ],
    ids=str,
)
def test_the_bound_is_no_wider_than_rounding_explains(mode: QuantMode, bound: float) -> None:
    """A sum of 1 from 64 products: half a unit of fp16's last place, and as much again where weights are rounded."""
    q, scales = np.full((1, 64), 9, np.uint8), np.full((1, 1), 1 / 64, np.float16)
    zeros = np.zeros_like(scales) if mode.has_zeros else None
    weight = QuantizedWeight(q, scales if mode.is_grouped else scales[0], zeros, 64, mode)
    expected = Expectation(np.ones((1, 64), np.float16), weight)
    assert expected.result(1.0, None).item() == 1
    assert expected.bound(1.0, None).item() == pytest.approx(bound, rel=1e-4)
