"""Chains of launches: what they compute, and that a wrong order is found, with a stand-in for the GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from w4a16gen import KernelConfig, PackedWeight, QuantMode
from w4a16gen.errors import CudaError
from w4a16gen.kernels.spaces import enumerate_space
from w4a16gen.verify import launch_chains as chained
from w4a16gen.verify.numeric import NumericProof
from w4a16gen.weights.reference import gemm_reference

SM_COUNT = 4
"""A small GPU, so that its weights are small."""
NAMES = [
    "w4a16_sm90_native_fgsz_cta64x8x128_cluster1x1x2_warpgroups2_persistent",
    "w4a16_sm90_native_cs_cta64x8x128_cluster1x1x1_warpgroups2_persistent",
    "w4a16_sm90_native_fgs_cta128x16x128_cluster1x1x1_warpgroups2_streamk",
    "w4a16_sm90_cutlass_fgs_cta128x16x64_cluster1x1x1_cooperative_streamk",
]


@dataclass
class Array:
    """Memory of the stand-in."""

    values: npt.NDArray[Any]

    @property
    def buffer(self) -> Array:
        return self

    def upload(self, source: npt.NDArray[Any]) -> None:
        self.values[...] = source

    def to_host(self) -> npt.NDArray[Any]:
        return self.values.copy()


class StandIn:
    """Records launches and computes them when a graph of them is replayed; a test may take over how."""

    launches: list[dict[str, Any]]
    order: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] = staticmethod(lambda launches: launches)
    error: Exception | None = None
    dependent: list[list[bool]]

    def __init__(self, _library: object, device: int) -> None:
        self.device = device
        nothing = SimpleNamespace(synchronize=lambda: None)
        self.stream = SimpleNamespace(
            begin_capture=self._begin, end_capture=self._end, replay=self._replay, **vars(nothing)
        )
        self.library = SimpleNamespace(
            gemm=self._gemm, workspace_bytes=lambda *_, **__: 16, to_device=lambda value, _device: value
        )

    @staticmethod
    def upload(values: npt.NDArray[Any]) -> Array:
        return Array(values.copy())

    def _begin(self) -> None:
        self.launches = []

    def _gemm(self, a: Array, weight: PackedWeight, **given: Any) -> None:
        if self.error is not None:
            raise self.error
        self.launches.append({"a": a, "weight": weight, **given})

    def _end(self) -> None:
        type(self).dependent.append([launch["dependent_launch"] for launch in self.launches])

    def _replay(self) -> None:
        for launch in type(self).order(self.launches):
            launch["out"].values[...] = gemm_reference(launch["a"].values, launch["weight"].unpack())


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chained, "GuardedGpu", StandIn)
    monkeypatch.setattr(StandIn, "dependent", [], raising=False)


def run(names: list[str] = NAMES) -> dict[str, NumericProof]:
    """Run the chains of some kernels."""
    proofs = {KernelConfig.parse(name): NumericProof(name) for name in names}
    chained.prove_chains(None, proofs, sm_count=SM_COUNT, k=256)  # type: ignore[arg-type]
    return {config.name: proof for config, proof in proofs.items()}


def swapped(first: int) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    """Give an order in which a launch comes before the one that it should follow."""

    def order(launches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        result = list(launches)
        result[first], result[first + 1] = result[first + 1], result[first]
        return result

    return order


def test_chains_pass_and_hold_dependent_launches_in_every_pattern() -> None:
    proofs = run()
    assert [proof.failures for proof in proofs.values()] == [[]] * len(NAMES)
    grouped, per_column = proofs[NAMES[0]], proofs[NAMES[1]]
    assert grouped.passed == {chained.KIND: 3 * 2 * 3}  # group sizes, tokens, patterns
    assert per_column.passed == {chained.KIND: 2 * 3}
    assert {tuple(pattern) for pattern in StandIn.dependent} == {
        (True,) * 7,
        (True, False, True, False, True, False, True),
        (False,) * 7,
    }


def test_reading_before_the_launch_before_has_written_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StandIn, "order", staticmethod(swapped(0)))
    failures = run(NAMES[:1])[NAMES[0]].failures
    assert len(failures) == 18
    assert failures[0] == "chain n=128 k=256 group=32 m=1 all dependent: 128 of 128 values in y are wrong"


def test_overwriting_what_the_launch_before_still_reads_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StandIn, "order", staticmethod(swapped(3)))
    failures = run(NAMES[:1])[NAMES[0]].failures
    assert len(failures) == 18
    assert all("values in v are wrong" in failure for failure in failures)


def test_what_no_launch_has_written_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StandIn, "order", staticmethod(lambda launches: launches[:-1]))
    failures = run(NAMES[:1])[NAMES[0]].failures
    assert len(failures) == 18
    assert all("values in w are wrong" in failure for failure in failures)


def test_a_launch_that_fails_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StandIn, "error", CudaError("no such luck"))
    failures = run(NAMES[:1])[NAMES[0]].failures
    assert len(failures) == 18
    assert failures[-1].endswith("group=128 m=8 none dependent: no such luck")


@pytest.mark.parametrize("mode", QuantMode, ids=str)
def test_all_numbers_of_a_chain_are_integers_that_fp16_holds(mode: QuantMode) -> None:
    chain = chained.draw_chain(np.random.default_rng(3), 384, 256, mode)
    for values in chain.left.values():
        assert np.array_equal(values, np.rint(values))
        assert np.abs(values).max() <= 1024
    assert np.count_nonzero(chain.weights["up"], axis=1).tolist() == [chained.TERMS] * 384
    for group_size in chained.GROUP_SIZES if mode.is_grouped else (0,):
        weight = chained.quantized(chain.weights["down"], mode, group_size)
        assert np.array_equal(weight.dequantize(), chain.weights["down"])


def test_grids_leave_sms_without_work_where_two_of_them_fit() -> None:
    for config in enumerate_space("native"):
        if config.cluster.channels * config.cluster.tokens == 1 and config.cluster.k < 4:
            channels = chained.channels_for(config, 132)
            ctas = channels // config.cta.channels * config.cluster.k
            assert 66 < ctas < 132, config.name
