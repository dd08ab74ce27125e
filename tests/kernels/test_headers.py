"""The headers and Python state the same rules: compared for every kernel and every constant, on the CPU."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from host_programs import compile_for_host, output_of

from w4a16gen import KernelConfig, QuantMode
from w4a16gen.build import toolchain
from w4a16gen.build.headers import CUDA_FOLDER
from w4a16gen.choose import cost_model
from w4a16gen.choose.cost_model import Split, default_cost_model, split_of
from w4a16gen.kernels import arrangement
from w4a16gen.kernels.arrangement import native_arrangement
from w4a16gen.kernels.epilogue import GATED_MULTIPLE
from w4a16gen.kernels.problem import DIMENSION_MULTIPLE, MAX_DIMENSION, NATIVE_GROUP_MULTIPLE, Problem
from w4a16gen.kernels.spaces import enumerate_space
from w4a16gen.weights.layouts.fragments import interleaved
from w4a16gen.weights.layouts.geometry import ALIGNMENT, WeightGeometry
from w4a16gen.weights.packed import GATED_LAYOUT, LAYOUTS, TARGET_LAYOUTS

TILINGS = (
    "fgs_cta64x64x128_cluster1x1x1_warpgroups2_persistent",
    "fgs_cta64x64x128_cluster1x1x1_warpgroups2_streamk",
    "fgsz_cta256x128x64_cluster1x1x1_warpgroups2_streamk",
    "cs_cta64x64x128_cluster2x1x1_warpgroups2_persistent",
    "fgs_cta128x64x64_cluster1x2x1_warpgroups2_persistent",
    "fgs_cta128x128x64_cluster2x2x1_warpgroups2_persistent",
    "fgs_cta64x64x64_cluster1x2x1_warpgroups2_persistent",
    "fgs_cta64x16x128_cluster1x1x2_warpgroups4_persistent",
    "fgs_cta64x64x128_cluster1x1x4_warpgroups2_persistent",
    "fgs_cta128x128x64_cluster1x1x2_warpgroups2_persistent",
    "fgs_cta64x8x128_cluster1x1x1_warpgroups2_persistent",
    "fgs_cta64x8x128_cluster1x1x1_warpgroups2_streamk",
    "fgs_cta64x16x128_cluster1x1x2_warpgroups2_persistent",
    "fgs_cta64x8x128_cluster2x1x1_warpgroups2_persistent",
    "fgs_cta64x16x128_cluster1x1x1_warpgroups2_streamk",
    "fgs_cta128x96x64_cluster1x1x2_warpgroups2_persistent",
    "fgs_cta64x24x128_cluster2x1x1_warpgroups2_persistent",
    "fgs_cta128x192x64_cluster1x1x1_warpgroups2_streamk",
    "fgs_cta128x32x64_cluster2x1x1_warpgroups2_streamk",
    "fgs_cta64x64x128_cluster1x2x1_warpgroups2_streamk",
    "cs_cta64x16x128_cluster2x2x1_warpgroups4_streamk",
)
"""Kernels of every way to divide work: schedulers, clusters, two CTAs on an SM, overlapping token tiles."""

pytestmark = pytest.mark.xdist_group("headers")


@pytest.mark.compile
def test_headers_derive_the_arrangement_that_python_chose_for_every_native_kernel(tmp_path: Path) -> None:
    configs = [*enumerate_space("native"), *enumerate_space("experts")]
    assert len(configs) > 5024
    lines = output_of(compile_for_host("host_shapes", tmp_path, configs, optimisation="-O0"))  # it prints constants
    derived = {name: tuple(map(int, numbers)) for name, *numbers in map(str.split, lines)}
    assert derived == {config.name: dataclasses.astuple(native_arrangement(config)) for config in configs}


@pytest.fixture(scope="module")
def tilings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the program that divides work."""
    configs = [KernelConfig.parse(f"w4a16_sm90_native_{name}") for name in TILINGS]
    return compile_for_host("host_tiles", tmp_path_factory.mktemp("tiles"), configs)


