"""From objects to a kernel library and a module: CMake in a fresh folder, and a trial load in a child process."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pybind11

from w4a16gen.build import causes
from w4a16gen.build.environment import child_environment
from w4a16gen.build.headers import CUDA_FOLDER, headers_of
from w4a16gen.build.limits import usable_cores
from w4a16gen.build.objects import damaged_units, forget, put_in_place, write_log
from w4a16gen.build.scratch import LOGS, OBJECTS, OWNER_VARIABLE, alias, libraries_beside
from w4a16gen.build.toolchain import Toolchain, compiler_identity
from w4a16gen.build.units import CompiledUnit
from w4a16gen.errors import BuildError
from w4a16gen.executors.waiting import POLL_SECONDS
from w4a16gen.files import file_digest, has_digest, make_way, read_sealed, remove, seal, write_if_changed, write_json
from w4a16gen.kernels.config import KernelConfig
from w4a16gen.kernels.render import render_registry
from w4a16gen.runtime.artifact import LIBRARIES_PREFIX, LIBRARY, MODULE

STEPS = ("linking", "trial load")
"""Steps of a link, for progress."""
MODULE_SCHEMA = "w4a16gen.module/1"
_LOAD_CHECK = Path(__file__).with_name("load_check.py")
_LOAD_SECONDS = 300
_SHOWN_LINES = 8
_ERROR_WORDS = ("error", "undefined reference", "could not find", "fatal", "not found", "no such file")


@dataclass(frozen=True)
class Link:
    """The input of a link."""

    units: Sequence[CompiledUnit]
    configs: Sequence[KernelConfig]
    """The kernels in the units, sorted."""
    toolchain: Toolchain

    @cached_property
    def registry(self) -> str:
        """The source of the library's table of kernels."""
        return render_registry(self.configs)

    @cached_property
    def module_digest(self) -> str:
        """Hash of everything that the module is made of."""
        return _digest([*self._shared_parts(), *_source_parts("python"), pybind11.__version__, MODULE, sys.version])

    @cached_property
    def digest(self) -> str:
        """Hash of everything that the library and the module are made of."""
        objects = sorted(unit.sha256 for unit in self.units)
        parts = [*self._shared_parts(), *_source_parts("library"), self.module_digest, self.registry, *objects]
        return _digest(parts)

    def _shared_parts(self) -> list[str]:
        files = [CUDA_FOLDER / "CMakeLists.txt", *sorted(CUDA_FOLDER.rglob("*.map")), self.toolchain.cudart]
        return [compiler_identity(self.toolchain), *map(file_digest, files)]


@dataclass(frozen=True)
class LinkedPair:
    """A library and a module that a child process has loaded together."""

    folder: str
    """Name of their folder, in the build's folder."""
    library_sha256: str
    module_sha256: str


class _LinkError(BuildError):
    """Linking failed, maybe because of objects that are damaged."""

    def __init__(self, text: str, damaged: Sequence[CompiledUnit] = ()) -> None:
        super().__init__(text)
        self.damaged = damaged


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _source_parts(folder: str) -> list[str]:
    """Return digests of the sources of the link in a folder, and of the headers that they include."""
    sources = sorted((CUDA_FOLDER / folder).glob("*.cpp"))
    paths = [path for source in sources for path in (source, *headers_of(source.read_text(), source.parent).own)]
    return [f"{path.relative_to(CUDA_FOLDER)} {file_digest(path)}" for path in paths]


