"""What the tests share: a quick build with a stand-in compiler, a real one of one kernel per mode, and the GPU gate."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # small products: more threads only wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")  # those of torch too
os.environ["W4A16GEN_CACHE_DIR"] = "/nonexistent"  # a build of the user must not be found

import hypothesis
import numpy as np
import pytest
from fakes.runner import Runner
from fakes.workshop import Workshop

import w4a16gen
from w4a16gen import QuantMode
from w4a16gen.build import toolchain, versions
from w4a16gen.build.pipeline import BuildReport, build
from w4a16gen.choose.overrides import kernels_of_environment
from w4a16gen.kernels.config import ClusterShape, CtaShape, Epilogue, KernelConfig
from w4a16gen.kernels.spaces import Filter, enumerate_space, select, with_epilogues
from w4a16gen.runtime.artifact import Build
from w4a16gen.runtime.folders import BUILD_FOLDER_VARIABLE
from w4a16gen.runtime.library import Library

hypothesis.settings.register_profile("w4a16gen", deadline=None)  # no test judges time
hypothesis.settings.load_profile("w4a16gen")
GENERATED = "generated"
BUILD = "build"


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep tests that share a real build, or a GPU, in one of xdist's workers."""
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.xdist_group("gpu"))
        elif {"real_build", "real_library"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.xdist_group("real build"))


def one_per_mode() -> list[KernelConfig]:
    """Return the kernels of the real build: one per mode, of both schedules and schedulers, one with a cluster."""
    shapes = {
        QuantMode.PER_COLUMN_SCALE_ONLY: ("64x16x64", "1x1x1"),
        QuantMode.FINEGRAINED_SCALE_ONLY: ("128x128x64", "2x1x1"),
        QuantMode.FINEGRAINED_SCALE_AND_ZEROS: ("128x64x64", "1x1x1"),
    }
    return [
        config
        for mode, (cta, cluster) in shapes.items()
        for config in select("trtllm", Filter([CtaShape.parse(cta)], [ClusterShape.parse(cluster)], [mode]))
    ]


@pytest.fixture(autouse=True)
def fresh_environment() -> Iterator[None]:
    """Let a test set the variable that names kernels, which a process reads once."""
    kernels_of_environment.cache_clear()
    yield
    kernels_of_environment.cache_clear()


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Runner:
    """Return a runner in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(BUILD_FOLDER_VARIABLE, raising=False)
    return Runner()


@pytest.fixture
def rng() -> np.random.Generator:
    """Return a fixed source of random numbers."""
    return np.random.default_rng(20261123)


def install_fake_nvcc(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make builds use the stand-ins for nvcc and CMake, which keep what they compile in `cache`."""
    nvcc = toolchain.find_nvcc()
    include = toolchain.find_cuda_include(nvcc) if nvcc else None
    assert include is not None, "the tests need the CUDA runtime headers: pip install 'w4a16gen[test]'"
    for program, variable in (("nvcc", "W4A16GEN_NVCC"), ("cmake", "W4A16GEN_CMAKE")):
        fake = Path(__file__).parent / "fakes" / f"{program}.py"
        script = folder / program
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{fake}" "$@"\n')
        script.chmod(0o755)
        monkeypatch.setenv(variable, str(script))
    monkeypatch.setenv("FAKE_CACHE", str(cache))
    monkeypatch.setenv("FAKE_NVCC_INCLUDE", str(include))
    monkeypatch.setenv("PYTHONPATH", str(Path(w4a16gen.__file__).resolve().parents[1]))
    versions.program_version.cache_clear()


@pytest.fixture(scope="session")
def fake_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of what the stand-in compilers have compiled in this session, for all of xdist's workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture
def fake_nvcc(tmp_path: Path, fake_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use the stand-in compiler in one test."""
    install_fake_nvcc(tmp_path, fake_cache, monkeypatch)
    yield
    versions.program_version.cache_clear()


@pytest.fixture
def workshop(tmp_path: Path, fake_nvcc: None, monkeypatch: pytest.MonkeyPatch) -> Workshop:
    """Return an empty folder for builds; the stand-in compiler writes a line for every call."""
    del fake_nvcc
    made = Workshop(tmp_path / "workshop")
    made.root.mkdir()
    monkeypatch.setenv("FAKE_NVCC_LOG", str(made.calls))
    monkeypatch.delenv(BUILD_FOLDER_VARIABLE, raising=False)
    return made


@pytest.fixture(scope="session")
def fake_build(tmp_path_factory: pytest.TempPathFactory, fake_cache: Path) -> Build:
    """Return a build of the 63 shapes whose kernels can be described but not launched."""
    folder = tmp_path_factory.mktemp("fake")
    with pytest.MonkeyPatch.context() as monkeypatch:
        install_fake_nvcc(folder, fake_cache, monkeypatch)
        result = build(select("trtllm", Filter()), generated=folder / GENERATED, folder=folder / BUILD).build
    versions.program_version.cache_clear()
    return result


@pytest.fixture(scope="session")
def fake_library(fake_build: Build) -> Library:
    """Load the described-only build."""
    return Library(fake_build)


@pytest.fixture(scope="session")
def real_build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Return a real build of one kernel per mode: by one compiler, which reads CUTLASS's headers once for all three."""
    folder = tmp_path_factory.mktemp("real")
    return build(one_per_mode(), generated=folder / GENERATED, folder=folder / BUILD, jobs=1).build


def build_again(start: Build, configs: Iterable[KernelConfig], folder: Path, *, jobs: int | None = None) -> BuildReport:
    """Build other kernels in a copy of a build, which has the compiled module already."""
    shutil.copytree(start.folder, folder / BUILD, symlinks=True)
    return build(configs, generated=folder / GENERATED, folder=folder / BUILD, jobs=jobs)


@pytest.fixture(scope="session")
def real_library(real_build: Build) -> Library:
    """Load the real build."""
    return Library(real_build)


@pytest.fixture(scope="session")
def gpu_library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """Return a build of the spaces trtllm, trtllm-native, default and experts, of the last two with every epilogue.

    It skips without a Hopper GPU.

    W4A16GEN_BUILD_DIR names a build that is there already.
    """
    if not Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has no NVIDIA GPU")
    given = os.environ.get(BUILD_FOLDER_VARIABLE)
    if given:
        found = w4a16gen.load(given)
    else:
        folder = tmp_path_factory.mktemp("gpu")
        every = {kernel for space in ("trtllm", "trtllm-native") for kernel in enumerate_space(space)}
        every |= set(with_epilogues(enumerate_space("default"), list(Epilogue)))
        every |= set(with_epilogues(enumerate_space("experts"), [Epilogue.NONE, Epilogue.GATED]))
        found = Library(build(sorted(every), generated=folder / GENERATED, folder=folder / BUILD).build)
    if not found.hopper_devices():
        pytest.skip("this machine has no Hopper GPU")
    return found
