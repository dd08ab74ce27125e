"""From configurations to a loadable build: emit, compile, link, and the manifest that says what is in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import filelock

from w4a16gen.build.compile import Failure, Progress, compile_kernels
from w4a16gen.build.emit import emit
from w4a16gen.build.link import _link
from w4a16gen.build.toolchain import find_toolchain
from w4a16gen.errors import BuildError, BuildLockedError
from w4a16gen.kernels.config import KernelConfig
from w4a16gen.runtime.artifact import Build


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
    progress: Progress = lambda _done, _total, _name: None,
) -> BuildReport:
    """Emit, compile and link kernels; only what changed is done again.

    The library holds exactly the kernels asked for, less those that failed to compile.

    Args:
        configs: the kernels.
        generated: folder for their sources.
        folder: folder for objects, logs, the library and the manifest.
        jobs: compilers at once; None takes the cores, and fewer where memory is short.
        progress: told after every compiled unit.

    Raises:
        MissingToolError: if a tool is not there.
        BuildLockedError: if another process is building in the folder.
        BuildError: if no kernel compiled, or linking failed.
        OSError: if a folder cannot be written.
    """
    wanted = sorted(set(configs))
    toolchain = find_toolchain()
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / ".lock")
    try:
        with lock.acquire(timeout=0):
            emit(wanted, generated)
            compilation = compile_kernels(wanted, toolchain, generated, folder, jobs, progress)
            if not compilation.units:
                raise BuildError(describe_failures(compilation.failures))
            result = _link(compilation.units, wanted, toolchain, folder, compilation.failures)
    except filelock.Timeout:
        raise BuildLockedError(
            f"another process is building in {folder}: wait for it, or give this build a folder of its own"
        ) from None
    return BuildReport(result, compilation.compiled, compilation.failures)


def describe_failures(failures: Sequence[Failure]) -> str:
    """Name every kernel that failed, why, and its log."""
    lines = [f"  {failure.name}: {failure.summary}\n    log: {failure.log}" for failure in failures]
    return "\n".join([f"{len(failures)} kernels failed to compile:", *lines])