@pytest.mark.compile
def test_the_ctas_of_every_kind_of_kernel_sum_everything_once(tilings: Path) -> None:
    lines = output_of(tilings)
    assert len(lines) == 1 + 14 + len(TILINGS) * (1 + 3 + 192 * 2 * 2)
    assert [line for line in lines if not line.endswith(": ok")] == []
    with_heads = {line.partition(",")[0] for line in lines if ", heads" in line}
    assert with_heads == {f"w4a16_sm90_native_{name}" for name in TILINGS if name.endswith("streamk")}


@pytest.mark.compile
@pytest.mark.parametrize(
    ("name", "ctas", "clusters", "grid"),
    [
        ("fgs_cta64x8x128_cluster1x1x1_warpgroups2_persistent", 128, 264, 132),
        ("fgs_cta64x8x128_cluster1x1x1_warpgroups2_persistent", 67, 264, 132),
        ("fgs_cta64x8x128_cluster1x1x1_warpgroups2_persistent", 66, 264, 66),
        ("fgs_cta64x8x128_cluster1x1x1_warpgroups2_persistent", 200, 264, 200),
        ("fgs_cta64x16x128_cluster1x1x2_warpgroups2_persistent", 128, 132, 132),
        ("fgs_cta64x8x128_cluster1x1x1_warpgroups2_streamk", 128, 264, 128),
        ("fgs_cta64x64x128_cluster1x1x1_warpgroups2_persistent", 128, 132, 128),
    ],
)
def test_grids_of_dependent_launches_are_padded_to_one_cta_per_sm(
    tilings: Path, name: str, ctas: int, clusters: int, grid: int
) -> None:
    assert output_of(tilings, f"w4a16_sm90_native_{name}", str(ctas), str(clusters)) == [str(grid)]


@pytest.mark.compile
@pytest.mark.parametrize(
    "name", ["fgsz_cta256x128x64_cluster1x1x1_warpgroups2_streamk", "fgs_cta64x8x128_cluster1x1x1_warpgroups2_streamk"]
)
def test_estimates_divide_tiles_as_kernels_do(tilings: Path, name: str) -> None:
    lines = [tuple(map(int, line.split())) for line in output_of(tilings, f"w4a16_sm90_native_{name}")]
    heads = Counter[bool]()
    for tiles, clusters, k_blocks, may_have_heads, split_tiles, head_blocks in lines:
        split = split_of(tiles, clusters, k_blocks, may_have_heads=bool(may_have_heads))
        assert split.tiles == split_tiles, (tiles, clusters, k_blocks)
        if split_tiles:
            assert split.head_blocks == head_blocks
        heads[head_blocks > 0] += 1
    assert min(heads[True], heads[False]) > 100


