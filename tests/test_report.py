"""Which kernels a sample holds, and what the summary says of those that ran."""

from __future__ import annotations

from typing import Any

from w4a16gen.space import enumerate_space
from w4a16gen.verify.numeric import sample
from w4a16gen.verify.report import Report


def test_a_sample_holds_every_schedule_of_every_cta_shape_and_mode() -> None:
    configs = enumerate_space("native")
    kinds = {(config.mode, config.cta, config.schedule, config.scheduler) for config in configs}
    chosen = sample(configs)
    assert len(chosen) == len(kinds) < len(configs) / 2
    assert {(config.mode, config.cta, config.schedule, config.scheduler) for config in chosen} == kinds


def test_the_summary_counts_the_kernels_that_ran() -> None:
    def kernel(passed: int, *failures: str) -> dict[str, Any]:
        return {"name": "k", "passed": {"drawn": passed} if passed else {}, "failures": list(failures)}

    ran = [kernel(5), kernel(3, "off"), kernel(0, "off")]
    numerics = {"status": "failed", "gpu": "a GPU", "kernels": [*ran, kernel(0)]}
    report = Report({"static": {"ok": True, "kernels": [{}] * 7, "violations": []}, "numerics": numerics})
    expected = "Static proofs hold for 7 kernels. Numerics of 3 of them on a GPU: 8 checks passed, 2 failed."
    assert report.summary() == expected
