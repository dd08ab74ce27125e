"""Chains of launches: what they compute, and that a wrong order is found, on a GPU made of host memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from fakes.experts import Work
from fakes.library import FakeLibrary

from w4a16gen import KernelConfig, QuantMode
from w4a16gen.kernels.spaces import enumerate_space
from w4a16gen.verify import launch_chains
from w4a16gen.verify.numeric import NumericProof

SM_COUNT = 4
"""A small GPU, so that its weights are small."""
NAMES = [
    "w4a16_sm90_native_fgsz_cta64x8x128_cluster1x1x2_warpgroups2_persistent",
    "w4a16_sm90_native_cs_cta64x8x128_cluster1x1x1_warpgroups2_persistent",
    "w4a16_sm90_native_fgs_cta128x16x128_cluster1x1x1_warpgroups2_streamk",
    "w4a16_sm90_cutlass_fgs_cta128x16x64_cluster1x1x1_cooperative_streamk",
]


def run(library: FakeLibrary) -> dict[str, NumericProof]:
    """Run the chains of a library's kernels."""
    proofs = {config: NumericProof(config.name) for config in library.configs()}
    launch_chains.prove_chains(library, proofs, sm_count=SM_COUNT, k=256)
    return {config.name: proof for config, proof in proofs.items()}


def library_of(names: Sequence[str] = NAMES[:1]) -> FakeLibrary:
    return FakeLibrary(map(KernelConfig.parse, names))


def failures_of(order: Callable[[Sequence[Work]], Sequence[Work]]) -> list[str]:
    """Return the failures of the first kernel where a graph's launches run in this order."""
    library = library_of()
    library.module.order = order
    return run(library)[NAMES[0]].failures


def swapped(first: int) -> Callable[[Sequence[Work]], Sequence[Work]]:
    """Return an order in which a launch comes before the one that it should follow."""

    def order(launches: Sequence[Work]) -> Sequence[Work]:
        result = list(launches)
        result[first], result[first + 1] = result[first + 1], result[first]
        return result

    return order


def test_chains_pass_and_hold_dependent_launches_in_every_pattern() -> None:
    library = library_of(NAMES)
    proofs = run(library)
    assert [proof.failures for proof in proofs.values()] == [[]] * len(NAMES)
    grouped, per_column = proofs[NAMES[0]], proofs[NAMES[1]]
    assert grouped.passed == {launch_chains.KIND: 3 * 2 * 3}  # group sizes, tokens, patterns
    assert per_column.passed == {launch_chains.KIND: 2 * 3}
    assert {tuple(launch.dependent for launch in graph) for graph in library.module.graphs} == {
        (True,) * 7,
        (True, False, True, False, True, False, True),
        (False,) * 7,
    }


def test_reading_before_the_launch_before_has_written_is_found() -> None:
    failures = failures_of(swapped(0))
    assert len(failures) == 18
    assert failures[0] == "chain n=128 k=256 group=32 m=1 all dependent: 128 of 128 values in y are wrong"


def test_overwriting_what_the_launch_before_still_reads_is_found() -> None:
    failures = failures_of(swapped(3))
    assert len(failures) == 18
    assert all("values in v are wrong" in failure for failure in failures)


def test_what_no_launch_has_written_is_found() -> None:
    failures = failures_of(lambda launches: launches[:-1])
    assert len(failures) == 18
    assert all("values in w are wrong" in failure for failure in failures)


def test_a_launch_that_fails_is_recorded() -> None:
    library = library_of()
    library.module.refusal = (4, "no such luck")
    failures = run(library)[NAMES[0]].failures
    assert len(failures) == 18
    assert failures[-1].endswith("group=128 m=8 none dependent: no such luck")


@pytest.mark.parametrize("mode", QuantMode, ids=str)
def test_all_numbers_of_a_chain_are_integers_that_fp16_holds(mode: QuantMode) -> None:
    chain = launch_chains.draw_chain(np.random.default_rng(3), 384, 256, mode)
    for values in chain.left.values():
        assert np.array_equal(values, np.rint(values))
        assert np.abs(values).max() <= 1024
    assert np.count_nonzero(chain.weights["up"], axis=1).tolist() == [launch_chains.TERMS] * 384
    for group_size in launch_chains.GROUP_SIZES if mode.is_grouped else (0,):
        weight = launch_chains.quantized(chain.weights["down"], mode, group_size)
        assert np.array_equal(weight.dequantize(), chain.weights["down"])


def test_grids_leave_sms_without_work_where_two_of_them_fit() -> None:
    for config in enumerate_space("native"):
        if config.cluster.channels * config.cluster.tokens == 1 and config.cluster.k < 4:
            channels = launch_chains.channels_for(config, 132)
            ctas = channels // config.cta.channels * config.cluster.k
            assert 66 < ctas < 132, config.name
