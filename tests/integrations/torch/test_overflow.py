"""Values beyond fp16 in models of bf16: counted, named, and scaled away."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import w4a16gen
from w4a16gen import InvalidValueError

torch = pytest.importorskip("torch")
integration = pytest.importorskip("w4a16gen.integrations.torch")
K = 64


def identity(factor: float = 1.0) -> Any:
    """Return a layer that multiplies by a factor."""
    weight = w4a16gen.quantize(np.eye(K) * factor, group_size=32)
    return integration.W4A16Linear.from_packed(w4a16gen.pack_weight(weight))


@pytest.fixture
def model() -> Any:
    """Return three layers, of which the second makes values larger."""
    return torch.nn.Sequential(identity(), identity(8.0), identity(1 / 8))


def test_the_first_layer_whose_outputs_are_not_finite_is_named(model: Any) -> None:
    integration.check_overflow(model)
    x = torch.ones(2, K)
    model(x)
    assert integration.first_overflow(model) is None
    x[0, :3] = 60000
    model(x)
    model(x)
    assert integration.first_overflow(model) == ("1", 6)
    assert int(model[2].non_finite) > 6
    assert "non_finite" not in model[1].state_dict()
    integration.check_overflow(model)
    assert integration.first_overflow(model) is None
    integration.check_overflow(model, on=False)
    with pytest.raises(InvalidValueError, match="no layer counts overflow"):
        integration.first_overflow(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [60000.0, 3e6])
def test_a_calibrated_model_gives_what_a_model_in_float64_gives(dtype: Any, size: float, model: Any) -> None:
    x = torch.full((2, K), size, dtype=dtype)
    x[1] = 1.0
    weights = [layer.dequantize(torch.float64) for layer in model]
    expected = x.double() @ weights[0].T @ weights[1].T @ weights[2].T
    assert not bool(torch.isfinite(model(x)).all())
    found = integration.calibrate(model, lambda: model(x))
    assert "1" in found
    torch.testing.assert_close(model(x).double(), expected, rtol=3 * torch.finfo(dtype).eps + 2**-9, atol=2**-10 * size)
    assert found["1"].output_scale >= 8 * size * 4 / 65504
    assert {scale for scales in found.values() for scale in scales} <= {2.0**e for e in range(12)}
    assert integration.calibrate(model, lambda: model(torch.ones(1, K, dtype=dtype))) == found


def test_models_that_fit_need_no_scales(model: Any) -> None:
    assert integration.calibrate(model, lambda: model(torch.ones(2, K))) == {}
    assert integration.calibrate(model, lambda: model(torch.full((2, K), 6e4, dtype=torch.float16))) == {}
    assert integration.calibrate(model, lambda: model(torch.full((2, K), torch.nan))) == {}
    assert integration.calibrate(model, lambda: model(torch.ones(0, K))) == {}
    with pytest.raises(InvalidValueError, match=r"headroom of 0\.5 must be a finite number of at least 1"):
        integration.calibrate(model, lambda: None, headroom=0.5)


def test_powers_of_two_change_no_bits(rng: np.random.Generator) -> None:
    layer = integration.W4A16Linear.from_packed(
        w4a16gen.pack_weight(w4a16gen.quantize(rng.standard_normal((K, K)), group_size=32)),
        rng.standard_normal(K).astype(np.float16),
    )
    x = torch.from_numpy(rng.standard_normal((4, K)).astype(np.float32))
    expected = layer(x)
    layer.activation_scale, layer.output_scale = 16.0, 8.0
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=2.0**-20)


def test_calibration_counts_activations_that_are_passed_by_name(rng: np.random.Generator) -> None:
    layer = integration.W4A16Linear.from_linear(torch.nn.Linear(256, 64))
    x = torch.from_numpy(rng.standard_normal((3, 256))) * 1e6
    named = integration.calibrate(layer, lambda: layer(x=x))
    assert named[""].activation_scale > 1


def test_calibration_takes_a_residual_by_place_and_by_name() -> None:
    layer = integration.W4A16Linear.from_linear(torch.nn.Linear(256, 64))
    layer.input_scale = torch.full((256,), 2.0, dtype=torch.float16)
    x, residual = torch.full((3, 256), 1e6), torch.ones(3, 64)
    alone = integration.calibrate(layer, lambda: layer(x))
    assert integration.calibrate(layer, lambda: layer(x, residual)) == alone
    assert integration.calibrate(layer, lambda: layer(x, residual=residual)) == alone


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_calibration_fits_the_product_not_its_sum_with_a_residual(dtype: Any) -> None:
    layer, x = identity(64.0), torch.full((2, K), 4096.0, dtype=dtype)
    integration.calibrate(layer, lambda: layer(x, -64 * x))
    assert layer.output_scale == 32, "64 * 4096 * 4 exceeds 65504 by at most this"
    assert torch.equal(layer(x, -64 * x), torch.zeros_like(x))
    layer = identity()
    assert integration.calibrate(layer, lambda: layer(torch.ones(2, K, dtype=dtype), x * 2.0**40)) == {}


def test_calibration_keeps_scales_where_none_makes_outputs_finite() -> None:
    layer, x = identity(), torch.ones(2, K, dtype=torch.bfloat16)
    infinite = torch.full_like(x, torch.inf)
    assert integration.calibrate(layer, lambda: layer(x, infinite)) == {}
    layer.bias = torch.full((K,), torch.nan, dtype=torch.float16)
    assert not bool(torch.isfinite(layer(x)).all())
    assert integration.calibrate(layer, lambda: layer(x)) == {}


@pytest.mark.parametrize("headroom", [0.5, float("nan"), float("inf"), "4"])
def test_a_headroom_that_is_no_finite_factor_is_refused(headroom: Any) -> None:
    with pytest.raises(InvalidValueError, match=f"headroom of {headroom!r} must be a finite number"):
        integration.calibrate(torch.nn.Identity(), list, headroom=headroom)
