"""Grouped kernels on a Hopper GPU: every kernel's proofs, large routings, layers of any size, and graphs."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from w4a16gen import Epilogue, KernelConfig, Library, QuantMode
from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.arrangement import UNSORTED_TOKENS
from w4a16gen.kernels.spaces import enumerate_space, with_epilogues
from w4a16gen.runtime.expert_calls import MAX_EXPERTS, MoeOptions
from w4a16gen.runtime.expert_plan import Pair, moe_sizes
from w4a16gen.runtime.expert_rows import ExpertRows
from w4a16gen.verify import experts, grouped_products
from w4a16gen.verify.numeric import NumericProof
from w4a16gen.weights.experts import pack_experts
from w4a16gen.weights.moe_reference import MoeExpectation, route_reference
from w4a16gen.weights.quantized import Half
from w4a16gen.weights.reference import Expectation, error_over_bound, random_weight

pytestmark = pytest.mark.gpu
GROUPED = with_epilogues(enumerate_space("experts"), [Epilogue.NONE, Epilogue.GATED])
MODE = QuantMode.FINEGRAINED_SCALE_ONLY
HIDDEN, INNER, EXPERTS, SLOTS = 512, 384, 16, 4


@pytest.fixture
def library(gpu_library: Library) -> Library:
    """Return the build of every kernel."""
    if not set(GROUPED) <= set(gpu_library.grouped_configs()):
        pytest.skip("the build that W4A16GEN_BUILD_DIR names does not hold space experts with epilogue gated")
    return gpu_library


@pytest.fixture(scope="session")
def proofs(gpu_library: Library) -> dict[KernelConfig, NumericProof]:
    """Run the proofs of every grouped kernel once."""
    found = {config: NumericProof(config.name) for config in gpu_library.grouped_configs()}
    experts.prove_experts(gpu_library, found)
    return found


@pytest.mark.parametrize("config", GROUPED, ids=str)
def test_every_product_and_layer_of_every_kernel_is_right(
    proofs: dict[KernelConfig, NumericProof], config: KernelConfig
) -> None:
    if config not in proofs:
        pytest.skip("the build that W4A16GEN_BUILD_DIR names does not hold it")
    assert proofs[config].failures == []
    assert set(proofs[config].passed) >= {grouped_products.ROUTING, grouped_products.PRODUCT}


class Layer:
    """A layer of experts on the GPU, with and without kernels that apply the gate."""

    def __init__(self, library: Library, mode: QuantMode = MODE) -> None:
        rng = np.random.default_rng(11)
        group = 128 if mode.is_grouped else 0
        self.library, self.rng = library, rng
        self.gate, self.up, self.down = (
            [random_weight(rng, n, k, group or k, mode, size=0.03) for _ in range(EXPERTS)]
            for n, k in ((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))
        )
        self.w13 = {gated: library.to_device(pack_experts(self.gate, self.up, gated=gated)) for gated in (False, True)}
        self.w2 = library.to_device(pack_experts(self.down))

    def drawn(self, tokens: int) -> tuple[Half, Any, Any]:
        """Draw the operands of a call."""
        hidden = self.rng.standard_normal((tokens, HIDDEN)).astype(np.float16)
        order = self.rng.random((tokens, EXPERTS)).argsort(axis=1)[:, :SLOTS]
        return hidden, order.astype(np.int32), self.rng.random((tokens, SLOTS)).astype(np.float32)

    def moe(self, hidden: Half, ids: Any, factors: Any, *, gated: bool = True, **options: Any) -> Half:
        """Call the layer with arrays of the host."""
        operands = [self.library.to_device(array) for array in (ids, factors)]
        result = self.library.moe(self.library.to_device(hidden), self.w13[gated], self.w2, *operands, **options)
        host: Half = result.to_host()
        return host

    def error(self, got: Half, hidden: Half, ids: Any, factors: Any) -> float:
        """Return the largest error as a multiple of its bound."""
        return MoeExpectation(hidden, self.gate, self.up, self.down, ids, factors).error_over_bound(got)


@pytest.mark.parametrize("mode", QuantMode, ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_layers_of_any_number_of_tokens_are_within_their_bounds(library: Library, mode: QuantMode, gated: bool) -> None:
    layer = Layer(library, mode)
    for tokens in (1, 2, 7, 16, 33, 100, 256, 800):
        call = layer.drawn(tokens)
        got = layer.moe(*call, gated=gated)
        assert 0 < layer.error(got, *call) <= 1, tokens
        assert np.array_equal(layer.moe(*call, gated=gated).view(np.uint16), got.view(np.uint16)), tokens


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_the_output_may_replace_the_hidden_states(library: Library, gated: bool) -> None:
    layer = Layer(library)
    for tokens in (1, 4, 8, 9, 100, 800):
        hidden, *routes = layer.drawn(tokens)
        apart = layer.moe(hidden, *routes, gated=gated)
        for launch in (False, True):
            states, *operands = (library.to_device(array) for array in (hidden, *routes))
            weights = layer.w13[gated], layer.w2
            assert library.moe(states, *weights, *operands, out=states, dependent_launch=launch) is states
            assert np.array_equal(states.to_host().view(np.uint16), apart.view(np.uint16)), tokens


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_invariant_results_do_not_depend_on_other_tokens(library: Library, gated: bool) -> None:
    layer = Layer(library)
    call = layer.drawn(300)
    whole = layer.moe(*call, gated=gated, invariant=True).view(np.uint16)
    for few in (slice(0, 1), slice(17, 18), slice(3, 40), slice(150, 300)):
        alone = layer.moe(*(part[few] for part in call), gated=gated, invariant=True).view(np.uint16)
        assert np.array_equal(alone, whole[few])


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("mode", QuantMode, ids=str)
def test_unsorted_routes_give_the_bits_of_sorted_ones(library: Library, mode: QuantMode, gated: bool) -> None:
    layer = Layer(library, mode)
    w13, w2 = layer.w13[gated], layer.w2
    first, second = (
        [kernel for kernel in GROUPED if (kernel.mode, kernel.epilogue, kernel.cta.tokens) == (mode, epilogue, 8)]
        for epilogue in (Epilogue.GATED if gated else Epilogue.NONE, Epilogue.NONE)
    )
    call = layer.drawn(UNSORTED_TOKENS + 1)
    call[1][2, 1:] = [-1, call[1][0, 0], EXPERTS]
    for pair in zip(first, second, strict=True):

        def compute(tokens: int, pair: Pair = pair) -> Any:
            hidden, ids, factors = (library.to_device(np.ascontiguousarray(part[:tokens])) for part in call)
            result = library.experts.moe(hidden, w13, w2, ids, factors, MoeOptions(), pair=pair)
            return result.to_host().view(np.uint16)

        whole = compute(UNSORTED_TOKENS + 1)
        for tokens in range(1, UNSORTED_TOKENS + 1):
            plan = library.experts.plan(moe_sizes(tokens, SLOTS, w13, w2), 0, pair=pair)
            assert plan.can_leave_unsorted
            assert np.array_equal(compute(tokens), whole[:tokens]), (pair, tokens)


@pytest.mark.parametrize("mode", QuantMode, ids=str)
def test_gated_weights_have_the_bits_of_plain_ones_without_gated_kernels(library: Library, mode: QuantMode) -> None:
    layer = Layer(library, mode)
    kernels = [kernel for kernel in GROUPED if (kernel.mode, kernel.epilogue) == (mode, Epilogue.NONE)]
    for tokens, tile in ((1, 8), (UNSORTED_TOKENS, 8), (40, 8), (300, 64)):
        call = layer.drawn(tokens)
        call[1][0, 1:] = -1
        hidden, ids, factors = (library.to_device(part) for part in call)
        kernel = next(kernel for kernel in kernels if kernel.cta.tokens == tile)
        plain, gated = (
            library.experts.moe(hidden, w13, layer.w2, ids, factors, MoeOptions(), pair=(kernel, kernel))
            for w13 in (layer.w13[False], layer.w13[True])
        )
        assert np.array_equal(gated.to_host().view(np.uint16), plain.to_host().view(np.uint16)), tokens
        assert 0 < layer.error(gated.to_host(), *call) <= 1, tokens


@pytest.mark.parametrize(
    ("count", "tokens", "slots"), [(MAX_EXPERTS, 8192, 8), (128, 4096, 8), (8, 1, 2), (3, 20000, 1)]
)
def test_large_routings_are_sorted(library: Library, count: int, tokens: int, slots: int) -> None:
    rng = np.random.default_rng(count)
    ids = rng.integers(-1, count + 1, (tokens, slots))
    for tile in (8, 96):
        rows = library.route_tokens(library.to_device(ids), count, tile)
        offsets, order = route_reference(ids, count)
        assert np.array_equal(rows.offsets.to_host(), offsets)
        assert np.array_equal(rows.routes_of_rows.to_host()[: offsets[-1]], order)
        back = np.full(ids.size, -1, np.int32)
        back[order] = np.arange(len(order))
        assert np.array_equal(rows.rows_of_routes.to_host(), back)
        tiles = rows.token_tiles.to_host().view(np.int32)
        assert tiles[0] == (-(-np.diff(offsets) // tile)).sum()
        listed = library.list_rows(ids.size, tile, offsets=rows.offsets).token_tiles.to_host().view(np.int32)
        used = slice(4, 4 * (tiles[0] + 1))
        assert listed[0] == tiles[0]
        assert np.array_equal(listed[used], tiles[used])
        named = np.full(ids.size, -1, np.int32)
        named[: offsets[-1]] = np.repeat(np.arange(count, dtype=np.int32), np.diff(offsets))
        given = library.list_rows(ids.size, tile, indices=library.to_device(named), experts=count)
        listed = given.token_tiles.to_host().view(np.int32)
        assert listed[0] == tiles[0]
        assert np.array_equal(listed[used], tiles[used])


def test_without_tokens_offsets_are_0_and_the_list_is_empty_in_graphs_too(library: Library) -> None:
    torch = pytest.importorskip("torch")
    ids = torch.zeros((0, SLOTS), dtype=torch.int32, device="cuda")
    bounds = torch.zeros(EXPERTS + 1, dtype=torch.int32, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = library.route_tokens(ids, EXPERTS, 8), library.list_rows(0, 8, offsets=bounds)
    for rows in captured:
        for array in (rows.token_tiles, rows.offsets):
            if array is not None:
                array.fill_(-1 if array.dtype == torch.int32 else 255)
    graph.replay()
    for rows in (*captured, library.route_tokens(ids, EXPERTS, 8), library.list_rows(0, 8, offsets=bounds)):
        assert not rows.token_tiles[:4].any()
        assert rows.offsets is None or not rows.offsets.any()


@pytest.mark.parametrize("tile", sorted({config.cta.tokens for config in GROUPED}))
def test_rows_of_offsets_and_of_counts_are_multiplied(library: Library, tile: int) -> None:
    layer = Layer(library)
    # A call without a kernel may get another one for more rows, and other bits.
    kernel = next(c for c in GROUPED if (c.mode, c.epilogue, c.cta.tokens) == (MODE, Epilogue.NONE, tile))
    rng = np.random.default_rng(tile)
    counts = rng.integers(0, 3 * tile, EXPERTS).astype(np.int32)
    counts[3] = 0
    stride = 3 * tile
    bounds = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    packed = layer.w2

    def product(rows: ExpertRows, a: Half) -> Half:
        out = library.to_device(np.full((len(a), HIDDEN), np.nan, np.float16))
        library.grouped_gemm(library.to_device(a), packed, rows, out=out, config=kernel)
        host: Half = out.to_host()
        return host

    a = rng.standard_normal((bounds[-1] + 5, INNER)).astype(np.float16)
    dense = product(library.list_rows(len(a), tile, offsets=library.to_device(bounds)), a)
    padded = np.zeros((EXPERTS * stride, INNER), np.float16)
    own = [slice(expert * stride, expert * stride + int(counts[expert])) for expert in range(EXPERTS)]
    for place, (first, end) in zip(own, pairwise(bounds.tolist()), strict=True):
        padded[place] = a[first:end]
    masked = product(library.list_rows(len(padded), tile, counts=library.to_device(counts), stride=stride), padded)
    assert np.isnan(dense[bounds[-1] :]).all()
    written = np.zeros(len(padded), bool)
    for expert, (place, (first, end)) in enumerate(zip(own, pairwise(bounds.tolist()), strict=True)):
        written[place] = True
        assert np.array_equal(masked[place].view(np.uint16), dense[first:end].view(np.uint16))
        if end > first:
            assert error_over_bound(dense[first:end], Expectation(a[first:end], layer.down[expert]), 1.0, None) <= 1
    assert np.isnan(masked[~written]).all()


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dependent", [False, True, "auto"])
def test_chained_layers_in_a_graph_give_the_bits_of_calls_one_by_one(
    library: Library, gated: bool, dependent: Any
) -> None:
    layer = Layer(library)
    hidden, ids, factors = layer.drawn(40)
    stream = library.module.Stream(0)
    factors *= np.float32(0.01)  # keeps the states about as large as they are
    operands = [library.to_device(array) for array in (ids, factors)]
    needed = library.moe_workspace_bytes(40, SLOTS, layer.w13[gated], layer.w2)
    room = library.to_device(np.zeros(needed, np.uint8))
    states = [library.to_device(hidden) for _ in range(3)]

    def run(*, launch: Any, waits: bool) -> None:
        for read, written in 2 * list(pairwise(states)):
            library.moe(
                read,
                layer.w13[gated],
                layer.w2,
                *operands,
                out=written,
                workspace=room,
                stream=stream,
                dependent_launch=launch,
            )
            if waits:
                stream.synchronize()

    run(launch=False, waits=True)
    wanted = [state.to_host() for state in states]
    assert np.isfinite(wanted[-1]).all()
    assert np.count_nonzero(wanted[-1]) > wanted[-1].size / 2
    for state in states[1:]:
        state.buffer.upload(np.zeros_like(hidden))
    stream.begin_capture()
    run(launch=dependent, waits=False)
    stream.end_capture()
    for _ in range(3):
        stream.replay()
    stream.synchronize()
    for state, values in zip(states, wanted, strict=True):
        assert np.array_equal(state.to_host().view(np.uint16), values.view(np.uint16))


def test_torch_tensors_are_served_on_torchs_stream(library: Library) -> None:
    torch = pytest.importorskip("torch")
    layer = Layer(library)
    hidden, ids, factors = layer.drawn(20)
    tensors = [torch.from_numpy(array).cuda() for array in (hidden, ids.astype(np.int64), factors)]
    weights = layer.w13[True], layer.w2
    with torch.cuda.stream(torch.cuda.Stream()):
        got = library.moe(tensors[0], *weights, *tensors[1:])
    torch.cuda.synchronize()
    assert got.dtype == torch.float16
    assert layer.error(got.cpu().numpy(), hidden, ids, factors) <= 1
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = library.moe(tensors[0], *weights, *tensors[1:])
    hidden, ids, factors = layer.drawn(20)
    for tensor, array in zip(tensors, (hidden, ids, factors), strict=True):
        tensor.copy_(torch.from_numpy(array))
    graph.replay()
    assert layer.error(captured.cpu().numpy(), hidden, ids, factors) <= 1
    room = torch.empty(1 << 22, dtype=torch.uint8, device="cuda")
    beginning = room[: 2 * 20 * HIDDEN].view(torch.float16).view(20, HIDDEN)
    with pytest.raises(InvalidValueError, match="overlaps the"):
        library.moe(tensors[0], *weights, *tensors[1:], out=beginning, workspace=room)
