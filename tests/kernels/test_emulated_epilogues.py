"""Kernels with epilogues, run on the CPU as a whole: in place, in any order of threads, and behind another kernel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from emulation import Emulation, EmulationError, Launch, build_for_emulation, build_mutant, draw_operands

from w4a16gen import KernelConfig
from w4a16gen.kernels.config import Epilogue
from w4a16gen.kernels.epilogue import Activation, CallEpilogue, why_not_by
from w4a16gen.weights.reference import Expectation, Extra, error_over_bound

SHAPES = (
    "fgs_cta64x8x128_cluster1x1x1_warps8_persistent",
    "fgsz_cta64x16x128_cluster1x1x4_warps8_persistent",
    "cs_cta64x24x128_cluster1x1x2_warpgroups4_persistent",
    "fgs_cta64x32x64_cluster1x1x2_warpgroups4_persistent",
    "fgs_cta64x64x128_cluster1x1x2_warpgroups2_persistent",
    "fgs_cta64x80x128_cluster1x2x1_warpgroups2_persistent",
    "fgs_cta128x40x128_cluster1x1x1_warpgroups2_streamk",
    "fgs_cta128x112x128_cluster2x1x1_warpgroups2_streamk",
    "fgsz_cta128x128x64_cluster1x1x2_warpgroups2_persistent",
    "fgs_cta128x256x64_cluster1x1x1_warpgroups2_persistent",
    "cs_cta256x64x64_cluster1x1x1_warpgroups4_persistent",
    "fgs_cta256x80x128_cluster1x1x1_warpgroups2_persistent",
    "fgs_cta256x128x64_cluster1x1x1_warpgroups2_persistent",
)
"""Outputs and residuals from registers and through shared memory; every way to split K, and every kind of cluster."""
KERNELS = [
    replace(KernelConfig.parse(f"w4a16_sm90_native_{name}"), epilogue=epilogue)
    for name in SHAPES
    for epilogue in (Epilogue.ELEMENTWISE, Epilogue.GATED)
]
PROBLEMS = ((5, 208, 512, 128), (140, 336, 320, 64))
"""Ragged in every dimension: tokens, channels, k and the group size."""
CALLS = (
    (Activation.NONE, False, False),
    (Activation.NONE, True, True),
    (Activation.SILU, True, False),
    (Activation.GELU_TANH, False, False),
    (Activation.GELU, True, True),
    (Activation.RELU2, False, False),
    (Activation.SWIGLU, False, False),
    (Activation.SWIGLU, True, True),
    (Activation.GEGLU_TANH, False, False),
    (Activation.GEGLU, True, False),
)
"""The activation, whether there is a residual, and whether it is the output."""
MUTANTS = {
    "a residual is read before it is there": (
        "cs_cta256x64x64_cluster1x1x1_warpgroups4_persistent",
        ("kernel.cuh", "await_residual<S>(p, shared, turn);", "(void)turn;"),
    ),
    "tiles overlap in place": (
        "fgs_cta64x8x128_cluster1x1x1_warps8_persistent",
        ("launch.cuh", "clusters_at_once, !in_place);", "clusters_at_once, true || in_place);"),
    ),
}
"""Faults: a shape that shows it; a header, a statement of it, and what takes its place."""

pytestmark = [pytest.mark.compile, pytest.mark.xdist_group("emulated")]


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Emulation:
    """Return the kernels, compiled for the CPU."""
    return build_for_emulation(KERNELS, tmp_path_factory.mktemp("emulated"))


def errors_of(
    emulation: Emulation, config: KernelConfig, problem: tuple[int, int, int, int], seed: int
) -> Iterator[float]:
    """Run all that a kernel computes, each in two orders; give each error as a multiple of its bound."""
    rng = np.random.default_rng(seed)
    a, weight, bias = draw_operands(rng, config, problem)
    m, n = len(a), weight.n
    expected = Expectation(a, weight)
    for activation, has_residual, in_place in CALLS:
        call = CallEpilogue(activation, has_residual=has_residual)
        if why_not_by(config.epilogue, call) is not None:
            continue
        residual = rng.standard_normal((m, call.outputs(n))).astype(np.float16) if has_residual else None
        launch = Launch(alpha=1.25, bias=bias, activation=activation, residual=residual, in_place=in_place)
        first, other = (
            emulation.gemm(config, a, weight, replace(launch, seed=number, is_dependent=number == 1))
            for number in range(2)
        )
        assert np.array_equal(first.view(np.uint16), other.view(np.uint16)), "the order decides the bits"
        yield error_over_bound(first, expected, 1.25, bias, Extra(activation, residual))


@pytest.mark.parametrize("config", KERNELS, ids=lambda config: config.short_name)
def test_any_order_of_threads_gives_the_result(emulation: Emulation, config: KernelConfig) -> None:
    for seed, problem in enumerate(PROBLEMS):
        assert 0 < max(errors_of(emulation, config, problem, seed)) < 1


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_the_emulation_sees_a_residual_at_the_wrong_time(tmp_path: Path, mutant: str) -> None:
    shape, fault = MUTANTS[mutant]
    config = KernelConfig.parse(f"w4a16_sm90_native_{shape}_elementwise")
    broken = build_mutant([config], tmp_path, *fault)
    try:
        is_wrong = any(error > 1 for error in errors_of(broken, config, PROBLEMS[1], 0))
    except (EmulationError, AssertionError):
        return
    assert is_wrong
