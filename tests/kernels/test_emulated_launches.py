"""How native kernels are launched behind other kernels: grids and shared memory, on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
from emulation import Emulation, EmulationError, Launch, build_for_emulation, draw_operands

from w4a16gen import KernelConfig
from w4a16gen.kernels.arrangement import RESERVED_SHARED_BYTES, SHARED_BYTES_PER_SM, native_arrangement
from w4a16gen.weights.reference import Expectation, error_over_bound

PAIRED, CLUSTERS_OF_2, CLUSTERS_OF_4, STREAM_K, UNPAIRED = (
    KernelConfig.parse(f"w4a16_sm90_native_fgs_{name}")
    for name in (
        "cta64x8x128_cluster1x1x1_warps8_persistent",
        "cta64x8x128_cluster1x1x2_warps8_persistent",
        "cta64x8x128_cluster1x1x4_warps8_persistent",
        "cta64x8x128_cluster1x1x1_warps8_streamk",
        "cta64x32x128_cluster1x1x1_warpgroups4_persistent",
    )
)

pytestmark = [pytest.mark.compile, pytest.mark.xdist_group("emulated")]


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Emulation:
    """Return the kernels, compiled for the CPU."""
    kernels = [PAIRED, CLUSTERS_OF_2, CLUSTERS_OF_4, STREAM_K, UNPAIRED]
    return build_for_emulation(kernels, tmp_path_factory.mktemp("emulated"))


def launched(emulation: Emulation, config: KernelConfig, tiles: int, launch: Launch) -> tuple[int, int]:
    """Multiply 5 tokens by some tiles of channels, and check the result; return the CTAs and their shared memory."""
    a, weight, _ = draw_operands(np.random.default_rng(3), config, (5, 64 * tiles, 512, 128))
    got = emulation.gemm(config, a, weight, launch)
    assert error_over_bound(got, Expectation(a, weight), 1.0, None) < 1
    return emulation.launched()


@pytest.mark.parametrize(
    ("config", "tiles", "sms", "ctas"),
    [
        (PAIRED, 3, 4, 3),
        (PAIRED, 4, 4, 4),
        (CLUSTERS_OF_2, 2, 5, 4),
        (CLUSTERS_OF_4, 2, 12, 8),
    ],
)
def test_ctas_take_sms_alone_behind_a_kernel_without_room(
    emulation: Emulation, config: KernelConfig, tiles: int, sms: int, ctas: int
) -> None:
    grid, shared_bytes = launched(emulation, config, tiles, Launch(sm_count=sms, is_dependent=True, is_captured=True))
    assert grid == ctas, "no CTA is redundant"
    taken = shared_bytes + RESERVED_SHARED_BYTES
    assert taken <= SHARED_BYTES_PER_SM < 2 * taken


@pytest.mark.parametrize(
    ("config", "tiles", "sms", "ctas"),
    [
        pytest.param(PAIRED, 5, 4, 5, id="more CTAs than SMs"),
        pytest.param(CLUSTERS_OF_2, 3, 5, 6, id="more clusters than find room alone"),
        pytest.param(CLUSTERS_OF_4, 3, 12, 12, id="clusters that leave SMs of a GPC over"),
        pytest.param(CLUSTERS_OF_2, 1, 1, 2, id="a cluster that fits on an SM in pairs only"),
        pytest.param(STREAM_K, 3, 4, 8, id="stream-K"),
        pytest.param(UNPAIRED, 3, 4, 3, id="a kernel that fills an SM anyway"),
    ],
)
def test_ctas_that_do_not_fit_alone_share_sms(
    emulation: Emulation, config: KernelConfig, tiles: int, sms: int, ctas: int
) -> None:
    found = launched(emulation, config, tiles, Launch(sm_count=sms, is_dependent=True, is_captured=True))
    assert found == (ctas, native_arrangement(config).shared_bytes)


@pytest.mark.parametrize(
    ("launch", "ctas"),
    [
        pytest.param(Launch(is_captured=True), 3, id="ordinary"),
        pytest.param(Launch(is_dependent=True), 4, id="dependent, behind a kernel that nobody knows"),
    ],
)
def test_any_other_launch_has_the_shared_memory_of_its_kernel(emulation: Emulation, launch: Launch, ctas: int) -> None:
    assert launched(emulation, PAIRED, 3, launch) == (ctas, native_arrangement(PAIRED).shared_bytes)


def test_clusters_that_never_fit_are_refused(emulation: Emulation) -> None:
    with pytest.raises(EmulationError, match="invalid configuration argument"):
        launched(emulation, CLUSTERS_OF_4, 1, Launch(sm_count=1))


def test_a_device_is_asked_once_what_runs_on_it(emulation: Emulation) -> None:
    launched(emulation, CLUSTERS_OF_2, 1, Launch(sm_count=3))
    asked = emulation.library.emulation_questions()
    launched(emulation, CLUSTERS_OF_2, 2, Launch(sm_count=3))
    assert emulation.library.emulation_questions() == asked > 0
