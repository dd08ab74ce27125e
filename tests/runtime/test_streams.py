"""Captures, streams and memory on a Hopper GPU: first calls in a graph, replays, and streams that come and go."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from w4a16gen import InvalidValueError, KernelConfig, Library, PackedWeight, QuantMode, Scheduler, pack_weight, quantize
from w4a16gen.weights.packed import TARGET_LAYOUTS
from w4a16gen.weights.quantized import QuantizedWeight
from w4a16gen.weights.reference import Expectation, error_over_bound, random_weight

pytestmark = pytest.mark.gpu
MODE = QuantMode.FINEGRAINED_SCALE_ONLY
CAPTURES = 40
STREAMS = 500


@pytest.fixture
def library(gpu_library: Library) -> Library:
    """Return the build of every kernel."""
    return gpu_library


@pytest.fixture
def torch() -> Any:
    """Return torch, or skip."""
    return pytest.importorskip("torch")


def needing_workspace(library: Library) -> list[KernelConfig]:
    """Return kernels of the mode that split tiles along K."""
    found = [config for config in library.configs() if config.mode is MODE and config.scheduler is Scheduler.STREAM_K]
    if not found:
        pytest.skip("the build that W4A16GEN_BUILD_DIR names holds no stream-K kernel")
    return found


def problems(library: Library) -> Iterator[tuple[int, QuantizedWeight, KernelConfig | None]]:
    """Draw tokens, weights, and kernels: the chosen one, or one that needs a workspace."""
    rng = np.random.default_rng(21)
    split = needing_workspace(library)
    for turn in range(CAPTURES):
        n, k = (int(rng.integers(1, 33)) * 128 for _ in range(2))
        config = None if turn % 3 == 0 else split[int(rng.integers(len(split)))]
        yield int(rng.integers(1, 300)), random_weight(rng, n, k, 128, MODE), config


def packed_for(library: Library, weight: QuantizedWeight, config: KernelConfig | None) -> PackedWeight:
    target = library.configs()[-1].target if config is None else config.target
    if not any(kernel.mode is MODE and kernel.target is target for kernel in library.configs()):
        pytest.skip("the build holds no kernel of the mode")
    return library.to_device(pack_weight(weight, target=target))


def test_a_first_call_is_captured_and_replayed_on_other_activations(library: Library, torch: Any) -> None:
    for m, weight, config in problems(library):
        packed = packed_for(library, weight, config)
        x = torch.zeros((m, weight.k), dtype=torch.float16, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = library.gemm(x, packed, config=config)
        for seed in range(2):
            rows = np.random.default_rng(seed).standard_normal((m, weight.k)).astype(np.float16)
            x.copy_(torch.from_numpy(rows))
            y.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            ratio = error_over_bound(y.cpu().numpy(), Expectation(rows, weight), 1.0, None)
            assert ratio <= 1, f"{m} tokens, {config}"


def test_a_replay_is_right_after_everything_else_was_freed_and_overwritten(library: Library, torch: Any) -> None:
    weight = random_weight(np.random.default_rng(3), 1024, 4096, 128, MODE)
    for config in needing_workspace(library)[:4]:
        packed = packed_for(library, weight, config)
        rows = np.random.default_rng(4).standard_normal((64, 4096)).astype(np.float16)
        x, kept = torch.from_numpy(rows).cuda(), torch.empty((64, 1024), dtype=torch.float16, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept.copy_(library.gemm(x, packed, config=config))  # the call's own output is freed in the capture
        gc.collect()
        torch.cuda.empty_cache()
        junk = [torch.full((1 << 20,), float("nan"), dtype=torch.float16, device="cuda") for _ in range(64)]
        for _ in range(3):
            kept.zero_()
            graph.replay()
            library.gemm(x, packed, config=config)
        torch.cuda.synchronize()
        assert error_over_bound(kept.cpu().numpy(), Expectation(rows, weight), 1.0, None) <= 1
        assert all(bool(torch.isnan(part).all()) for part in junk), "a replay wrote over memory of others"


def test_a_capture_without_torch_owns_its_workspace(library: Library) -> None:
    weight = random_weight(np.random.default_rng(5), 1024, 4096, 128, MODE)
    rows = np.random.default_rng(6).standard_normal((64, 4096)).astype(np.float16)
    for config in needing_workspace(library)[:4]:
        packed, a = packed_for(library, weight, config), library.to_device(rows)
        out, other = (library.to_device(np.full((64, 1024), np.nan, np.float16)) for _ in range(2))
        stream = library.module.Stream(0)
        stream.begin_capture()
        library.gemm(a, packed, config=config, out=out, stream=stream)
        stream.end_capture()
        for _ in range(3):
            stream.replay()
            library.gemm(a, packed, config=config, out=other, stream=stream)
        stream.synchronize()
        for result in (out, other):
            assert error_over_bound(result.to_host(), Expectation(rows, weight), 1.0, None) <= 1


def test_a_capture_without_torch_needs_an_output(library: Library) -> None:
    config = needing_workspace(library)[0]
    packed = packed_for(library, random_weight(np.random.default_rng(5), 256, 512, 128, MODE), config)
    a, out = (library.to_device(np.zeros((8, size), np.float16)) for size in (512, 256))
    stream = library.module.Stream(0)
    stream.begin_capture()
    with pytest.raises(InvalidValueError, match="pass out= in a capture"):
        library.gemm(a, packed, config=config, stream=stream)
    library.gemm(a, packed, config=config, stream=stream, out=out)
    stream.end_capture()
    stream.replay()
    stream.synchronize()
    assert not out.to_host().any()


def test_captures_that_come_and_go_keep_no_memory(library: Library, torch: Any) -> None:
    config = needing_workspace(library)[0]
    packed = packed_for(library, random_weight(np.random.default_rng(5), 4096, 4096, 128, MODE), config)
    a, out = (library.to_device(np.zeros((64, 4096), np.float16)) for _ in range(2))
    free = []
    for turn in range(60):
        stream = library.module.Stream(0)
        stream.begin_capture()
        library.gemm(a, packed, config=config, stream=stream, out=out)
        stream.end_capture()
        stream.replay()
        stream.synchronize()
        del stream
        if turn in {9, 59}:
            torch.cuda.synchronize()
            free.append(torch.cuda.mem_get_info()[0])
    assert free[0] - free[1] < 64 << 20


@pytest.mark.parametrize("kind", ["torch's", "this module's"])
def test_streams_that_come_and_go_keep_no_memory(library: Library, torch: Any, kind: str) -> None:
    config = needing_workspace(library)[0]
    weight = random_weight(np.random.default_rng(5), 4096, 4096, 128, MODE)
    packed = packed_for(library, weight, config)
    rows = np.random.default_rng(6).standard_normal((64, 4096)).astype(np.float16)
    ours, theirs = library.to_device(rows), torch.from_numpy(rows).cuda()
    expected = Expectation(rows, weight)
    free = []
    for turn in range(STREAMS):
        if kind == "torch's":
            stream = torch.cuda.Stream()
            result = library.gemm(theirs, packed, config=config, stream=stream)
            stream.synchronize()
            got = result.cpu().numpy()
        else:
            stream = library.module.Stream(0)
            result = library.gemm(ours, packed, config=config, stream=stream)
            stream.synchronize()
            got = result.to_host()
        if turn % 50 == 0:
            assert error_over_bound(got, expected, 1.0, None) <= 1
        del stream, result
        if turn in {40, STREAMS - 1}:
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            free.append(torch.cuda.mem_get_info()[0])
    assert free[0] - free[1] < 64 << 20


def test_an_output_on_a_given_stream_is_not_memory_that_others_still_read(library: Library, torch: Any) -> None:
    weight = random_weight(np.random.default_rng(7), 1024, 1024, 128, MODE)
    config = next(config for config in library.configs() if config.mode is MODE)
    packed = packed_for(library, weight, config)
    assert packed.layout == TARGET_LAYOUTS[config.target]
    x = torch.zeros((1024, 1024), dtype=torch.float16, device="cuda")
    side = torch.cuda.Stream()
    for _ in range(20):
        held = torch.ones((1024, 1024), dtype=torch.float16, device="cuda")
        torch.cuda._sleep(5_000_000)  # noqa: SLF001  (the current stream is busy before it reads)
        copy = held.clone()
        del held  # torch may hand this memory out again, in the order of the current stream
        library.gemm(x, packed, config=config, stream=side)
        torch.cuda.synchronize()
        assert bool((copy == 1).all())


def test_wrong_scalars_are_refused_after_right_calls(library: Library, torch: Any) -> None:
    config = next(config for config in library.configs() if config.mode is MODE)
    host = packed_for(library, random_weight(np.random.default_rng(7), 256, 512, 128, MODE), config).to_host()
    packed = PackedWeight(torch.from_numpy(host.data).cuda(), host.layout, host.n, host.k, host.group_size, host.mode)
    x = torch.ones((8, 512), dtype=torch.float16, device="cuda")
    good = library.gemm(x, packed)
    wrong: list[Any] = [None, "1", True, 1j, [1.0], float("nan"), 1e300, torch.ones(1)]
    for alpha in wrong:
        with pytest.raises(InvalidValueError, match="alpha"):
            library.gemm(x, packed, alpha=alpha)
    with pytest.raises(InvalidValueError, match="dependent_launch of 'no' must be True, False or"):
        library.gemm(x, packed, dependent_launch="no")  # type: ignore[arg-type]
    assert torch.equal(library.gemm(x, packed, alpha=np.float32(1)), good)
    assert torch.equal(library.gemm(x, packed), good)


def test_torch_parameters_and_bfloat16_are_packed_from_the_host(library: Library, torch: Any) -> None:
    linear = torch.nn.Linear(512, 256)
    weights = [linear.weight, linear.weight.bfloat16(), linear.weight.detach().double()]
    x = torch.ones((8, 512), dtype=torch.float16, device="cuda")
    for weight in weights:
        packed = library.to_device(pack_weight(quantize(weight, group_size=128)))
        if any(kernel.mode is MODE and kernel.target.value == "native" for kernel in library.configs()):
            exact = x.float().cpu() @ weight.detach().float().t()
            assert (library.gemm(x, packed).float().cpu() - exact).abs().max() < 1


def test_a_buffer_that_goes_during_a_capture_does_not_break_it(library: Library, torch: Any) -> None:
    weight = random_weight(np.random.default_rng(5), 256, 512, 128, MODE)
    packed = packed_for(library, weight, None)
    x = torch.ones((4, weight.k), dtype=torch.float16, device="cuda")
    buffers = [library.to_device(np.zeros(1 << 20, np.uint8)) for _ in range(3)]
    streams = [library.module.Stream(0)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = library.gemm(x, packed)
        buffers.clear()
        streams.clear()
    graph.replay()
    torch.cuda.synchronize()
    ratio = error_over_bound(y.cpu().numpy(), Expectation(x.cpu().numpy(), weight), 1.0, None)
    assert ratio <= 1
