"""What only a Hopper GPU can show. Builds every kernel first, unless W4A16GEN_BUILD_DIR names a build of them."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from graph_edges import programmatic_edges

from w4a16gen import KernelConfig, Library, PackedWeight, Problem, QuantMode, Target, pack_weight
from w4a16gen.errors import InvalidValueError, UnsupportedProblemError
from w4a16gen.kernels.config import Epilogue, Scheduler
from w4a16gen.kernels.spaces import enumerate_space
from w4a16gen.measure.probes import probe_multiply, probe_read
from w4a16gen.runtime.arrays import DeviceArray
from w4a16gen.runtime.typing import DependentLaunch
from w4a16gen.verify import numeric
from w4a16gen.verify.numeric import NumericProof
from w4a16gen.weights.quantized import Half, QuantizedWeight
from w4a16gen.weights.reference import Expectation, error_over_bound, random_weight

pytestmark = pytest.mark.gpu
NATIVE = sorted({*enumerate_space("trtllm-native"), *enumerate_space("default")})
EVERY = enumerate_space("trtllm") + NATIVE
STREAM_K = KernelConfig.parse("w4a16_sm90_native_fgs_cta128x64x128_cluster1x1x1_warpgroups2_streamk")


@pytest.fixture
def library(gpu_library: Library) -> Library:
    """Return the build of every kernel."""
    return gpu_library


@pytest.fixture(scope="session")
def proofs(gpu_library: Library) -> dict[str, NumericProof]:
    """Run the numerical proofs of every kernel once."""
    return {proof.name: proof for proof in numeric.prove(gpu_library)}


@pytest.mark.parametrize("config", EVERY, ids=str)
def test_every_kernel_is_right(proofs: dict[str, NumericProof], config: KernelConfig) -> None:
    if config.name not in proofs:
        pytest.skip("the build that W4A16GEN_BUILD_DIR names does not hold it")
    proof = proofs[config.name]
    assert proof.failures == []
    assert set(proof.passed) == {"one_hot", "random", "smallest", "ragged_k", "scales", "large", "long_k"}


class Layer:
    """A layer on a GPU with its exact result."""

    def __init__(
        self,
        library: Library,
        device: int = 0,
        mode: QuantMode = STREAM_K.mode,
        m: int = 40,
        target: Target = Target.NATIVE,
    ) -> None:
        rng = np.random.default_rng(device)
        self.library = library
        self.weight: QuantizedWeight = random_weight(rng, 512, 1024, 128, mode)
        self.a: Half = rng.standard_normal((m, 1024)).astype(np.float16)
        self.on_gpu = library.to_device(self.a, device)
        self.packed: PackedWeight = library.to_device(pack_weight(self.weight, target=target), device)
        self.expected = Expectation(self.a, self.weight)
        self.target = target

    def configs(self) -> list[KernelConfig]:
        """Return the kernels that read the layer's weight."""
        return [
            config
            for config in self.library.configs()
            if (config.target, config.mode) == (self.target, self.weight.mode) and config.epilogue is not Epilogue.GATED
        ]

    def run(self, **arguments: Any) -> DeviceArray:
        """Launch with the layer's own arrays."""
        result: DeviceArray = self.library.gemm(self.on_gpu, self.packed, **arguments)
        return result

    def check(self, result: Half) -> None:
        """Assert that a result is right."""
        assert error_over_bound(result, self.expected, 1.0, None) <= 1


def every_kernel(library: Library) -> list[tuple[Layer, KernelConfig]]:
    """Return every kernel of one mode with a layer of its target."""
    layers = [Layer(library, target=target) for target in Target]
    return [(layer, config) for layer in layers for config in layer.configs()]


@pytest.mark.parametrize("mode", QuantMode, ids=str)
@pytest.mark.parametrize("target", Target, ids=str)
def test_a_kernel_is_chosen_and_memory_allocated(library: Library, target: Target, mode: QuantMode) -> None:
    layer = Layer(library, mode=mode, target=target)
    if not layer.configs():
        pytest.skip("the build that W4A16GEN_BUILD_DIR names holds no such kernel")
    layer.check(layer.run().to_host())


def test_no_tokens_are_no_work(library: Library) -> None:
    assert Layer(library, m=0).run().to_host().shape == (0, 512)


