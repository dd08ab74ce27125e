"""Torch on a Hopper GPU: the operator, compiled blocks in CUDA graphs, casts, and loading."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.checkpoints.cases import CASES
from fakes.checkpoints.gptq_layers import write_checkpoint
from graph_edges import programmatic_edges

import w4a16gen
from w4a16gen import InvalidValueError, KernelConfig, Library, Problem, QuantMode, UnsupportedProblemError, use_kernels
from w4a16gen.kernels.problem import DIMENSION_MULTIPLE
from w4a16gen.runtime import default
from w4a16gen.weights.reference import Expectation, error_over_bound, random_weight

torch = pytest.importorskip("torch")
integration = pytest.importorskip("w4a16gen.integrations.torch")
functional = torch.nn.functional
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
STREAM_K = KernelConfig.parse("w4a16_sm90_native_fgs_cta128x64x128_cluster1x1x1_warpgroups2_streamk")
HIDDEN, HEADS, WIDE, GROUP = 1024, 8, 2816, 128


@pytest.fixture
def library(gpu_library: Library, monkeypatch: pytest.MonkeyPatch) -> Library:
    """Return the build of every kernel, which is the default build of these tests."""
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    monkeypatch.setattr(default._InUse, "library", gpu_library)  # noqa: SLF001
    return gpu_library


@pytest.fixture(params=[False, True], ids=["chosen kernels", "kernels with a workspace"])
def kernels(request: pytest.FixtureRequest, library: Library) -> Iterator[None]:
    """Run with the chosen kernels, or with one that needs a workspace."""
    if not request.param:
        yield
        return
    if STREAM_K not in library.configs():
        pytest.skip("the build that W4A16GEN_BUILD_DIR names does not hold it")
    assert library.workspace_bytes(STREAM_K, Problem(16, HIDDEN, HIDDEN, GROUP)) > 0
    with use_kernels(STREAM_K):
        yield


def half(rng: np.random.Generator, *shape: int) -> Any:
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float16)).cuda()


@pytest.mark.parametrize("mode", QuantMode, ids=str)
def test_opcheck_passes_and_results_are_within_their_bounds(
    mode: QuantMode, library: Library, rng: np.random.Generator
) -> None:
    assert library.configs()
    weight = random_weight(rng, 512, 1024, GROUP if mode.is_grouped else 1024, mode)
    packed = integration.ops.on_torch(w4a16gen.pack_weight(weight), "cuda")
    bias = half(rng, 512)
    for shape in ((3, 1024), (2, 8, 1024), (0, 1024)):
        x = half(rng, *shape)
        arguments = (x, packed.data, bias, *integration.ops.facts_of(packed), 0.5)
        torch.library.opcheck(torch.ops.w4a16gen.gemm.default, arguments)
        expected = Expectation(x.cpu().numpy().reshape(-1, 1024), weight)
        for _ in range(2):  # the slow path, then the fast one
            y = torch.ops.w4a16gen.gemm(*arguments)
            assert y.shape == (*shape[:-1], 512)
            assert error_over_bound(y.cpu().numpy().reshape(-1, 512), expected, 0.5, bias.cpu().numpy()) <= 1
    y = integration.gemm(x.requires_grad_(), packed)
    with pytest.raises(InvalidValueError, match="compute no gradients"):
        y.sum().backward()


class Block(torch.nn.Module):  # type: ignore[misc, name-defined]
    """A block as Llama's, with q|k|v and gate|up fused."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.norms = torch.nn.ModuleList(torch.nn.RMSNorm(HIDDEN) for _ in range(2))
        self.qkv, self.out = linear("qkv", HIDDEN, 3 * HIDDEN), linear("out", HIDDEN, HIDDEN)
        self.gate_up, self.down = linear("gate_up", HIDDEN, 2 * WIDE), linear("down", WIDE, HIDDEN)

    def forward(self, x: Any) -> Any:
        batch, tokens, _ = x.shape
        parts = self.qkv(self.norms[0](x)).view(batch, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(x.shape))
        gate, up = self.gate_up(self.norms[1](x)).chunk(2, dim=-1)
        return x + self.down(functional.silu(gate) * up)


def blocks(dtype: Any) -> tuple[Any, Any, Any]:
    """Return a block of 4-bit layers, and the same in dense form in its dtype and in float64."""
    torch.manual_seed(0)
    made: dict[str, Any] = {}

    def four_bits(name: str, k: int, n: int) -> Any:
        made[name] = integration.W4A16Linear.from_linear(torch.nn.Linear(k, n, device="cuda"), group_size=GROUP)
        return made[name]

    def dense(name: str, k: int, n: int) -> Any:
        linear = torch.nn.Linear(k, n, device="cuda", dtype=torch.float64)
        linear.weight.data, linear.bias.data = made[name].dequantize(torch.float64), made[name].bias.double()
        return linear

    block = Block(four_bits).cuda().to(dtype).requires_grad_(requires_grad=False)
    twins = [Block(dense).cuda().to(kind).requires_grad_(requires_grad=False) for kind in (dtype, torch.float64)]
    return block, twins[0], twins[1]


def inputs(m: int, dtype: Any) -> Any:
    return torch.randn(2, m, HIDDEN, device="cuda", generator=torch.Generator("cuda").manual_seed(m)).to(dtype)


