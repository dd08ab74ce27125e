"""From configurations to a loadable build: emit, compile, link, and the manifest that describes the result."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from w4a16gen.build.compile import Compilation, compile_kernels, describe_failures
from w4a16gen.build.emit import emit, refuse_foreign_manifest
from w4a16gen.build.headers import headers_of
from w4a16gen.build.link import STEPS, Link, LinkedPair, link
from w4a16gen.build.lock import locked
from w4a16gen.build.objects import Failure
from w4a16gen.build.scratch import OBJECTS, make_folders, remove_leftovers, scratch_folder
from w4a16gen.build.toolchain import Toolchain, describe_compiler, find_toolchain
from w4a16gen.build.units import CompiledUnit, find_units, kernel_hashes
from w4a16gen.build.versions import cuda_version, cutlass_version
from w4a16gen.build.workers import Workers, local_workers
from w4a16gen.errors import BuildError, InvalidValueError, NotBuiltError
from w4a16gen.executors.summaries import NodeSummary
from w4a16gen.files import make_way, write_json
from w4a16gen.kernels.config import KernelConfig
from w4a16gen.kernels.render import render_kernel
from w4a16gen.progress import Progress, no_progress
from w4a16gen.runtime.artifact import MANIFEST, MODULE, Build, BuiltKernel, Manifest, load_build


@dataclass(frozen=True)
class BuildReport:
    """The result of a call of `build`."""

    build: Build
    compiled: int
    failures: Sequence[Failure]
    nodes: Sequence[NodeSummary] = ()
    """What each machine compiled: compile units, and seconds."""


def build(
    configs: Iterable[KernelConfig],
    *,
    generated: Path,
    folder: Path,
    jobs: int | None = None,
    progress: Progress = no_progress,
    workers: Workers = local_workers,
) -> BuildReport:
    """Emit, compile and link kernels; only what changed is done again.

    The library contains exactly the kernels asked for, less those that failed to compile. The build that is in the
    folder stays usable until the new one is complete, and if this call fails. Damaged files are made again.

    Args:
        configs: the kernels.
        generated: folder for their sources.
        folder: folder for objects, logs, the libraries and the manifest. Its name may contain any character.
        jobs: compilers at once; None takes the usable cores, and fewer if memory is short.
        progress: told at the start, after every compiled unit and after every step of linking.
        workers: provides the compilers; by default they run on this machine. Linking always does.

    Raises:
        InvalidValueError: if there are no kernels, both folders are the same, or one has another program's
            manifest.json.
        MissingToolError: if a tool is missing.
        BuildLockedError: if another process is building in the folder.
        BuildError: if no kernel compiled, or linking failed.
        ClusterError: if the workers are elsewhere and none is left.
        OSError: if a folder cannot be written.
    """
    asked = sorted(set(configs))
    if not asked:
        raise InvalidValueError("no kernels were named: a build needs at least one")
    if generated.resolve() == folder.resolve():
        raise InvalidValueError(f"{folder} cannot be the folder of the sources and of the build: choose two folders")
    for place in (folder, generated):
        refuse_foreign_manifest(place)
    toolchain = find_toolchain()
    hashes = kernel_hashes(asked, toolchain)
    make_folders(folder)
    with locked(folder):
        remove_leftovers(folder)
        emit(asked, generated)
        return _Run(asked, hashes, toolchain, generated, folder, progress).run(jobs, workers)


def compiled(configs: Iterable[KernelConfig], folder: Path) -> set[KernelConfig]:
    """Return the kernels that `build` would take from the folder's objects, if it were asked for all of these.

    Raises:
        MissingToolError: if a tool is missing.
    """
    hashes = kernel_hashes(configs, find_toolchain())
    names = {name for unit in find_units(folder / OBJECTS, hashes) for name in unit.hashes}
    return {config for config in hashes if config.name in names}


class _Run:
    """One build, in a folder whose lock is held."""

    def __init__(
        self,
        asked: Sequence[KernelConfig],
        hashes: Mapping[KernelConfig, str],
        toolchain: Toolchain,
        generated: Path,
        folder: Path,
        progress: Progress,
    ) -> None:
        self._asked = asked
        self._hashes = hashes
        self._toolchain = toolchain
        self._generated = generated
        self._folder = folder
        self._progress = progress
        self._done = 0
        self._total = 0

    def run(self, jobs: int | None, workers: Workers) -> BuildReport:
        """Compile what is not cached, link unless the build in the folder is of the same parts, write the manifest."""
        units = find_units(self._folder / OBJECTS, self._hashes)
        cached = {name for unit in units for name in unit.hashes}
        missing = [config for config in self._asked if config.name not in cached]
        needs_link = bool(missing) or self._current(self._link_of(units)) is None
        self._total = len(missing) + (len(STEPS) if needs_link else 0)
        self._progress(0, self._total, "compiling" if missing else "linking")
        with scratch_folder(self._folder) as scratch:
            compilation, nodes = Compilation(), list[NodeSummary]()
            if missing:
                executor = workers(self._toolchain, scratch, jobs)
                compilation = compile_kernels(missing, self._hashes, executor, self._folder, self._report)
                nodes = executor.summaries
            what = self._link_of([*units, *compilation.units])
            if not what.units:
                raise BuildError(describe_failures(compilation.failures))
            pair = self._linked(what, scratch)
            manifest = self._manifest(what, pair, compilation.failures)
        self._write(manifest)
        return BuildReport(Build(self._folder, manifest), compilation.compiled, compilation.failures, nodes)

    def _report(self, done: int, what: str) -> None:
        self._done = min(done, self._total)
        self._progress(self._done, self._total, what)

    def _link_of(self, units: Sequence[CompiledUnit]) -> Link:
        names = {name for unit in units for name in unit.hashes}
        configs = [config for config in self._asked if config.name in names]
        return Link(sorted(units, key=lambda unit: unit.path.name), configs, self._toolchain)

    def _current(self, what: Link) -> LinkedPair | None:
        """Return the libraries of the build in the folder, if it is undamaged and of exactly these parts."""
        try:
            manifest = load_build(self._folder).manifest
        except NotBuiltError:
            return None
        if manifest.link_digest != what.digest:
            return None
        return LinkedPair(manifest.libraries, manifest.library_sha256, manifest.module_sha256)

    def _linked(self, what: Link, scratch: Path) -> LinkedPair:
        current = self._current(what)
        if current is not None:
            self._report(self._total, "up to date")
            return current
        self._report(self._done, "linking")
        return link(what, self._folder, scratch, lambda step: self._report(self._done + 1, step))

    def _manifest(self, what: Link, pair: LinkedPair, failures: Sequence[Failure]) -> Manifest:
        return Manifest(
            compiler=describe_compiler(self._toolchain),
            cuda_version=cuda_version(self._toolchain.cuda_include),
            cutlass=_cutlass_version(what),
            link_digest=what.digest,
            libraries=pair.folder,
            library_sha256=pair.library_sha256,
            module=MODULE,
            module_sha256=pair.module_sha256,
            sources=os.path.relpath(self._generated.resolve(), self._folder.resolve()),
            asked=tuple(config.name for config in self._asked),
            failed=tuple(failure.name for failure in failures),
            kernels=tuple(_built_kernel(config, what.units) for config in what.configs),
        )

    def _write(self, manifest: Manifest) -> None:
        """Replace the manifest, which makes this build the one in use."""
        path = self._folder / MANIFEST
        make_way(path)
        write_json(path, manifest.as_json(), mode=0o644)


def _cutlass_version(what: Link) -> str:
    """Return the version of the CUTLASS headers; nothing if no kernel includes them."""
    include = what.toolchain.cutlass_include
    used = any(headers_of(render_kernel(config)).needs_cutlass for config in what.configs)
    return cutlass_version(include) if include and used else ""


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
