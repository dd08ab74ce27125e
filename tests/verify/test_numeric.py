"""How results are judged: by the largest error over its bound, and by the bits of equal launches."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from w4a16gen.choose.cost_model import default_cost_model
from w4a16gen.kernels.config import KernelConfig, QuantMode, Scheduler
from w4a16gen.kernels.problem import Problem
from w4a16gen.kernels.spaces import enumerate_space
from w4a16gen.runtime.library import Library
from w4a16gen.verify import numeric
from w4a16gen.verify.numeric import Case, NumericProof, cases, judge_error

MODE = QuantMode.FINEGRAINED_SCALE_ONLY
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


@pytest.mark.parametrize("with_stream_k", [True, False])
def test_only_stream_k_kernels_run_the_product_beyond_l2(monkeypatch: pytest.MonkeyPatch, with_stream_k: bool) -> None:
    persistent, stream_k = (
        KernelConfig.parse(f"w4a16_sm90_native_cs_cta64x16x128_cluster1x1x1_warpgroups2_{scheduler}")
        for scheduler in ("persistent", "streamk")
    )
    kernels = [persistent, stream_k] if with_stream_k else [persistent]
    ran: dict[str, list[KernelConfig]] = {}

    def prove_case(_gpu: object, case: Case, proofs: list[tuple[KernelConfig, NumericProof]], _rng: object) -> None:
        ran[case.kind] = [config for config, _ in proofs]

    monkeypatch.setattr(numeric, "GuardedGpu", lambda *_: None)
    monkeypatch.setattr(numeric, "_prove_case", prove_case)
    numeric.prove(cast("Library", SimpleNamespace(configs=lambda: kernels)))
    assert ran.pop("beyond_l2", None) == (kernels[1:] or None)
    assert all(configs == kernels for configs in ran.values())
    assert {"one_hot", "long_k"} < ran.keys()


def test_stream_k_kernels_run_a_product_in_which_most_have_heads() -> None:
    kernels = [config for config in enumerate_space("default") if config.mode is MODE]
    (case,) = (case for case in cases(MODE, np.random.default_rng(0)) if case.kind == "beyond_l2")
    suited = [config for config in kernels if case.suits(config)]
    assert suited == [config for config in kernels if config.scheduler is Scheduler.STREAM_K]
    with_heads = without = 0
    for tokens in case.tokens:
        problem = Problem(tokens, case.weight.n, case.weight.k, case.weight.group_size)
        for config in suited:
            models = (replace(default_cost_model(), stream_k_has_heads=has_heads) for has_heads in (True, False))
            first, second = (model.work(config, problem) for model in models)
            with_heads += first != second
            without += first == second
    assert with_heads > 8 * without
