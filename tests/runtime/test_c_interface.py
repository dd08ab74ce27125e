"""The C interface of a built library: wrong calls are refused with a status and a sentence, before any launch."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
from c_structures import CGemmArguments, CProblem

from w4a16gen import Library

FGS = "w4a16_sm90_cutlass_fgs_cta128x64x64_cluster1x1x1_cooperative_streamk"
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
    problem = CProblem(4, 16, 64, 64)
    arguments = CGemmArguments(ALIGNED, 3 * ALIGNED, 640, None, 2 * ALIGNED, None, 0, None, 1.0, 0)
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