def error(found: Any, exact: Any) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_compiled_block_is_as_exact_as_a_dense_one_and_the_same_in_a_graph(dtype: Any) -> None:
    torch.compiler.reset()
    block, dense, exact = blocks(dtype)
    compiled = torch.compile(block, fullgraph=True)
    for m in (1, 8, 40):
        x = inputs(m, dtype)
        expected = exact(x.double())
        # fp32 activations become fp16 before a kernel: its layers round as those of fp16 do.
        limit = 2 * max(error(dense(x), expected), 2.0**-11)
        assert error(block(x), expected) <= limit
        first = compiled(x)
        assert error(first, expected) <= limit
        graph, given = torch.cuda.CUDAGraph(), x.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            compiled(given)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            captured = compiled(given)
        filler = [
            torch.full((1 << 20,), torch.nan, device="cuda") for _ in range(64)
        ]  # memory that a graph must not use
        for _ in range(20):
            graph.replay()
        assert torch.equal(captured, first)
        given.copy_(-x)
        graph.replay()
        assert torch.equal(captured, compiled(-x))
        del filler


@pytest.mark.usefixtures("library")
def test_products_behind_compiled_kernels_that_take_part_are_dependent_launches() -> None:
    if not hasattr(torch._inductor.config.triton, "enable_pdl"):  # noqa: SLF001
        pytest.skip("this torch has no triton.enable_pdl")
    torch.compiler.reset()
    block, _, _ = blocks(torch.float16)
    x = inputs(1, torch.float16)
    edges = []
    for options in (None, {"triton.enable_pdl": True}, {"triton.enable_pdl": True, "combo_kernels": True}):
        compiled = torch.compile(block, fullgraph=True, options=options)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(side):
            expected = compiled(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.no_grad(), torch.cuda.graph(graph):
            captured = compiled(x)
        for _ in range(100):
            captured.zero_()
            graph.replay()
            assert torch.equal(captured, expected), "outside a capture all launches are ordinary"
        edges.append(programmatic_edges(graph.raw_cuda_graph()))
    assert min(edges[1:]) >= edges[0] + 3, "three products of the block follow a norm or the gate"


@pytest.mark.usefixtures("kernels")
def test_graph_trees_give_the_same_bits() -> None:
    torch.compiler.reset()
    block, _, _ = blocks(torch.bfloat16)
    block.down.overflow = "check"
    plain = torch.compile(block, fullgraph=True)
    trees = torch.compile(block, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        for m in (1, 8):
            x = inputs(m, torch.bfloat16)
            torch.compiler.cudagraph_mark_step_begin()
            assert torch.equal(trees(x).clone(), plain(x))
    assert integration.first_overflow(block) is None


@pytest.mark.usefixtures("kernels")
def test_calls_on_several_streams_do_not_disturb_each_other() -> None:
    block, _, _ = blocks(torch.float16)
    given = [inputs(m, torch.float16) for m in (1, 8, 16, 40)]
    expected = [block(x) for x in given]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in given]
    found: list[Any] = []
    for _ in range(20):
        found = []
        for stream, x in zip(streams, given, strict=True):
            with torch.cuda.stream(stream):
                found.append(block(x))
    torch.cuda.synchronize()
    assert [torch.equal(one, other) for one, other in zip(found, expected, strict=True)] == [True] * len(given)


def test_a_layer_moves_between_host_and_gpu(library: Library, rng: np.random.Generator) -> None:
    assert library.configs()
    layer = integration.W4A16Linear.from_linear(torch.nn.Linear(1024, 512), group_size=GROUP)
    x = half(rng, 4, 1024)
    on_host = layer(x.cpu())
    y = layer.cuda()(x)
    torch.testing.assert_close(y.cpu(), on_host, rtol=2**-9, atol=2**-9)
    saved = {name: value.cpu() for name, value in layer.state_dict().items()}
    layer.to("meta").to_empty(device="cuda").load_state_dict(saved)
    assert torch.equal(layer(x), y)
    with pytest.raises((InvalidValueError, RuntimeError)):
        layer(x.cpu())


@pytest.mark.parametrize("name", sorted(CASES.keys() - {"compressed-tensors-part-of-a-word"}))
def test_loading_on_the_gpu_gives_the_bytes_of_the_host(
    name: str, library: Library, tmp_path: Path, rng: np.random.Generator
) -> None:
    assert library.configs()
    expected = CASES[name](tmp_path, rng)
    layer = w4a16gen.open_checkpoint(expected.path)[expected.name]
    if layer.n % DIMENSION_MULTIPLE:
        with pytest.raises(UnsupportedProblemError, match="must be a positive multiple of 8"):
            integration.load_layer(layer, "cuda")
        return
    found = integration.load_layer(layer, "cuda")
    assert found.packed.data.is_cuda
    np.testing.assert_array_equal(found.packed.data.cpu().numpy(), w4a16gen.pack_weight(layer.quantized()).data)


def test_loading_keeps_no_second_copy(library: Library, tmp_path: Path, rng: np.random.Generator) -> None:
    assert library.configs()
    sizes = [(f"layers.{number}", 4096, 4096, 32) for number in range(16)]
    checkpoint = write_checkpoint(tmp_path, rng, *sizes)
    with torch.device("meta"):
        model = torch.nn.ModuleDict(
            {"layers": torch.nn.ModuleList(torch.nn.Linear(4096, 4096, bias=False) for _ in sizes)}
        )
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    integration.replace_linears(model, checkpoint, device="cuda")
    packed = sum(buffer.nbytes for buffer in model.buffers())
    one = 4096 * 4096
    assert (
        torch.cuda.max_memory_allocated() - before <= packed + 4 * one
    )  # q, its permuted copy, and words of one layer
    assert torch.cuda.memory_allocated() - before <= 1.02 * packed
