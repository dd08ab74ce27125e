"""One real compile per mode, and the proofs that need no GPU: on the real thing, and on what must not pass."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import pytest
from click.testing import CliRunner
from conftest import build_again
from hypothesis import given
from hypothesis import strategies as st
from paths import CPP

from w4a16gen import KernelConfig, Library, Problem, QuantMode
from w4a16gen.build import toolchain
from w4a16gen.build.headers import CUDA_FOLDER
from w4a16gen.build.pipeline import build
from w4a16gen.build.units import FLAGS
from w4a16gen.cli import main
from w4a16gen.kernels.arrangement import native_arrangement
from w4a16gen.kernels.config import Epilogue, Schedule, Scheduler
from w4a16gen.kernels.legality import (
    MAX_ACCUMULATORS,
    MAX_STREAM_K_ACCUMULATORS_IN_CLUSTERS,
    MAX_STREAM_K_ACCUMULATORS_OF_ONE_FRAGMENT_IN_CLUSTERS,
    why_forbidden,
)
from w4a16gen.kernels.render import source_name
from w4a16gen.kernels.spaces import enumerate_space, with_epilogues
from w4a16gen.runtime.artifact import Build, load_build
from w4a16gen.verify import static, verify
from w4a16gen.verify.static import KernelCode, read_code

pytestmark = pytest.mark.compile

MOST_REGISTERS = QuantMode.FINEGRAINED_SCALE_AND_ZEROS
BY_WARPS = "w4a16_sm90_native_fgs_cta64x8x128_cluster1x1x2_warps8_persistent"


def generated(build: Build) -> Path:
    """Return the folder that a build's sources were emitted to."""
    folder: Path = build.folder.parent / "generated"
    return folder


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="there is one process")
def test_xdist_builds_once(real_build: Build, request: pytest.FixtureRequest) -> None:
    assert real_build
    assert request.node.nodeid.endswith("@real build")


def test_every_static_proof_holds(real_library: Library) -> None:
    proof = static.prove(real_library, generated(real_library.build))
    assert proof.violations == []
    assert {kernel["mode"] for kernel in proof.kernels} == {"cs", "fgs", "fgsz"}
    for kernel in proof.kernels:
        assert kernel["registers"] == 168, "384 threads share 65536 registers"
        assert kernel["stages"] >= 4
        assert 100_000 < kernel["shared_memory_bytes"] <= 232_448
        assert 10_000 < kernel["code_bytes"] < 200_000
        assert kernel["instructions"]["HGMMA"] > 0


def native_kernels() -> list[KernelConfig]:
    """Return the native kernels of the default space, and of TensorRT-LLM's."""
    return sorted({*enumerate_space("trtllm-native"), *enumerate_space("default")})


def cpu_seconds_of_a_small_file(folder: Path) -> float:
    """Compile a kernel of one line: what nvcc costs on this machine, which may be twice as slow as another."""
    tools = toolchain.find_toolchain()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [
        str(tools.nvcc),
        *FLAGS,
        f"-ccbin={tools.host_compiler}",
        "-c",
        str(CPP / "small.cu"),
        "-o",
        str(folder / "small.o"),
    ]
    subprocess.run(command, check=True)  # noqa: S603
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_native_kernels_compile_in_seconds_and_are_proven(real_build: Build, tmp_path: Path) -> None:
    before = cpu_seconds_of_a_small_file(tmp_path)
    configs = native_kernels()
    built = build_again(real_build, configs, tmp_path)
    assert built.failures == []
    small = (before + cpu_seconds_of_a_small_file(tmp_path)) / 2
    proof = static.prove(Library(built.build), tmp_path / "generated")
    assert proof.violations == []
    assert len(proof.kernels) == len(configs) > 100
    assert {kernel["stack_bytes"] for kernel in proof.kernels} == {0}
    # 1.2 times as long as the small file; with CUTLASS's collectives included, though unused, 2.2 times.
    assert mean(kernel["compile_cpu_seconds"] for kernel in proof.kernels) < 1.75 * small
    for config, kernel in zip(configs, proof.kernels, strict=True):
        assert kernel["name"] == config.name
        assert kernel["compile_cpu_seconds"] < 3 * small
        assert kernel["compile_peak_bytes"] < 1e9
        assert kernel["instructions"]["UBLKCP"] > 0
    check_that_more_tokens_need_no_less_workspace(Library(built.build))


