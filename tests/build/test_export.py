"""A build for other programs: C++ that finds it with CMake, and a wheel for machines without a compiler."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import build_again
from packaging.metadata import Metadata
from paths import EXAMPLES

from w4a16gen import Library
from w4a16gen.build import toolchain
from w4a16gen.build.export import export_prefix, export_wheel, licenses
from w4a16gen.cli import main
from w4a16gen.errors import InvalidValueError, NoHopperGpuError, UnsupportedProblemError
from w4a16gen.kernels.config import CtaShape
from w4a16gen.kernels.spaces import Filter, select
from w4a16gen.measure.probes import probe_multiply
from w4a16gen.runtime.artifact import Build, load_build
from w4a16gen.runtime.folders import CACHE_VARIABLE

EXAMPLE = EXAMPLES / "cpp"


@pytest.fixture(scope="session")
def native_build(real_build: Build, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Return a real build of three native kernels, one per mode."""
    configs = select("default", Filter([CtaShape.parse("128x128x64")]))
    one = [next(config for config in configs if config.mode is mode) for mode in {config.mode for config in configs}]
    return build_again(real_build, one, tmp_path_factory.mktemp("native")).build


@pytest.fixture(scope="session")
def example(native_build: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the example program against an exported prefix that has been moved, with CMake; give its path."""
    folder = tmp_path_factory.mktemp("example")
    export_prefix(native_build, folder / "first", "0.1.0")
    (folder / "first").rename(folder / "prefix")
    tools = toolchain.find_toolchain()
    definitions = {
        "CMAKE_PREFIX_PATH": folder / "prefix",
        "CMAKE_MAKE_PROGRAM": tools.ninja,
        "CMAKE_CXX_COMPILER": tools.host_compiler,
        "CMAKE_CXX_FLAGS": "-Wall -Wextra -Werror",
        "CMAKE_BUILD_TYPE": "Release",
        "w4a16_CUDA_INCLUDE": tools.cuda_include,
        "w4a16_CUDART": tools.cudart,
    }
    configure = [str(tools.cmake), "-S", str(EXAMPLE), "-B", str(folder / "out"), "-G", "Ninja"]
    configure += [f"-D{name}={value}" for name, value in definitions.items()]
    for command in (configure, [str(tools.cmake), "--build", str(folder / "out")]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "out" / "minimal_test"


@pytest.mark.compile
def test_a_cpp_program_finds_the_kernels_and_is_refused_what_is_wrong(example: Path) -> None:
    done = subprocess.run([example, "64", "256", "256"], capture_output=True, text=True, check=False)  # noqa: S603
    if Path("/dev/nvidiactl").exists():
        assert done.returncode == 0, done.stdout
        assert "all results are right" in done.stdout
    else:
        assert done.returncode == 3, done.stdout
        assert "No CUDA GPU: argument checks passed, no GEMM was run" in done.stdout


@pytest.mark.compile
def test_probes_come_with_native_kernels_and_need_a_gpu(native_build: Build, real_library: Library) -> None:
    library = Library(native_build)
    with pytest.raises(InvalidValueError, match="rounds of 0 must be positive"):
        probe_multiply(library, 0, stream=0)
    with pytest.raises(UnsupportedProblemError, match="only native kernels come with probes"):
        probe_multiply(real_library, 1, stream=0)
    if not library.hopper_devices():
        with pytest.raises(NoHopperGpuError, match="need an NVIDIA Hopper GPU"):
            probe_multiply(library, 1, stream=0)


@pytest.mark.compile
def test_a_wheel_is_found_where_there_is_no_build_and_needs_no_compiler(native_build: Build, tmp_path: Path) -> None:
    wheel = export_wheel(native_build, tmp_path / "dist", "0.1.0")
    assert export_wheel(native_build, tmp_path / "again", "0.1.0").read_bytes() == wheel.read_bytes()
    site = tmp_path / "site"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
        str(wheel),
    ]
    subprocess.run([*install, str(wheel)], check=True)  # noqa: S603
    with zipfile.ZipFile(wheel) as archive:
        assert archive.testzip() is None
        recorded = archive.read("w4a16gen_kernels-0.1.0.dist-info/RECORD").decode().splitlines()
        assert {line.partition(",")[0] for line in recorded} == set(archive.namelist())
    environment = {name: value for name, value in os.environ.items() if not name.startswith("W4A16GEN")}
    program = "import w4a16gen; print(*w4a16gen.configs(), sep='\\n')"
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**environment, "PATH": "/nowhere", "PYTHONPATH": str(site), CACHE_VARIABLE: str(tmp_path / "none")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [config.name for config in native_build.configs]


def test_exporting_from_the_command_line(cli: CliRunner, fake_build: Build) -> None:
    command = ["export", "--build-dir", str(fake_build.folder)]
    nothing = cli.invoke(main, command)
    assert nothing.exit_code == 2
    assert "Specify --prefix, --wheel, or both" in nothing.stderr
    done = cli.invoke(main, [*command, "--prefix", "prefix", "--wheel", "--json"])
    assert done.exit_code == 0, done.output
    written = [Path(path) for path in json.loads(done.stdout)["written"]]
    assert all(path.is_file() for path in written)
    assert written[-1].parent == Path("dist")
    assert {str(path.relative_to("prefix")) for path in written[:-1]} == {
        "lib/libw4a16_kernels.so",
        "include/w4a16.h",
        "include/w4a16/choice_file.h",
        "include/w4a16/chooser.h",
        "include/w4a16/cost_model.h",
        "include/w4a16/default_chooser.h",
        "include/w4a16/plain_weights.h",
        "include/w4a16/runner.h",
        "lib/cmake/w4a16/w4a16-config.cmake",
        "lib/cmake/w4a16/w4a16-config-version.cmake",
        "lib/pkgconfig/w4a16.pc",
        "share/w4a16/choice.txt",
        "share/w4a16/manifest.json",
        "share/licenses/w4a16/LICENSE",
        "share/licenses/w4a16/NVIDIA-CUDA-EULA.txt",
        "share/licenses/w4a16/CUTLASS.txt",
    }
    assert [path.name for path in written[:-1] if os.access(path, os.X_OK)] == ["libw4a16_kernels.so"]
    unbuilt = cli.invoke(main, ["export", "--prefix", "prefix"])
    assert unbuilt.exit_code == 3


def test_a_prefix_that_cannot_be_written_gets_no_file(fake_build: Build, tmp_path: Path) -> None:
    (tmp_path / "share").write_text("of another program")
    with pytest.raises(OSError, match="share"):
        export_prefix(fake_build, tmp_path, "0.1.0")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["share"]


def test_a_wheel_carries_licences_and_true_hashes(fake_build: Build, tmp_path: Path) -> None:
    wheel = export_wheel(fake_build, tmp_path, "0.1.0")
    with zipfile.ZipFile(wheel) as archive:
        info = "w4a16gen_kernels-0.1.0.dist-info"
        metadata = Metadata.from_email(archive.read(f"{info}/METADATA"), validate=True)
        assert metadata.license_expression == "Apache-2.0 AND LicenseRef-NVIDIA-CUDA-EULA AND BSD-3-Clause"
        assert metadata.license_files == ["LICENSE", "NVIDIA-CUDA-EULA.txt", "CUTLASS.txt", "pybind11.txt"]
        assert metadata.description_content_type == "text/markdown"
        assert metadata.description
        for name in metadata.license_files:
            assert len(archive.read(f"{info}/licenses/{name}")) > 1000
        for line in archive.read(f"{info}/RECORD").decode().splitlines():
            name, digest, size = line.split(",")
            if name != f"{info}/RECORD":
                data = archive.read(name)
                hashed = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
                assert (digest, size) == (f"sha256={hashed}", str(len(data)))


def test_an_exported_build_can_be_loaded_and_names_no_folder_of_its_maker(fake_build: Build, tmp_path: Path) -> None:
    with zipfile.ZipFile(export_wheel(fake_build, tmp_path, "0.1.0")) as archive:
        archive.extractall(tmp_path / "site")
    exported = load_build(tmp_path / "site" / "w4a16gen_kernels" / "build")
    assert exported.configs == fake_build.configs
    assert exported.sources is None


def test_cutlass_is_licensed_only_where_it_is_used(fake_build: Build) -> None:
    without = dataclasses.replace(fake_build, manifest=dataclasses.replace(fake_build.manifest, cutlass=""))
    assert set(licenses(fake_build, with_module=False)) - set(licenses(without, with_module=False)) == {"CUTLASS.txt"}