def link(what: Link, build: Path, scratch: Path, report: Callable[[str], None]) -> LinkedPair:
    """Link the library and the module, load them in a child process, and put them into the build's folder.

    A failure costs one more try, in a fresh folder and without the cached module. The build that was there before stays
    as it is: the pair gets a folder of its own. Objects in which the last try finds a fault are removed.

    Args:
        what: the objects and the tools.
        build: the build's folder.
        scratch: an empty folder with a safe path.
        report: called with the name of each step of `STEPS` that is done.

    Raises:
        BuildError: if linking fails twice, or what was linked cannot be loaded or contains other kernels; the text
            names the log.
        OSError: if something cannot be written.
    """
    log = build / LOGS / "link.log"
    first: BuildError | None = None
    damaged: Sequence[CompiledUnit] = ()
    for attempt, cached_module in enumerate((_cached_module(what, build), None)):
        folder = scratch / f"link-{attempt}"
        try:
            library, module = _run_cmake(what, build, folder, log, cached_module)
            report(STEPS[0])
            _check_load(library, module, what, log)
            report(STEPS[1])
        except BuildError as error:
            first = first or error
            damaged = error.damaged if isinstance(error, _LinkError) else ()
            shutil.rmtree(folder, ignore_errors=True)
            continue
        if cached_module is None:
            _cache_module(what, build, module)
        return _install(library, module, build, scratch)
    forget(damaged)
    way_out = (
        f"\nDamaged objects: {len(damaged)}. They are removed: the next build compiles them again" if damaged else ""
    )
    raise BuildError(f"{first}{way_out}")


def _cached_module(what: Link, build: Path) -> Path | None:
    """Return the module that was made of the same parts before, if it is undamaged."""
    path = build / OBJECTS / f"{what.module_digest[:32]}.so"
    try:
        digest = read_sealed(path.with_suffix(".json"), MODULE_SCHEMA)["module_sha256"]
    except (OSError, ValueError, KeyError):
        return None
    return path if has_digest(path, digest) else None


def _cache_module(what: Link, build: Path, module: Path) -> None:
    path = build / OBJECTS / f"{what.module_digest[:32]}.so"
    copy = module.with_suffix(".copy")
    shutil.copyfile(module, copy)
    put_in_place(copy, path)
    record = path.with_suffix(".json")
    make_way(record)
    write_json(record, seal({"schema": MODULE_SCHEMA, "module_sha256": file_digest(path)}), mode=0o644)


def _definitions(what: Link, build: Path, folder: Path) -> Mapping[str, object]:
    """Return CMake's variables; every path among them is safe."""
    tools = what.toolchain
    objects = alias(folder, "objects", build.resolve() / OBJECTS)
    pybind = alias(folder, "pybind11", Path(pybind11.__file__).resolve().parent)
    return {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_CXX_COMPILER": alias(folder, "compiler", tools.host_compiler),
        "CMAKE_MAKE_PROGRAM": alias(folder, "ninja", tools.ninja),
        "CMAKE_SUPPRESS_REGENERATION": "ON",  # the folder is fresh; a clock that was moved back would make Ninja loop
        "Python_EXECUTABLE": alias(folder, "python", Path(sys.executable)),
        "pybind11_DIR": pybind / Path(pybind11.get_cmake_dir()).relative_to(Path(pybind11.__file__).parent),
        "W4A16_KERNEL_OBJECTS": ";".join(str(objects / unit.path.name) for unit in what.units),
        "W4A16_REGISTRY": folder / "registry.cpp",
        "W4A16_CUDA_INCLUDE": alias(folder, "cuda_include", tools.cuda_include),
        "W4A16_CUDART": alias(folder, "libcudart_static.a", tools.cudart),
    }


