"""The native kernels, run on the CPU: every CUDA thread is a fiber, in random order, with copies at random times."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from emulation import Emulation, EmulationError, Launch, build_for_emulation, build_mutant, draw_operands

from w4a16gen import KernelConfig, Scheduler
from w4a16gen.weights.reference import Expectation, error_over_bound

KERNELS = [
    KernelConfig.parse(f"w4a16_sm90_native_{name}")
    for name in (
        "cs_cta64x8x128_cluster1x1x1_warps8_persistent",
        "cs_cta128x8x128_cluster2x1x1_warpgroups4_persistent",
        "cs_cta128x112x128_cluster2x1x1_warpgroups2_streamk",
        "fgs_cta64x8x128_cluster1x1x1_warps8_persistent",
        "fgs_cta64x16x128_cluster1x1x4_warps8_persistent",
        "fgs_cta64x32x64_cluster1x1x2_warpgroups4_persistent",
        "fgs_cta64x80x128_cluster1x2x1_warpgroups2_persistent",
        "fgs_cta64x104x64_cluster1x1x2_warpgroups2_persistent",
        "fgs_cta128x40x128_cluster1x1x1_warpgroups2_streamk",
        "fgs_cta128x72x128_cluster1x1x1_warpgroups2_persistent",
        "fgs_cta128x256x64_cluster1x1x1_warpgroups2_persistent",
        "fgs_cta256x64x64_cluster1x1x1_warpgroups4_persistent",
        "fgs_cta256x80x128_cluster1x1x1_warpgroups2_persistent",
        "fgsz_cta64x16x128_cluster1x1x2_warps8_persistent",
        "fgsz_cta64x24x128_cluster1x1x2_warpgroups4_persistent",
        "fgsz_cta128x128x64_cluster1x1x2_warpgroups2_persistent",
        "fgsz_cta128x152x64_cluster2x1x1_warpgroups2_streamk",
        "fgsz_cta256x8x128_cluster1x1x2_warpgroups4_persistent",
        "fgsz_cta256x128x64_cluster1x1x1_warpgroups2_persistent",
    )
]
"""Every mode and schedule; operands that are multicast; K split by warps, in clusters and by stream-K; outputs from
registers and through shared memory, in both orders; every kind of tile."""
PROBLEMS = ((5, 200, 512, 128), (27, 136, 416, 32), (140, 328, 320, 64))
"""Ragged in every dimension: tokens, channels, k and the group size."""
STREAM_K = [
    KernelConfig.parse(f"w4a16_sm90_native_{name}")
    for name in (
        "cs_cta128x112x128_cluster2x1x1_warpgroups2_streamk",
        "fgs_cta128x40x128_cluster1x1x1_warpgroups2_streamk",
        "fgs_cta64x16x128_cluster1x1x1_warpgroups2_streamk",
    )
]
"""Operands that are multicast; neither those nor a second warpgroup along K; such a warpgroup."""
NO_L2 = ("tiles.h", "kL2Bytes = 50'000'000;", "kL2Bytes = 0;")
MUTANTS = {
    "a slot is filled before it is free": (
        "producer.cuh",
        "barrier_wait(shared.empty(at.slot), at.phase ^ 1);",
        "(void)shared;",
    ),
    "a slot is read before it is full": ("mainloop.cuh", "barrier_wait(shared.full(at.slot), at.phase);", ""),
    "a slot is never released": ("mainloop.cuh", "if (ends) in_flight = slot;", ""),
    "sums are read before WGMMA ends": ("mainloop.cuh", "wgmma_wait<0>();", ""),
    "partial sums are read too early": (
        "reduce.cuh",
        "named_barrier(barrier, S::WarpgroupsK * kWarpgroup);",
        "(void)barrier;",
    ),
    "activations are fetched before they are written": ("producer.cuh", "wait_for_prerequisites();", ""),
    "a CTA ends while others send to it": ("reduce.cuh", "barrier_wait(arrived, turn / 2 % 2);", "(void)turn;"),
}
"""Faults of synchronisation: a header, a statement of it, and what takes its place."""

pytestmark = [pytest.mark.compile, pytest.mark.xdist_group("emulated")]


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Emulation:
    """Return the kernels, compiled for the CPU."""
    return build_for_emulation(KERNELS, tmp_path_factory.mktemp("emulated"))


def largest_error(emulation: Emulation, config: KernelConfig, problem: tuple[int, int, int, int], seed: int) -> float:
    """Run a random product three times, in different orders; return the error as a multiple of its bound."""
    a, weight, bias = draw_operands(np.random.default_rng(seed), config, problem)
    first, *others = (
        emulation.gemm(config, a, weight, Launch(number, 4, 1.25, bias, is_dependent=number == 1))
        for number in range(3)
    )
    for other in others:
        assert np.array_equal(first.view(np.uint16), other.view(np.uint16)), "the order decides the bits"
    if config.scheduler is Scheduler.PERSISTENT:
        other = emulation.gemm(config, a, weight, Launch(3, 7, 1.25, bias))
        assert np.array_equal(first.view(np.uint16), other.view(np.uint16)), "the multiprocessors decide the bits"
    return error_over_bound(first, Expectation(a, weight), 1.25, bias)


@pytest.mark.parametrize("config", KERNELS, ids=lambda config: config.short_name)
def test_any_order_of_threads_gives_the_product(emulation: Emulation, config: KernelConfig) -> None:
    for seed, problem in enumerate(PROBLEMS):
        assert largest_error(emulation, config, problem, seed) < 1


@pytest.fixture(scope="module")
def without_l2(tmp_path_factory: pytest.TempPathFactory) -> Emulation:
    """Return stream-K kernels to which every product of several token tiles has operands that L2 cannot keep."""
    return build_mutant(STREAM_K, tmp_path_factory.mktemp("without_l2"), *NO_L2)


@pytest.mark.parametrize("config", STREAM_K, ids=lambda config: config.short_name)
def test_stream_k_divides_operands_that_l2_cannot_keep(without_l2: Emulation, config: KernelConfig) -> None:
    rows = 3 * config.cta.tokens - 1
    for seed, channels in enumerate((104, 200)):
        assert largest_error(without_l2, config, (rows, channels, 1152, 128), seed) < 1


@pytest.mark.parametrize("config", STREAM_K, ids=lambda config: config.short_name)
def test_heads_wait_for_late_tails(without_l2: Emulation, config: KernelConfig) -> None:
    a, weight, _ = draw_operands(np.random.default_rng(0), config, (3 * config.cta.tokens - 1, 104, 1152, 128))
    expected = Expectation(a, weight)
    for seed in range(2):
        late = Launch(seed, slow_cta=0)  # the first CTA sums tails
        assert error_over_bound(without_l2.gemm(config, a, weight, late), expected, 1.0, None) < 1


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_the_emulation_sees_missing_synchronisation(tmp_path: Path, mutant: str) -> None:
    config = KernelConfig.parse("w4a16_sm90_native_fgs_cta64x32x64_cluster1x1x2_warpgroups4_persistent")
    broken = build_mutant([config], tmp_path, *MUTANTS[mutant])
    try:
        error = largest_error(broken, config, (27, 328, 2048, 32), 0)
    except (EmulationError, AssertionError):
        return
    assert error > 1 or np.isnan(error)
