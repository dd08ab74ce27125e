"""Wrong calls, one row each: a clear error that names value, rule and way out, and nothing left behind."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from fakes.arrays import GpuArray
from fakes.machine import LibraryOnGpus

import w4a16gen
from w4a16gen import KernelConfig, Library, Problem, QuantMode, Target, pack, quantize
from w4a16gen.cli import main
from w4a16gen.errors import (
    CudaError,
    InvalidValueError,
    NoHopperGpuError,
    NotBuiltError,
    UnsupportedProblemError,
    W4A16Error,
)
from w4a16gen.runtime.artifact import Build
from w4a16gen.runtime.folders import BUILD_FOLDER_VARIABLE
from w4a16gen.weights.packed import PackedWeight

FGS = "w4a16_sm90_cutlass_fgs_cta128x64x64_cluster1x1x1_cooperative_streamk"
CS = "w4a16_sm90_cutlass_cs_cta64x16x64_cluster1x1x1_pingpong_persistent"

WITHOUT_BUILD = [
    ("emit --cta 7x7x7", 2, "CTA channels of 7 must be one of 64, 128, 256"),
    ("emit --cta 128x128", 2, "must be CHANNELSxTOKENSxK"),
    ("emit --target cutlass --cta 128x8x64", 2, "does not compile below 16"),
    ("emit --cta 128x16x32", 2, "needs four k16 steps"),
    ("emit --cta 256x256x64", 2, "no legal kernel matches --cta 256x256x64"),
    ("emit --cta 256x128x64 --space trtllm", 2, "is legal, but not in space trtllm: use --space default"),
    ("emit --cluster 4x4x1 --space all", 2, "the portable limit is 8"),
    ("emit --cluster 1x1x2 --space trtllm-native", 2, "is legal, but not in space trtllm-native: use --space default"),
    ("emit --cluster 1x1x2 --target cutlass", 2, "split K through stream-K"),
    ("emit --cluster 3x1x1", 2, "cluster channels of 3 must be one of 1, 2, 4"),
    ("emit --cta 64x64x64 --cluster 2x1x1 --space trtllm", 2, "but not in space trtllm: use --space native"),
    ("emit --mode int8", 2, "'int8' is not one of cs, fgs, fgsz"),
    ("emit --target marlin", 2, "'marlin' is not one of cutlass, native"),
    ("emit --space everything", 2, "is not one of 'default', 'trtllm-native', 'trtllm'"),
    ("emit --output a_file", 2, "is a file"),
    ("emit --output /proc/read_only", 1, "/proc/read_only"),
    ("emti", 2, "No such command 'emti'"),
    ("build --jobs 0", 2, "'0' must be a whole number from 1"),
    ("build --build-dir /proc/read_only", 1, "/proc/read_only"),
    ("verify", 3, "No build found in build. Run `w4a16gen build`"),
    ("verify --build-dir elsewhere", 3, "No build found in elsewhere"),
    ("run 16 512 512", 3, "No build found in build"),
    ("run -1 512 512", 2, "No such option"),
    ("run 16 512", 2, "Missing argument 'K'"),
    ("run 16 512 many", 2, "'many' must be a whole number from 1"),
    ("list --built", 3, "No build found in build"),
]
WITH_BUILD = [
    ("run 16 12 512", 2, "n of 12 must be a positive multiple of 8"),
    ("run 16 512 500", 2, "k of 500 must be a positive multiple of 8"),
    ("run 16 512 576 --group-size 96", 2, "group size 96 must be 576 (= k) or a multiple of 64 that divides k"),
    ("run 16 512 576 --group-size 128", 2, "group size 128 must be 576 (= k)"),
    ("run 16 512 512 --mode cs --group-size 64", 2, "per-column mode has one scale per channel"),
    ("run 16 512 512 --config nonsense", 2, "nonsense' is not a kernel name"),
    (f"run 16 512 512 --mode fgs --config {CS}", 2, "pass --mode cs"),
    (f"run 16 512 576 --group-size 96 --config {FGS}", 2, "cannot run 16x512x576, group size 96"),
    (f"run 16 512 512 --config {FGS.replace('128x64x64', '256x64x64')}", 3, "is not in"),
    ("list --built --cta 128x8x64", 2, "the build has no kernel with --cta 128x8x64"),
]


@pytest.mark.parametrize(("arguments", "code", "text"), WITHOUT_BUILD, ids=[row[0] for row in WITHOUT_BUILD])
def test_a_wrong_command_fails_clearly_and_leaves_nothing(
    cli: CliRunner, tmp_path: Path, arguments: str, code: int, text: str
) -> None:
    (tmp_path / "a_file").touch()
    result = cli.invoke(main, arguments.split())
    assert result.exit_code == code, result.output
    assert text in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["a_file"]


@pytest.mark.parametrize(("arguments", "code", "text"), WITH_BUILD, ids=[row[0] for row in WITH_BUILD])
def test_a_wrong_command_on_a_build_fails_clearly(
    cli: CliRunner, fake_build: Build, monkeypatch: pytest.MonkeyPatch, arguments: str, code: int, text: str
) -> None:
    monkeypatch.setenv(BUILD_FOLDER_VARIABLE, str(fake_build.folder))
    result = cli.invoke(main, arguments.split())
    assert result.exit_code == code, result.output
    assert text in " ".join(result.output.split())


def test_running_without_a_gpu_says_what_is_needed(
    cli: CliRunner, fake_build: Build, fake_library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fake_library.hopper_devices():
        pytest.skip("this machine has a Hopper GPU")
    monkeypatch.setenv(BUILD_FOLDER_VARIABLE, str(fake_build.folder))
    result = cli.invoke(main, ["run", "16", "512", "512"])
    assert result.exit_code == 3
    assert "needs an NVIDIA Hopper GPU" in " ".join(result.output.split())


ENVIRONMENTS = [
    ("no nvcc", {"W4A16GEN_NVCC": "/nowhere/nvcc"}, "W4A16GEN_NVCC=/nowhere/nvcc is not an executable file"),
    ("old nvcc", {"FAKE_NVCC_RELEASE": "11.8"}, "release 11.8; 13.0 or newer is needed"),
    ("no CUTLASS", {"W4A16GEN_CUTLASS": "/nowhere"}, "pip install nvidia-cutlass"),
    ("no host compiler", {"CXX": "no-such-compiler"}, "CXX=no-such-compiler is not a program"),
]


@pytest.mark.usefixtures("fake_nvcc")
@pytest.mark.parametrize(("variables", "text"), [row[1:] for row in ENVIRONMENTS], ids=[row[0] for row in ENVIRONMENTS])
def test_building_without_a_tool_names_it(
    cli: CliRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], text: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    result = cli.invoke(main, ["build", "--space", "trtllm"])  # CUTLASS kernels need every tool
    assert result.exit_code == 3, result.output
    assert text in " ".join(result.output.split())
    assert not (tmp_path / "build").exists()
    assert not (tmp_path / "generated").exists()
    diagnosis = cli.invoke(main, ["doctor"])
    assert diagnosis.exit_code == 3
    assert "MISSING" in diagnosis.output


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
def test_a_wrong_call_on_the_gpu_is_refused(fake_build: Build, change: dict[str, Any], text: str) -> None:
    library = LibraryOnGpus(fake_build)
    arguments: dict[str, Any] = {"a": GpuArray((4, 64)), "w": GPU_PACKED, "config": FGS} | change
    with pytest.raises((InvalidValueError, NotBuiltError), match=text):
        library.gemm(**arguments)
    assert library.launches == []


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


class _Problem(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("m", "n", "k", "group_size")]


class _Arguments(ctypes.Structure):
    _fields_ = [
        ("activations", ctypes.c_void_p),
        ("packed", ctypes.c_void_p),
        ("packed_bytes", ctypes.c_size_t),
        ("bias", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_size_t),
        ("stream", ctypes.c_void_p),
        ("alpha", ctypes.c_float),
        ("dependent_launch", ctypes.c_int32),
    ]


ALIGNED = 1 << 20
C_CALLS: list[tuple[str, dict[str, Any], int, str]] = [
    ("kernel index", {"kernel": 63}, 1, "kernel index 63 must be at least 0 and below 63"),
    ("negative index", {"kernel": -1}, 1, "kernel index -1 must be"),
    ("null problem", {"problem": None}, 1, "problem must not be null"),
    ("null arguments", {"arguments": None}, 1, "arguments must not be null"),
    ("null activations", {"activations": None}, 1, "activations must not be null"),
    ("misaligned activations", {"activations": ALIGNED + 8}, 1, "activations at 0x100008 must be aligned to 16 bytes"),
    ("misaligned weight", {"packed": ALIGNED + 64}, 1, "packed weight at 0x100040 must be aligned to 128 bytes"),
    ("misaligned output", {"output": ALIGNED + 2}, 1, "output at 0x100002 must be aligned to 16 bytes"),
    ("misaligned bias", {"bias": ALIGNED + 1}, 1, "bias at 0x100001 must be aligned to 2 bytes"),
    ("output in place", {"output": ALIGNED}, 1, "output overlaps the activations: pass another array"),
    ("output over the last row", {"output": ALIGNED + 4 * 64 * 2 - 16}, 1, "output overlaps the activations"),
    ("activations behind the output", {"output": ALIGNED - 4 * 16 * 2 + 16}, 1, "output overlaps the activations"),
    (
        "output over the weight",
        {"output": 3 * ALIGNED + 640 - 16},
        1,
        "output overlaps the packed weight: pass another",
    ),
    ("output at the bias", {"bias": 2 * ALIGNED + 4 * 16 * 2 - 2}, 1, "output overlaps the bias: pass another array"),
    ("short weight", {"packed_bytes": 639}, 1, "packed weight of 639 bytes must be exactly 640 bytes"),
    ("group", {"group_size": 48}, 2, "group size 48 must be 64 (= k)"),
    ("n", {"n": 12}, 2, "n of 12 must be a positive multiple of 8"),
]


def c_gemm(library: Library, change: dict[str, Any]) -> tuple[int, str]:
    """Call the C interface with one thing wrong."""
    problem = _Problem(4, 16, 64, 64)
    arguments = _Arguments(ALIGNED, 3 * ALIGNED, 640, None, 2 * ALIGNED, None, 0, None, 1.0, 0)
    for name, value in change.items():
        for struct in (problem, arguments):
            if hasattr(struct, name):
                setattr(struct, name, value)
    kernel = change.get("kernel", [kernel.config.name for kernel in library.kernels].index(FGS))
    message = ctypes.create_string_buffer(300)
    status = ctypes.CDLL(str(library.build.library)).w4a16_gemm(
        kernel,
        None if "problem" in change else ctypes.byref(problem),
        None if "arguments" in change else ctypes.byref(arguments),
        message,
        ctypes.c_size_t(len(message)),
    )
    return status, message.value.decode()


@pytest.mark.parametrize(("change", "status", "text"), [row[1:] for row in C_CALLS], ids=[row[0] for row in C_CALLS])
def test_a_wrong_call_in_c_is_refused(fake_library: Library, change: dict[str, Any], status: int, text: str) -> None:
    got, message = c_gemm(fake_library, change)
    assert got == status
    assert text in message


@pytest.mark.parametrize("output", [ALIGNED + 4 * 64 * 2, ALIGNED - 4 * 16 * 2])
def test_an_output_beside_the_activations_is_not_refused(fake_library: Library, output: int) -> None:
    assert "overlaps" not in c_gemm(fake_library, {"output": output, "packed_bytes": 640})[1]


def test_c_without_a_gpu_says_so_and_no_tokens_are_no_work(fake_library: Library) -> None:
    assert c_gemm(fake_library, {"m": 0}) == (0, "")
    if not fake_library.devices():
        status, message = c_gemm(fake_library, {})
        assert status == 3
        assert "need an NVIDIA Hopper GPU of compute capability 9.0" in message


def test_without_a_gpu_nothing_moves_there(fake_library: Library) -> None:
    if fake_library.devices():
        pytest.skip("this machine has a GPU")
    with pytest.raises(NoHopperGpuError, match="no CUDA device 0"):
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
