"""The numpy path of gemm: the reference behind the checks of the kernels, on any machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import w4a16gen
from w4a16gen import QuantMode, pack_weight, quantize
from w4a16gen.errors import NotBuiltError
from w4a16gen.runtime import default as api
from w4a16gen.runtime.arrays import _is_contiguous
from w4a16gen.runtime.artifact import Build
from w4a16gen.runtime.folders import BUILD_FOLDER_VARIABLE
from w4a16gen.weights.reference import Expectation, random_weight


@pytest.mark.parametrize("mode", QuantMode, ids=str)
@pytest.mark.parametrize("m", [0, 1, 17])
def test_gemm_on_numpy_is_the_rounded_exact_product(mode: QuantMode, m: int, rng: np.random.Generator) -> None:
    weight = random_weight(rng, 24, 256, 64, mode)
    a = rng.standard_normal((m, 256)).astype(np.float16)
    bias = rng.standard_normal(24).astype(np.float16)
    got = w4a16gen.gemm(a, pack_weight(weight), alpha=0.5, bias=bias)
    assert got.shape == (m, 24)
    assert got.dtype == np.float16
    exact = Expectation(a, weight).result(0.5, bias)
    assert np.array_equal(got, exact.astype(np.float16))


def test_gemm_writes_into_out(rng: np.random.Generator) -> None:
    packed = pack_weight(quantize(rng.standard_normal((8, 64))))
    a = rng.standard_normal((3, 64)).astype(np.float16)
    out = np.full((3, 8), np.nan, np.float16)
    assert w4a16gen.gemm(a, packed, out=out) is out
    assert np.array_equal(out, w4a16gen.gemm(a, packed))


def test_a_result_beyond_fp16_is_infinite_without_a_warning() -> None:
    packed = pack_weight(quantize(np.full((8, 64), 100.0)))
    assert np.isinf(w4a16gen.gemm(np.full((1, 64), 1000.0, np.float16), packed)).all()


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_contiguity_is_what_numpy_says(shape: list[int]) -> None:
    for array in (np.zeros(shape), np.zeros(shape).T, np.zeros([*shape, 2])[..., 0], np.zeros([2 * s for s in shape])):
        strides = tuple(stride // array.itemsize for stride in array.strides)
        assert _is_contiguous(array.shape, strides) == array.flags.c_contiguous


def test_importing_and_multiplying_needs_no_torch_build_or_gpu() -> None:
    program = """
import sys, numpy as np, w4a16gen
w = w4a16gen.pack_weight(w4a16gen.quantize(np.ones((8, 64)), group_size=64))
assert (w4a16gen.gemm(np.ones((2, 64), np.float16), w) == 64).all()
assert "torch" not in sys.modules and "cutlass" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)  # noqa: S603


def test_the_default_build_is_looked_for_again_only_when_loaded(
    fake_build: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(api, "_InUse", type("Nothing", (), {"library": None}))
    monkeypatch.setenv(BUILD_FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(NotBuiltError):
        w4a16gen.configs()
    monkeypatch.setenv(BUILD_FOLDER_VARIABLE, str(fake_build.folder))
    assert w4a16gen.configs() == fake_build.configs
    monkeypatch.setenv(BUILD_FOLDER_VARIABLE, str(tmp_path))
    assert w4a16gen.configs() == fake_build.configs
    with pytest.raises(NotBuiltError):
        w4a16gen.load()
    first = w4a16gen.load(fake_build.folder)
    assert w4a16gen.load(fake_build.folder) is first, "the same library is loaded once"
    monkeypatch.chdir(fake_build.folder.parent)
    assert w4a16gen.load(fake_build.folder.name) is first
