"""What follows a plain product, in torch: gates, biases and residuals, for kernels that compute none of them."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from w4a16gen.integrations.torch.apart import apart_from, gates_first  # noqa: E402
from w4a16gen.kernels.epilogue import SIDE_BY_SIDE, Activation, CallEpilogue  # noqa: E402
from w4a16gen.weights.packed import GATED_LAYOUT  # noqa: E402

PLAIN_LAYOUT = "fragment_blocks_v2"
GATES = {
    Activation.SWIGLU: torch.nn.functional.silu,
    Activation.GEGLU: torch.nn.functional.gelu,
    Activation.GEGLU_TANH: torch.nn.GELU(approximate="tanh"),
}
M, N, K = 3, 48, 16


def side_by_side(values: Any) -> Any:
    """Return rows, all gates first, in the order of a weight for gated activations."""
    runs = zip(*(half.split(SIDE_BY_SIDE) for half in values.chunk(2)), strict=True)
    return torch.cat([torch.cat(pair) for pair in runs])


class Product:
    """A plain product with rows in the order that a layout has."""

    def __init__(self, weight: Any, x: Any) -> None:
        self._weight, self._x = weight, x
        self.layouts: list[str] = []

    def __call__(self, *, bias: Any, layout: str) -> Any:
        self.layouts.append(layout)
        y = self._x @ self._weight.T
        return (y if bias is None else y + bias.float()).half()


def sixteenths(*shape: int) -> Any:
    """Return multiples of 1/16 up to 2: sums of K products of two are exact in fp32, whatever the order."""
    return torch.randint(-32, 33, shape) / 16


def check_rounded_once(got: Any, exact: Any, largest: Any) -> None:
    """Check a result, computed in fp32 and rounded once to fp16.

    Args:
        got: fp16.
        exact: the same in float64.
        largest: the sum of the magnitudes of what was multiplied and added. Each of a dozen operations of fp32, with
            those inside an activation, may lose half a unit in the last place of it.
    """
    assert got.dtype == torch.float16
    bound = 2**-11 * exact.abs() + 12 * 2**-24 * largest + 2**-25
    assert ((got.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("activation", GATES, ids=str)
@pytest.mark.parametrize("is_whole", [False, True], ids=["alone", "bias and residual"])
def test_gates_multiply_their_factors(activation: Activation, is_whole: bool) -> None:
    torch.manual_seed(0)
    weight, x = sixteenths(N, K), sixteenths(M, K)
    bias, residual = (sixteenths(N).half(), sixteenths(M, N // 2).half()) if is_whole else (None, None)
    product = Product(side_by_side(weight), x)
    got = apart_from(product, bias, N, GATED_LAYOUT, CallEpilogue(activation, has_residual=is_whole), residual)
    assert product.layouts == [PLAIN_LAYOUT], "any kernel computes the product"
    gate, up = Product(weight, x)(bias=bias, layout="").double().chunk(2, dim=1)
    added = torch.zeros(()) if residual is None else residual.double()
    check_rounded_once(got, GATES[activation](gate) * up + added, (gate * up).abs() + added.abs())


@pytest.mark.parametrize("activation", [Activation.NONE, Activation.SILU, Activation.RELU2], ids=str)
def test_other_activations_keep_the_layout(activation: Activation) -> None:
    torch.manual_seed(0)
    weight, x, bias, residual = sixteenths(N, K), sixteenths(M, K), sixteenths(N).half(), sixteenths(M, N).half()
    product = Product(weight, x)
    got = apart_from(product, bias, N, PLAIN_LAYOUT, CallEpilogue(activation, has_residual=True), residual)
    assert product.layouts == [PLAIN_LAYOUT]
    y = product(bias=bias, layout="").double()
    functions = {
        Activation.NONE: y,
        Activation.SILU: torch.nn.functional.silu(y),
        Activation.RELU2: torch.relu(y) ** 2,
    }
    added = residual.double()
    check_rounded_once(got, functions[activation] + added, y.abs() * y.abs().clamp(min=1) + added.abs())


def test_gates_come_first_again() -> None:
    rows = torch.arange(N)
    assert torch.equal(gates_first(side_by_side(rows)), rows)
    assert not torch.equal(side_by_side(rows), rows)
