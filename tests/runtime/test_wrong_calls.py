"""Wrong calls, one row each: a clear error that names value, rule and way out, and nothing left behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.arrays import GpuArray
from fakes.library import FakeLibrary

import w4a16gen
from w4a16gen import KernelConfig, Library, Problem, QuantMode, Target, pack, quantize
from w4a16gen.errors import (
    CudaError,
    InvalidValueError,
    NoHopperGpuError,
    NotBuiltError,
    UnsupportedProblemError,
    W4A16Error,
)
from w4a16gen.kernels.spaces import enumerate_space
from w4a16gen.runtime.artifact import Build
from w4a16gen.weights.packed import PackedWeight

FGS = "w4a16_sm90_cutlass_fgs_cta128x64x64_cluster1x1x1_cooperative_streamk"
CS = "w4a16_sm90_cutlass_cs_cta64x16x64_cluster1x1x1_pingpong_persistent"
FORBIDDEN = FGS.replace("cta128x64", "cta64x64")  # cooperative CTAs need 128 channels

W = np.zeros((16, 64), np.uint8)
S = np.ones((1, 16), np.float16)
QUANTIZATION: list[tuple[str, Callable[[], object], str]] = [
    ("q of floats", lambda: pack(W.astype(np.float32), S), "must be integers of 0 to 15"),
    ("q out of range", lambda: pack(W + 16, S), "q holds 16 to 16; it must hold 0 to 15"),
    ("q of one axis", lambda: pack(W[0], S), r"must be \[n, k\]"),
    ("q empty", lambda: pack(W[:0], S), r"must be \[n, k\] with at least one value"),
    ("scales of fp32", lambda: pack(W, S.astype(np.float32)), "scales of dtype float32 must be float16"),
    ("scales transposed", lambda: pack(W, S.T.copy()), "group size|scales of shape"),
    ("scales of another n", lambda: pack(W, S[:, :8]), r"scales of shape \[1, 8\] must be \[1, 16\]"),
    ("scales of another group", lambda: pack(W, S, group_size=32), r"scales of shape \[1, 16\] must be \[2, 16\]"),
    ("scales not finite", lambda: pack(W, S * np.float16(np.nan)), "scales must be finite"),
    ("group does not divide", lambda: pack(W, S, group_size=48), "group size 48 must divide k = 64"),
    ("group of zero", lambda: pack(W, S, group_size=0), "group size 0 must divide k = 64"),
    ("zeros per column", lambda: pack(W, S[0], S[0]), "per-column scales"),
    ("zeros of another shape", lambda: pack(W, S, S[:, :8]), r"zeros of shape \[1, 8\] must be \[1, 16\]"),
    ("group in per-column mode", lambda: pack(W, S[0], group_size=32), r"group size 32 must be 64 \(= k\)"),
    ("weight of integers", lambda: quantize(W), "must be floating point"),
    ("weight not finite", lambda: quantize(np.full((2, 8), np.inf)), "weight must be finite"),
    ("weight too large", lambda: quantize(np.full((2, 8), 1e6)), "exceeds fp16"),
    ("zero points, no group", lambda: quantize(np.ones((2, 8)), zero_points=True), "zero points need a group size"),
    ("quantise odd group", lambda: quantize(np.ones((2, 8)), group_size=3), "group size 3 must divide k = 8"),
]


@pytest.mark.parametrize(("call", "text"), [row[1:] for row in QUANTIZATION], ids=[row[0] for row in QUANTIZATION])
def test_a_wrong_weight_is_refused(call: Callable[[], object], text: str) -> None:
    with pytest.raises(InvalidValueError, match=text):
        call()


A = np.zeros((4, 64), np.float16)
PACKED = pack(W, S, target=Target.CUTLASS)
GPU_PACKED = dataclasses.replace(PACKED, data=GpuArray((PACKED.nbytes,), "|u1"))
HOST_CALLS: list[tuple[str, dict[str, Any], str]] = [
    ("activations of fp32", {"a": A.astype(np.float32)}, "activations of dtype float32 must be float16"),
    ("activations of another k", {"a": A[:, :32]}, r"activations of shape \[4, 32\] must be \[m, 64\]"),
    ("activations of one axis", {"a": A[0]}, r"activations of shape \[64\] must be"),
    ("a list", {"a": A.tolist()}, "activations of type list must be a numpy array"),
    ("bias of fp32", {"bias": np.zeros(16, np.float32)}, "bias of dtype float32 must be float16"),
    ("bias of another n", {"bias": np.zeros(8, np.float16)}, r"bias of shape \[8\] must be \[16\]"),
    ("output of another m", {"out": np.zeros((5, 16), np.float16)}, r"output of shape \[5, 16\] must be \[4, 16\]"),
    ("a kernel of another mode", {"config": CS}, "of mode fgs, but .* is of mode cs"),
    ("a kernel that no build holds", {"config": FORBIDDEN}, "cta64x.*: CTA channels of 64: the cooperative schedule"),
    ("not a kernel", {"config": "fast"}, "'fast' is not a kernel name"),
    ("data cut short", {"w": dataclasses.replace(PACKED, data=PACKED.data[:-1])}, "bytes must be"),
]
GPU_CALLS: list[tuple[str, dict[str, Any], str]] = [
    ("activations on the host", {"a": A}, "activations of type ndarray must be on a GPU"),
    ("weight on the host", {"a": GpuArray((4, 64)), "w": PACKED}, "packed weight of type ndarray must be on a GPU"),
    ("activations of fp32", {"a": GpuArray((4, 64), "<f4")}, "activations of dtype float32 must be float16"),
    ("activations of another k", {"a": GpuArray((4, 32))}, r"activations of shape \[4, 32\] must be \[m, 64\]"),
    ("activations of one axis", {"a": GpuArray((64,))}, r"activations of shape \[64\] must be \[m, 64\]"),
    ("activations transposed", {"a": GpuArray((4, 64), strides=(2, 8))}, "activations must be contiguous"),
    ("activations one byte apart", {"a": GpuArray((4, 64), strides=(129, 3))}, "activations must be contiguous"),
    ("activations of too few strides", {"a": GpuArray((4, 64), strides=(2,))}, "cannot be read as an array"),
    ("activations sliced", {"a": GpuArray((4, 64), strides=(256, 2))}, "activations must be contiguous"),
    ("bias on the host", {"bias": np.zeros(16, np.float16)}, "bias of type ndarray must be on a GPU"),
    ("bias of another n", {"bias": GpuArray((8,))}, r"bias of shape \[8\] must be \[16\]"),
    ("bias without memory", {"bias": GpuArray((16,))}, "bias must not be null"),
    ("output of fp32", {"out": GpuArray((4, 16), "<f4")}, "output of dtype float32 must be float16"),
    ("output not contiguous", {"out": GpuArray((4, 16), strides=(64, 2))}, "output must be contiguous"),
    ("a kernel of another mode", {"config": CS}, "of mode fgs, but .* is of mode cs"),
    ("a kernel not built", {"config": FGS.replace("128x64", "256x64")}, "is not in"),
    (
        "data cut short",
        {"w": dataclasses.replace(GPU_PACKED, data=GpuArray((9,), "|u1"))},
        r"shape \[9\] must be \[640\]",
    ),
    ("a foreign layout", {"w": dataclasses.replace(GPU_PACKED, layout="fragment_blocks_v2")}, "but .* reads kmajor"),
    ("not a stream", {"out": GpuArray((4, 16)), "stream": "fast"}, "stream of type str must be"),
    (
        "workspace of fp16",
        {"out": GpuArray((4, 16)), "workspace": GpuArray((4,))},
        "workspace of dtype float16 must be uint8",
    ),
]


@pytest.mark.parametrize(("change", "text"), [row[1:] for row in HOST_CALLS], ids=[row[0] for row in HOST_CALLS])
def test_a_wrong_call_on_the_host_is_refused(change: dict[str, Any], text: str) -> None:
    arguments: dict[str, Any] = {"a": A, "w": PACKED} | change
    with pytest.raises(InvalidValueError, match=text):
        w4a16gen.gemm(**arguments)


@pytest.mark.parametrize(("change", "text"), [row[1:] for row in GPU_CALLS], ids=[row[0] for row in GPU_CALLS])
def test_a_wrong_call_on_the_gpu_is_refused(change: dict[str, Any], text: str) -> None:
    library = FakeLibrary(enumerate_space("trtllm"))
    arguments: dict[str, Any] = {"a": GpuArray((4, 64)), "w": GPU_PACKED, "config": FGS} | change
    with pytest.raises((InvalidValueError, NotBuiltError), match=text):
        library.gemm(**arguments)
    assert library.module.launches == []


def test_a_problem_that_a_kernel_cannot_run_is_refused_on_the_host_as_on_the_gpu(fake_library: Library) -> None:
    q = np.zeros((16, 96), np.uint8)
    packed = pack(q, np.ones((2, 16), np.float16), group_size=48, target=Target.CUTLASS)
    sentence = r"group size 48 must be 96 \(= k\) or a multiple of 64 that divides k"
    with pytest.raises(UnsupportedProblemError, match=sentence):
        w4a16gen.gemm(np.zeros((1, 96), np.float16), packed, config=FGS)
    on_gpu = dataclasses.replace(packed, data=GpuArray((packed.nbytes,), "|u1"))
    with pytest.raises(UnsupportedProblemError, match=sentence):
        fake_library.gemm(GpuArray((1, 96)), on_gpu)


@pytest.mark.parametrize(
    ("status", "error"),
    [(1, InvalidValueError), (2, UnsupportedProblemError), (3, NoHopperGpuError), (4, CudaError)],
)
def test_what_the_library_refuses_is_raised_with_its_sentence(
    fake_library: Library, status: int, error: type[W4A16Error]
) -> None:
    with pytest.raises(error, match=r"^what is wrong$"):
        fake_library.bindings.result_of((status, "what is wrong"))
    assert fake_library.bindings.result_of((0, "", 7)) == 7
    assert fake_library.bindings.result_of((0, "")) is None


def test_sizes_of_a_problem_that_a_kernel_cannot_run_are_refused(fake_library: Library) -> None:
    config, problem = KernelConfig.parse(FGS), Problem(4, 16, 96, 48)
    with pytest.raises(UnsupportedProblemError, match="group size 48 must be 96"):
        fake_library.packed_bytes(config, problem)
    with pytest.raises(UnsupportedProblemError, match="group size 48 must be 96"):
        fake_library.workspace_bytes(config, problem, sm_count=132)


def test_without_a_gpu_nothing_moves_there(fake_library: Library) -> None:
    if fake_library.devices():
        pytest.skip("this machine has a GPU")
    with pytest.raises(NoHopperGpuError, match="no CUDA device 0: this machine has no CUDA GPU, and calls take host"):
        fake_library.to_device(A)
    config, problem = KernelConfig.parse(FGS), Problem(4, 16, 64, 64)
    with pytest.raises(NoHopperGpuError, match="pass sm_count"):
        fake_library.workspace_bytes(config, problem)
    assert fake_library.workspace_bytes(config, problem, sm_count=132) > 0


def test_a_damaged_build_is_not_loaded(fake_build: Build, tmp_path: Path) -> None:
    for text in ("{", '{"schema": 0}', '{"schema": "w4a16gen.manifest/2"}', "[]", ""):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(NotBuiltError, match=r"is not the manifest of a build .*: run `w4a16gen build`"):
            w4a16gen.load(tmp_path)
    (tmp_path / "manifest.json").write_text((fake_build.folder / "manifest.json").read_text())
    with pytest.raises(NotBuiltError, match="is missing"):
        w4a16gen.load(tmp_path)
    libraries = tmp_path / fake_build.manifest.libraries
    libraries.mkdir()
    for file in (fake_build.library, fake_build.module):
        (libraries / file.name).write_bytes(b"not a library")
    with pytest.raises(NotBuiltError, match="is damaged: it differs from what"):
        w4a16gen.load(tmp_path)


def test_every_error_is_of_the_package() -> None:
    assert issubclass(InvalidValueError, W4A16Error)
    assert issubclass(InvalidValueError, ValueError)
    assert isinstance(PACKED, PackedWeight)
    assert QuantMode("fgs") is PACKED.mode
