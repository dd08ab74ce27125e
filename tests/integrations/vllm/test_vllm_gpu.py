"""The kernel of vLLM on a Hopper GPU, in the stand-in: packed there, exact, captured in graphs, reloaded in place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from fakes.engine_experts import StoredExperts, routing  # noqa: E402
from fakes.engine_layers import StoredWeight, activations  # noqa: E402
from fakes.vllm_package import configs, experts, layers, parameters  # noqa: E402
from fakes.vllm_package.installed import install  # noqa: E402

from w4a16gen import KernelConfig, Library, Problem, use_kernels  # noqa: E402
from w4a16gen.integrations.vllm import plugin  # noqa: E402
from w4a16gen.runtime import default  # noqa: E402
from w4a16gen.weights.reference import Expectation, error_over_bound  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
STREAM_K = KernelConfig.parse("w4a16_sm90_native_fgs_cta128x64x128_cluster1x1x1_warpgroups2_streamk")
"""A kernel with a workspace."""
K, N = 1024, 512
CASES = [
    ("gptq", 128, {}),
    ("gptq", -1, {}),
    ("gptq", 64, {"desc_act": True}),
    ("gptq", 256, {"desc_act": True, "sym": False}),
    ("awq", 64, {"sym": False}),
    ("compressed-tensors", 32, {}),
    ("compressed-tensors", 128, {"sym": False}),
]


@pytest.fixture(autouse=True)
def engine(gpu_library: Library, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Install the stand-in with the plug-in; layers are made on the GPU, as vLLM makes them."""
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    monkeypatch.setattr(default._InUse, "library", gpu_library)  # noqa: SLF001
    install(monkeypatch)
    plugin.register()
    with torch.device("cuda"):
        yield


