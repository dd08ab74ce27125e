"""The exported SDK: what pkg-config says is enough to build and start a program that uses runner.h."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from paths import EXAMPLES

from w4a16gen.build import toolchain
from w4a16gen.build.export import export_prefix
from w4a16gen.runtime.artifact import Build

MINIMAL = EXAMPLES / "cpp" / "minimal.cpp"


@pytest.fixture(scope="module")
def minimal(fake_build: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the program to copy with pkg-config's flags, against an exported prefix that has been moved."""
    pkg_config = shutil.which("pkg-config")
    if pkg_config is None:
        pytest.skip("pkg-config is not installed")
    folder = tmp_path_factory.mktemp("sdk")
    export_prefix(fake_build, folder / "first", "0.1.0")
    (folder / "first").rename(folder / "prefix")
    tools = toolchain.find_toolchain()
    ask = [pkg_config, f"--define-variable=cudadir={tools.cuda_include.parent}", "--cflags", "--libs", "w4a16"]
    environment = {"PKG_CONFIG_PATH": str(folder / "prefix" / "lib" / "pkgconfig")}
    flags = subprocess.run(ask, env=environment, capture_output=True, text=True, check=True).stdout.split()  # noqa: S603
    program = folder / "minimal"
    command = [str(tools.host_compiler), "-std=c++17", "-Wall", "-Wextra", str(MINIMAL), "-o", str(program), *flags]
    subprocess.run(command, check=True)  # noqa: S603
    return program


def test_a_library_without_native_kernels_is_refused_with_the_way_out(minimal: Path) -> None:
    done = subprocess.run([minimal], env={}, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 2
    assert "the library holds only cutlass kernels of mode fgs: this runner needs a native one" in done.stderr
    assert "`w4a16gen build` without --space" in done.stderr
