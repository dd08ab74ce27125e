"""How results are judged: by the largest error over its bound, and by the bits of equal launches."""

from __future__ import annotations

import numpy as np
import pytest

from w4a16gen.verify.numeric import NumericProof, judge_error

ONES = np.ones(3, np.float16)


@pytest.mark.parametrize(
    ("ratio", "fault"),
    [(0.0, None), (1.0, None), (1.01, "error is 1.01 times the bound"), (float("inf"), "error is inf times the bound")],
)
def test_an_error_may_reach_its_bound_and_not_exceed_it(ratio: float, fault: str | None) -> None:
    proof = NumericProof("kernel")
    judge_error(proof, "kind", "a product", ratio, [ONES, ONES.copy()])
    assert proof.failures == ([] if fault is None else [f"a product: {fault}"])
    assert proof.passed == ({"kind": 1} if fault is None else {})


@pytest.mark.parametrize("changed", [1, 2])
def test_each_result_has_the_bits_of_the_first(changed: int) -> None:
    results = [ONES.copy() for _ in range(3)]
    results[changed][2] = -1
    proof = NumericProof("kernel")
    judge_error(proof, "kind", "a product", 0.5, results)
    assert proof.failures == ["a product: the bits differ when it runs again"]
