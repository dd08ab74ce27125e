"""Cores and memory that a build may use: affinity and control groups of both versions."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psutil
import pytest

from w4a16gen.build.limits import usable_cores, usable_memory

GB = 1 << 30


def group_files(folder: Path, **values: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


def process_in(tmp_path: Path, groups: str, mounts: list[str]) -> Path:
    """Return a folder like /proc/self of a process in these control groups."""
    process = tmp_path / "self"
    process.mkdir()
    (process / "cgroup").write_text(groups)
    lines = [f"{30 + number} 1 0:{number} {mount}" for number, mount in enumerate(mounts)]
    (process / "mountinfo").write_text("22 1 8:1 / / rw - ext4 /dev/sda rw\n" + "\n".join(lines) + "\n")
    return process


def version_2(tmp_path: Path) -> tuple[Path, Path]:
    mount = tmp_path / "cgroup 2"
    escaped = str(mount).replace(" ", "\\040")
    return process_in(tmp_path, "0::/job/step\n", [f"/ {escaped} rw shared:4 - cgroup2 cgroup2 rw"]), mount


def version_1(tmp_path: Path, root: str = "/") -> tuple[Path, Path]:
    mount = tmp_path / "memory"
    groups = "3:cpu,cpuacct:/job\n5:memory:/job/step\n0::/\n"
    mounts = [
        f"{root} {mount} rw - cgroup cgroup rw,memory",
        f"/ {tmp_path / 'cpu'} rw - cgroup cgroup rw,cpu,cpuacct",
    ]
    return process_in(tmp_path, groups, mounts), mount


def test_without_control_groups_the_machine_counts(tmp_path: Path) -> None:
    assert usable_cores(tmp_path) == len(os.sched_getaffinity(0))
    assert 0 < usable_memory(tmp_path) <= psutil.virtual_memory().total


@pytest.mark.skipif(sys.platform != "linux", reason="affinity is Linux's")
def test_affinity_counts(tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert usable_cores(tmp_path) == 1
    finally:
        os.sched_setaffinity(0, before)


def test_memory_of_version_2_is_the_least_that_any_group_above_leaves(tmp_path: Path) -> None:
    process, mount = version_2(tmp_path)
    group_files(mount / "job" / "step", memory__max="max", memory__current=GB)
    assert usable_memory(process) > GB
    group_files(mount / "job", memory__max=2 * GB, memory__current=GB, memory__stat=f"anon 5\ninactive_file {GB // 2}")
    assert usable_memory(process) == 2 * GB - GB + GB // 2, "cached files can be dropped"
    group_files(mount / "job" / "step", memory__max=GB // 4, memory__current=0)
    assert usable_memory(process) == GB // 4
    group_files(mount / "job" / "step", memory__max=GB // 4, memory__current=GB)
    assert usable_memory(process) == 0


@pytest.mark.parametrize("root", ["/", "/job", "/job/step"])
def test_memory_of_version_1_also_inside_a_container(tmp_path: Path, root: str) -> None:
    process, mount = version_1(tmp_path, root)
    folder = mount / "/job/step".removeprefix(root).strip("/")
    group_files(folder, memory__limit_in_bytes=(1 << 63) - 4096, memory__usage_in_bytes=GB)
    assert usable_memory(process) > GB, "a number near 2**63 is no limit"
    stat = f"inactive_file 0\ntotal_inactive_file {GB // 8}"
    group_files(folder, memory__limit_in_bytes=GB, memory__usage_in_bytes=GB // 2, memory__stat=stat)
    assert usable_memory(process) == GB - GB // 2 + GB // 8


def test_quotas_of_version_2_round_up_to_whole_cores(tmp_path: Path) -> None:
    process, mount = version_2(tmp_path)
    cores = len(os.sched_getaffinity(0))
    group_files(mount / "job", cpu__max="max 100000")
    assert usable_cores(process) == cores
    group_files(mount / "job", cpu__max="50000 100000")
    assert usable_cores(process) == 1
    group_files(mount / "job", cpu__max="150000 100000")
    assert usable_cores(process) == min(2, cores)


def test_quotas_of_version_1(tmp_path: Path) -> None:
    process, _ = version_1(tmp_path)
    group_files(tmp_path / "cpu" / "job", cpu__cfs_quota_us=-1, cpu__cfs_period_us=100000)
    assert usable_cores(process) == len(os.sched_getaffinity(0))
    group_files(tmp_path / "cpu" / "job", cpu__cfs_quota_us=20000, cpu__cfs_period_us=100000)
    assert usable_cores(process) == 1


def test_unreadable_files_limit_nothing(tmp_path: Path) -> None:
    process, mount = version_2(tmp_path)
    group_files(mount / "job", memory__max="?", memory__current="", cpu__max="", memory__stat="x")
    assert usable_cores(process) == len(os.sched_getaffinity(0))
    assert usable_memory(process) > GB // 2
