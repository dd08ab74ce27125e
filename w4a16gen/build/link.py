"""From objects to a build: CMake, the linker, and the manifest."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pybind11

from w4a16gen.build.compile import CUDA_FOLDER, CompiledUnit, Failure
from w4a16gen.build.toolchain import Toolchain, cutlass_version, describe_compiler
from w4a16gen.errors import BuildError, NotBuiltError
from w4a16gen.files import file_digest, write_if_changed, write_json
from w4a16gen.kernels.config import KernelConfig
from w4a16gen.kernels.render import render_registry
from w4a16gen.runtime.artifact import LIBRARY, MANIFEST, MODULE, Build, BuiltKernel, Manifest, load_build

_LINK_SOURCES = ("CMakeLists.txt", "w4a16.h", "library/*", "python/*")


def _link(
    units: Sequence[CompiledUnit],
    asked: Sequence[KernelConfig],
    toolchain: Toolchain,
    folder: Path,
    failures: Sequence[Failure],
) -> Build:
    """Link the units and the module with CMake, unless the same link is there already; write the manifest last."""
    units = sorted(units, key=lambda unit: unit.path.name)
    linked = [config for config in asked if any(config.name in unit.hashes for unit in units)]
    registry = folder / "registry.cpp"
    write_if_changed(registry, render_registry(linked))
    digest = _link_digest(units, registry, toolchain)
    try:
        current = load_build(folder)
        done = current.manifest.link_digest == digest
    except NotBuiltError:
        done = False
    if not done:
        (folder / MANIFEST).unlink(missing_ok=True)  # from here on until the new manifest there is no build
        _run_cmake(units, registry, toolchain, folder)
    manifest = Manifest(
        compiler=describe_compiler(toolchain),
        cutlass=cutlass_version(toolchain.cutlass_include),
        link_digest=digest,
        library_sha256=file_digest(folder / "lib" / LIBRARY),
        asked=tuple(config.name for config in asked),
        failed=tuple(failure.name for failure in failures),
        kernels=tuple(_built_kernel(config, units) for config in linked),
    )
    write_json(folder / MANIFEST, manifest.as_json())
    return Build(folder, manifest)


def _built_kernel(config: KernelConfig, units: Sequence[CompiledUnit]) -> BuiltKernel:
    """Describe a linked kernel: its hash, and what compiling its unit cost in equal shares."""
    unit = next(unit for unit in units if config.name in unit.hashes)
    return BuiltKernel(
        config=config,
        content_hash=unit.hashes[config.name],
        unit_kernels=len(unit.hashes),
        compile_cpu_seconds=round(unit.cpu_seconds / len(unit.hashes), 1),
        compile_peak_bytes=unit.peak_bytes,
    )


def _link_digest(units: Sequence[CompiledUnit], registry: Path, toolchain: Toolchain) -> str:
    """Give the hash of all that the library and the module are made of."""
    parts = [unit.path.name for unit in units]
    sources = [path for pattern in _LINK_SOURCES for path in sorted(CUDA_FOLDER.glob(pattern))]
    parts += [file_digest(path) for path in (registry, *sources)]
    parts += [describe_compiler(toolchain), pybind11.__version__, MODULE]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _run_cmake(units: Sequence[CompiledUnit], registry: Path, toolchain: Toolchain, folder: Path) -> None:
    """Configure and build the two targets, then put copies into place.

    The CMake tree stays, so that other kernels are linked without compiling the module again.

    Raises:
        BuildError: if CMake or the linker fails; the text names the log.
    """
    key = f"{describe_compiler(toolchain)} {toolchain} {sys.executable} {pybind11.__version__}"
    tree = folder / f"cmake-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    definitions = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_CXX_COMPILER": toolchain.host_compiler,
        "CMAKE_MAKE_PROGRAM": toolchain.ninja,
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "W4A16_KERNEL_OBJECTS": ";".join(str(unit.path.resolve()) for unit in units),
        "W4A16_REGISTRY": registry.resolve(),
        "W4A16_CUDA_INCLUDE": toolchain.cuda_include,
        "W4A16_CUDART": toolchain.cudart,
    }
    cmake = str(toolchain.cmake)
    configure = [cmake, "-S", str(CUDA_FOLDER), "-B", str(tree), "-G", "Ninja"]
    configure += [f"-D{name}={value}" for name, value in definitions.items()]
    log = folder / "logs" / "link.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        for command in (configure, [cmake, "--build", str(tree)]):
            finished = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False)  # noqa: S603
            if finished.returncode != 0:
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-8:])
                raise BuildError(f"linking failed, log in {log}:\n{tail}")
    (folder / "lib").mkdir(exist_ok=True)
    for name in (LIBRARY, MODULE):
        copy = folder / "lib" / f".{name}.new"
        shutil.copyfile(tree / name, copy)
        copy.replace(folder / "lib" / name)  # a process that has the old file open keeps it