def test_threads_and_gpus_may_call_at_once(library: Library) -> None:
    devices = [device.index for device in library.hopper_devices()]
    layers = [Layer(library, device, target=target) for device in devices for target in Target for _ in range(2)]
    wrong: list[BaseException] = []

    def work(layer: Layer) -> None:
        try:
            stream = library.module.Stream(layer.on_gpu.device)
            for config in layer.configs() * 3:
                result = layer.run(config=config, stream=stream)
                stream.synchronize()
                layer.check(result.to_host())
        except BaseException as error:  # noqa: BLE001  (asserted below, in the test's own thread)
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(layer,)) for layer in layers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_results_repeat_bit_for_bit_inside_and_outside_graphs(library: Library) -> None:
    stream = library.module.Stream(0)
    for layer, config in every_kernel(library):
        first = layer.run(config=config, stream=stream)
        out = library.to_device(np.full((40, 512), np.nan, np.float16))
        needed = library.workspace_bytes(config, Problem(40, 512, 1024, 128))
        workspace = library.to_device(np.zeros(needed, np.uint8))
        stream.begin_capture()
        layer.run(config=config, stream=stream, out=out, workspace=workspace)
        stream.end_capture()
        for _ in range(1000):
            stream.replay()
        stream.synchronize()
        assert np.array_equal(first.to_host().view(np.uint16), out.to_host().view(np.uint16))


def test_chained_dependent_launches_give_the_same_bits(library: Library) -> None:
    rng = np.random.default_rng(7)
    weights = [random_weight(rng, 1024, 1024, 128, STREAM_K.mode) for _ in range(3)]
    stream = library.module.Stream(0)
    for target in Target:
        packed = [library.to_device(pack_weight(weight, target=target)) for weight in weights]
        for config in library.configs():
            if (config.target, config.mode) != (target, STREAM_K.mode) or config.epilogue is Epilogue.GATED:
                continue
            results = []
            for dependent in ([False] * 9, [True] * 9, [True, False, True] * 3):
                rows = library.to_device(np.full((33, 1024), 0.01, np.float16))
                for turn, launch in enumerate(dependent):
                    rows = library.gemm(
                        rows, packed[turn % 3], config=config, alpha=0.5, stream=stream, dependent_launch=launch
                    )
                stream.synchronize()
                results.append(rows.to_host().view(np.uint16))
            assert np.array_equal(results[0], results[1]), config.name
            assert np.array_equal(results[0], results[2]), config.name


def test_launches_in_a_capture_are_dependent_behind_native_kernels_and_give_the_same_bits(library: Library) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(9)
    weight = random_weight(rng, 1024, 1024, 128, STREAM_K.mode)
    packed = library.to_device(pack_weight(weight))
    a = torch.from_numpy(rng.standard_normal((16, 1024)).astype(np.float16)).cuda()

    def products(kind: DependentLaunch) -> Any:
        rows = a * 1  # an ordinary kernel
        for _ in range(3):
            rows = library.gemm(rows, packed, alpha=0.05, dependent_launch=kind)
        return library.gemm(rows * 1, packed, alpha=0.05, dependent_launch=kind)

    expected = products(False)
    kinds: list[tuple[DependentLaunch, int]] = [(False, 0), ("auto", 2)]
    for kind, programmatic in kinds:
        assert torch.equal(products(kind), expected), "outside a capture"
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph):
            captured = products(kind)
        for _ in range(100):
            captured.zero_()
            graph.replay()
            assert torch.equal(captured, expected)
        assert programmatic_edges(graph.raw_cuda_graph()) == programmatic


def test_a_short_workspace_is_refused(library: Library) -> None:
    layer = Layer(library)
    needed = library.workspace_bytes(STREAM_K, Problem(40, 512, 1024, 128))
    short = library.to_device(np.zeros(needed - 1, np.uint8))
    with pytest.raises(InvalidValueError, match=f"workspace of {needed - 1} bytes must be at least {needed} bytes"):
        layer.run(config=STREAM_K, workspace=short)


def test_an_array_on_another_gpu_is_refused(library: Library) -> None:
    devices = library.hopper_devices()
    if len(devices) < 2:
        pytest.skip("this machine has one GPU")
    layer = Layer(library)
    with pytest.raises(InvalidValueError, match="activations on GPU 1 must be on GPU 0"):
        library.gemm(library.to_device(layer.a, 1), layer.packed)


def test_host_memory_that_claims_to_be_on_the_gpu_is_refused(library: Library) -> None:
    layer = Layer(library)
    host = layer.a

    class Claimant:
        __cuda_array_interface__ = {  # noqa: RUF012
            "shape": host.shape,
            "typestr": "<f2",
            "data": (host.ctypes.data, False),
            "strides": None,
            "version": 3,
        }

    with pytest.raises(InvalidValueError, match="must be in GPU memory"):
        library.gemm(Claimant(), layer.packed)


def test_torch_tensors_go_in_and_come_out(library: Library) -> None:
    torch = pytest.importorskip("torch")
    layer = Layer(library)
    a = torch.from_numpy(layer.a).cuda()
    result = library.gemm(a, layer.packed)
    assert isinstance(result, torch.Tensor)
    layer.check(result.cpu().numpy())
    with pytest.raises(InvalidValueError, match="activations must be contiguous"):
        library.gemm(a.T.contiguous().T, layer.packed)
    with pytest.raises(InvalidValueError, match="must be aligned to 16 bytes"):
        library.gemm(torch.zeros(40 * 1024 + 1, dtype=torch.float16, device="cuda")[1:].view(40, 1024), layer.packed)
    with pytest.raises(InvalidValueError, match="activations of dtype float32 must be float16"):
        library.gemm(a.float(), layer.packed)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        on_stream = library.gemm(a, layer.packed)
    stream.synchronize()
    assert torch.equal(on_stream, result)


