"""A stand-in for CMake: links what a build asks for with g++, and compiles each source once per session.

It takes the calls that `w4a16gen.build.link` makes. FAKE_CACHE is the folder of compiled sources. FAKE_CMAKE_FAIL, a
file, is removed and makes one call fail. With FAKE_CMAKE_ALWAYS_FAIL every call fails. FAKE_CMAKE_SLEEP delays. With
FAKE_CMAKE_TRUNCATE the library is cut to one part in that many; with FAKE_CMAKE_OTHER_KERNELS its table is empty.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

VERSION = "cmake version 3.31.0"
CPP = Path(__file__).resolve().parents[1] / "cpp"


def run(*command: object) -> None:
    done = subprocess.run([str(part) for part in command], check=False)  # noqa: S603
    if done.returncode:
        sys.exit(done.returncode)


def cached(key: str, suffix: str) -> Path:
    """Return the place of a compiled file that is made of these parts."""
    return Path(os.environ["FAKE_CACHE"]) / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}{suffix}"


def compile_once(output: Path, *command: object) -> Path:
    if not output.exists():
        fresh = output.with_name(f".{output.name}.{os.getpid()}")
        run(*command, "-o", fresh)
        fresh.replace(output)
    return output


def configure(arguments: list[str]) -> None:
    tree = Path(arguments[arguments.index("-B") + 1])
    tree.mkdir(parents=True)
    definitions = dict(argument[2:].split("=", 1) for argument in arguments if argument.startswith("-D"))
    definitions["source"] = arguments[arguments.index("-S") + 1]
    (tree / "definitions.json").write_text(json.dumps(definitions))


def build(arguments: list[str]) -> None:
    tree = Path(arguments[arguments.index("--build") + 1])
    definitions = json.loads((tree / "definitions.json").read_text())
    source = Path(definitions["source"])
    text = "".join(path.read_text() for path in sorted(source.rglob("*")) if path.is_file())
    flags = [
        "-std=c++17",
        "-fPIC",
        "-fvisibility=hidden",
        f"-I{source}",
        f"-isystem{definitions['W4A16_CUDA_INCLUDE']}",
    ]
    link = ["-shared", definitions["W4A16_CUDART"], "-ldl", "-lrt", "-lpthread", "-Wl,--exclude-libs,ALL"]
    compiler = definitions["CMAKE_CXX_COMPILER"]
    module = source / "python" / "module.cpp"
    objects = [
        compile_once(cached(f"{part.name}{text}", ".o"), compiler, *flags, "-c", part)
        for part in sorted((source / "library").glob("*.cpp"))
    ]
    registry = Path(definitions["W4A16_REGISTRY"])
    if "FAKE_CMAKE_OTHER_KERNELS" in os.environ:
        shutil.copyfile(CPP / "empty_registry.cpp", registry)
    objects.append(
        compile_once(cached(f"registry{text}{registry.read_text()}", ".o"), compiler, *flags, "-c", registry)
    )
    objects += map(Path, definitions["W4A16_KERNEL_OBJECTS"].split(";"))
    run(compiler, *objects, *link, "-Wl,--no-undefined", "-o", tree / "libw4a16_kernels.so")
    if parts := os.environ.get("FAKE_CMAKE_TRUNCATE"):
        made = tree / "libw4a16_kernels.so"
        made.write_bytes(made.read_bytes()[: made.stat().st_size // int(parts)])
    if "_w4a16" in arguments:
        includes = (sysconfig.get_path("include"), Path(definitions["pybind11_DIR"]).parents[2] / "include")
        flags += [f"-isystem{folder}" for folder in includes]
        made = cached(f"module{text}{sys.version}", ".so")
        compile_once(made, compiler, *flags, module, *link)
        shutil.copyfile(made, tree / f"_w4a16{sysconfig.get_config_var('EXT_SUFFIX')}")


def main(arguments: list[str]) -> None:
    """Behave as CMake does for the calls that a build makes."""
    if "--version" in arguments:
        print(VERSION)
        return
    time.sleep(float(os.environ.get("FAKE_CMAKE_SLEEP", "0")))
    failing = os.environ.get("FAKE_CMAKE_FAIL")
    if "FAKE_CMAKE_ALWAYS_FAIL" in os.environ or (failing and Path(failing).exists()):
        if failing:
            Path(failing).unlink()
        print("CMake Error: the stand-in was told to fail")
        sys.exit(1)
    if "-S" in arguments:
        configure(arguments)
    else:
        build(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
