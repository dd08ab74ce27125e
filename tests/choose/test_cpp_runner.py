"""Runner::chooseConfig finds the exported choice file, asks the GPU that is there, and says what is wrong."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes.devices import H100
from fakes.library import build_of
from paths import CPP, ROOT

from w4a16gen import KernelConfig, Problem, QuantMode
from w4a16gen.build import toolchain
from w4a16gen.choose.choice_file import CHOICE_FILE, choice_text
from w4a16gen.choose.chooser import Chooser
from w4a16gen.choose.overrides import KERNELS_VARIABLE
from w4a16gen.kernels.config import Target
from w4a16gen.kernels.device import Device
from w4a16gen.kernels.spaces import enumerate_space

pytestmark = [pytest.mark.compile, pytest.mark.xdist_group("C++ runner")]

CUDA = ROOT / "w4a16gen" / "cuda"
FGS = QuantMode.FINEGRAINED_SCALE_ONLY
KERNELS = [*enumerate_space("default"), *enumerate_space("trtllm")[:3]]
GROUPED = enumerate_space("experts")
PROBLEMS = [Problem(m, n, 4096, 128) for m in (0, 1, 16, 100, 4000) for n in (4096, 4104)]


class Prefix:
    """An exported prefix with a stub for a library, and a program that was linked to it."""

    def __init__(self, folder: Path) -> None:
        """Lay it out and compile."""
        nvcc = toolchain.find_nvcc()
        include = toolchain.find_cuda_include(nvcc) if nvcc else None
        assert include is not None, "the tests need the CUDA runtime headers: pip install 'w4a16gen[test]'"
        self.folder, self.program, self.names = folder, folder / "bin" / "choose", folder / "kernels.txt"
        for name in ("bin", "lib", "include/w4a16", "share/w4a16"):
            (folder / name).mkdir(parents=True)
        shutil.copy(CUDA / "w4a16.h", folder / "include")
        for header in (CUDA / "sdk").glob("*.h"):
            shutil.copy(header, folder / "include" / "w4a16")
        flags = ["g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-isystem{include}"]
        library = folder / "lib" / "libw4a16_kernels.so"
        self._run(*flags, f"-I{CUDA}", "-fPIC", "-shared", str(CPP / "stub_kernels.cpp"), "-o", str(library))
        source, link = str(CPP / "choose_with_runner.cpp"), f"-Wl,-rpath,{library.parent}"
        self._run(*flags, f"-I{folder / 'include'}", source, str(library), link, "-ldl", "-o", str(self.program))
        self.export(KERNELS)

    def export(self, kernels: list[KernelConfig]) -> None:
        """Lay out a build of these kernels."""
        self.names.write_text("".join(f"{config.name}\n" for config in kernels))
        hashes = build_of(kernels).content_hashes
        (self.folder / CHOICE_FILE).write_text(choice_text(hashes, self.folder / "tuning.json"))

    def choose(self, problem: Problem, **environment: str) -> str:
        """Return what the program prints."""
        sizes = [str(value) for value in vars(problem).values()]
        clean = {name: value for name, value in os.environ.items() if name != KERNELS_VARIABLE}
        return self._run(
            str(self.program), *sizes, env={**clean, "W4A16_STUB_KERNELS": str(self.names), **environment}
        ).strip()

    @staticmethod
    def _run(*command: str, env: dict[str, str] | None = None) -> str:
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env).stdout  # noqa: S603


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory: pytest.TempPathFactory) -> Prefix:
    return Prefix(tmp_path_factory.mktemp("prefix"))


@pytest.fixture
def prefix(laid_out: Prefix) -> Iterator[Prefix]:
    """Return the prefix, and lay out the whole build again after the test."""
    yield laid_out
    laid_out.export(KERNELS)


def in_python(problem: Problem, device: Device | None) -> str:
    chooser = Chooser(build_of(KERNELS).content_hashes, Path("nowhere"))
    return chooser.choose(problem, FGS, device=device, target=Target.NATIVE).kernel.name


def test_the_runner_chooses_what_python_chooses(prefix: Prefix) -> None:
    for problem in PROBLEMS:
        assert prefix.choose(problem) == in_python(problem, H100)
        assert prefix.choose(problem, NO_GPU="1") == in_python(problem, None)


def test_the_runner_honours_the_environment(prefix: Prefix) -> None:
    named = [config for config in KERNELS if config.mode is FGS and config.target is Target.NATIVE][-1]
    assert prefix.choose(PROBLEMS[2], W4A16GEN_KERNELS=named.name) == named.name
    refused = prefix.choose(PROBLEMS[2], W4A16GEN_KERNELS="fast")
    assert refused.startswith("error 1 'fast' is not a kernel name such as ")


def test_the_runner_leaves_grouped_kernels_out(prefix: Prefix) -> None:
    prefix.export([*KERNELS, *GROUPED])
    for problem in PROBLEMS:
        assert prefix.choose(problem) == in_python(problem, H100)
    named = next(config for config in GROUPED if config.mode is FGS)
    refused = prefix.choose(PROBLEMS[2], W4A16GEN_KERNELS=named.name)
    assert refused == f"error 1 {named.name} computes grouped products: name it in the call of grouped_gemm"
    prefix.export(GROUPED)
    assert prefix.choose(PROBLEMS[2]) == (
        "error 2 the library holds no kernel of mode fgs: this runner needs a native one, as `w4a16gen build` without "
        "--space builds; see w4a16_gemm for the others"
    )


def test_a_problem_that_no_kernel_can_run_is_refused(prefix: Prefix) -> None:
    for problem, sentence in {
        Problem(1, 4096, 4096, 48): "group size 48 must be 4096 (= k) or a multiple of 32 that divides k",
        Problem(1, 4096, 0, 128): "k of 0 must be a positive multiple of 8: pad the layer with zeros",
        Problem(1, 4096, 4096, 0): "group size 0 must be 4096 (= k) or a multiple of 32 that divides k",
        Problem(-1, 4096, 4096, 128): "m of -1 must be 0 or more",
    }.items():
        assert prefix.choose(problem) == f"error 2 {sentence}"


def test_a_choice_file_that_is_missing_or_of_another_library_is_refused(prefix: Prefix) -> None:
    chosen = prefix.choose(PROBLEMS[2])
    others = [config for config in KERNELS if config.name != chosen]
    prefix.names.write_text("".join(f"{config.name}\n" for config in others))
    assert re.match(f"error 1 .*{chosen}.* is no kernel of .*mode.* in the library", prefix.choose(PROBLEMS[2]))
    (prefix.folder / CHOICE_FILE).unlink()
    answer = prefix.choose(PROBLEMS[2])
    assert answer.startswith("error 1 ")
    assert answer.endswith("share/w4a16/choice.txt cannot be read: run `w4a16gen export --prefix` again")
