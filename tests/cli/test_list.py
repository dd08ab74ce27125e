"""`list` and `emit`: which kernels they select, and in which form they show them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fakes.library import FakeLibrary
from fakes.runner import Runner

from w4a16gen import QuantMode
from w4a16gen.cli.list import by_shape, shape_pattern
from w4a16gen.cli.services import Services
from w4a16gen.kernels.config import Epilogue
from w4a16gen.kernels.spaces import enumerate_space, with_epilogues

SHAPE = "--cta 128x256x64 --cluster 2x1x1"


def test_list_prints_bare_names_in_a_pipe_and_counts_beside_them(cli: Runner) -> None:
    done = cli.run("list --space trtllm")
    assert done.exit_code == 0
    assert done.stdout.split() == [config.name for config in enumerate_space("trtllm")]
    assert "63 kernels (21 cs, 21 fgs, 21 fgsz) in space trtllm" in done.stderr


def test_list_and_emit_and_build_share_one_default(cli: Runner) -> None:
    asked: list[object] = []

    def build(configs: object, **_: object) -> None:
        asked.append(configs)
        raise KeyboardInterrupt

    cli.services = Services(build=build)
    for filters, space in (
        ("", "default"),
        (SHAPE, "trtllm-native"),
        ("--target cutlass --mode cs", "trtllm"),
        ("--epilogue gated", "default"),
        (f"{SHAPE} --epilogue none --epilogue elementwise", "trtllm-native"),
    ):
        names = cli.run(f"list {filters}").stdout.split()
        emitted = json.loads(cli.run(f"emit {filters} --output out --json").stdout)
        assert [name for file in emitted["files"] for name in file["kernels"]] == names
        assert emitted["spaces"] == [space]
        for command in ("build", "build-and-verify"):
            stopped = cli.run(f"{command} {filters}")
            assert stopped.exit_code == 130
            assert [config.name for config in asked.pop()] == names  # type: ignore[attr-defined]
            assert f"{len(names)} kernels of space {space}" in stopped.stderr


def test_spaces_may_be_repeated(cli: Runner) -> None:
    done = cli.run("list --space default --space trtllm")
    assert len(done.stdout.split()) == len(enumerate_space("default")) + len(enumerate_space("trtllm"))
    assert "in space default + trtllm" in done.stderr


def test_epilogues_are_added_to_the_kernels_of_spaces(cli: Runner) -> None:
    plain = [config.name for config in enumerate_space("default")]
    assert cli.run("list --epilogue none").stdout.split() == plain
    for epilogue in ("elementwise", "gated"):
        assert cli.run(f"list --epilogue {epilogue}").stdout.split() == [f"{name}_{epilogue}" for name in plain]
    every = cli.run("list --space default --space trtllm --epilogue none --epilogue gated --epilogue elementwise")
    assert len(every.stdout.split()) == 3 * len(plain) + len(enumerate_space("trtllm"))
    refused = cli.run("list --target cutlass --epilogue gated")
    assert refused.exit_code == 2
    assert "only native kernels have epilogues" in " ".join(refused.stderr.split())
    assert "'silu' is not one of none, elementwise, gated" in cli.run("list --epilogue silu").stderr


def test_the_build_is_listed_with_all_its_epilogues(cli: Runner) -> None:
    library = FakeLibrary(with_epilogues(enumerate_space("default")[:2], list(Epilogue)))
    cli.services = Services(load=lambda _folder: library)
    assert len(cli.run("list --built").stdout.split()) == 6
    (first, second) = cli.run("list --built --epilogue gated").stdout.split()
    assert first.endswith("_gated")
    assert second.endswith("_gated")


def test_what_a_space_leaves_out_and_what_is_forbidden_have_epilogues_too(cli: Runner) -> None:
    filters = f"{SHAPE} --mode fgs --epilogue gated"
    left_out = cli.run(f"list --explain {filters}").stdout.splitlines()
    name = "w4a16_sm90_native_fgs_cta128x256x64_cluster2x1x1_warpgroups2_persistent_gated"
    assert any(line.startswith(f"{name}\t") for line in left_out)
    assert all("_gated\t" in line for line in left_out)
    forbidden = cli.run(f"list --explain --forbidden --target cutlass {filters}").stdout.splitlines()
    assert any("_persistent_gated\tforbidden: epilogue gated: only native" in line for line in forbidden)


def test_list_as_json_has_the_documented_fields(cli: Runner) -> None:
    assert json.loads(cli.run(f"list --json {SHAPE} --mode fgs").stdout)["kernels"] == [
        {
            "name": "w4a16_sm90_native_fgs_cta128x256x64_cluster2x1x1_warpgroups2_persistent",
            "target": "native",
            "mode": "fgs",
            "cta": [128, 256, 64],
            "cluster": [2, 1, 1],
            "schedule": "warpgroups2",
            "scheduler": "persistent",
            "epilogue": "none",
        }
    ]


def test_filters_repeat_and_combine(cli: Runner) -> None:
    done = cli.run(f"list {SHAPE} --mode cs --mode FINEGRAINED_SCALE_ONLY --target native")
    assert len(done.stdout.split()) == 2


def test_list_built_shows_the_build(cli: Runner) -> None:
    cli.services = Services(load=lambda _: FakeLibrary(enumerate_space("trtllm")))
    done = cli.run("list --built")
    assert len(done.stdout.split()) == 63
    assert "in the build" in done.stderr


def test_explain_shows_the_legal_kernels_that_a_space_leaves_out(cli: Runner) -> None:
    done = cli.run("list --explain --space trtllm --cta 256x64x64 --cluster 1x1x1")
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert lines
    assert {name for name, _ in lines} <= {config.name for config in enumerate_space("all")}
    assert any("left out: TensorRT-LLM has CTA channels of 64 and 128" in reason for _, reason in lines)
    assert f"{len(lines)} legal kernels that space trtllm leaves out" in done.stderr
    inside = cli.run("list --explain --space trtllm --space native --target native")
    assert inside.stdout == ""


def test_explain_shows_what_is_forbidden_only_if_asked(cli: Runner) -> None:
    assert "forbidden" not in cli.run("list --explain").stdout
    done = cli.run("list --explain --forbidden --cta 128x8x64 --target cutlass --json")
    found = json.loads(done.stdout)["kernels"]
    assert {row["kind"] for row in found} == {"forbidden"}
    assert all(len(row["reason"].split()) > 4 for row in found)
    assert {row["schedule"] for row in found} == {"pingpong", "cooperative"}, "schedules of the family only"


def test_kernels_that_differ_in_mode_only_share_a_pattern() -> None:
    kernels = enumerate_space("default")
    shapes = by_shape(kernels)
    assert [len(shape) for shape in shapes] == [len(QuantMode)] * (len(kernels) // len(QuantMode))
    assert shape_pattern(shapes[0]) == "native_{cs,fgs,fgsz}_cta64x8x128_cluster1x1x1_warpgroups4_persistent"
    assert shape_pattern(shapes[0][:1]) == shapes[0][0].short_name


def test_emit_writes_one_kernel_per_mode_and_a_second_time_nothing(cli: Runner, tmp_path: Path) -> None:
    first = cli.run(f"emit {SHAPE}")
    assert first.exit_code == 0
    assert len(first.stdout.split()) == 3
    assert sorted(path.name for path in (tmp_path / "generated").glob("*.cu")) == sorted(
        Path(line).name for line in first.stdout.split()
    )
    assert "3 kernels of space trtllm-native: 3 files written, 0 unchanged" in first.stderr
    second = cli.run(f"emit {SHAPE}")
    assert second.stdout == first.stdout
    assert "0 files written, 3 unchanged" in second.stderr


def test_emit_removes_stale_sources_when_asked(cli: Runner, tmp_path: Path) -> None:
    count = len(enumerate_space("default"))
    cli.run("emit --output out")
    kept = cli.run(f"emit --output out {SHAPE}")
    assert f"out keeps {count} files of earlier calls; --remove-stale removes them" in kept.stderr
    cli.run("emit --output out")
    done = cli.run(f"emit --output out --remove-stale --json {SHAPE}")
    assert len(json.loads(done.stdout)["removed"]) >= count
    assert len(list((tmp_path / "out").glob("*.cu"))) == 3


@pytest.mark.parametrize("command", ["list", "emit", "build", "build-and-verify"])
def test_a_space_without_the_kernel_names_one_that_has_it(cli: Runner, command: str) -> None:
    done = cli.run(f"{command} {SHAPE} --space default")
    assert done.exit_code == 2
    assert "is legal, but not in space default: use --space trtllm-native" in done.stderr
