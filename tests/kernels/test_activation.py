"""The kernels' formula of activations, run on the CPU, against float64; and that both sides number them alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from host_programs import compile_for_host, output_of

from w4a16gen import InvalidValueError
from w4a16gen.kernels.config import Target
from w4a16gen.kernels.epilogue import Activation, CallEpilogue, activation_numbers, check_epilogue, why_not_gated
from w4a16gen.weights.activations import activated, activation_error

SIGMOIDS = (Activation.SILU, Activation.GELU_TANH, Activation.GELU)
X = np.unique(np.concatenate([np.linspace(-30, 30, 20001), np.linspace(-7, 7, 40001)]).astype(np.float32))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_for_host("host_activations", tmp_path_factory.mktemp("activations"))


@pytest.mark.parametrize("activation", SIGMOIDS, ids=str)
def test_the_formula_is_as_near_as_the_bound_says(program: Path, activation: Activation) -> None:
    lines = output_of(program, str(activation.number), given="\n".join(f"{x:.9g}" for x in X))
    got = np.array([float(line) for line in lines])
    exact = activated(activation, X.astype(np.float64))
    bound = activation_error(activation, X.astype(np.float64), np.zeros(X.size))
    ratio = np.abs(got - exact) / bound
    assert ratio.max() < 1
    assert ratio.max() > 0.05  # a bound so wide would prove nothing


@pytest.mark.parametrize("activation", SIGMOIDS, ids=str)
@pytest.mark.parametrize("x", [-3e38, -1e6, -1e3, 0.0, 1e3, 1e6, 3e38])
def test_large_arguments_give_the_limits(program: Path, activation: Activation, x: float) -> None:
    (line,) = output_of(program, str(activation.number), given=f"{x:.9g}")
    assert float(line) == pytest.approx(max(x, 0.0), abs=1e-12, rel=1e-7)


def test_the_library_numbers_them_alike(program: Path) -> None:
    kinds = {Activation.NONE: 0, Activation.RELU2: 1} | dict.fromkeys(SIGMOIDS, 2) | {Activation.SILU: 3}
    wanted = [f"{item.number} {int(item.is_gated)} {kinds[item.function]}" for item in Activation]
    assert output_of(program) == wanted


@pytest.mark.parametrize("activation", Activation, ids=str)
def test_an_error_of_the_argument_is_passed_on(activation: Activation) -> None:
    rng = np.random.default_rng(5)
    x, error = rng.normal(0, 3, (50, 64)), np.full((50, 64), 1e-3)
    moved = activated(activation, x + 0.999 * error * rng.choice((-1, 1), x.shape))
    allowed = activation_error(activation, x, error)
    assert (np.abs(moved - activated(activation, x)) <= allowed).all()
    assert (activation_error(activation, x, 0 * error) < allowed).all()


def test_known_values() -> None:
    x = np.array([[1.0, -2.0, 3.0, 0.5]])
    assert activated(Activation.SILU, x)[0] == pytest.approx([0.7310586, -0.2384058, 2.8577224, 0.3112297])
    assert activated(Activation.GELU, x)[0] == pytest.approx([0.8413447, -0.0455003, 2.9959502, 0.3457312])
    assert activated(Activation.GELU_TANH, x)[0] == pytest.approx([0.8411920, -0.0454023, 2.9963627, 0.3457140])
    assert activated(Activation.RELU2, x)[0] == pytest.approx([1, 0, 9, 0.25])
    assert activated(Activation.SWIGLU, x)[0] == pytest.approx([0.7310586 * 3, -0.2384058 * 0.5])


def test_arguments_of_calls() -> None:
    assert Activation.of(None) is Activation.NONE
    assert Activation.of("swiglu") is Activation.SWIGLU
    with pytest.raises(InvalidValueError, match="'mish' is not one of none, silu, gelu_tanh"):
        Activation.of("mish")
    assert set(activation_numbers(gated_weight=True).values()) == {5, 6, 7}
    assert activation_numbers(gated_weight=False)[None] == 0
    assert why_not_gated(32) is None


@pytest.mark.parametrize(
    ("epilogue", "target", "gated", "match"),
    [
        (CallEpilogue(Activation.SILU), Target.CUTLASS, False, "target cutlass compute no activations"),
        (CallEpilogue(has_residual=True), Target.CUTLASS, False, "add no residual: pack the weight for target native"),
        (CallEpilogue(Activation.SWIGLU), Target.NATIVE, False, "swiglu needs a weight .* gated=True"),
        (CallEpilogue(Activation.SILU), Target.NATIVE, True, "silu does not fit .* swiglu, geglu_tanh, geglu"),
        (CallEpilogue(), Target.NATIVE, True, "none does not fit"),
    ],
)
def test_refused_epilogues(epilogue: CallEpilogue, target: Target, gated: bool, match: str) -> None:
    with pytest.raises(InvalidValueError, match=match):
        check_epilogue(epilogue, target, gated_weight=gated)
