"""Kernels with epilogues on the stage where kernels are checked and timed, on a GPU of host memory."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from fakes.library import FakeLibrary
from fakes.module import Launched

from w4a16gen import Activation, Epilogue, KernelConfig, Problem, QuantMode
from w4a16gen.kernels.problem import runnable
from w4a16gen.kernels.spaces import enumerate_space, with_epilogues
from w4a16gen.measure.compare import with_one_of
from w4a16gen.measure.workload import Workload

MODE = QuantMode.FINEGRAINED_SCALE_ONLY
KERNELS = with_epilogues([config for config in enumerate_space("default") if config.mode is MODE][:3], list(Epilogue))
PROBLEM = Problem(12, 96, 256, 64)
CALLS = {
    Epilogue.NONE: (Activation.NONE, False),
    Epilogue.ELEMENTWISE: (Activation.NONE, True),
    Epilogue.GATED: (Activation.SWIGLU, False),
}
"""The activation that kernels are timed with, and whether there is a residual."""


@pytest.mark.parametrize("config", KERNELS, ids=lambda config: config.short_name)
def test_a_kernel_is_timed_and_checked_with_its_epilogue(config: KernelConfig) -> None:
    library = FakeLibrary(KERNELS)
    assert 0 < Workload(library, 0, PROBLEM, MODE).check(config) <= 1
    launches = library.module.launches
    assert {(one.config, one.activation, one.residual != 0) for one in launches} == {(config, *CALLS[config.epilogue])}
    assert all(one.residual != one.output for one in launches)


def _swapped(launched: Launched) -> None:
    launched.out[...] = np.roll(launched.reference(), 1, axis=1)


@pytest.mark.parametrize("epilogue", Epilogue, ids=str)
def test_a_wrong_result_is_found(epilogue: Epilogue) -> None:
    config = replace(KERNELS[0], epilogue=epilogue)
    assert Workload(FakeLibrary(KERNELS, compute=_swapped), 0, PROBLEM, MODE).check(config) > 1


def test_kernels_are_compared_with_those_of_the_epilogues_that_are_asked_for() -> None:
    for epilogue in Epilogue:
        assert {config.epilogue for config in with_one_of(KERNELS, [epilogue])} == {epilogue}
        assert runnable(KERNELS, MODE, PROBLEM, epilogue) == with_one_of(KERNELS, [epilogue])
    assert runnable(KERNELS, MODE, PROBLEM) == with_one_of(KERNELS, [Epilogue.NONE])
    assert runnable(KERNELS, MODE, Problem(12, 104, 256, 64), Epilogue.GATED) == [], "halves of 52 channels"
