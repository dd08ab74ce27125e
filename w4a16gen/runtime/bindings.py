"""A build's pybind11 module and kernel library, opened: raw calls, and their statuses as this package's errors."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from w4a16gen.errors import (
    CudaError,
    InvalidValueError,
    NoHopperGpuError,
    NotBuiltError,
    UnsupportedProblemError,
    W4A16Error,
)
from w4a16gen.kernels.config import KernelConfig
from w4a16gen.kernels.device import Device
from w4a16gen.kernels.problem import Problem
from w4a16gen.runtime.artifact import Build


@dataclass(frozen=True)
class KernelInfo:
    """The library's description of one of its kernels."""

    config: KernelConfig
    layout: str
    """Tag of the packed layout that it reads."""
    stages: int
    """Stages of its shared-memory pipeline."""
    threads: int
    """Threads per CTA."""
    shared_memory_bytes: int
    """Dynamic shared memory per CTA."""


@cache
def _import_module(path: Path, _modified: int) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader("_w4a16", str(path))
    spec = importlib.util.spec_from_file_location("_w4a16", path, loader=loader)
    if spec is None:
        raise NotBuiltError(f"{path} cannot be imported: run `w4a16gen build`")
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


class Bindings:
    """The opened library of one build. Its methods may be called from several threads, for several GPUs, at once."""

    def __init__(self, build: Build) -> None:
        """Open the library of a finished build.

        Raises:
            NotBuiltError: if it cannot be loaded.
        """
        try:
            self.module = _import_module(build.module.resolve(), build.module.stat().st_mtime_ns)
            self.library = self.module.KernelLibrary(os.fsencode(build.library.resolve()))
        except (ImportError, RuntimeError) as error:
            raise NotBuiltError(
                f"the build in {build.folder} cannot be loaded ({error}): run `w4a16gen build`"
            ) from None
        self._errors: dict[int, type[W4A16Error]] = {
            self.module.INVALID_ARGUMENT: InvalidValueError,
            self.module.UNSUPPORTED: UnsupportedProblemError,
            self.module.NO_HOPPER_GPU: NoHopperGpuError,
            self.module.CUDA_ERROR: CudaError,
        }
        self.kernels = tuple(_kernel_info(described) for described in self.library.kernels())
        """The library's kernels, in its order."""

    def devices(self) -> list[Device]:
        """Return every CUDA GPU of this machine; empty where there is none."""
        return [Device(**{**found, "compute_capability": tuple(found["compute_capability"])}) for found in self._raw()]

    def _raw(self) -> list[dict[str, Any]]:
        return list(self.module.devices())

    def why_cannot_run(self, kernel: int, problem: Problem) -> str | None:
        """Return the sentence by which the library refuses a problem, or None if it can run it. Needs no GPU."""
        status, message = self.library.can_implement(kernel, *numbers_of(problem))
        return message if status else None

    def packed_bytes(self, kernel: int, problem: Problem) -> int:
        """Return the bytes of the packed weight that a kernel reads. Needs no GPU."""
        return int(self.result_of(self.library.packed_bytes(kernel, *numbers_of(problem)[1:])))

    def workspace_bytes(self, kernel: int, problem: Problem, sm_count: int, device: int) -> int:
        """Return the exact workspace of a problem in bytes; an `sm_count` of 0 asks the device."""
        return int(self.result_of(self.library.workspace_bytes(kernel, *numbers_of(problem), sm_count, device)))

    def token_tiles_bytes(self, rows: int, experts: int, tile_tokens: int) -> int:
        """Return the bytes that a list of token tiles may need. Needs no GPU."""
        return int(self.result_of(self.library.token_tiles_bytes(rows, experts, tile_tokens)))

    def result_of(self, outcome: tuple[Any, ...]) -> Any:
        """Return the value of an outcome (status, message, value...).

        Raises:
            W4A16Error: the error of the status, if it is not 0.
        """
        status, message, *value = outcome
        if status:
            raise self._errors[status](message)
        return value[0] if value else None


def _kernel_info(described: dict[str, Any]) -> KernelInfo:
    rest = {name: described[name] for name in ("layout", "stages", "threads", "shared_memory_bytes")}
    return KernelInfo(KernelConfig.parse(described["name"]), **rest)


def numbers_of(problem: Problem) -> tuple[int, int, int, int]:
    """Return a problem as the library takes it: m, n, k, group size.

    Raises:
        InvalidValueError: if it is not a Problem.
    """
    if not isinstance(problem, Problem):
        raise InvalidValueError(f"problem of type {type(problem).__name__} must be a Problem(m, n, k, group_size)")
    return problem.m, problem.n, problem.k, problem.group_size
