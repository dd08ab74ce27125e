"""The kernels' own epilogues, run on the CPU: each thread of a CTA is one, and warps exchange as on the GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from host_programs import compile_for_host, output_of

from w4a16gen import KernelConfig
from w4a16gen.kernels.config import Epilogue

KERNELS = (
    "fgs_cta64x8x128_cluster1x1x1_warps8_persistent",
    "fgs_cta64x16x128_cluster1x1x4_warps8_persistent",
    "fgs_cta64x24x128_cluster1x1x2_warpgroups4_persistent",
    "fgs_cta64x32x64_cluster1x1x2_warpgroups4_persistent",
    "fgs_cta128x40x128_cluster1x1x1_warpgroups2_streamk",
    "fgs_cta128x8x128_cluster2x1x1_warpgroups4_persistent",
    "fgs_cta256x8x128_cluster1x1x2_warpgroups4_persistent",
    "fgs_cta64x64x128_cluster1x1x2_warpgroups2_persistent",
    "fgs_cta64x80x128_cluster1x2x1_warpgroups2_persistent",
    "fgs_cta128x128x64_cluster1x1x2_warpgroups2_persistent",
    "fgs_cta128x112x128_cluster2x1x1_warpgroups2_streamk",
    "fgs_cta256x64x64_cluster1x1x1_warpgroups4_persistent",
    "fgs_cta256x128x64_cluster1x1x1_warpgroups2_persistent",
    "fgs_cta128x256x64_cluster1x1x1_warpgroups2_persistent",
    "fgs_cta256x80x128_cluster1x1x1_warpgroups2_persistent",
)
"""Kernels that store from registers and through shared memory, read the residual by threads or by the copy engine,
split K in each way, and have every number of fragments."""
RUNS = {Epilogue.NONE: 1, Epilogue.ELEMENTWISE: 8, Epilogue.GATED: 4}
"""Pairs of activation and residual in tests/cpp/host_epilogues.cpp."""


@pytest.mark.compile
def test_every_thread_stores_what_it_must(tmp_path: Path) -> None:
    plain = [KernelConfig.parse(f"w4a16_sm90_native_{name}") for name in KERNELS]
    configs = [replace(config, epilogue=epilogue) for config in plain for epilogue in Epilogue]
    lines = output_of(compile_for_host("host_epilogues", tmp_path, configs))
    for config in configs:
        assert sum(line.startswith(f"{config.name}, ") for line in lines) == RUNS[config.epilogue]
    assert [line for line in lines if not line.endswith(": ok")] == []
