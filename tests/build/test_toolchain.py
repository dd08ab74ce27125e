"""Tools: what is found, which compiler is chosen, what compilers inherit, and what is told when they do not fit."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from fakes.workshop import CONFIGS, Workshop

from w4a16gen.build import causes, install, toolchain, versions
from w4a16gen.build.compile import describe_failures
from w4a16gen.build.diagnose import Finding, diagnose, driver_finding
from w4a16gen.build.environment import IGNORED_VARIABLES, child_environment
from w4a16gen.build.headers import CUDA_FOLDER, headers_of
from w4a16gen.build.objects import Failure
from w4a16gen.build.toolchain import (
    compiler_identity,
    find_cmake,
    find_compilers,
    find_cutlass,
    find_host_compiler,
    find_ninja,
    find_nvcc,
    find_toolchain,
)
from w4a16gen.build.units import kernel_hashes
from w4a16gen.build.versions import newest_supported_gcc
from w4a16gen.errors import BuildError, MissingToolError
from w4a16gen.kernels.render import render_kernel
from w4a16gen.kernels.spaces import enumerate_space

GLIBC = (
    "/usr/include/x86_64-linux-gnu/bits/mathcalls.h(206): error: exception specification is incompatible with that of "
    'previous function "rsqrt"'
)
GCC = (
    "host_config.h:137:2: error: #error -- unsupported GNU version! gcc versions later than 15 are not supported! The "
    "nvcc flag '-allow-unsupported-compiler' can be used to override this version check; however, using an unsupported "
    "host compiler may cause compilation failure or incorrect run time execution. Use at your own risk."
)


def program(path: Path, says: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    versions.program_version.cache_clear()
    return path


def finding(subject: str) -> Finding:
    return next(found for found in diagnose() if found.subject == subject)


@pytest.fixture
def cuda_include(tmp_path: Path) -> Path:
    """Return headers of an nvcc that supports g++ 15 at most."""
    folder = tmp_path / "include"
    (folder / "crt").mkdir(parents=True)
    (folder / "crt" / "host_config.h").write_text("#if __GNUC__ > 15\n#error unsupported GNU version\n#endif\n")
    return folder


def test_the_newest_compiler_that_nvcc_supports_is_chosen(
    tmp_path: Path, cuda_include: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    bin_folder = tmp_path / "bin"
    newest = program(bin_folder / "g++", "g++ (Debian 16.1.0-2) 16.1.0")
    monkeypatch.setenv(
        "PATH", f"{bin_folder}:/bin:/usr/bin" if not Path("/usr/bin/g++-14").exists() else str(bin_folder)
    )
    assert newest_supported_gcc(cuda_include) == 15
    assert find_host_compiler() == newest
    monkeypatch.setenv("PATH", str(bin_folder))
    monkeypatch.setattr(toolchain, "gcc_major", lambda path: 16 if path == newest else 14)
    assert find_host_compiler(cuda_include) == newest, "there is no other"
    older = program(bin_folder / "g++-14", "g++-14 (Debian 14.3.0-2) 14.3.0")
    assert find_host_compiler(cuda_include) == older


@pytest.mark.parametrize(
    ("says", "major"),
    [
        ("g++ (Debian 12.2.0-14+deb12u1) 12.2.0", 12),
        ("g++-15 (Ubuntu 15.2.0-1ubuntu1) 15.2.0", 15),
        ("x86_64-conda-linux-gnu-c++ (conda-forge gcc 14.3.0-5) 14.3.0", 14),
        ("g++ (GCC) 16.0.1 20260310 (Red Hat 16.0.1-0)", 16),
        ("clang version 19.1.0", None),
    ],
)
def test_the_version_of_a_compiler_is_read(tmp_path: Path, says: str, major: int | None) -> None:
    assert versions.gcc_major(program(tmp_path / "compiler", says)) == major


@pytest.mark.parametrize(("value", "words"), [("ccache g++", "without arguments"), ("/nowhere/g++", "not a program")])
def test_a_wrong_cxx_is_named(value: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", value)
    with pytest.raises(MissingToolError, match=words) as error:
        find_host_compiler()
    assert value in str(error.value)
    assert finding("host compiler").fix == "unset CXX"


@pytest.mark.parametrize("variable", ["W4A16GEN_NVCC", "W4A16GEN_CMAKE"])
def test_a_variable_that_names_no_program_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    path = tmp_path / "program"
    path.write_text("")
    monkeypatch.setenv(variable, str(path))
    with pytest.raises(MissingToolError, match=f"{variable}=.* is not an executable file"):
        find_nvcc() if variable == "W4A16GEN_NVCC" else find_cmake()
    assert finding("nvcc" if variable == "W4A16GEN_NVCC" else "cmake").fix == f"unset {variable}"
    if variable == "W4A16GEN_NVCC":
        assert finding("CUDA runtime headers").fix == "unset W4A16GEN_NVCC", "they lie beside nvcc"


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("W4A16GEN_NVCC", "W4A16GEN_CMAKE", "W4A16GEN_CUTLASS"):
        monkeypatch.delenv(variable, raising=False)
    found = find_nvcc(), find_cmake(), find_cutlass()
    for variable in ("W4A16GEN_NVCC", "W4A16GEN_CMAKE", "W4A16GEN_CUTLASS"):
        monkeypatch.setenv(variable, "")
    assert (find_nvcc(), find_cmake(), find_cutlass()) == found
    assert install.replace_nvcc() == install.install_cuda(), "there is nothing to unset"


def test_an_old_nvcc_that_a_variable_names_is_unset_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "nvcc"
    old.write_text('#!/bin/sh\necho "Cuda compilation tools, release 12.4, V12.4.131"\n')
    old.chmod(0o755)
    monkeypatch.setenv("W4A16GEN_NVCC", str(old))
    with pytest.raises(MissingToolError, match=r"Fix: unset W4A16GEN_NVCC; .*pip install"):
        find_compilers()
    assert finding("nvcc").fix.startswith("unset W4A16GEN_NVCC; ")


def test_programs_of_packages_are_found_without_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    for found in (find_cmake(), find_ninja()):
        assert found is not None
        assert os.access(found, os.X_OK)


def test_variables_that_nvcc_adds_to_its_commands_do_not_reach_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = find_nvcc()
    assert nvcc is not None
    profile = (nvcc.resolve().parent / "nvcc.profile").read_text()
    extended = set(re.findall(r"^(\w+)\s*(?:\+=|=\+)", profile, re.MULTILINE)) - {"PATH", "LD_LIBRARY_PATH"}
    assert extended
    for name in (*extended, "NVVM_FLAGS", "OCG_FLAGS", "NV_NVVM_VERSION", "NVCC_APPEND_FLAGS"):
        monkeypatch.setenv(name, "-DHOSTILE")
    source = tmp_path / "empty.cu"
    source.touch()
    command = [str(nvcc), "--dryrun", "-c", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=child_environment())  # noqa: S603
    assert "cicc" in done.stderr
    assert "HOSTILE" not in done.stderr


def test_variables_that_compilers_honour_do_not_reach_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*IGNORED_VARIABLES, "CMAKE_GENERATOR", "CMAKE_CXX_FLAGS", "NINJA_STATUS"):
        monkeypatch.setenv(name, "/elsewhere")
    inherited = child_environment(TMPDIR="/somewhere")
    assert "/elsewhere" not in inherited.values()
    assert inherited["TMPDIR"] == "/somewhere"
    assert inherited["LC_ALL"] == "C", "messages are read"
    assert inherited["PATH"] == os.environ["PATH"]
    for name in ("CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH", "NVCC_APPEND_FLAGS", "CXXFLAGS"):
        assert name in IGNORED_VARIABLES
    assert "CPATH" in finding("compiler variables").detail


@pytest.mark.usefixtures("fake_nvcc")
def test_variables_that_select_parts_of_the_compiler_are_in_the_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    tools = find_toolchain()
    before = compiler_identity(tools)
    monkeypatch.setenv("GCC_EXEC_PREFIX", "/elsewhere/")
    assert compiler_identity(tools) != before
    assert child_environment()["GCC_EXEC_PREFIX"] == "/elsewhere/"


@pytest.mark.usefixtures("fake_nvcc")
def test_a_missing_cutlass_stops_only_kernels_that_include_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("W4A16GEN_CUTLASS", str(tmp_path))
    assert find_cutlass() is None
    with pytest.raises(MissingToolError, match="CUTLASS was not found"):
        kernel_hashes(CONFIGS[:1], find_toolchain())
    found = finding("CUTLASS headers")
    assert found.ok
    assert "only kernels of target cutlass need them" in found.detail
    native = enumerate_space("default")[0]
    if not headers_of(render_kernel(native)).needs_cutlass:
        assert kernel_hashes([native], find_toolchain())


def test_a_hash_covers_the_headers_that_a_kernel_includes_and_no_others() -> None:
    native, cutlass = (
        {path.relative_to(CUDA_FOLDER).parts[0] for path in headers_of(render_kernel(config)).own}
        for config in (enumerate_space("default")[0], CONFIGS[0])
    )
    assert native == {"native", "library", "w4a16.h"}
    assert cutlass == {"cutlass", "library", "w4a16.h"}
    for config in (enumerate_space("default")[0], CONFIGS[0]):
        names = {path.name for path in headers_of(render_kernel(config)).own}
        assert {"kernel.h", "w4a16.h"} <= names
        assert not {"registry.h", "problem.h", "runner.h"} & names


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (GLIBC, "glibc 2.42 and newer need nvcc 13.2 or newer. Fix: "),
        (GCC, "supports (g++ 15 at most). Fix: set CXX=g++-15"),
        ("module.cpp:3: fatal error: Python.h: No such file or directory", "Python.h was not found. Fix: "),
        ("  Could NOT find Python (missing: Python_INCLUDE_DIRS Development.Module)", "Python.h was not found. Fix: "),
        ("g++: fatal error: cannot execute 'cc1plus': execvp: No such file or directory", "is incomplete. Fix: "),
        ("ptxas unit.ptx, line 9; fatal : Unsupported .version 9.2; current version is '9.0'", "of different releases"),
    ],
)
def test_one_cause_is_told_once_with_the_command_that_fixes_it(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, cuda_include: Path, text: str, words: str
) -> None:
    monkeypatch.setattr(toolchain, "newest_supported_gcc", lambda _: 15)
    monkeypatch.setattr(causes, "newest_supported_gcc", lambda _: newest_supported_gcc(cuda_include))
    monkeypatch.setenv("FAKE_NVCC_SAY", text.replace("\n", " "))
    with pytest.raises(BuildError) as error:
        workshop.build(CONFIGS)
    assert words in str(error.value)
    assert str(error.value).count("Fix:") <= 1
    assert str(workshop.folder / "logs") in str(error.value)
    assert len(workshop.calls.read_text().splitlines()) == 1, "no kernel is tried again for a fault of the machine"


@pytest.mark.parametrize("code", ["137", "9"])
def test_a_killed_compiler_is_tried_again_alone_and_then_told(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    monkeypatch.setenv("FAKE_NVCC_SAY", "nvcc error   : 'cicc' died")
    monkeypatch.setenv("FAKE_NVCC_EXIT", code)
    with pytest.raises(BuildError, match=r"was killed \(out of memory\?\): compiling it takes about 4.0 GB"):
        workshop.build(CONFIGS[:2], jobs=2)
    assert len(workshop.calls.read_text().splitlines()) == 4, "each of two at once, then each alone"


def test_kernels_that_failed_for_one_reason_share_a_line() -> None:
    failures = [Failure(f"kernel{number}", Path(f"kernel{number}.log"), "error: same") for number in range(60)]
    text = describe_failures(failures)
    assert text.count("error: same") == 1
    assert "59 others for the same reason" in text


def test_a_long_line_is_not_cut_in_a_word_without_saying_so() -> None:
    assert causes.summarise("error: " + "x" * 1000, 1).endswith("...")
    assert causes.summarise("", 3) == "nvcc exited with 3"


@pytest.mark.parametrize(
    ("driver", "runtime", "ok", "words"),
    [
        ((12, 4), (13, 0), False, "supports CUDA 12.4; kernels built with CUDA 13.0 need driver 580 or newer"),
        ((13, 0), (13, 5), True, "supports CUDA 13.0"),
        ((14, 0), (13, 0), True, "supports CUDA 14.0"),
        (None, (13, 0), False, "not found"),
    ],
)
def test_the_age_of_the_driver(driver: tuple[int, int] | None, runtime: tuple[int, int], ok: bool, words: str) -> None:
    found = driver_finding(driver, runtime)
    assert found.ok is ok
    assert words in found.detail
    assert bool(found.fix) is not ok


def test_missing_python_headers_are_found_before_anything_is_compiled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / name))
    found = finding("Python.h")
    assert not found.ok
    assert found.fix
    with pytest.raises(MissingToolError, match=r"^Python\.h was not found\. Fix: "):
        find_toolchain()


def test_commands_name_the_interpreter_and_real_requirements() -> None:
    words = shlex.split(install.pip_install("cmake"))
    assert words[:4] == [sys.executable, "-m", "pip", "install"]
    assert words[-1].startswith("cmake")
    assert any(word.startswith("cuda-toolkit[") for word in shlex.split(install.install_cuda()))


@pytest.mark.parametrize(
    ("venv", "managed", "user", "flags"),
    [
        (True, True, True, ""),
        (False, False, False, ""),
        (False, True, False, " --break-system-packages"),
        (False, True, True, " --user --break-system-packages"),
    ],
)
def testpip_flags_fit_how_python_is_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, venv: bool, managed: bool, user: bool, flags: str
) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path) if venv else sys.base_prefix)
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    if managed:
        (tmp_path / "EXTERNALLY-MANAGED").touch()
    site_folder = Path(install.__file__).parents[2] if user else tmp_path
    monkeypatch.setattr(site, "getusersitepackages", lambda: str(site_folder))
    assert install.pip_flags() == flags


def test_mixed_releases_of_the_cuda_wheels_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    releases = {"nvidia-cuda-nvcc": "13.0.88", "nvidia-nvvm": "13.5.37"}

    def version(wheel: str) -> str:
        if wheel not in releases:
            raise importlib.metadata.PackageNotFoundError(wheel)
        return releases[wheel]

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = finding("CUDA wheels of one release")
    assert not found.ok
    assert "--force-reinstall" in found.fix


def test_a_program_that_cannot_be_run_has_no_version(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x7fELF")
    broken.chmod(0o755)
    assert versions.program_version(broken) == ""


def test_diagnosing_imports_nothing_heavy_until_it_runs() -> None:
    program_text = "import sys, w4a16gen.build.toolchain; print([n for n in sys.modules if n.startswith('cuda')])"
    done = subprocess.run([sys.executable, "-c", program_text], capture_output=True, text=True, check=True)  # noqa: S603
    assert done.stdout.strip() == "[]"
