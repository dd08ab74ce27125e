"""Scales that fp16 cannot hold: what is exact, what alpha repairs, and what the report says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from fakes.checkpoints import packers
from fakes.checkpoints.files import BFloat16, write_folder
from hypothesis import given
from hypothesis import strategies as st

import w4a16gen
from w4a16gen import InvalidValueError
from w4a16gen.weights.importers.rounding import round_factors
from w4a16gen.weights.importers.stored import Factors

Array = npt.NDArray[Any]
N, K, GROUPS = 16, 128, 2
NAME = "lm_head"


def factors(scales: Any, zeros: Any = None) -> Factors:
    parts = [None if part is None else np.atleast_2d(np.asarray(part, np.float64)) for part in (scales, zeros)]
    assert parts[0] is not None
    return Factors(parts[0], parts[1])


def checkpoint(folder: Path, scales: Array, points: Array) -> Any:
    tensors: dict[str, Any] = {
        f"{NAME}.weight_packed": packers.along_columns(np.arange(N * K).reshape(N, K) % 16),
        f"{NAME}.weight_scale": BFloat16(np.ascontiguousarray(scales.T)),
        f"{NAME}.weight_zero_point": packers.along_rows(points.T),
        f"{NAME}.weight_shape": np.array([N, K], np.int64),
    }
    return w4a16gen.open_checkpoint(write_folder(folder, tensors, {"quant_method": "compressed-tensors"}))[NAME]


def weights(scales: Array, points: Array) -> Array:
    q = (np.arange(N * K) % 16).reshape(N, GROUPS, K // GROUPS)
    return ((q - points.T[..., None].astype(np.float64)) * scales.T[..., None]).reshape(N, K)


@pytest.mark.parametrize("exponent", [-60, -30, -22, -18, -17, -10, 0, 12, 14, 60])
def test_bfloat16_scales_are_exact_at_any_size(exponent: int, tmp_path: Path, rng: np.random.Generator) -> None:
    scales = np.ldexp(rng.integers(128, 256, (GROUPS, N)) / 128, exponent)  # 8 significant bits
    points = rng.integers(0, 16, (GROUPS, N)).astype(np.uint8)
    layer = checkpoint(tmp_path, scales, points)
    assert layer.exactness.is_exact
    assert layer.exactness.max_zero_error_steps == 0
    fits = -17 <= exponent <= 12  # 8 * 2^13 is 65536
    assert (layer.alpha == 1) == fits
    assert (layer.exactness.out_of_range == 0) == fits
    np.testing.assert_array_equal(layer.quantized().dequantize() * layer.alpha, weights(scales, points))


def test_alpha_is_a_power_of_two_that_gemm_takes(tmp_path: Path, rng: np.random.Generator) -> None:
    scales = np.ldexp(rng.integers(128, 256, (GROUPS, N)) / 128, -24)
    points = rng.integers(0, 16, (GROUPS, N)).astype(np.uint8)
    layer = checkpoint(tmp_path, scales, points)
    a = (1024 * rng.standard_normal((2, K))).astype(np.float16)
    c = w4a16gen.gemm(a, w4a16gen.pack_weight(layer.quantized()), alpha=layer.alpha)
    exact = a.astype(np.float64) @ weights(scales, points).T
    np.testing.assert_allclose(c.astype(np.float64), exact, rtol=2**-10, atol=2**-20)
    assert np.log2(layer.alpha) == round(np.log2(layer.alpha))


def test_scales_of_too_many_binades_are_reported() -> None:
    rounded = round_factors(factors([2.0**-40 * 1.5, 1000.0]), name="x")
    assert not rounded.exactness.scales_exact
    assert rounded.exactness.out_of_range == 1
    assert rounded.exactness.max_scale_error > 0.4


def test_large_values_have_precedence_over_small_ones() -> None:
    rounded = round_factors(factors([2.0**-18 * 1.9921875, 2.0**20]), name="x")
    assert rounded.exactness.alpha == 2**5
    assert float(rounded.scales[0, 1]) * rounded.exactness.alpha == 2**20


def test_a_zero_alone_may_need_alpha() -> None:
    rounded = round_factors(factors([16384.0], [131072.0]), name="x")
    assert rounded.exactness.is_exact
    assert rounded.exactness.alpha == 4


def test_scales_of_0_are_kept() -> None:
    rounded = round_factors(factors([0.0, 0.0], [0.0, 0.0]), name="x")
    assert rounded.exactness.is_exact
    assert rounded.exactness.max_zero_error_steps == 0


def test_a_zero_beside_a_scale_of_0_has_no_steps_to_be_off_by() -> None:
    assert round_factors(factors([0.0], [0.1]), name="x").exactness.max_zero_error_steps == np.inf


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scales_and_zeros_must_be_finite(value: float) -> None:
    for parts in (factors([value]), factors([1.0], [value])):
        with pytest.raises(InvalidValueError, match="layer x: scales and zeros must be finite"):
            round_factors(parts, name="x")


def test_scales_beyond_the_range_of_alpha_are_refused() -> None:
    with pytest.raises(InvalidValueError, match="beyond FP32"):
        round_factors(factors([2.0**200]), name="x")


@given(st.lists(st.floats(-1e30, 1e30).filter(lambda x: x == 0 or abs(x) > 1e-30), min_size=1, max_size=4))
def test_nothing_overflows(scales: list[float]) -> None:
    rounded = round_factors(factors(scales), name="x")
    assert np.isfinite(rounded.scales).all()
    largest = max(map(abs, scales))
    back = np.abs(rounded.scales.astype(np.float64)).max() * rounded.exactness.alpha
    assert abs(back - largest) <= 2**-11 * largest
