"""Who runs the compilers of a build: threads of this process, or the nodes of a cluster."""

from __future__ import annotations

import atexit
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from w4a16gen import __version__
from w4a16gen.build.headers import CUDA_FOLDER, headers_of
from w4a16gen.build.limits import usable_cores, usable_memory
from w4a16gen.build.nvcc import Compiler
from w4a16gen.build.scratch import end_orphans, safe_temporary_folder
from w4a16gen.build.toolchain import Compilers, Toolchain, compiler_versions, find_compilers
from w4a16gen.build.units import FLAGS
from w4a16gen.build.versions import cutlass_version, program_version
from w4a16gen.executors.cluster import Cluster
from w4a16gen.executors.executor import Executor
from w4a16gen.executors.node import VERSION, Files, Named, Setup
from w4a16gen.executors.nodes import Crew, on_cpus
from w4a16gen.executors.place import Context, InProcess
from w4a16gen.files import is_running
from w4a16gen.kernels.config import KernelConfig
from w4a16gen.kernels.render import render_kernel

_MEMORY_SHARE = 0.9
"""Part of the usable memory that compilers may take."""
_CUTLASS = "CUTLASS"
_HEADERS = {".h", ".cuh"}
_SCRATCH = re.compile(r"w4a16gen-worker-(\d+)-[a-z0-9_]{8}")
"""Names of the scratch folders of workers; the number is the worker's process."""

Workers = Callable[[Toolchain, Path, "int | None"], Executor]
"""Takes the tools, a scratch folder and the compilers at once, or None for as many as fit. Returns what runs them."""


def local_workers(toolchain: Toolchain, scratch: Path, jobs: int | None) -> Executor:
    """Return this process's compilers: as many at once as cores and memory allow, or as many as are asked for."""
    compiler = Compiler(toolchain, scratch)
    memory = float("inf") if jobs else _MEMORY_SHARE * usable_memory()
    context = Context(compiler, compiler.cancel)
    return Executor([InProcess(platform.node(), context, jobs or usable_cores(), memory)])


def cluster_workers(cluster: Cluster, configs: Iterable[KernelConfig]) -> Workers:
    """Return the compilers of a cluster's nodes, of which those with other compilers than this machine are refused.

    This package's headers travel. The compilers' own headers and CUTLASS are the node's, of the same version.

    Args:
        cluster: the connection.
        configs: the kernels; only if one includes CUTLASS's headers must nodes have them.
    """
    needs_cutlass = any(headers_of(render_kernel(config)).needs_cutlass for config in configs)

    def start(toolchain: Toolchain, _scratch: Path, jobs: int | None) -> Executor:
        expected = versions_of(toolchain)
        if not needs_cutlass:
            del expected[_CUTLASS]
        setup = Setup(Named.of(open_compiler))
        return on_cpus(cluster, Crew(setup, _headers(), Named.of(identify), expected), most=jobs)

    return start


def _headers() -> Files:
    paths = sorted(path for path in CUDA_FOLDER.rglob("*") if path.suffix in _HEADERS)
    return {str(path.relative_to(CUDA_FOLDER)): path.read_bytes() for path in paths}


def versions_of(tools: Compilers) -> dict[str, str]:
    """Return everything that decides the bytes of an object, apart from its sources."""
    include = tools.cutlass_include
    return {
        VERSION: __version__,
        **compiler_versions(tools),
        "nvcc": " ".join(program_version(tools.nvcc).strip().splitlines()[-2:]),
        "the flags": " ".join(FLAGS),
        "the C library": " ".join(platform.libc_ver()),
        "the machine": platform.machine(),
        _CUTLASS: cutlass_version(include) if include else "missing",
    }


def identify() -> dict[str, str]:
    """Return the versions of the node that this runs on.

    Raises:
        MissingToolError: if a compiler is missing.
    """
    return versions_of(find_compilers())


def open_compiler(headers: Path) -> Context:
    """Return the compiler of a worker's process, and remove what killed workers left on the node.

    Args:
        headers: the folder of this package's headers, as they came.

    Raises:
        MissingToolError: if a compiler is missing.
    """
    root = safe_temporary_folder()
    _remove_dead(root)
    scratch = Path(tempfile.mkdtemp(prefix=f"w4a16gen-worker-{os.getpid()}-", dir=root))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    compiler = Compiler(find_compilers(), scratch, headers)
    return Context(compiler, compiler.cancel)


def _remove_dead(root: Path) -> None:
    """Remove the scratch folders of workers that have ended, and end their compilers."""
    dead = {
        path
        for path in root.glob("w4a16gen-worker-*")
        if (match := _SCRATCH.fullmatch(path.name)) and not is_running(int(match[1]))
    }
    with suppress(OSError):
        dead = {path for path in dead if path.lstat().st_uid == os.geteuid()}
    if dead:
        end_orphans(dead)
    for path in dead:
        shutil.rmtree(path, ignore_errors=True)
