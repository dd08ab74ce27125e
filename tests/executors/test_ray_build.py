"""Builds over a Ray cluster of several nodes on this machine, with the stand-in compiler and with the real one."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import install_fake_nvcc
from fakes.clusters import LocalCluster, local_cluster
from processes import heed_interrupts

from w4a16gen import KernelConfig
from w4a16gen.build import toolchain, versions
from w4a16gen.build.compile import compile_kernels
from w4a16gen.build.pipeline import BuildReport, build
from w4a16gen.build.scratch import make_folders
from w4a16gen.build.units import kernel_hashes, plan_units
from w4a16gen.build.workers import cluster_workers, local_workers
from w4a16gen.errors import ClusterError, InvalidValueError
from w4a16gen.executors import cluster as ray_cluster
from w4a16gen.executors import executor, pulse, recruits
from w4a16gen.executors.cluster import connect
from w4a16gen.kernels.spaces import enumerate_space
from w4a16gen.runtime.artifact import load_build

pytest.importorskip("ray")
pytestmark = [pytest.mark.compile, pytest.mark.xdist_group("ray")]

KERNELS = enumerate_space("trtllm-native")[:36]
FAILING = enumerate_space("trtllm-native")[-1]
"""A kernel that the nodes' compilers refuse."""
JOBS = 2
COMMAND = [sys.executable, "-m", "w4a16gen", "build", "--space", "trtllm-native", "--mode", "cs", "--mode", "fgs"]
SECONDS_OF_A_UNIT = "0.5"
DEADLINE_SECONDS = 180.0
"""How long anything that these tests wait for may take: Ray starts processes slowly beside compilers."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, fake_cache: Path) -> Iterator[LocalCluster]:
    """Return a cluster of two nodes with the stand-in compiler, which takes half a second for each unit."""
    folder = tmp_path_factory.mktemp("cluster")
    with pytest.MonkeyPatch.context() as monkeypatch:
        install_fake_nvcc(folder, fake_cache, monkeypatch)
        monkeypatch.setenv("FAKE_NVCC_LOG", str(folder / "calls"))
        monkeypatch.setenv("FAKE_NVCC_SLEEP", SECONDS_OF_A_UNIT)
        monkeypatch.setenv("FAKE_NVCC_FAIL", FAILING.name)
        # The subject is what becomes of nodes, not how long a busy machine takes to start their processes.
        monkeypatch.setattr(recruits, "OTHERS_SECONDS", DEADLINE_SECONDS)
        monkeypatch.setattr(recruits, "_SAID_SECONDS", math.inf)
        versions.program_version.cache_clear()
        with local_cluster() as started:
            started.add(JOBS)
            yield started
    versions.program_version.cache_clear()


@pytest.fixture
def calls(cluster: LocalCluster) -> Path:
    """Return the log of the stand-in compiler, which is empty at first."""
    del cluster
    log = Path(os.environ["FAKE_NVCC_LOG"])
    log.unlink(missing_ok=True)
    return log


def compiled(log: Path) -> Counter[str]:
    """Return how often each kernel was given to the compiler."""
    return Counter(log.read_text().split()) if log.exists() else Counter()


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the objects, the library and the module of a build."""
    found = load_build(folder)
    return {path.name: path.read_bytes() for path in [*folder.glob("objects/*.o"), found.library, found.module]}


def build_on(
    cluster: LocalCluster, root: Path, configs: list[KernelConfig] | None = None
) -> tuple[BuildReport, list[str]]:
    told: list[str] = []
    wanted = KERNELS if configs is None else configs
    with connect(cluster.address, None, told.append) as connection:
        workers = cluster_workers(connection, wanted)
        generated, folder = root / "generated", root / "build"
        return build(wanted, generated=generated, folder=folder, jobs=JOBS, workers=workers), told


