"""`W4A16Experts` on a Hopper GPU: grouped kernels within their bounds, captured, compiled, and the same bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from w4a16gen import Library, QuantMode
from w4a16gen.runtime import default
from w4a16gen.weights.experts import pack_experts
from w4a16gen.weights.moe_reference import MoeExpectation
from w4a16gen.weights.reference import random_weight

torch = pytest.importorskip("torch")
integration = pytest.importorskip("w4a16gen.integrations.torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
HIDDEN, INNER, EXPERTS, SLOTS = 512, 384, 16, 4
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


@pytest.fixture(autouse=True)
def library(gpu_library: Library, monkeypatch: pytest.MonkeyPatch) -> Library:
    """Return the build of every kernel, which is the default build of these tests."""
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    if not gpu_library.grouped_configs():
        pytest.skip("the build that W4A16GEN_BUILD_DIR names holds no grouped kernels")
    monkeypatch.setattr(default._InUse, "library", gpu_library)  # noqa: SLF001
    return gpu_library


class Layer:
    """Experts on the GPU, and their weights."""

    def __init__(
        self,
        rng: np.random.Generator,
        mode: QuantMode = QuantMode.FINEGRAINED_SCALE_ONLY,
        activation: str = "silu",
        *,
        gated: bool = True,
    ) -> None:
        self.rng, self.activation = rng, activation
        self.gate, self.up, self.down = (
            [random_weight(rng, n, k, 128 if mode.is_grouped else k, mode, size=0.03) for _ in range(EXPERTS)]
            for n, k in ((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))
        )
        self.experts = integration.W4A16Experts.from_packed(
            pack_experts(self.gate, self.up, gated=gated), pack_experts(self.down), activation, device="cuda"
        )
        assert self.experts.is_grouped

    def drawn(self, tokens: int) -> list[Any]:
        """Draw the operands of a call; some routes are to no expert."""
        hidden = self.rng.standard_normal((tokens, HIDDEN)).astype(np.float16)
        ids = self.rng.integers(-1, EXPERTS + 1, (tokens, SLOTS))
        weights = self.rng.random((tokens, SLOTS)).astype(np.float32)
        return [torch.from_numpy(array).cuda() for array in (hidden, ids, weights)]

    def error(self, got: Any, hidden: Any, ids: Any, weights: Any) -> float:
        """Return the largest error as a multiple of its bound."""
        x, routes, factors = (tensor.cpu().numpy() for tensor in (hidden, ids, weights))
        expected = MoeExpectation(x, self.gate, self.up, self.down, routes, factors, activation=self.activation)
        return expected.error_over_bound(got.cpu().numpy())


@pytest.mark.parametrize("mode", QuantMode, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_results_are_within_their_bounds_and_repeat(
    mode: QuantMode, activation: str, gated: bool, rng: np.random.Generator
) -> None:
    layer = Layer(rng, mode, activation, gated=gated)
    for tokens in (0, 1, 5, 64, 300):
        call = layer.drawn(tokens)
        got = layer.experts(*call)
        assert layer.error(got, *call) <= 1
        assert torch.equal(layer.experts(*call), got)
        assert torch.equal(layer.experts(call[0], call[1].int(), call[2]), got), "ids of 32 bits"
        wide = layer.experts(call[0].bfloat16(), *call[1:])
        assert wide.dtype == torch.bfloat16
        assert torch.equal(wide, layer.experts(call[0].bfloat16().half(), *call[1:]).bfloat16())


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_the_operator_passes_opcheck(gated: bool, rng: np.random.Generator) -> None:
    layer = Layer(rng, gated=gated)
    experts = layer.experts
    facts = (HIDDEN, INNER, 128, 128, experts.down.mode, experts.gate_up.layout, "silu")
    operands = (*layer.drawn(9), experts.gate_up.packed, experts.down.packed, *facts)
    torch.library.opcheck(torch.ops.w4a16gen.moe.default, operands)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_it_is_near_experts_that_are_computed_one_by_one(gated: bool, rng: np.random.Generator) -> None:
    layer = Layer(rng, gated=gated)
    call = layer.drawn(33)
    apart = layer.experts._one_by_one(*call)  # noqa: SLF001
    assert layer.error(apart, *call) <= 1
    torch.testing.assert_close(layer.experts(*call).float(), apart, rtol=2e-2, atol=2e-2)


def test_a_state_of_the_other_packing_is_taken(rng: np.random.Generator) -> None:
    plain, gated = Layer(rng, gated=False), Layer(rng)
    gated.experts.load_state_dict(plain.experts.state_dict())
    for tokens in (1, 40):
        call = plain.drawn(tokens)
        assert torch.equal(gated.experts(*call), plain.experts(*call))


@pytest.mark.parametrize("tokens", [1, 8, 40, 300])
def test_a_captured_layer_is_replayed_with_other_operands(tokens: int, rng: np.random.Generator) -> None:
    layer = Layer(rng)
    call = layer.drawn(tokens)
    layer.experts(*call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer.experts(*call)
    for _ in range(3):
        others = layer.drawn(tokens)
        for tensor, values in zip(call, others, strict=True):
            tensor.copy_(values)
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, layer.experts(*others))
        assert layer.error(captured, *others) <= 1


def test_a_call_waits_for_nothing(rng: np.random.Generator) -> None:
    layer = Layer(rng)
    call = layer.drawn(40)
    layer.experts(*call)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = layer.experts(*call)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert layer.error(got, *call) <= 1


class Block(torch.nn.Module):  # type: ignore[misc, name-defined]
    """A router and its experts."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.router = torch.nn.Linear(HIDDEN, EXPERTS, bias=False, device="cuda", dtype=torch.float16)
        self.experts = layer.experts

    def forward(self, x: Any) -> Any:
        weights, ids = torch.topk(self.router(x).float().softmax(-1), SLOTS)
        return x + self.experts(x, ids, weights)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_block_is_compiled_whole(mode: str, rng: np.random.Generator) -> None:
    layer = Layer(rng)
    block = Block(layer).eval()
    torch.compiler.reset()
    compiled = torch.compile(lambda *call: layer.experts(*call) * 1, fullgraph=True, mode=mode)
    whole = torch.compile(block, fullgraph=True, mode=mode)
    with torch.no_grad():
        for tokens in (1, 24):
            for _ in range(3):
                call = layer.drawn(tokens)
                assert torch.equal(compiled(*call), layer.experts(*call))
                torch.testing.assert_close(whole(call[0]), block(call[0]), rtol=2e-2, atol=2e-2)


def test_an_exported_layer_gives_the_same_bits(rng: np.random.Generator) -> None:
    layer = Layer(rng)
    call = tuple(layer.drawn(12))
    with torch.no_grad():
        exported = torch.export.export(layer.experts, call)
        assert torch.equal(exported.module()(*call), layer.experts(*call))
