"""The proofs of epilogues: what they run, and that a wrong kernel is found, on a GPU made of host memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from fakes.library import FakeLibrary
from fakes.module import Launched, compute

from w4a16gen import Epilogue, KernelConfig
from w4a16gen.kernels.epilogue import Activation
from w4a16gen.verify import epilogues
from w4a16gen.verify.numeric import NumericProof

NAMES = [
    "w4a16_sm90_native_fgs_cta64x16x128_cluster1x1x2_warps8_persistent_elementwise",
    "w4a16_sm90_native_fgs_cta64x16x128_cluster1x1x2_warps8_persistent_gated",
    "w4a16_sm90_native_cs_cta128x64x128_cluster1x1x1_warpgroups2_streamk_elementwise",
    "w4a16_sm90_native_fgs_cta64x16x128_cluster1x1x2_warps8_persistent",
    "w4a16_sm90_cutlass_fgs_cta128x16x64_cluster1x1x1_cooperative_streamk",
]
RESIDUALS = ((False, False), (True, False), (True, True))
"""Whether there is one, and whether it is the output."""


def run(
    compute: Callable[[Launched], None] = compute, names: Sequence[str] = NAMES[:2]
) -> tuple[FakeLibrary, list[NumericProof]]:
    """Prove the epilogues of kernels that compute the reference, or something else."""
    library = FakeLibrary(map(KernelConfig.parse, names), compute=compute)
    proofs = {config: NumericProof(config.name) for config in library.configs()}
    epilogues.prove_epilogues(library, proofs)
    return library, list(proofs.values())


def test_every_epilogue_of_native_kernels_passes() -> None:
    library, proofs = run(names=NAMES)
    assert [proof.failures for proof in proofs] == [[]] * len(NAMES)
    passed = {proof.name: proof.passed for proof in proofs}
    counts = {config.name: len(epilogues.SHAPES) * len(epilogues.PLAN[config.epilogue]) for config in library.configs()}
    assert passed == {name: {epilogues.KIND: count} if count else {} for name, count in counts.items()}
    assert sorted(counts.values()) == [0, 0, 27, 42, 42]
    assert all(0 < proof.worst_error_over_bound <= 1 for proof in proofs if counts[proof.name])
    launches = library.module.launches
    asked = {(one.activation, one.residual != 0, one.residual == one.output) for one in launches}
    kinds = {(activation, *residual) for activation in Activation for residual in RESIDUALS}
    assert asked == kinds - {(Activation.NONE, False, False)}
    assert {one.problem.m for one in launches if one.residual == one.output} >= {1, 7, 17, 65, 100}


def _no_activation(launched: Launched) -> None:
    """Leave out the activations that are not gated."""
    plain = launched if launched.activation.is_gated else replace(launched, activation_number=0)
    launched.out[...] = plain.reference()


def _twice(launched: Launched) -> None:
    """Add a residual that is the output twice to the last row, as tiles that overlap would."""
    result = launched.reference()
    if launched.residual == launched.output:
        result[-1] += launched.out[-1]
    launched.out[...] = result


def _gates_swapped(launched: Launched) -> None:
    """Take the first half of the channels as factors."""
    result = launched.reference()
    if launched.activation.is_gated:
        result = np.roll(result, 1, axis=1)
    launched.out[...] = result


@pytest.mark.parametrize(
    ("wrong", "text"),
    [(_no_activation, " silu"), (_twice, " residual in place: error"), (_gates_swapped, " swiglu")],
)
def test_a_wrong_epilogue_is_found(wrong: Callable[[Launched], None], text: str) -> None:
    _, proofs = run(wrong)
    assert any(text in failure for proof in proofs for failure in proof.failures)
    assert sum(proof.passed.get(epilogues.KIND, 0) for proof in proofs) > 0


def test_bits_that_change_are_found() -> None:
    flips = iter(range(1 << 20))

    def last_bit(launched: Launched) -> None:
        launched.out[...] = launched.reference()
        launched.out.view(np.uint16)[0, 0] ^= next(flips) % 2

    _, (proof,) = run(last_bit, NAMES[:1])
    assert any("1 of" in failure and "values differ the second time" in failure for failure in proof.failures)


def test_a_launch_that_fails_is_recorded() -> None:
    library = FakeLibrary([KernelConfig.parse(NAMES[0])])
    library.module.refusal = (4, "no such luck")
    proof = NumericProof(NAMES[0])
    epilogues.prove_epilogues(library, {library.configs()[0]: proof})
    assert len(proof.failures) == len(epilogues.SHAPES) * len(epilogues.PLAN[Epilogue.ELEMENTWISE])
    assert proof.failures[0].endswith("residual: no such luck")
