"""Which kernels a sample holds, and what the summary says of those that ran."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fakes.devices import A100, H100_PCIE, numbered
from fakes.library import FakeLibrary

from w4a16gen import KernelConfig
from w4a16gen.kernels.spaces import enumerate_space
from w4a16gen.verify import epilogues, numeric, report, static
from w4a16gen.verify import launch_chains as chained
from w4a16gen.verify.numeric import NumericProof, sample
from w4a16gen.verify.report import Report
from w4a16gen.verify.static import StaticProof


def test_a_sample_holds_every_schedule_of_every_cta_shape_and_mode() -> None:
    configs = enumerate_space("native")
    kinds = {(config.mode, config.cta, config.schedule, config.scheduler) for config in configs}
    chosen = sample(configs)
    assert len(chosen) == len(kinds) < len(configs) / 2
    assert {(config.mode, config.cta, config.schedule, config.scheduler) for config in chosen} == kinds


@pytest.mark.parametrize(("sampled", "k"), [(False, 512), (True, 128)])
def test_verify_runs_chains_of_the_kernels_that_it_proves(
    monkeypatch: pytest.MonkeyPatch, sampled: bool, k: int
) -> None:
    proof = NumericProof("w4a16_sm90_native_cs_cta64x8x128_cluster1x1x2_warps8_persistent")
    asked: list[dict[str, Any]] = []

    def prove_chains(_library: object, proofs: dict[KernelConfig, NumericProof], **given: Any) -> None:
        asked.append(given)
        proofs[KernelConfig.parse(proof.name)].record("chain", "a chain", "wrong")

    monkeypatch.setattr(static, "prove", lambda _library, _folder: StaticProof([], []))
    monkeypatch.setattr(numeric, "prove", lambda _library, **_given: [proof])
    monkeypatch.setattr(chained, "prove_chains", prove_chains)
    monkeypatch.setattr(epilogues, "prove_epilogues", lambda *_, **_given: proof.record("epilogue", "one", None))
    library = FakeLibrary([KernelConfig.parse(proof.name)], devices=numbered(A100, A100, A100, H100_PCIE))
    found = report.verify(library, Path("nowhere"), sampled=sampled)
    assert [(given["sm_count"], given["device"], given["k"]) for given in asked] == [(114, 3, k)]
    assert proof.passed == {"epilogue": 1}
    assert not found.ok
    assert found.violations() == [f"{proof.name}: a chain: wrong"]


def test_the_summary_counts_the_kernels_that_ran() -> None:
    def kernel(passed: int, *failures: str) -> dict[str, Any]:
        return {"name": "k", "passed": {"drawn": passed} if passed else {}, "failures": list(failures)}

    ran = [kernel(5), kernel(3, "off"), kernel(0, "off")]
    numerics = {"status": "failed", "gpu": "a GPU", "kernels": [*ran, kernel(0)]}
    found = Report({"static": {"ok": True, "kernels": [{}] * 7, "violations": []}, "numerics": numerics})
    expected = "Static proofs hold for 7 kernels. Numerics of 3 of them on a GPU: 8 checks passed, 2 failed."
    assert found.summary() == expected