def kernels_at_the_edge() -> list[KernelConfig]:
    """Return those of space native that exchange as many sums as a thread can have: what ptxas lets spill first."""

    def is_at_the_edge(config: KernelConfig) -> bool:
        arrangement = native_arrangement(config)
        exchanges = arrangement.along_k * config.cluster.k > 1 or config.scheduler is Scheduler.STREAM_K
        return arrangement.accumulators == MAX_ACCUMULATORS and exchanges and config.mode.is_grouped

    def is_at_the_edge_of_clusters(config: KernelConfig) -> bool:
        in_cluster = config.scheduler is Scheduler.STREAM_K and config.cluster.channels * config.cluster.tokens > 1
        most = (MAX_STREAM_K_ACCUMULATORS_IN_CLUSTERS, MAX_STREAM_K_ACCUMULATORS_OF_ONE_FRAGMENT_IN_CLUSTERS)
        fits = native_arrangement(config).accumulators in most
        return in_cluster and fits and config.cta.channels > 64 and config.cta.k == 64 and config.mode.is_grouped

    space = enumerate_space("native")
    configs = list(filter(is_at_the_edge, space))
    assert len(configs) == 20
    in_clusters = list(filter(is_at_the_edge_of_clusters, space))
    assert len(in_clusters) == 15
    return sorted([*configs, *in_clusters])


def kernels_with_epilogues() -> list[KernelConfig]:
    """Return those with zeros, which need most registers: at the edge, and of each schedule the default with most sums.

    Each with both epilogues.
    """
    fullest: dict[Schedule, KernelConfig] = {}
    for config in sorted(enumerate_space("default"), key=lambda config: native_arrangement(config).accumulators):
        fullest[config.schedule] = config
    configs = {
        dataclasses.replace(config, mode=MOST_REGISTERS) for config in (*kernels_at_the_edge(), *fullest.values())
    }
    legal = [config for config in configs if why_forbidden(config) is None]
    assert len(legal) > len(fullest)
    return with_epilogues(legal, [Epilogue.ELEMENTWISE, Epilogue.GATED])


@pytest.fixture(scope="module")
def proof_of_the_fullest(real_build: Build, tmp_path_factory: pytest.TempPathFactory) -> static.StaticProof:
    """Prove one build, which links once, of the kernels that spill first and are not proven above."""
    configs = {*kernels_at_the_edge(), *kernels_with_epilogues()}.difference(native_kernels())
    folder = tmp_path_factory.mktemp("fullest")
    built = build_again(real_build, configs, folder)
    assert built.failures == []
    proof = static.prove(Library(built.build), folder / "generated")
    assert proof.violations == []
    assert len(proof.kernels) == len(configs)
    return proof


def stack_bytes(proof: static.StaticProof, configs: Sequence[KernelConfig]) -> list[int]:
    """Return the stack of each kernel of a proof."""
    found = {kernel["name"]: kernel["stack_bytes"] for kernel in proof.kernels}
    return [found[config.name] for config in configs]


def test_kernels_at_the_edge_of_their_registers_do_not_spill(proof_of_the_fullest: static.StaticProof) -> None:
    """Those that are not proven above."""
    others = sorted(set(kernels_at_the_edge()).difference(native_kernels()))
    assert len(others) == 29
    assert set(stack_bytes(proof_of_the_fullest, others)) == {0}


def test_kernels_with_epilogues_do_not_spill(proof_of_the_fullest: static.StaticProof) -> None:
    assert set(stack_bytes(proof_of_the_fullest, kernels_with_epilogues())) == {0}


EXPERT_FUNCTIONS = (
    *("route", "count_routes", "list_token_tiles", "list_indexed_rows"),
    *("gather_rows", "activate_rows", "combine_rows"),
)
"""Kernels beside the products of a layer of experts."""