def layer_of(kind: str, group: int, options: dict[str, bool], **more: Any) -> Any:
    is_symmetric = options.get("sym", True)
    if kind == "gptq":
        raw = {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": options.get("desc_act", False)}
        config = configs.get_quantization_config("gptq").from_config(raw | {"sym": is_symmetric})
    else:
        config = configs.OtherConfig(kind, group, is_sym=is_symmetric)
    return layers.LinearBase(more.pop("k", K), [N], config, "layer", **more)


def random_weight(rng: np.random.Generator, group: int, options: dict[str, bool], k: int = K) -> StoredWeight:
    order = options.get("desc_act", False)
    return StoredWeight.random(rng, N, k, group, is_symmetric=options.get("sym", True), act_order=order)


def load(layer: Any, kind: str, stored: StoredWeight) -> None:
    tensors = stored.gptq(with_order=True) if kind == "gptq" else stored.stored_as(kind)
    layer.load_parts([tensors])


def assert_is_exact(got: Any, x: Any, stored: StoredWeight, bias: Any = None) -> None:
    expected = Expectation(stored.sorted_columns(x), stored.quantized())
    added = None if bias is None else bias.cpu().numpy()
    assert error_over_bound(got.cpu().numpy(), expected, 1.0, added) <= 1


@pytest.mark.parametrize(("kind", "group", "options"), CASES, ids=str)
def test_results_are_within_their_bounds(
    kind: str, group: int, options: dict[str, bool], rng: np.random.Generator
) -> None:
    layer, stored = layer_of(kind, group, options), random_weight(rng, group, options)
    load(layer, kind, stored)
    bias = activations(rng, 1, N)[0].cuda()
    for m in (0, 1, 16, 300):
        x = activations(rng, m, K).cuda()
        assert_is_exact(layer(x), x, stored)
        assert_is_exact(layer(x, bias), x, stored, bias)
        assert torch.equal(layer(x.bfloat16()), layer(x).bfloat16())
    assert [parameter.dtype for parameter in layer.parameters()] == [torch.uint8]


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_with_padded_groups_are_within_their_bounds(
    size: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = random_weight(rng, 128, {"desc_act": True})
    x = activations(rng, 16, K).cuda()
    total = torch.zeros(16, N, dtype=torch.float64)
    for rank in range(size):
        monkeypatch.setattr(parameters.World, "rank", rank)
        monkeypatch.setattr(parameters.World, "size", size)
        layer = layer_of("gptq", 128, {"desc_act": True}, is_row_parallel=True)
        load(layer, "gptq", stored)
        rows = slice(rank * K // size, (rank + 1) * K // size)
        total += layer(x[:, rows].contiguous()).double()
    exact = x.double().cpu().numpy() @ stored.dequantized().T
    expected = Expectation(stored.sorted_columns(x), stored.quantized())
    error = np.abs(total.cpu().numpy() - exact)
    assert (error <= size * expected.bound(1.0, None)).all()


@pytest.mark.parametrize("needs_workspace", [False, True], ids=["chosen kernels", "a kernel with a workspace"])
def test_a_captured_graph_follows_a_reload(
    needs_workspace: bool, gpu_library: Library, rng: np.random.Generator
) -> None:
    kernels = [STREAM_K] if needs_workspace else []
    if needs_workspace and STREAM_K not in gpu_library.configs():
        pytest.skip("the build that W4A16GEN_BUILD_DIR names does not hold it")
    assert not needs_workspace or gpu_library.workspace_bytes(STREAM_K, Problem(16, N, K, 64)) > 0
    layer, options = layer_of("gptq", 64, {"desc_act": True}), {"desc_act": True}
    load(layer, "gptq", random_weight(rng, 64, options))
    x = activations(rng, 16, K).cuda()
    with use_kernels(*kernels), torch.no_grad():
        layer(x)  # as vLLM warms up
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        for _ in range(3):
            stored = random_weight(rng, 64, options)
            layer.create()
            load(layer, "gptq", stored)
            x.copy_(activations(rng, 16, K))
            graph.replay()
            torch.cuda.synchronize()
            assert_is_exact(y, x, stored)


def test_a_compiled_call_is_the_eager_one(rng: np.random.Generator) -> None:
    layer = layer_of("awq", 64, {"sym": False})
    load(layer, "awq", random_weight(rng, 64, {"sym": False}))
    compiled = torch.compile(layer.quant_method.kernel.apply_weights, fullgraph=True)
    x = activations(rng, 16, K, torch.bfloat16).cuda()
    with torch.no_grad():
        assert torch.equal(compiled(layer, x), layer(x))


def test_only_one_layer_exists_twice_while_a_model_is_packed(rng: np.random.Generator) -> None:
    count, k = 8, 8192
    made = [layer_of("gptq", 128, {}, k=k) for _ in range(count)]
    stored = random_weight(rng, 128, {}, k)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for layer in made:
        load(layer, "gptq", stored)
    values = N * k  # one layer's q, a byte each
    assert torch.cuda.memory_allocated() <= before * 1.05
    assert torch.cuda.max_memory_allocated() <= before + 6 * values


EXPERTS, HIDDEN, INNER, SLOTS = 8, 512, 256, 2


def experts_of(kind: str, group: int, *, is_symmetric: bool, dtype: Any = torch.float16) -> Any:
    """Return a layer of experts on the GPU, which this package serves."""
    found = configs.get_quantization_config(kind)
    if kind == "gptq":
        raw = {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": False, "sym": is_symmetric}
        config = found.from_config(raw)
    else:
        config = found(group) if kind == "awq" else found(group, is_sym=is_symmetric)
    layer = experts.RoutedExperts(config, experts.FusedMoEConfig(HIDDEN, INNER), EXPERTS, dtype)
    if not layer.quant_method.serves:
        pytest.skip("the build that W4A16GEN_BUILD_DIR names holds no grouped kernels with and without the gate")
    return layer


@pytest.mark.parametrize(
    ("kind", "group", "is_symmetric"),
    [
        ("gptq", 128, True),
        ("gptq", -1, True),
        ("gptq", 128, False),
        ("awq", 64, False),
        ("compressed-tensors", 32, True),
    ],
)
def test_experts_are_within_their_bounds_and_captured(
    kind: str, group: int, is_symmetric: bool, rng: np.random.Generator
) -> None:
    layer = experts_of(kind, group, is_symmetric=is_symmetric)
    stored = StoredExperts.random(rng, EXPERTS, HIDDEN, INNER, group, is_symmetric=is_symmetric)
    layer.load(stored, kind)
    for tokens in (1, 16, 300):
        x = activations(rng, tokens, HIDDEN).cuda()
        ids, weights = (tensor.cuda() for tensor in routing(rng, tokens, SLOTS, EXPERTS))
        stored.assert_computed_by(layer, x, ids, weights)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x, weights, ids)
    for _ in range(2):
        stored = StoredExperts.random(rng, EXPERTS, HIDDEN, INNER, group, is_symmetric=is_symmetric)
        layer.create()
        layer.load(stored, kind)
        x.copy_(activations(rng, 300, HIDDEN))
        graph.replay()
        torch.cuda.synchronize()
        stored.assert_is_sum(y, x, ids, weights)
