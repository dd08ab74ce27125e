"""A build's library, opened: which kernels it holds, what each can run and needs, and what its answers mean."""

from __future__ import annotations

import importlib.machinery
import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from w4a16gen.arrays import stream_pointer, view
from w4a16gen.built import Build
from w4a16gen.config import KernelConfig
from w4a16gen.errors import (
    CudaError,
    InvalidValueError,
    NoHopperGpuError,
    NotBuiltError,
    UnsupportedProblemError,
    W4A16Error,
)
from w4a16gen.packing import PackedWeight
from w4a16gen.problem import Problem

_ERRORS: dict[int, type[W4A16Error]] = {
    1: InvalidValueError,
    2: UnsupportedProblemError,
    3: NoHopperGpuError,
    4: CudaError,
}


@cache
def _import_module(path: Path, _modified: int) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader("_w4a16", str(path))
    spec = importlib.util.spec_from_file_location("_w4a16", path, loader=loader)
    if spec is None:
        raise NotBuiltError(f"{path} cannot be imported: run `w4a16gen build`")
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


class LoadedBuild:
    """A loaded build. Its methods may be called from several threads, for several GPUs, at once."""

    def __init__(self, build: Build) -> None:
        """Open the library of a finished build.

        Raises:
            NotBuiltError: if it cannot be loaded, or holds other kernels than its manifest says.
        """
        self.build = build
        try:
            self.module = _import_module(build.module.resolve(), build.module.stat().st_mtime_ns)
            self.kernel_library = self.module.KernelLibrary(str(build.library.resolve()))
        except (ImportError, RuntimeError) as error:
            raise NotBuiltError(
                f"the build in {build.folder} cannot be loaded ({error}): run `w4a16gen build`"
            ) from None
        self.kernels: list[dict[str, Any]] = self.kernel_library.kernels()
        """What the library says of each kernel, in its order."""
        self.indices = {KernelConfig.parse(kernel["name"]): index for index, kernel in enumerate(self.kernels)}

    def configs(self) -> list[KernelConfig]:
        """Give the kernels that can be called, sorted."""
        return sorted(self.indices)

    def devices(self) -> list[dict[str, Any]]:
        """Give every CUDA GPU: index, name, compute_capability, sm_count; empty where there is none."""
        return list(self.module.devices())

    def hopper_devices(self) -> list[dict[str, Any]]:
        """Give the GPUs that these kernels run on."""
        return [device for device in self.devices() if device["compute_capability"] == (9, 0)]

    def why_cannot_run(self, config: KernelConfig, problem: Problem) -> str | None:
        """Ask the built library why a kernel cannot run a problem; None if it can. Needs no GPU."""
        status, message = self.kernel_library.can_implement(self.index_of(config), *numbers_of(problem))
        return message if status else None

    def packed_bytes(self, config: KernelConfig, problem: Problem) -> int:
        """Give the bytes of the packed weight that a kernel reads. Needs no GPU."""
        return int(self.result_of(self.kernel_library.packed_bytes(self.index_of(config), *numbers_of(problem)[1:])))

    def workspace_bytes(
        self, config: KernelConfig, problem: Problem, *, sm_count: int | None = None, device: int = 0
    ) -> int:
        """Give the exact workspace of a problem, in bytes.

        Args:
            config: the kernel.
            problem: the problem.
            sm_count: multiprocessors of the GPU; None asks the device.
            device: the GPU to ask.

        Raises:
            UnsupportedProblemError: if the kernel cannot run the problem.
            NoHopperGpuError: if the device is asked and is not a Hopper GPU.
        """
        if sm_count is None and not self.devices():
            raise NoHopperGpuError("no CUDA device: pass sm_count to ask for another machine's GPU")
        outcome = self.kernel_library.workspace_bytes(
            self.index_of(config), *numbers_of(problem), sm_count or 0, device
        )
        return int(self.result_of(outcome))

    def probe_read(self, w: PackedWeight, *, stream: Any, dependent_launch: bool = False) -> None:
        """Launch a kernel that only reads a packed weight on a GPU: the least that any kernel takes.

        Raises:
            UnsupportedProblemError: if the build holds no native kernel, with which the probes come.
            NoHopperGpuError: if the weight is on another kind of GPU.
        """
        data = view("packed weight", w.data, self.module)
        address = stream_pointer(stream, w.data)
        outcome = self.kernel_library.probe_read(data.pointer, data.nbytes, dependent_launch, address, data.device or 0)
        self.result_of(outcome)

    def probe_multiply(self, rounds: int, *, stream: Any, device: int = 0) -> int:
        """Launch a kernel that keeps all tensor cores multiplying fp16, and give the operations that it does.

        Raises:
            UnsupportedProblemError: if the build holds no native kernel, with which the probes come.
            NoHopperGpuError: if it is another kind of GPU.
        """
        return int(self.result_of(self.kernel_library.probe_multiply(rounds, stream_pointer(stream, None), device)))

    def index_of(self, config: KernelConfig) -> int:
        """Give the number by which the library knows a kernel.

        Raises:
            NotBuiltError: if the build does not hold it.
        """
        try:
            return self.indices[config]
        except KeyError:
            raise NotBuiltError(
                f"{config.name} is not in {self.build.folder}: it holds {len(self.indices)} kernels, see "
                "`w4a16gen list --built`"
            ) from None

    @staticmethod
    def result_of(outcome: tuple[Any, ...]) -> Any:
        """Give an outcome's value, or raise the exception of its status."""
        status, message, *value = outcome
        if status:
            raise _ERRORS[status](message)
        return value[0] if value else None


def numbers_of(problem: Problem) -> tuple[int, int, int, int]:
    """Give a problem as the library takes it."""
    return problem.m, problem.n, problem.k, problem.group_size
