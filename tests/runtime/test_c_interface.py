"""The C interface of a built library: wrong calls are refused with a status and a sentence, before any launch."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
from c_structures import CGemmArguments, CKernelInfo, CProblem
from conftest import install_fake_nvcc

from w4a16gen import KernelConfig, Library
from w4a16gen.build import versions
from w4a16gen.build.pipeline import build
from w4a16gen.kernels.config import Epilogue
from w4a16gen.kernels.epilogue import Activation, CallEpilogue, why_no_epilogue, why_not_by, why_not_gated

FGS = "w4a16_sm90_cutlass_fgs_cta128x64x64_cluster1x1x1_cooperative_streamk"


ALIGNED = 1 << 20
NATIVE = "w4a16_sm90_native_fgs_cta64x8x128_cluster1x1x1_warps8_persistent"
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
    ("an activation that is none", {"activation": 8}, 1, "activation of 8 must be a w4a16_activation, 0 to 7"),
    ("a negative activation", {"activation": -1}, 1, "activation of -1 must be a w4a16_activation"),
    ("an activation of cutlass", {"activation": 1}, 1, why_no_epilogue("cutlass")),
    ("a residual of cutlass", {"residual": 4 * ALIGNED}, 1, why_no_epilogue("cutlass")),
    ("a launch that is none", {"dependent_launch": 3}, 1, "dependent_launch of 3 must be a w4a16_launch, 0 to 2"),
    ("a negative launch", {"dependent_launch": -1}, 1, "dependent_launch of -1 must be a w4a16_launch"),
    ("group", {"group_size": 48}, 2, "group size 48 must be 64 (= k)"),
    ("n", {"n": 12}, 2, "n of 12 must be a positive multiple of 8"),
]


def c_gemm(library: Library, change: dict[str, Any]) -> tuple[int, str]:
    """Call the C interface with one thing wrong."""
    problem = CProblem(4, 16, 64, 64)
    arguments = CGemmArguments(ALIGNED, 3 * ALIGNED, 640, None, 2 * ALIGNED, None, 0, None, 1.0, 0, 0, None)
    for name, value in change.items():
        for struct in (problem, arguments):
            if hasattr(struct, name):
                setattr(struct, name, value)
    names = [kernel.config.name for kernel in library.kernels]
    call = CallEpilogue(list(Activation)[change.get("activation", 0) % 8], has_residual="residual" in change)
    kernel = change.get("kernel", names.index(FGS if FGS in names else NATIVE + call.kernels.suffix))
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


@pytest.fixture(scope="module")
def native_library(tmp_path_factory: pytest.TempPathFactory, fake_cache: Path) -> Library:
    """Return a build of a native kernel, with each epilogue, that can be described but not launched."""
    folder = tmp_path_factory.mktemp("native")
    with pytest.MonkeyPatch.context() as monkeypatch:
        install_fake_nvcc(folder, fake_cache, monkeypatch)
        configs = [KernelConfig.parse(NATIVE + epilogue.suffix) for epilogue in Epilogue]
        made = build(configs, generated=folder / "generated", folder=folder / "build").build
    versions.program_version.cache_clear()
    return Library(made)


OUTPUT = 2 * ALIGNED
EPILOGUES: list[tuple[str, dict[str, Any], int, str]] = [
    ("odd halves", {"activation": 5, "n": 24, "packed_bytes": 896}, 1, str(why_not_gated(24))),
    ("a misaligned residual", {"residual": 4 * ALIGNED + 8}, 1, "residual at 0x400008 must be aligned to 16 bytes"),
    ("a residual one row on", {"residual": OUTPUT + 32}, 1, "output overlaps the residual: pass another array"),
    ("a residual one row before", {"residual": OUTPUT - 32}, 1, "output overlaps the residual: pass another array"),
    ("a gated output over its bias", {"activation": 5, "bias": OUTPUT + 32}, 1, "output overlaps the bias"),
]


@pytest.mark.parametrize(
    ("change", "status", "text"), [row[1:] for row in EPILOGUES], ids=[row[0] for row in EPILOGUES]
)
def test_a_wrong_epilogue_in_c_is_refused(
    native_library: Library, change: dict[str, Any], status: int, text: str
) -> None:
    got, message = c_gemm(native_library, change)
    assert (got, text in message) == (status, True), message


@pytest.mark.parametrize(
    "change",
    [
        *[{"activation": number} for number in range(8)],
        {"residual": OUTPUT},
        {"residual": OUTPUT + 4 * 16 * 2},
        {"residual": OUTPUT - 4 * 16 * 2},
        {"activation": 5, "residual": OUTPUT + 4 * 8 * 2},
        {"activation": 5, "residual": OUTPUT - 4 * 8 * 2},
        {"activation": 5, "bias": OUTPUT + 4 * 8 * 2},
    ],
    ids=str,
)
def test_a_right_epilogue_in_c_reaches_the_gpu(native_library: Library, change: dict[str, Any]) -> None:
    got, message = c_gemm(native_library, change)
    assert got in (3, 4), message
    assert "overlap" not in message


@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("activation", Activation, ids=str)
@pytest.mark.parametrize("kernel", Epilogue, ids=str)
def test_both_sides_agree_on_what_a_kernel_computes(
    native_library: Library, kernel: Epilogue, activation: Activation, has_residual: bool
) -> None:
    index = native_library.index_of(NATIVE + kernel.suffix)
    residual = {"residual": 4 * ALIGNED} if has_residual else {}
    status, message = c_gemm(native_library, {"kernel": index, "activation": activation.number, **residual})
    reason = why_not_by(kernel, CallEpilogue(activation, has_residual=has_residual))
    if reason is None:
        assert status in (3, 4), message
    else:
        assert (status, message) == (1, reason)


def test_the_library_describes_the_epilogue(native_library: Library) -> None:
    library = ctypes.CDLL(str(native_library.build.library))
    found = []
    for index in range(len(native_library.kernels)):
        info = CKernelInfo()
        assert library.w4a16_get_kernel_info(index, ctypes.byref(info)) == 0
        found.append((info.name.decode(), info.epilogue, info.grouped))
    assert sorted(found) == sorted((NATIVE + epilogue.suffix, epilogue.number, 0) for epilogue in Epilogue)


@pytest.mark.parametrize("output", [ALIGNED + 4 * 64 * 2, ALIGNED - 4 * 16 * 2])
def test_an_output_beside_the_activations_is_not_refused(fake_library: Library, output: int) -> None:
    assert "overlaps" not in c_gemm(fake_library, {"output": output, "packed_bytes": 640})[1]


def test_c_without_a_gpu_says_so_and_no_tokens_are_no_work(fake_library: Library) -> None:
    assert c_gemm(fake_library, {"m": 0}) == (0, "")
    if not fake_library.devices():
        status, message = c_gemm(fake_library, {})
        assert status == 3
        assert "need an NVIDIA Hopper GPU of compute capability 9.0" in message