@pytest.fixture(scope="module")
def by_warps(real_build: Build, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Return a build of one kernel, which is not grouped, and whose warps multiply each by itself."""
    return build_again(real_build, [KernelConfig.parse(BY_WARPS)], tmp_path_factory.mktemp("by warps")).build


def test_grouped_kernels_of_several_units_link_and_others_have_none_of_their_functions(
    by_warps: Build, tmp_path: Path
) -> None:
    """Two are added to a build of another kernel: each is compiled in a unit of its own, as there are two compilers."""
    names = ("grouped", "grouped_gated")
    added = [KernelConfig.parse(f"w4a16_sm90_native_fgs_cta64x8x128_cluster1x1x1_warps8_{name}") for name in names]
    assert all(b"combine_rows" not in path.read_bytes() for path in by_warps.folder.rglob("*.o"))
    built = build_again(by_warps, [*by_warps.configs, *added], tmp_path, jobs=2)
    assert (built.compiled, built.failures) == (2, [])
    assert [kernel.unit_kernels for kernel in built.build.manifest.kernels] == [1, 1, 1]
    library = Library(built.build)
    assert static.prove(library, tmp_path / "generated").violations == []
    code = read_code(library.build.library)
    for function in EXPERT_FUNCTIONS:
        assert any(f"native{len(function)}{function}I" in symbol for symbol in code)


def check_that_more_tokens_need_no_less_workspace(library: Library) -> None:
    stream_k = [config for config in library.configs() if config.scheduler is Scheduler.STREAM_K]
    assert stream_k

    @given(
        st.sampled_from(stream_k), st.integers(1, 8000), st.integers(1, 400), st.integers(0, 9000), st.integers(0, 9000)
    )
    def check(config: KernelConfig, n: int, k: int, m: int, more: int) -> None:
        fewer, all_of_them = (
            library.workspace_bytes(config, Problem(tokens, 8 * n, 32 * k, 32 * k), sm_count=132)
            for tokens in (m, m + more)
        )
        assert fewer <= all_of_them < 30e6

    check()


def test_the_report_says_what_was_not_proven(real_library: Library) -> None:
    if real_library.hopper_devices():
        pytest.skip("this machine has a Hopper GPU")
    report = verify(real_library, generated(real_library.build))
    assert report.ok
    assert not report.numerics_ran
    assert "Numerics were NOT run: this machine has" in report.summary()
    assert report.markdown().count("not run") == 3
    json.dumps(report.value)


def test_verify_on_the_command_line(cli: CliRunner, real_library: Library, tmp_path: Path) -> None:
    folders = ["--build-dir", str(real_library.build.folder), "--generated-dir", str(generated(real_library.build))]
    result = cli.invoke(main, ["verify", *folders, "--json", "--report", "report"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads((tmp_path / "report.json").read_text())
    assert (tmp_path / "report.md").read_text().startswith("# Verification report")
    if not real_library.hopper_devices():
        required = cli.invoke(main, ["verify", *folders, "--require-gpu"])
        assert required.exit_code == 3
        assert "the numerical proofs did not run" in " ".join(required.output.split())


def test_the_library_exports_the_c_interface_and_nothing_else(real_library: Library) -> None:
    text = real_library.build.library.read_bytes()
    assert b"w4a16_gemm\0" in text
    for symbol in (b"cudaMalloc\0", b"_ZN7cutlass"):
        assert symbol not in exported_names(text), "CUTLASS and the CUDA runtime stay inside"


def exported_names(library: bytes) -> bytes:
    """Return the dynamic string table of an ELF library."""
    start = library.index(b"w4a16_")
    begin = library.rindex(b"\0\0", 0, start) if b"\0\0" in library[:start] else 0
    return library[begin : library.index(b"\0\0", start)]


def test_workspace_is_exact_per_problem(real_library: Library) -> None:
    for config in real_library.configs():
        mode_group = 64 if config.mode.is_grouped else 4096
        sizes = [
            real_library.workspace_bytes(config, Problem(m, 4096, 4096, mode_group), sm_count=132)
            for m in (0, 1, 64, 256, 4096)
        ]
        assert sizes[0] == 0
        if config.scheduler.value == "persistent":
            assert set(sizes) == {0}
        else:
            assert sizes[1] > 0
            assert max(sizes) < 30e6, "TensorRT-LLM takes 82.5 MiB whatever the problem"


def test_a_missing_and_a_foreign_kernel_are_found(real_library: Library, tmp_path: Path) -> None:
    folder = tmp_path / "generated"
    shutil.copytree(generated(real_library.build), folder)
    gone, kept = (folder / source_name(config) for config in real_library.configs()[:2])
    gone.unlink()
    kept.write_text(kept.read_text() + "// __nv_fp8_e4m3\n")
    violations = static.prove(real_library, folder).violations
    (lacking,) = [violation for violation in violations if "lacks the sources of 1 of" in violation]
    assert lacking.endswith(f"the first is {real_library.configs()[0].name}")
    assert any(violation.startswith(f"{kept} differs from what") for violation in violations)
    assert any("names a foreign type: fp8" in violation for violation in violations)


def test_a_manifest_that_asks_for_more_is_found(real_library: Library) -> None:
    missing = "w4a16_sm90_cutlass_cs_cta128x16x64_cluster1x1x1_cooperative_streamk"
    before = real_library.build
    manifest = dataclasses.replace(before.manifest, asked=(*before.manifest.asked, missing))
    real_library.build = dataclasses.replace(before, manifest=manifest)
    try:
        violations = static.prove(real_library, generated(before)).violations
    finally:
        real_library.build = before
    assert any(violation.endswith(f"the first is {missing}") for violation in violations)
    assert f"{missing} is asked for but not exported" in violations


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (KernelCode(168, 0, Counter(UTMALDG=3)), "has no HGMMA"),
        (KernelCode(168, 0, Counter(HGMMA=12), 12), "has no UTMALDG"),
        (KernelCode(168, 0, Counter(HGMMA=12, UTMALDG=3, HMMA=1), 12), "has 1 HMMA"),
        (KernelCode(168, 0, Counter(HGMMA=12, UTMALDG=3, STL=2), 12), "spills: 2 STL and 0 LDL"),
        (KernelCode(168, 16, Counter(HGMMA=12, UTMALDG=3), 12), "uses 16 bytes of stack"),
    ],
)
def test_wrong_machine_code_is_a_violation(code: KernelCode, text: str) -> None:
    (violation,) = static.code_violations("kernel", code)
    assert violation.startswith(f"kernel {text}")


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (KernelCode(80, 0, Counter(UTMALDG=3, UBLKCP=2)), "has no HMMA"),
        (KernelCode(80, 0, Counter(HMMA=8, UTMALDG=3, UBLKCP=2, HGMMA=12), 12), "has 12 HGMMA"),
        (KernelCode(80, 0, Counter(HMMA=8, UTMALDG=3)), "has no UBLKCP"),
    ],
)
def test_wrong_machine_code_of_warps_that_multiply_each_by_itself_is_a_violation(code: KernelCode, text: str) -> None:
    (violation,) = static.code_violations(BY_WARPS, code)
    assert violation.startswith(f"{BY_WARPS} {text}")
    assert static.code_violations(BY_WARPS, KernelCode(80, 0, Counter(HMMA=8, UTMALDG=3, UBLKCP=2))) == []


def test_a_build_without_kernels_fails_the_static_proof(fake_library: Library) -> None:
    violations = static.prove(fake_library, generated(fake_library.build)).violations
    assert len([violation for violation in violations if "not in the machine code" in violation]) == 63


def test_kernels_are_found_in_the_machine_code_by_their_names(real_library: Library) -> None:
    code = read_code(real_library.build.library)
    assert {KernelConfig.parse(name) for name in code} == set(real_library.configs())


def test_a_native_kernel_takes_part_in_dependent_launches_and_captures_know_it(by_warps: Build) -> None:
    code = read_code(by_warps.library)[BY_WARPS]
    assert code.instructions["PREEXIT"] > 0, "it lets dependent launches start"
    assert code.instructions["ACQBULK"] > 0, "it waits for the kernel that it depends on"
    begin = re.search(r'kBegin\[\] = "(\w+)"', (CUDA_FOLDER / "library" / "capture.h").read_text())
    assert begin is not None
    assert f"{begin[1]}NS_{len(BY_WARPS)}{BY_WARPS}E".encode() in by_warps.library.read_bytes()


def test_a_second_build_compiles_and_links_nothing(real_build: Build) -> None:
    library = load_build(real_build.folder).library
    before = library.stat().st_mtime_ns
    report = build(real_build.configs, generated=generated(real_build), folder=real_build.folder)
    assert report.compiled == 0
    assert library.stat().st_mtime_ns == before


def test_modes_are_all_built(real_library: Library) -> None:
    assert [config.mode for config in real_library.configs()] == list(QuantMode)
