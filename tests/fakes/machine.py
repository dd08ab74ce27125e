"""A built library on a machine with GPUs that are not there: launches are recorded, everything else is real."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, ClassVar

from fakes.devices import H100
from w4a16gen import Library
from w4a16gen.kernels.device import Device
from w4a16gen.runtime.artifact import Build


class CallCache:
    """Stands in for the module's class: repeats any call with a number of tokens that it has been told of."""

    made: ClassVar[list[tuple[Any, ...]]] = []

    def __init__(self, *_: Any) -> None:
        self.known: set[int] = set()

    def add(self, m: int, _kernel: int) -> None:
        self.known.add(m)

    def try_launch(self, *arguments: Any) -> str | None:
        if arguments[0].shape[0] not in self.known:
            return None
        self.made.append(arguments)
        return "repeated"


class Module(ModuleType):
    """The built pybind11 module, except for what it says of GPUs."""

    def __init__(self, module: Any, devices: Sequence[Device]) -> None:
        super().__init__("_w4a16")
        self._module = module
        self._devices = devices
        self.CallCache = CallCache

    def devices(self) -> list[dict[str, object]]:
        return [device.as_json() for device in self._devices]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class Kernels:
    """The opened library of kernels, except for what needs a GPU."""

    def __init__(self, kernels: Any, devices: Sequence[Device]) -> None:
        self._kernels = kernels
        self._devices = {device.index: device for device in devices}
        self.launches: list[tuple[Any, ...]] = []
        """The arguments of every launch."""
        self.workspace: int | None = None
        """The bytes that every problem needs, if not those that the library says."""

    def gemm(self, *arguments: Any) -> tuple[int, str]:
        self.launches.append(arguments)
        return 0, ""

    def workspace_bytes(self, *arguments: int) -> Any:
        if self.workspace is not None:
            return 0, "", self.workspace
        *problem, sm_count, device = arguments
        return self._kernels.workspace_bytes(*problem, sm_count or self._devices[device].sm_count, device)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernels, name)


class LibraryOnGpus(Library):
    """A loaded build that sees these GPUs, and records launches instead of making them."""

    def __init__(self, build: Build, *devices: Device) -> None:
        super().__init__(build)
        found = devices or (H100,)
        self.recorder = Kernels(self.bindings.library, found)
        self.bindings.library = self.recorder
        self.bindings.module = self.module = Module(self.module, found)

    @property
    def launches(self) -> list[tuple[Any, ...]]:
        """The arguments of every launch."""
        return self.recorder.launches