@pytest.fixture(scope="module")
def local_files(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the files of a build by this machine's compilers."""
    del cluster
    root = tmp_path_factory.mktemp("local")
    build(KERNELS, jobs=JOBS, generated=root / "generated", folder=root / "build")
    return files_of(root / "build")


def wait_until(log: Path, kernels: int) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while sum(compiled(log).values()) < kernels:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_build_over_a_cluster_is_the_same_to_the_byte(
    cluster: LocalCluster, calls: Path, local_files: dict[str, bytes], tmp_path: Path
) -> None:
    report, told = build_on(cluster, tmp_path / "cluster")
    assert told == []
    assert report.compiled == len(KERNELS)
    assert compiled(calls) == Counter(config.name for config in KERNELS)
    assert len(report.nodes) == JOBS, "every node takes part"
    assert sum(node.tasks for node in report.nodes) == len(plan_units(KERNELS, JOBS, float("inf")))
    assert files_of(tmp_path / "cluster" / "build") == local_files


def test_a_cluster_of_other_compilers_only_is_an_error(
    cluster: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_NVCC_RELEASE", "13.4")
    versions.program_version.cache_clear()
    with pytest.raises(ClusterError, match="no node of the cluster can compile"):
        build_on(cluster, tmp_path)
    versions.program_version.cache_clear()
    assert not list((tmp_path / "build").glob("manifest.json"))


def test_a_kernel_that_fails_is_named_as_it_is_here(cluster: LocalCluster, tmp_path: Path) -> None:
    report, _ = build_on(cluster, tmp_path, [*KERNELS[:2], FAILING])
    assert [failure.name for failure in report.failures] == [FAILING.name]
    assert "this kernel cannot be compiled" in report.failures[0].log.read_text()
    assert report.compiled == 2


def test_a_runtime_env_that_ray_refuses_is_a_wrong_value(cluster: LocalCluster) -> None:
    with pytest.raises(InvalidValueError, match=r"Ray refuses this runtime_env \(TypeError: runtime_env\['pip'\] must"):
        connect(cluster.address, {"pip": 5}, print).__enter__()


def test_two_drivers_build_at_once(cluster: LocalCluster, tmp_path: Path) -> None:
    processes = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        command = [*COMMAND, "--ray", cluster.address, "-j", str(JOBS), "--json"]
        processes.append(
            subprocess.Popen(command, cwd=tmp_path / name, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # noqa: S603
        )
    for process in processes:
        printed, errors = process.communicate(timeout=DEADLINE_SECONDS)
        assert process.returncode == 0, errors
        result = json.loads(printed)
        assert result["compiled"] == len(result["kernels"]) == 42
        assert sum(node["tasks"] for node in result["nodes"]) > 0
    assert files_of(tmp_path / "one" / "build") == files_of(tmp_path / "two" / "build")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["killed", "ctrl-c"])
def test_a_driver_that_ends_and_starts_again_goes_on(
    cluster: LocalCluster, calls: Path, tmp_path: Path, how: signal.Signals
) -> None:
    command = [*COMMAND, "--ray", cluster.address]
    objects = tmp_path / "build" / "objects"
    with subprocess.Popen(  # noqa: S603
        [*command, "-j", "1"],  # two compilers would end both units at once, before the signal
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,  # noqa: PLW1509
    ) as process:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not list(objects.glob("*.json")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(how)
        _, errors = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == (-how if how is signal.SIGKILL else 130), errors
    came_back = {name for path in objects.glob("*.json") for name in json.loads(path.read_text())["hashes"]}
    assert 0 < len(came_back) < 42
    time.sleep(float(SECONDS_OF_A_UNIT) + 0.5)  # what the first driver began ends
    calls.unlink()
    again_command = [*command, "-j", str(JOBS), "--json"]
    done = subprocess.run(again_command, cwd=tmp_path, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["compiled"] == 42 - len(came_back)
    again = compiled(calls)
    assert not again.keys() & came_back
    assert len(again) == 42 - len(came_back)


def test_a_node_that_dies_costs_its_own_unit_only(
    cluster: LocalCluster, calls: Path, local_files: dict[str, bytes], tmp_path: Path
) -> None:
    doomed = cluster.nodes[0]

    def kill() -> None:
        wait_until(calls, len(KERNELS) // 2)
        cluster.kill(doomed)

    killer = threading.Thread(target=kill)
    killer.start()
    report, told = build_on(cluster, tmp_path / "cluster")
    killer.join()
    cluster.add()
    assert report.compiled == len(KERNELS)
    assert len(told) == sum(node.lost for node in report.nodes) == 1
    assert "gets no more work" in told[0] or "goes on elsewhere" in told[0]
    twice = [name for name, times in compiled(calls).items() if times > 1]
    assert len(twice) <= max(len(part) for part in plan_units(KERNELS, JOBS, float("inf"))), "one unit at most"
    assert max(compiled(calls).values()) <= 2
    assert files_of(tmp_path / "cluster" / "build") == local_files


@pytest.mark.parametrize("what", ["node", "worker"])
def test_a_frozen_node_or_worker_holds_nothing_up(
    cluster: LocalCluster,
    calls: Path,
    local_files: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    monkeypatch.setattr(ray_cluster, "_ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(pulse, "QUIET_SECONDS", 2.0 if what == "node" else 600.0)
    monkeypatch.setattr(pulse, "ANSWER_SECONDS", 15.0)  # the other node may have to start a process for its answer
    monkeypatch.setattr(executor, "LATE_SECONDS", 600.0 if what == "node" else 2.0)
    frozen = cluster.nodes[0]

    def freeze() -> None:
        wait_until(calls, len(KERNELS) // 2)
        (cluster.freeze if what == "node" else cluster.freeze_worker)(frozen)

    freezer = threading.Thread(target=freeze)
    freezer.start()
    report, told = build_on(cluster, tmp_path / "cluster")
    freezer.join()
    cluster.kill(frozen)
    cluster.add()
    assert report.compiled == len(KERNELS)
    assert "it does not answer" in told[0] if what == "node" else "takes long for a task" in told[0]
    assert sum(node.lost for node in report.nodes) == (what == "node")
    assert files_of(tmp_path / "cluster" / "build") == local_files


def test_a_node_with_another_compiler_is_refused_and_named(cluster: LocalCluster, calls: Path, tmp_path: Path) -> None:
    other = cluster.add(FAKE_NVCC_RELEASE="13.9")
    try:
        report, told = build_on(cluster, tmp_path, KERNELS[:4])
    finally:
        cluster.kill(other)
    assert report.compiled == 4
    assert len(told) == 1
    assert "gets no work: nvcc is" in told[0]
    assert "13.9" in told[0]
    assert "13.0" in told[0]
    assert sum(compiled(calls).values()) == 4


def test_real_objects_are_the_same_to_the_byte(
    cluster: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("W4A16GEN_NVCC")
    versions.program_version.cache_clear()
    tools = toolchain.find_toolchain()
    kernels = KERNELS[:1]
    hashes = kernel_hashes(kernels, tools)
    real = cluster.add(W4A16GEN_NVCC=str(tools.nvcc))
    told: list[str] = []
    try:
        with connect(cluster.address, None, told.append) as connection:
            make_folders(tmp_path / "cluster")
            compilers = cluster_workers(connection, kernels)(tools, tmp_path, None)
            there = compile_kernels(kernels, hashes, compilers, tmp_path / "cluster").units
    finally:
        cluster.kill(real)
        versions.program_version.cache_clear()
    assert len(told) == JOBS, "the nodes with the stand-in are refused"
    make_folders(tmp_path / "local")
    (tmp_path / "scratch").mkdir()
    here = compile_kernels(kernels, hashes, local_workers(tools, tmp_path / "scratch", 1), tmp_path / "local").units
    assert [unit.path.read_bytes() for unit in there] == [unit.path.read_bytes() for unit in here]


def test_an_address_without_a_cluster_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.monotonic()
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1"):
        with pytest.raises(ClusterError, match=r"no Ray cluster answers at .* check the address"):
            connect(address, None, print).__enter__()
    for address in ("nonsense", "http://[", "127.0.0.1:port"):
        with pytest.raises(ClusterError, match="is no address of a Ray cluster"):
            connect(address, None, print).__enter__()
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ClusterError, match="no Ray cluster answers"):
        connect(ray_cluster.AUTO, None, print).__enter__()
    assert time.monotonic() - began < 5 * 60
