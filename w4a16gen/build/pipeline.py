"""From configurations to a loadable build: emit, compile, link, and the manifest that describes the result."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from w4a16gen.build.compile import Failure, _Compiler, compile_kernels, describe_failures
from w4a16gen.build.emit import emit
from w4a16gen.build.headers import headers_of
from w4a16gen.build.link import STEPS, Link, LinkedPair, link
from w4a16gen.build.lock import locked
from w4a16gen.build.scratch import OBJECTS, make_folders, remove_leftovers, scratch_folder
from w4a16gen.build.toolchain import cuda_version, cutlass_version, describe_compiler, find_toolchain
from w4a16gen.build.units import CompiledUnit, find_units, kernel_hashes
from w4a16gen.errors import BuildError, InvalidValueError, NotBuiltError
from w4a16gen.files import remove, write_json
from w4a16gen.kernels.config import KernelConfig
from w4a16gen.kernels.render import render_kernel
from w4a16gen.progress import Progress, no_progress
from w4a16gen.runtime.artifact import MANIFEST, MODULE, Build, BuiltKernel, Manifest, load_build


@dataclass(frozen=True)
class BuildReport:
    """What a call of `build` did."""

    build: Build
    compiled: int
    failures: Sequence[Failure]


def build(
    configs: Iterable[KernelConfig],
    *,
    generated: Path,
    folder: Path,
    jobs: int | None = None,
    progress: Progress = no_progress,
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

    Raises:
        InvalidValueError: if there are no kernels, or both folders are the same.
        MissingToolError: if a tool is missing.
        BuildLockedError: if another process is building in the folder.
        BuildError: if no kernel compiled, or linking failed.
        OSError: if a folder cannot be written.
    """
    asked = sorted(set(configs))
    if not asked:
        raise InvalidValueError("no kernels were named: a build needs at least one")
    if generated.resolve() == folder.resolve():
        raise InvalidValueError(f"{folder} cannot be the folder of the sources and of the build: choose two folders")
    toolchain = find_toolchain()
    hashes = kernel_hashes(asked, toolchain)
    folder.mkdir(0o755, parents=True, exist_ok=True)
    make_folders(folder)
    with locked(folder):
        remove_leftovers(folder)
        emit(asked, generated)
        units = find_units(folder / OBJECTS, hashes)
        cached = {name for unit in units for name in unit.hashes}
        missing = [config for config in asked if config.name not in cached]
        done, total = 0, len(missing)
        current = None if missing else _current(folder, Link(units, asked, toolchain))
        total += 0 if current else len(STEPS)
        progress(0, total, "compiling" if missing else "linking")
        with scratch_folder(folder) as scratch:
            compilation = compile_kernels(
                missing,
                hashes,
                _Compiler(toolchain, folder, scratch),
                jobs,
                lambda count, name: progress(count, total, name),
            )
            units += compilation.units
            if not units:
                raise BuildError(describe_failures(compilation.failures))
            built = {name for unit in units for name in unit.hashes}
            what = Link(units, [config for config in asked if config.name in built], toolchain)
            current = current or _current(folder, what)
            if current is None:
                done = len(missing)

                def report(step: str) -> None:
                    nonlocal done
                    done = min(done + 1, total)
                    progress(done, total, step)

                progress(done, total, "linking")
                pair = link(what, folder, scratch, report)
            else:
                pair = LinkedPair(current.libraries, current.library_sha256, current.module_sha256)
                progress(total, total, "up to date")
            result = _write_manifest(what, pair, asked, compilation.failures, generated, folder)
    return BuildReport(result, compilation.compiled, compilation.failures)


def _current(folder: Path, what: Link) -> Manifest | None:
    """Return the manifest of an undamaged build of exactly this link."""
    try:
        manifest = load_build(folder).manifest
    except NotBuiltError:
        return None
    return manifest if manifest.link_digest == what.digest else None


def _write_manifest(
    what: Link,
    pair: LinkedPair,
    asked: Sequence[KernelConfig],
    failures: Sequence[Failure],
    generated: Path,
    folder: Path,
) -> Build:
    """Replace the manifest, which makes the new build the one in use; then remove the libraries of older ones."""
    manifest = Manifest(
        compiler=describe_compiler(what.toolchain),
        cuda_version=cuda_version(what.toolchain.cuda_include),
        cutlass=_cutlass_version(what),
        link_digest=what.digest,
        libraries=pair.folder,
        library_sha256=pair.library_sha256,
        module=MODULE,
        module_sha256=pair.module_sha256,
        sources=os.path.relpath(generated.resolve(), folder.resolve()),
        asked=tuple(config.name for config in asked),
        failed=tuple(failure.name for failure in failures),
        kernels=tuple(_built_kernel(config, what.units) for config in what.configs),
    )
    path = folder / MANIFEST
    if path.is_symlink() or path.is_dir():
        remove(path)
    write_json(path, manifest.as_json(), mode=0o644)
    return Build(folder, manifest)


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
