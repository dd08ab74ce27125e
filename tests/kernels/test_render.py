"""Rendering: golden texts, determinism, and the files that emission touches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from paths import GOLDEN

from w4a16gen import KernelConfig
from w4a16gen.build.emit import emit
from w4a16gen.kernels.render import render_kernel, render_registry, render_unit, source_name
from w4a16gen.kernels.spaces import enumerate_space
from w4a16gen.runtime.artifact import MANIFEST
from w4a16gen.verify.static import FOREIGN

KERNEL = KernelConfig.parse("w4a16_sm90_cutlass_fgsz_cta128x64x64_cluster2x1x1_cooperative_streamk")
NATIVE = KernelConfig.parse("w4a16_sm90_native_fgs_cta64x16x128_cluster1x1x2_warpgroups4_persistent")
STREAM_K = KernelConfig.parse("w4a16_sm90_native_fgsz_cta256x64x128_cluster1x1x1_warpgroups2_streamk")
BY_WARPS = KernelConfig.parse("w4a16_sm90_native_cs_cta64x8x128_cluster1x1x2_warps8_persistent")
GATED = KernelConfig.parse("w4a16_sm90_native_fgs_cta64x16x128_cluster1x1x2_warps8_persistent_gated")
GROUPED = KernelConfig.parse("w4a16_sm90_native_fgsz_cta64x64x128_cluster1x1x1_warpgroups2_grouped_gated")
OTHER = KernelConfig.parse("w4a16_sm90_cutlass_cs_cta64x16x64_cluster1x1x1_pingpong_persistent")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("cutlass_kernel.cu", render_kernel(KERNEL)),
        ("native_kernel.cu", render_kernel(NATIVE)),
        ("native_stream_k_kernel.cu", render_kernel(STREAM_K)),
        ("native_by_warps_kernel.cu", render_kernel(BY_WARPS)),
        ("native_gated_kernel.cu", render_kernel(GATED)),
        ("native_grouped_kernel.cu", render_kernel(GROUPED)),
        ("registry.cpp", render_registry([KERNEL, OTHER])),
        ("unit.cu", render_unit([source_name(KERNEL), source_name(OTHER)])),
    ],
)
def test_rendered_text_is_the_golden_one(name: str, text: str) -> None:
    assert text == (GOLDEN / name).read_text()


def test_the_registry_does_not_depend_on_the_order_given() -> None:
    assert render_registry([KERNEL, OTHER]) == render_registry([OTHER, KERNEL])


def test_every_kernel_of_the_63_names_no_foreign_type() -> None:
    for config in enumerate_space("trtllm"):
        assert FOREIGN.search(render_kernel(config)) is None


@pytest.mark.parametrize(
    "text",
    ["__nv_fp8_e4m3", "cutlass::float_e5m2_t", "__nv_bfloat16", "cutlass::bfloat16_t", "uint8_t", "int8_t const*"],
)
def test_foreign_types_are_recognised(text: str) -> None:
    assert FOREIGN.search(text)


def test_emitting_twice_changes_nothing(tmp_path: Path) -> None:
    configs = enumerate_space("trtllm")
    first = emit(configs, tmp_path)
    assert len(first.paths) == 63
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()}
    second = emit(reversed(configs), tmp_path)
    assert second.written == ()
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()} == before


def test_stale_sources_go_only_when_asked_and_other_files_never(tmp_path: Path) -> None:
    emit([KERNEL, OTHER], tmp_path)
    (tmp_path / "notes.cu").write_text("mine")
    kept = emit([KERNEL], tmp_path)
    assert [path.name for path in kept.stale] == [source_name(OTHER)]
    assert (tmp_path / source_name(OTHER)).exists()
    removed = emit([KERNEL], tmp_path, remove_stale=True)
    assert [path.name for path in removed.removed] == [source_name(OTHER)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [MANIFEST, "notes.cu", source_name(KERNEL)]


def test_the_manifest_names_what_was_asked_for(tmp_path: Path) -> None:
    emit([KERNEL], tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert [kernel["name"] for kernel in manifest["kernels"]] == [KERNEL.name]


def test_a_changed_file_is_mended(tmp_path: Path) -> None:
    (path,) = emit([KERNEL], tmp_path).paths
    path.write_text("edited")
    assert emit([KERNEL], tmp_path).written == (path,)
    assert path.read_text() == render_kernel(KERNEL)
