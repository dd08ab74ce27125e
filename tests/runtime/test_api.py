"""The numpy path of gemm: the reference behind the checks of the kernels, on any machine."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import w4a16gen
from w4a16gen import PackedExperts, Problem, QuantizedWeight, QuantMode, pack_experts, pack_weight, quantize
from w4a16gen.errors import InvalidValueError, NotBuiltError, UnsupportedProblemError
from w4a16gen.files import file_digest, write_json
from w4a16gen.runtime import default as api
from w4a16gen.runtime.arrays import is_contiguous
from w4a16gen.runtime.artifact import MANIFEST, Build
from w4a16gen.runtime.calls import _WAYS_TO_PACK
from w4a16gen.runtime.folders import BUILD_FOLDER_VARIABLE
from w4a16gen.weights.importers.layer import CheckpointLayer
from w4a16gen.weights.packed_checkpoint import PackedLayer
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
        assert is_contiguous(array.shape, strides) == array.flags.c_contiguous
        assert is_contiguous(array.shape, array.strides, array.itemsize) == array.flags.c_contiguous


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


def test_a_build_that_was_replaced_on_disk_is_loaded_beside_the_old_one(fake_build: Build, tmp_path: Path) -> None:
    folder = tmp_path / "build"
    libraries = folder / fake_build.manifest.libraries
    libraries.parent.mkdir()
    shutil.copytree(fake_build.library.parent, libraries)
    write_json(folder / MANIFEST, fake_build.manifest.as_json())
    before = w4a16gen.load(folder)
    # Bytes behind the end of a shared object change its digest and nothing else.
    new = folder / "lib-0123456789abcdef"
    shutil.copytree(libraries, new)
    with (new / fake_build.library.name).open("ab") as file:
        file.write(b"another build")
    digest = file_digest(new / fake_build.library.name)
    manifest = dataclasses.replace(fake_build.manifest, libraries=new.name, library_sha256=digest)
    write_json(folder / MANIFEST, manifest.as_json())
    shutil.rmtree(libraries)
    after = w4a16gen.load(folder)
    assert after is not before
    assert w4a16gen.load(str(folder)) is after
    assert after.configs() == before.configs() == fake_build.configs
    problem = Problem(4, 64, 128, 128)
    assert after.packed_bytes(after.configs()[0], problem) == before.packed_bytes(before.configs()[0], problem)


@pytest.mark.parametrize(
    ("folder", "error", "text"),
    [
        ("/dev/null", NotBuiltError, "in /dev/null"),
        ("nowhere", NotBuiltError, "No build found in nowhere"),
        (Path(__file__), NotBuiltError, "No build found in"),
        ("x" * 5000, NotBuiltError, "cannot be read"),
        (b"build", InvalidValueError, "folder of type bytes must be text or a path"),
        (3, InvalidValueError, "folder of type int must be text or a path"),
        ("a\0b", InvalidValueError, "must name a file or folder"),
        ("", InvalidValueError, "must name a file or folder"),
    ],
    ids=repr,
)
def test_a_folder_that_is_no_build_is_refused(folder: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        w4a16gen.load(folder)


ALPHA = "alpha of .* must be one finite or infinite float"
HOST: list[tuple[str, dict[str, Any], str]] = [
    *(
        (f"alpha {value!r}", {"alpha": value}, ALPHA)
        for value in (None, "1", True, 1j, [1.0], np.ones(2), np.array(1.0))
    ),
    ("alpha of NaN", {"alpha": float("nan")}, "alpha of nan must be one finite or infinite float"),
    ("alpha beyond fp32", {"alpha": 1e300}, r"alpha of 1e\+300 must fit in fp32"),
    ("alpha beyond float64", {"alpha": 10**400}, "alpha must fit in fp32"),
    ("a quantised weight", {"w": quantize(np.ones((8, 64)), group_size=64)}, r"pass w4a16gen.pack_weight\(w\)"),
    (
        "an array for a weight",
        {"w": np.ones((8, 64))},
        r"pass w4a16gen.pack_weight\(w4a16gen.quantize\(w, group_size=128\)\), or w4a16gen.pack\(q, scales\)",
    ),
    ("experts", {"w": pack_experts([quantize(np.ones((8, 64)), group_size=64)])}, r"pass w.expert\(number\)"),
    ("no weight", {"w": None}, "w of type NoneType must be a PackedWeight"),
    ("a number for a kernel", {"config": 3}, "a value of type int is not a kernel name"),
    ("three axes", {"a": np.ones((1, 3, 64), np.float16)}, r"must be \[m, 64\]: pass a.reshape\(-1, 64\)"),
    ("one token", {"a": np.ones(64, np.float16)}, r"for one token, pass a\[None\]"),
    ("transposed", {"a": np.ones((64, 3), np.float16)}, "they look transposed"),
    ("masked", {"a": np.ma.ones((3, 64), np.float16)}, "activations of type MaskedArray must be a numpy array"),
    ("masked bias", {"bias": np.ma.ones(8, np.float16)}, "bias of type MaskedArray must be a numpy array"),
    ("read-only output", {"out": np.broadcast_to(np.float16(0), (3, 8))}, "output is read-only"),
    ("a launch of text", {"dependent_launch": "no"}, "dependent_launch of 'no' must be True, False or \"auto\""),
    ("a launch of a number", {"dependent_launch": 1}, 'dependent_launch of type int must be True, False or "auto"'),
]


@pytest.mark.parametrize(("change", "text"), [row[1:] for row in HOST], ids=[row[0] for row in HOST])
def test_a_slip_is_refused_in_words(change: dict[str, Any], text: str) -> None:
    arguments: dict[str, Any] = {
        "a": np.ones((3, 64), np.float16),
        "w": pack_weight(quantize(np.ones((8, 64)), group_size=64)),
    }
    with pytest.raises(InvalidValueError, match=text):
        w4a16gen.gemm(**(arguments | change))


def test_a_value_that_is_nearly_a_weight_has_what_the_message_names() -> None:
    kinds = {kind.__name__: kind for kind in (QuantizedWeight, CheckpointLayer, PackedLayer, PackedExperts)}
    for name, way in _WAYS_TO_PACK.items():
        for member in re.findall(r"\bw\.(\w+)", way):
            assert member in (*dir(kinds[name]), *kinds[name].__annotations__)


@pytest.mark.parametrize("alpha", [2, np.float32(2), np.int8(2), Fraction(2), float("inf"), -float("inf"), 0.0])
def test_alpha_is_one_number(alpha: Any) -> None:
    packed = pack_weight(quantize(np.ones((8, 64)), group_size=64))
    got = w4a16gen.gemm(np.ones((1, 64), np.float16), packed, alpha=alpha)
    assert (got == np.float16(float(alpha) * 64)).all()


def test_an_output_over_an_operand_is_refused_as_on_a_gpu() -> None:
    packed = pack_weight(quantize(np.ones((64, 64)), group_size=64))
    both = np.ones((6, 64), np.float16)
    weight = packed.data[: 3 * 64 * 2].view(np.float16).reshape(3, 64)
    for out, bias, name in (
        (both[2:5], None, "activations"),
        (weight, None, "packed weight"),
        (both[3:], both[5], "bias"),
    ):
        with pytest.raises(InvalidValueError, match=f"output overlaps the {name}: pass another array"):
            w4a16gen.gemm(both[:3], packed, bias=bias, out=out)
    assert (w4a16gen.gemm(both[:3], packed, out=both[3:]) == 64).all()


def test_what_is_not_contiguous_is_refused_as_on_a_gpu() -> None:
    packed = pack_weight(quantize(np.ones((64, 64)), group_size=64))
    a, wide = np.ones((3, 64), np.float16), np.ones((3, 128), np.float16)
    one_row = np.broadcast_to(a[0], (3, 64))
    same_row = np.lib.stride_tricks.as_strided(np.empty(64, np.float16), (3, 64), (0, 2))
    calls: list[tuple[str, dict[str, Any]]] = [
        ("activations", {"a": wide[:, :64]}),
        ("activations", {"a": one_row}),
        ("output", {"out": wide[:, 64:]}),
        ("output", {"out": same_row}),
        ("bias", {"bias": wide[0, ::2]}),
    ]
    for name, change in calls:
        with pytest.raises(InvalidValueError, match=f"{name} must be contiguous, row-major: make a contiguous copy"):
            w4a16gen.gemm(**{"a": a, "w": packed, **change})


@pytest.mark.parametrize(("n", "k", "sentence"), [(60, 64, "n of 60 must be"), (64, 60, "k of 60 must be")])
def test_sizes_that_no_kernel_runs_are_refused_without_a_gpu(n: int, k: int, sentence: str) -> None:
    packed = pack_weight(quantize(np.ones((n, k))), target="cutlass")
    with pytest.raises(UnsupportedProblemError, match=f"^{sentence} a positive multiple of 8"):
        w4a16gen.gemm(np.ones((1, k), np.float16), packed)


class Evil(np.ndarray[Any, Any]):
    """An array whose every operation raises."""

    def __array_ufunc__(self, *_: object, **__: object) -> object:
        raise RuntimeError("no operation")


def test_subclasses_of_arrays_are_read_as_arrays() -> None:
    weight = quantize(np.ones((64, 64)), group_size=64)
    subclassed = QuantizedWeight(weight.q.view(Evil), weight.scales.view(Evil), None, 64, weight.mode)
    a = np.ones((1, 64), np.float16).view(Evil)
    assert np.array_equal(w4a16gen.gemm(a, pack_weight(subclassed)), np.full((1, 64), 64, np.float16))


@pytest.mark.parametrize("span", [np.timedelta64(64, "D"), np.timedelta64(64, "s")])
def test_a_span_of_time_is_no_number(span: Any) -> None:
    packed = pack_weight(quantize(np.ones((64, 64)), group_size=64))
    with pytest.raises(InvalidValueError, match="alpha of type timedelta64 must be"):
        w4a16gen.gemm(np.ones((1, 64), np.float16), packed, alpha=span)
    with pytest.raises(InvalidValueError, match="group_size of type timedelta64 must be"):
        quantize(np.ones((64, 64)), group_size=span)


@pytest.mark.skipif(np.finfo(np.longdouble).max == np.finfo(np.float64).max, reason="this longdouble is a float64")
def test_alpha_beyond_float64_is_not_taken_for_infinity() -> None:
    packed = pack_weight(quantize(np.ones((64, 64)), group_size=64))
    with pytest.raises(InvalidValueError, match="must fit in fp32"):
        w4a16gen.gemm(np.ones((1, 64), np.float16), packed, alpha=np.longdouble("1e400"))