@pytest.mark.compile
@pytest.mark.parametrize(
    "name",
    [
        "fgs_cta64x8x128_cluster1x1x1_warpgroups2_streamk",
        "fgs_cta128x192x64_cluster1x1x1_warpgroups2_streamk",
        "fgs_cta64x64x128_cluster1x2x1_warpgroups2_streamk",
    ],
)
def test_estimates_divide_tiles_of_problems_around_the_size_of_l2_as_kernels_do(
    tilings: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    config, model = KernelConfig.parse(f"w4a16_sm90_native_{name}"), default_cost_model()
    splits: list[Split] = []

    def recorded(tiles: int, clusters: int, k_blocks: int, *, may_have_heads: bool) -> Split:
        splits.append(split_of(tiles, clusters, k_blocks, may_have_heads=may_have_heads))
        return splits[-1]

    monkeypatch.setattr(cost_model, "split_of", recorded)
    clusters = 132 * native_arrangement(config).ctas_per_sm // config.cluster.tokens
    given, expected = [], []
    for tokens, n in itertools.product((1, 40, 64, 65, 128, 129, 192, 193, 1000, 5000), (8, 200, 1024, 1032)):
        channel_blocks = -(-n // 64)
        most = int(model.constants.l2_bytes / (128 * (2 * tokens + 64 * channel_blocks / 2)))
        for k in (64, 128 * most - 64, 128 * most, 128 * most + 64):
            model.work(config, Problem(tokens, n, k, 64))
            k_blocks = -(-k // 128)
            given.append(f"{tokens} {channel_blocks} {k_blocks} {clusters}")
            split = splits[-1]
            expected.append((split.tiles, split.head_blocks))
    lines = output_of(tilings, f"w4a16_sm90_native_{name}", "problems", given="\n".join(given))
    assert [tuple(map(int, line.split())) for line in lines] == expected
    assert 5 < sum(head_blocks > 0 for _, head_blocks in expected) <= len(expected) / 4, "those above the limit"


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile the program that prints the headers' rules."""
    return compile_for_host("host_rules", tmp_path_factory.mktemp("rules"))


def test_constants_are_the_same_in_the_headers_and_in_python(rules: Path) -> None:
    found = dict(line.rsplit(" ", 1) for line in output_of(rules))
    expected = {
        "OK": 0,
        "INVALID_ARGUMENT": 1,
        "UNSUPPORTED": 2,
        "NO_HOPPER_GPU": 3,
        "CUDA_ERROR": 4,
        **{f"mode {mode}": index for index, mode in enumerate(QuantMode)},
        "DIMENSION_MULTIPLE": DIMENSION_MULTIPLE,
        "ALIGNMENT": ALIGNMENT,
        "MAX_DIMENSION": MAX_DIMENSION,
        "GATED_MULTIPLE": GATED_MULTIPLE,
        "NATIVE_GROUP_MULTIPLE": NATIVE_GROUP_MULTIPLE,
        **{
            name: getattr(arrangement, name)
            for name in (
                "WARPGROUP_THREADS",
                "WARPGROUP_CHANNELS",
                "PACKED_BLOCK_K",
                "SCALE_ROW_BYTES",
                "MAX_SCALE_ROWS",
                "SHARED_BYTES_PER_SM",
                "RESERVED_SHARED_BYTES",
            )
        },
        **{f"layout {target}": layout for target, layout in TARGET_LAYOUTS.items()},
        "layout gated": GATED_LAYOUT,
        "gated order": ",".join(map(str, interleaved(np.arange(48)))),
    }
    assert found == {name: str(value) for name, value in expected.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", QuantMode, ids=str)
def test_packed_bytes_are_the_same_in_the_headers_and_in_python(rules: Path, layout: str, mode: QuantMode) -> None:
    groups = (32, 64, 96, 128, 192, 256, 384, 576, 768)
    weights = [
        WeightGeometry(n, k, group, mode)
        for n, k, size in itertools.product((8, 64, 72, 1024, 28672), (8, 576, 768, 1152, 4608, 1 << 30), (*groups, 0))
        if (group := size or k) == k or (mode.is_grouped and k % group == 0)
    ]
    given = "\n".join(f"{weight.n} {weight.k} {weight.group_size}" for weight in weights)
    lines = output_of(rules, layout, str(list(QuantMode).index(mode)), given=given)
    assert [int(line) for line in lines] == [LAYOUTS[layout].packed_bytes(weight) for weight in weights]


def test_no_header_of_this_package_hides_one_of_cutlass() -> None:
    cutlass = toolchain.find_cutlass()
    assert cutlass is not None, "the tests need CUTLASS's headers: pip install 'w4a16gen[test]'"
    own = [path.relative_to(CUDA_FOLDER) for path in CUDA_FOLDER.rglob("*") if path.suffix in {".h", ".cuh"}]
    assert len(own) > 20
    assert [path for path in own if (cutlass / path).exists()] == []