def test_calls_that_are_known_give_the_same_on_torchs_stream_and_from_threads(library: Library) -> None:
    torch = pytest.importorskip("torch")
    layer = Layer(library)
    packed = replace(layer.packed, data=torch.from_numpy(layer.packed.data.to_host()).cuda())
    a = torch.from_numpy(layer.a).cuda()
    bias = torch.full((512,), 0.5, dtype=torch.float16, device="cuda")
    first = library.gemm(a, packed)
    if library.workspace_bytes(library.kernel_for(packed, Problem(40, 512, 1024, 128)), Problem(40, 512, 1024, 128)):
        pytest.skip("the kernel that is chosen needs a workspace: such calls are never known")
    assert library.calls.has(packed)
    has_api = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
    assert (library.calls.try_fast_path(a, packed, None, None, 1.0, False) is not None) == has_api
    out = torch.empty_like(first)
    assert library.gemm(a, packed, out=out, bias=bias, alpha=0.5) is out
    assert torch.equal(out, library.gemm(a, packed, bias=bias, alpha=0.5, stream=torch.cuda.current_stream()))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = library.gemm(a, packed)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, first)
    with pytest.raises(InvalidValueError, match="activations of dtype float32 must be float16"):
        library.gemm(a.float(), packed)
    with pytest.raises(InvalidValueError, match="must be aligned to 16 bytes"):
        library.gemm(torch.zeros(40 * 1024 + 1, dtype=torch.float16, device="cuda")[1:].view(40, 1024), packed)
    with pytest.raises(InvalidValueError, match="requires gradients"):
        library.gemm(a.clone().requires_grad_(), packed)

    def many(seed: int) -> bool:
        torch.manual_seed(seed)
        with torch.cuda.stream(torch.cuda.Stream()):
            mine = torch.randn(40, 1024, device="cuda").half()
            expected = library.gemm(mine, packed, stream=torch.cuda.current_stream())
            return all(torch.equal(library.gemm(mine, packed), expected) for _ in range(50))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(many, range(4)))


def test_probes_run_and_say_what_they_do(library: Library) -> None:
    layer = Layer(library)
    stream = library.module.Stream(0)
    if not any(config.target is Target.NATIVE for config in library.configs()):
        with pytest.raises(UnsupportedProblemError, match="only native kernels come with probes"):
            probe_read(library, layer.packed, stream=stream)
        return
    for dependent in (False, True):
        probe_read(library, layer.packed, stream=stream, dependent_launch=dependent)
    rounds = 3
    flops = probe_multiply(library, rounds, stream=stream)
    stream.synchronize()
    assert flops == rounds * library.hopper_device().sm_count * 2 * (2 * 64 * 256 * 64)
    with pytest.raises(InvalidValueError, match="rounds of 0 must be positive"):
        probe_multiply(library, 0, stream=stream)
    layer.check(layer.run().to_host())


def test_arrays_with_only_dlpack_work(library: Library) -> None:
    torch = pytest.importorskip("torch")
    layer = Layer(library)
    tensor = torch.from_numpy(layer.a).cuda()

    class DlpackOnly:
        def __dlpack__(self, stream: int | None = None) -> object:
            return tensor.__dlpack__(stream=stream)

        def __dlpack_device__(self) -> tuple[int, int]:
            device: tuple[int, int] = tensor.__dlpack_device__()
            return device

    layer.check(library.gemm(DlpackOnly(), layer.packed).to_host())


def test_a_row_has_the_same_bits_wherever_its_tile_lies(library: Library) -> None:
    """Two CTAs store the rows of overlapping tiles, in an order that changes from launch to launch."""
    rng = np.random.default_rng(8)
    weight = random_weight(rng, 512, 1152, 128, STREAM_K.mode)  # nine blocks of K: warpgroups get unequal shares
    packed = library.to_device(pack_weight(weight))
    rows = rng.standard_normal((512, 1152)).astype(np.float16)
    for config in library.configs():
        if config.target is not Target.NATIVE or config.mode is not STREAM_K.mode:
            continue
        if config.scheduler is Scheduler.STREAM_K:
            continue  # it divides K by the number of tiles
        tokens = config.cta.tokens
        alone = library.gemm(library.to_device(rows[:tokens]), packed, config=config).to_host()
        more = library.gemm(library.to_device(rows[: 2 * tokens - 8]), packed, config=config).to_host()
        assert np.array_equal(alone.view(np.uint16), more[:tokens].view(np.uint16)), config.name
        last = library.gemm(library.to_device(rows[tokens - 8 : 2 * tokens - 8]), packed, config=config).to_host()
        assert np.array_equal(last.view(np.uint16), more[tokens - 8 :].view(np.uint16)), config.name
