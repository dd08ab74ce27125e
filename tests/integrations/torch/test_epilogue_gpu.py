"""Activations, residuals and `W4A16MLP` in torch on a Hopper GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import w4a16gen
from w4a16gen import Library, QuantMode
from w4a16gen.kernels.epilogue import Activation
from w4a16gen.runtime import default
from w4a16gen.weights.reference import Expectation, Extra, error_over_bound, random_weight

torch = pytest.importorskip("torch")
integration = pytest.importorskip("w4a16gen.integrations.torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
HIDDEN, INNER = 1024, 1408
FGS = QuantMode.FINEGRAINED_SCALE_ONLY


@pytest.fixture(autouse=True)
def library(gpu_library: Library, monkeypatch: pytest.MonkeyPatch) -> Library:
    """Return the build of every kernel, which is the default build of these tests."""
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    monkeypatch.setattr(default._InUse, "library", gpu_library)  # noqa: SLF001
    return gpu_library


def half(rng: np.random.Generator, *shape: int) -> Any:
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float16)).cuda()


@pytest.mark.parametrize("mode", QuantMode, ids=str)
@pytest.mark.parametrize("activation", Activation, ids=str)
def test_the_operator_is_within_its_bounds(mode: QuantMode, activation: Activation, rng: np.random.Generator) -> None:
    weight = random_weight(rng, 528, HIDDEN, 128 if mode.is_grouped else HIDDEN, mode)
    packed = integration.ops.on_torch(w4a16gen.pack_weight(weight, gated=activation.is_gated), "cuda")
    bias = half(rng, 528)
    for shape in ((3, HIDDEN), (2, 40, HIDDEN)):
        x, residual = half(rng, *shape), half(rng, *shape[:-1], packed.outputs)
        arguments = (x, packed.data, bias, *integration.ops.facts_of(packed), 0.5, str(activation), residual)
        torch.library.opcheck(torch.ops.w4a16gen.gemm.default, arguments)
        expected = Expectation(x.cpu().numpy().reshape(-1, HIDDEN), weight)
        extra = Extra(activation, residual.cpu().numpy().reshape(-1, packed.outputs))
        for _ in range(2):  # the slow path, then the fast one
            y = torch.ops.w4a16gen.gemm(*arguments)
            got = y.cpu().numpy().reshape(-1, packed.outputs)
            assert error_over_bound(got, expected, 0.5, bias.cpu().numpy(), extra) <= 1


@pytest.mark.parametrize("mode", QuantMode, ids=str)
def test_bytes_are_interleaved_on_the_gpu_as_on_the_host(mode: QuantMode, rng: np.random.Generator) -> None:
    whole = random_weight(rng, 2 * INNER, HIDDEN, 128 if mode.is_grouped else HIDDEN, mode)
    layers = [
        integration.W4A16Linear.from_packed(
            w4a16gen.pack_weight(whole.channels(np.arange(at, at + INNER))), device="cuda"
        )
        for at in (0, INNER)
    ]
    fused = integration.fuse_gated(*layers)
    assert fused.packed.is_cuda
    np.testing.assert_array_equal(fused.packed.cpu().numpy(), w4a16gen.pack_weight(whole, gated=True).data)


@pytest.mark.parametrize("m", [1, 16, 70, 300])
def test_a_module_is_captured_and_compiled(m: int, rng: np.random.Generator) -> None:
    gate, up, down = (
        integration.W4A16Linear.from_linear(torch.nn.Linear(k, n, bias=False, device="cuda"))
        for k, n in ((HIDDEN, INNER), (HIDDEN, INNER), (INNER, HIDDEN))
    )
    made = integration.W4A16MLP.from_linears(gate, up, down)
    x, residual = half(rng, m, HIDDEN), half(rng, m, HIDDEN)
    with torch.no_grad():
        wanted = made(x, residual)
        apart = down(torch.nn.functional.silu(gate(x)) * up(x)) + residual
        assert torch.allclose(wanted, apart, rtol=2e-2, atol=2e-2)
        torch.compiler.reset()
        compiled = torch.compile(made, fullgraph=True)
        assert torch.equal(compiled(x, residual), wanted)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = made(x, residual)
        captured.zero_()
        for _ in range(3):
            graph.replay()
        assert torch.equal(captured, wanted)
