"""Random problems: what is drawn, on which kernels, and that a wrong kernel is found, on a GPU of host memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from fakes.library import FakeLibrary
from fakes.module import Launched

from w4a16gen import Activation, Epilogue, KernelConfig, QuantMode
from w4a16gen.errors import CudaError
from w4a16gen.kernels.spaces import enumerate_space, with_epilogues
from w4a16gen.verify import random_problems
from w4a16gen.verify.numeric import NumericProof

SPACES = sorted({*enumerate_space("default"), *enumerate_space("trtllm")})


class WrongLibrary(FakeLibrary):
    """A library of which one kernel errs in a value, and another fails."""

    def __init__(self, configs: Sequence[KernelConfig]) -> None:
        super().__init__(configs, compute=self.err)
        self.wrong, self.broken = configs[:2]

    def err(self, launched: Launched) -> None:
        if launched.config == self.broken:
            raise CudaError("the launch failed")
        launched.out[...] = launched.reference()
        if launched.config == self.wrong:
            launched.out[launched.problem.m // 2, launched.problem.n // 2] = np.nan


def run(library: FakeLibrary, count: int) -> dict[KernelConfig, NumericProof]:
    """Draw problems for a library's kernels."""
    proofs = {config: NumericProof(config.name) for config in library.configs()}
    random_problems.prove_random(library, proofs, count)
    return proofs


def test_as_many_problems_run_as_asked_for_and_all_kernels_get_their_turn() -> None:
    proofs = run(FakeLibrary(SPACES), 600)
    counts = [proof.passed.get(random_problems.KIND, 0) for proof in proofs.values()]
    assert sum(counts) == 600
    assert not any(proof.failures for proof in proofs.values())
    assert min(count for config, count in zip(proofs, counts, strict=True) if "native" in config.name) >= 1
    assert all(0 < proof.worst_error_over_bound <= 1 for proof in proofs.values() if proof.passed)


def test_kernels_with_epilogues_compute_what_they_can() -> None:
    plain = [config for config in enumerate_space("default") if config.mode is QuantMode.FINEGRAINED_SCALE_ONLY][:4]
    library = FakeLibrary(with_epilogues(plain, list(Epilogue)))
    proofs = run(library, 400)
    assert not any(proof.failures for proof in proofs.values())
    assert all(proof.passed for proof in proofs.values())
    asked: dict[Epilogue, set[tuple[Activation, bool]]] = {epilogue: set() for epilogue in Epilogue}
    for one in library.module.launches:
        asked[one.config.epilogue].add((one.activation, one.residual != 0))
    both = {(activation, residual) for activation in Activation for residual in (False, True)}
    assert asked[Epilogue.NONE] == {(Activation.NONE, False)}
    assert asked[Epilogue.ELEMENTWISE] == {pair for pair in both if not pair[0].is_gated}
    assert asked[Epilogue.GATED] == {pair for pair in both if pair[0].is_gated}


def test_a_wrong_kernel_and_a_failing_one_are_named() -> None:
    configs = [config for config in SPACES if config.mode is QuantMode.PER_COLUMN_SCALE_ONLY][:6]
    proofs = run(WrongLibrary(configs), 60)
    assert sum(proof.passed.get(random_problems.KIND, 0) + len(proof.failures) for proof in proofs.values()) == 60
    assert "error is inf times the bound" in proofs[configs[0]].failures[0]
    assert "the launch failed" in proofs[configs[1]].failures[0]
    assert random_problems.KIND not in proofs[configs[0]].passed
    assert not any(proofs[config].failures for config in configs[2:])


def test_no_problems_and_no_kernels_end_at_once() -> None:
    assert not any(proof.passed for proof in run(FakeLibrary(SPACES), 0).values())
    assert run(FakeLibrary([]), 10) == {}


@pytest.mark.parametrize("mode", QuantMode, ids=str)
def test_drawn_weights_can_run_and_vary(mode: QuantMode) -> None:
    rng = np.random.default_rng(0)
    weights = [random_problems.draw_weight(rng, mode) for _ in range(60)]
    assert all(weight.n % 8 == 0 and weight.k % 8 == 0 for weight in weights)
    assert all(weight.group_size == weight.k for weight in weights) or mode.is_grouped
    assert len({weight.group_size for weight in weights}) > 8
    assert max(weight.scales.max() for weight in weights) > 0.1
    assert min(weight.scales.min() for weight in weights) < 0.001
