"""Stand-ins of the header that declares the launcher, as the releases of TensorRT-LLM and descendants declare it."""

from __future__ import annotations

import shutil
from pathlib import Path

from paths import CPP

HEADER = "tensorrt_llm/kernels/cutlass_kernels/fpA_intB_gemm/launchers/fpA_intB_launcher_sm90.inl"
LAUNCHERS = CPP / "launchers"
AGES = {
    "0.9 to 0.20": "release_0_9.inl",
    "1.0": "release_1_0.inl",
    "1.1, one line": "release_1_1.inl",
    "1.2, inline namespace": "release_1_2.inl",
    "inline namespace, old name": "inline_namespace.inl",
    "both names": "both_names.inl",
}
"""The file of each age in tests/cpp/launchers."""
DESCENDANT = "onnxruntime.inl"


def write_header(folder: Path, file: str, *, header: str = HEADER, mixed_input: bool = False) -> Path:
    """Copy a stand-in of the header, and the types that it takes, into an include folder; return its path."""
    path = folder / header
    path.parent.mkdir(parents=True)
    schedules = "schedules_mixed_input.h" if mixed_input else "schedules.h"
    shutil.copyfile(LAUNCHERS / schedules, path.with_name("schedules.h"))
    shutil.copyfile(LAUNCHERS / "types.h", path.with_suffix(".h"))
    shutil.copyfile(LAUNCHERS / file, path)
    return path
