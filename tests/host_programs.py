"""Compiles the programs of tests/cpp, which run the kernels' own functions on the CPU."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path

from paths import CPP

from w4a16gen.build import toolchain
from w4a16gen.build.emit import emit
from w4a16gen.build.headers import CUDA_FOLDER
from w4a16gen.kernels.config import KernelConfig
from w4a16gen.kernels.render import render_unit, source_name


def compile_for_host(name: str, folder: Path, configs: Iterable[KernelConfig] = (), optimisation: str = "-O2") -> Path:
    """Compile a program with the host compiler, without CUDA.

    Args:
        name: of the source in tests/cpp.
        folder: where the program goes.
        configs: kernels whose rendered sources the program includes as `UNIT`; tests/cpp/on_host stands in for the
            header that would launch them.
        optimisation: an option of the compiler.
    """
    tools = toolchain.find_toolchain()
    program = folder / name
    command = [str(tools.host_compiler), "-std=c++17", optimisation, "-Wall", "-Wextra", "-Werror"]
    command += ["-Wno-unknown-pragmas", "-pthread"]  # the kernels ask nvcc to unroll loops
    if kernels := sorted(configs):
        emit(kernels, folder)
        (folder / "unit.cu").write_text(render_unit([source_name(config) for config in kernels]))
        command += [f'-DUNIT="{folder / "unit.cu"}"', f"-I{CPP / 'on_host'}"]
    command += [f"-I{CUDA_FOLDER}", f"-isystem{tools.cuda_include}", str(CPP / f"{name}.cpp"), "-o", str(program)]
    subprocess.run(command, check=True)  # noqa: S603
    return program


def output_of(program: Path, *arguments: str, given: str = "") -> list[str]:
    """Run a program; return the lines that it prints."""
    done = subprocess.run([program, *arguments], input=given, capture_output=True, check=True, text=True)  # noqa: S603
    return done.stdout.splitlines()
