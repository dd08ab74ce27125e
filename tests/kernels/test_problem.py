"""Which problems a kernel can run: Python's rule and the library's agree, in the same words."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable
from random import Random

import pytest
from fakes.library import chooser_of
from hypothesis import given
from hypothesis import strategies as st
from paths import DATA

from w4a16gen import Epilogue, KernelConfig, Library, Problem, QuantMode
from w4a16gen.choose.cost_model import default_cost_model
from w4a16gen.errors import UnsupportedProblemError
from w4a16gen.kernels.problem import MAX_DIMENSION, runnable, why_cannot_run
from w4a16gen.kernels.spaces import enumerate_space, with_epilogues
from w4a16gen.weights.packed import LAYOUTS, TARGET_LAYOUTS, PackedWeight

DIMENSIONS = (-8, 0, 1, 4, 8, 12, 64, 72, 576, 1024, MAX_DIMENSION, MAX_DIMENSION + 8)
GROUPS = (-64, 0, 8, 32, 64, 72, 96, 128, 192, 576, 1024)
GRID = [
    Problem(m, n, k, group)
    for m, n, k, group in itertools.product((-1, 0, 1, MAX_DIMENSION + 1), DIMENSIONS, DIMENSIONS, GROUPS)
]


@pytest.mark.parametrize("mode", QuantMode, ids=str)
def test_the_library_refuses_what_python_refuses_in_the_same_words(fake_library: Library, mode: QuantMode) -> None:
    config = next(config for config in fake_library.configs() if config.mode is mode)
    answers = {fake_library.why_cannot_run(config, problem) for problem in GRID}
    assert len(answers) > 20
    for problem in GRID:
        assert fake_library.why_cannot_run(config, problem) == why_cannot_run(config, problem)


@pytest.mark.parametrize("mode", QuantMode, ids=str)
def test_the_library_and_python_agree_on_packed_bytes(fake_library: Library, mode: QuantMode) -> None:
    config = next(config for config in fake_library.configs() if config.mode is mode)
    layout = TARGET_LAYOUTS[config.target]
    for problem in GRID:
        if problem.m == 0 and max(problem.n, problem.k) <= 1024 and why_cannot_run(config, problem) is None:
            weight = PackedWeight(None, layout, problem.n, problem.k, problem.group_size, mode).geometry
            assert fake_library.packed_bytes(config, problem) == LAYOUTS[layout].packed_bytes(weight)


@pytest.mark.parametrize("mode", QuantMode, ids=str)
def test_native_kernels_of_a_mode_run_the_same_problems_whatever_their_epilogue(mode: QuantMode) -> None:
    # Operators of torch ask whether an epilogue is built, and then trust that one of its kernels can run the problem.
    of_mode = [config for config in enumerate_space("native") if config.mode is mode]
    one_each = [next(iter(with_epilogues(of_mode, [epilogue]))) for epilogue in Epilogue]
    assert {config.epilogue for config in one_each} == set(Epilogue)
    kernels = [*one_each, *with_epilogues(of_mode, list(Epilogue))[::50]]
    for problem in GRID:
        assert len({why_cannot_run(config, problem) for config in kernels}) == 1


def choose(configs: Iterable[KernelConfig], mode: QuantMode, problem: Problem) -> KernelConfig:
    """Return the kernel that a build of these chooses on a machine without a GPU."""
    return chooser_of(configs).choose(problem, mode, device=None).kernel


CONFIGS = {space: enumerate_space(space) for space in ("default", "trtllm", "native")}
problems = st.builds(
    lambda m, n, k, groups: Problem(m, 8 * n, 64 * k * groups, 64 * k),
    st.integers(0, 10000),
    st.integers(1, 4096),
    st.integers(1, 8),
    st.integers(1, 8),
)


@given(problems, st.sampled_from(list(CONFIGS)), st.randoms())
def test_a_kernel_is_chosen_that_can_run_the_problem_whatever_the_order(
    problem: Problem, space: str, random: Random
) -> None:
    configs = list(CONFIGS[space])
    mode = QuantMode.FINEGRAINED_SCALE_ONLY
    chosen = choose(configs, mode, problem)
    assert chosen in runnable(configs, mode, problem)
    random.shuffle(configs)
    assert choose(configs, mode, problem) == chosen


def test_choosing_prefers_the_tile_that_covers_the_tokens() -> None:
    configs = enumerate_space("trtllm")
    for m, tokens in ((1, 16), (16, 16), (17, 32), (64, 64), (100, 128), (8192, 256)):
        assert choose(configs, QuantMode.FINEGRAINED_SCALE_ONLY, Problem(m, 4096, 4096, 128)).cta.tokens == tokens


def test_choosing_from_nothing_says_what_is_missing() -> None:
    problem = Problem(1, 8, 64, 64)
    with pytest.raises(UnsupportedProblemError, match="no kernel of mode fgsz that reads this weight"):
        choose([], QuantMode.FINEGRAINED_SCALE_AND_ZEROS, problem)
    configs = enumerate_space("trtllm")
    with pytest.raises(UnsupportedProblemError, match="group size 48 must be 96"):
        choose(configs, QuantMode.FINEGRAINED_SCALE_ONLY, Problem(1, 8, 96, 48))


def test_the_estimate_of_dense_fp16_is_near_what_was_measured() -> None:
    recorded = json.loads((DATA / "h100_cublas.json").read_text())
    off = []
    for m, n, k, microseconds in recorded["problems"]:
        off.append(math.log(default_cost_model().dense_microseconds(Problem(m, n, k, k)) / microseconds))
    assert len(off) == 105
    assert math.sqrt(sum(value**2 for value in off) / len(off)) < 0.05
    assert max(map(abs, off)) < 0.12
