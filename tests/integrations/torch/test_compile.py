"""Compiled and exported programs with `W4A16Linear` on the CPU."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
integration = pytest.importorskip("w4a16gen.integrations.torch")
K = 64
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:bf16 and fp16 are mixed:UserWarning")


class Block(torch.nn.Module):  # type: ignore[misc, name-defined]
    """A part of a model in bf16, with casts that a compiler may fuse."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.RMSNorm(K)
        self.gate, self.up = (self.layer(K, 2 * K) for _ in range(2))
        self.down = self.layer(2 * K, K)
        self.down.activation_scale, self.down.overflow = 4.0, "check"
        self.gate.permutation = torch.randperm(K)

    @staticmethod
    def layer(k: int, n: int) -> Any:
        return integration.W4A16Linear.from_linear(torch.nn.Linear(k, n), group_size=32)

    def forward(self, x: Any) -> Any:
        y = self.norm(x)
        return x + self.down(torch.nn.functional.silu(self.gate(y)) * self.up(y))


@pytest.fixture
def block() -> Any:
    """Return a block of random weights, and let the compiler forget other tests."""
    torch.compiler.reset()
    return Block().bfloat16().requires_grad_(requires_grad=False)


def inputs(rng: np.random.Generator, m: int) -> Any:
    return torch.from_numpy(rng.standard_normal((2, m, K)).astype(np.float32)).bfloat16()


def test_a_block_is_one_graph_for_all_numbers_of_tokens(block: Any, rng: np.random.Generator) -> None:
    graphs: list[Any] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=backend)
    for m in (3, 5, 9, 17):
        x = inputs(rng, m)
        assert torch.equal(compiled(x), block(x))
    assert len(graphs) == 1
    targets = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert sum("w4a16gen" in str(target) for target in targets) == 3


def test_gradients_may_be_recorded_as_long_as_nobody_asks_for_them(block: Any, rng: np.random.Generator) -> None:
    block.norm.requires_grad_()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = inputs(rng, 3)
    y = compiled(x)
    torch.testing.assert_close(y, block(x))
    with pytest.raises(integration.ops.InvalidValueError, match="the kernels compute no gradients"):
        y.sum().backward()


@pytest.mark.compile
def test_inductor_fuses_the_casts_with_their_neighbours(block: Any, rng: np.random.Generator) -> None:
    compiled = torch.compile(block, fullgraph=True)
    x = inputs(rng, 3)
    torch.testing.assert_close(compiled(x), block(x), rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("parts", [(), ("bias",), ("input_scale", "check"), ("permutation",), ("check",)], ids=str)
def test_a_layer_with_any_of_its_parts_is_exported(parts: tuple[str, ...], rng: np.random.Generator) -> None:
    given = {"bias": torch.randn(K), "permutation": torch.randperm(K), "input_scale": torch.rand(K)}
    packed = Block.layer(K, K).weight_of()
    layer = integration.W4A16Linear.from_packed(packed, **{name: given[name] for name in parts if name != "check"})
    layer.overflow = "check" if "check" in parts else "ignore"
    x = inputs(rng, 3)
    exported = torch.export.export(layer, (x,))
    assert torch.equal(exported.module()(x), layer(x))
    assert set(exported.state_dict) == {"packed", *parts} - {"check"}


def test_a_block_is_exported_with_any_number_of_tokens(block: Any, rng: np.random.Generator) -> None:
    tokens = torch.export.Dim("tokens", min=2, max=64)
    exported = torch.export.export(block, (inputs(rng, 3),), dynamic_shapes=({1: tokens},))
    stored = io.BytesIO()
    torch.export.save(exported, stored)
    stored.seek(0)
    loaded = torch.export.load(stored).module()
    for m in (2, 7):
        x = inputs(rng, m)
        assert torch.equal(loaded(x), block(x))