def _run_cmake(what: Link, build: Path, folder: Path, log: Path, cached_module: Path | None) -> tuple[Path, Path]:
    """Configure and build in a fresh folder, from copies of the sources; return the library and the module.

    Raises:
        BuildError: if CMake or the linker fails; the text names the log.
    """
    shutil.copytree(CUDA_FOLDER, folder / "source", ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    write_if_changed(folder / "registry.cpp", what.registry)
    tree = folder / "tree"
    cmake = str(what.toolchain.cmake)
    configure = [cmake, "-S", str(folder / "source"), "-B", str(tree), "-G", "Ninja"]
    configure += [f"-D{name}={value}" for name, value in _definitions(what, build, folder).items()]
    targets = ["w4a16_kernels"] if cached_module else ["w4a16_kernels", "_w4a16"]
    printed = ""
    for command in (configure, [cmake, "--build", str(tree), "-j", str(usable_cores()), "--target", *targets]):
        returncode, text = _run(command, folder)
        printed += text
        if returncode != 0:
            _fail(what, build, folder, log, printed)
    write_log(log, printed)
    return tree / LIBRARY, cached_module or tree / MODULE


def _run(command: Sequence[str], folder: Path) -> tuple[int, str]:
    """Run a program; if this process is interrupted, end it with all of its children."""
    environment = child_environment(**{"TMPDIR": str(folder), OWNER_VARIABLE: str(folder.parent)})
    with subprocess.Popen(  # noqa: S603
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:
        try:
            output = _output_of(process)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return process.returncode, output.decode(errors="replace")


def _output_of(process: subprocess.Popen[bytes]) -> bytes:
    """Return what a program prints until it ends, waiting in short steps, between which Python handles signals."""
    while True:
        with suppress(subprocess.TimeoutExpired):
            return process.communicate(timeout=POLL_SECONDS)[0]


def _fail(what: Link, build: Path, folder: Path, log: Path, text: str) -> None:
    """Raise the error of a failed link."""
    folders = (folder, build)
    if causes.is_full(text, folders):
        raise BuildError(causes.describe_full(folders))
    write_log(log, text)
    if cause := causes.describe_environment(text, what.toolchain):
        raise BuildError(f"{cause}\nThe output of CMake: {log}")
    lines = text.splitlines()
    telling = [line for line in lines if any(word in line.lower() for word in _ERROR_WORDS)] or lines
    shown = "\n".join(telling[:_SHOWN_LINES])
    raise _LinkError(f"linking failed, log: {log}\n{shown}", damaged_units(what.units, text))


def _check_load(library: Path, module: Path, what: Link, log: Path) -> None:
    """Load the pair in a child process, and compare its kernels with those that were linked.

    Raises:
        BuildError: if it cannot be loaded, or contains other kernels.
    """
    command = [sys.executable, "-I", str(_LOAD_CHECK), str(module), str(library)]
    try:
        done = subprocess.run(  # noqa: S603
            command, capture_output=True, text=True, errors="replace", check=False, timeout=_LOAD_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise BuildError(f"the linked library did not load within {_LOAD_SECONDS} s, log: {log}") from None
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise BuildError(f"the linked library ends the process that loads it ({name}), log: {log}")
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise BuildError(f"the linked library cannot be loaded ({reason}), log: {log}")
    found, expected = json.loads(done.stdout), [config.name for config in what.configs]
    if sorted(found) != sorted(expected):
        differing = set(found) ^ set(expected)
        shown = ", ".join(sorted(differing)[:3]) or "one of them twice"
        damaged = [unit for unit in what.units if differing & unit.hashes.keys()]
        raise _LinkError(f"the linked library contains other kernels than its objects: {shown}", damaged)


def _install(library: Path, module: Path, build: Path, scratch: Path) -> LinkedPair:
    """Put the pair into a folder of the build that is named by its contents."""
    digests = file_digest(library), file_digest(module)
    name = LIBRARIES_PREFIX + _digest(digests)[:16]
    if has_digest(build / name / LIBRARY, digests[0]) and has_digest(build / name / MODULE, digests[1]):
        return LinkedPair(name, *digests)
    fresh = scratch / name
    fresh.mkdir(0o755)
    for source, target in ((library, fresh / LIBRARY), (module, fresh / MODULE)):
        write_if_changed(target, source.read_bytes(), mode=0o755)
    remove(build / name)
    if fresh.stat().st_dev == build.stat().st_dev:
        fresh.rename(build / name)
    else:
        beside = libraries_beside(scratch, build)
        shutil.copytree(fresh, beside)
        beside.rename(build / name)
    return LinkedPair(name, *digests)
