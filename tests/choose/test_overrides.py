"""Kernels that are named for calls that name none."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from fakes.library import FakeLibrary

from w4a16gen import Problem, QuantMode, use_kernels
from w4a16gen.choose.overrides import KERNELS_VARIABLE, kernels_in_use, kernels_of_environment
from w4a16gen.errors import InvalidValueError, NotBuiltError
from w4a16gen.kernels.spaces import enumerate_space
from w4a16gen.weights.packed import TARGET_LAYOUTS, PackedWeight


@pytest.fixture
def library() -> FakeLibrary:
    """Return a library of CUTLASS kernels."""
    return FakeLibrary(enumerate_space("trtllm"))


def name_in_environment(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """Be a process that is started with this value."""
    monkeypatch.setenv(KERNELS_VARIABLE, value)
    kernels_of_environment.cache_clear()


def test_kernels_are_named_for_a_block_or_by_the_environment(
    library: FakeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    mode = QuantMode.FINEGRAINED_SCALE_ONLY
    problem = Problem(16, 512, 1024, 128)
    first, second = [config for config in library.configs() if config.mode is mode][:2]
    weight = PackedWeight(None, TARGET_LAYOUTS[first.target], problem.n, problem.k, problem.group_size, mode)
    chosen = library.kernel_for(weight, problem)
    for named in (first, second):
        with use_kernels(named.name):
            assert library.kernel_for(weight, problem) == named
            assert library.kernel_for(weight, problem, chosen) == chosen, "the call comes first"
    name_in_environment(monkeypatch, f"{second.name}, {first.name},")
    assert library.kernel_for(weight, problem) == second
    with use_kernels(first):
        assert library.kernel_for(weight, problem) == first
        with use_kernels():
            assert library.kernel_for(weight, problem) == chosen
        assert library.kernel_for(weight, problem) == first
    other = next(config for config in library.configs() if config.mode is QuantMode.PER_COLUMN_SCALE_ONLY)
    name_in_environment(monkeypatch, other.name)
    assert library.kernel_for(weight, problem) == chosen, "kernels of another mode do not count"
    name_in_environment(monkeypatch, "")
    assert library.kernel_for(weight, problem) == chosen


def test_what_is_named_for_all_calls_is_checked(library: FakeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(16, 512, 1024, 128)
    mode = QuantMode.FINEGRAINED_SCALE_ONLY
    missing = next(config for config in enumerate_space("native") if config.mode is mode)
    weight = PackedWeight(None, TARGET_LAYOUTS[missing.target], 512, 1024, 128, missing.mode)
    with use_kernels(missing), pytest.raises(NotBuiltError, match=missing.name):
        library.kernel_for(weight, problem)
    with pytest.raises(InvalidValueError, match="'kernel' is not a kernel name"), use_kernels("kernel"):
        pass
    for value in (None, 3, b"kernel", ["kernel"]):
        with pytest.raises(InvalidValueError, match="is not a kernel name"), use_kernels(value):  # type: ignore[arg-type]
            pass
    name_in_environment(monkeypatch, "kernel")
    with pytest.raises(InvalidValueError, match="W4A16GEN_KERNELS: 'kernel' is not a kernel name"):
        library.kernel_for(weight, problem)


def test_kernels_are_named_for_one_thread_only() -> None:
    config = enumerate_space("default")[0]
    with use_kernels(config), ThreadPoolExecutor(1) as pool:
        assert kernels_in_use() == (config,)
        assert pool.submit(kernels_in_use).result() == ()
