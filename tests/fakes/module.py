"""The built pybind11 module on a machine whose GPUs are made of host memory."""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from fakes.experts import Call, ExpertCalls, Work
from fakes.memory import memory_at
from w4a16gen import KernelConfig, PackedWeight, Problem
from w4a16gen.kernels.device import Device
from w4a16gen.kernels.epilogue import Activation, CallEpilogue
from w4a16gen.kernels.problem import why_cannot_run
from w4a16gen.weights.packed import TARGET_LAYOUTS, layout_for, pack_weight
from w4a16gen.weights.quantized import MAX_Q, QuantizedWeight
from w4a16gen.weights.reference import gemm_reference

Outcome = tuple[Any, ...]
OK: Outcome = (0, "")
INVALID, UNSUPPORTED, NO_HOPPER_GPU, CUDA_ERROR = 1, 2, 3, 4


class Buffer:
    """Device memory, with the interface of the module's `DeviceBuffer`."""

    def __init__(self, module: FakeModule, size: int, device: int) -> None:
        self.memory, self.device = np.zeros(max(size, 1), np.uint8), device
        self.bytes = size
        self.pointer = self.memory.ctypes.data
        module.buffers.add(self)

    def upload(self, source: npt.NDArray[Any], offset: int = 0) -> None:
        data = np.ascontiguousarray(source).reshape(-1).view(np.uint8)
        assert offset + data.size <= self.bytes, "upload beyond the device buffer"
        self.memory[offset : offset + data.size] = data

    def download(self, destination: npt.NDArray[Any], offset: int = 0) -> None:
        data = destination.reshape(-1).view(np.uint8)
        assert offset + data.size <= self.bytes, "download beyond the device buffer"
        data[:] = self.memory[offset : offset + data.size]


class FakeStream:
    """Runs what is launched on it at once, or keeps it for replays of a graph."""

    def __init__(self, module: FakeModule, device: int) -> None:
        self.module, self.device = module, device
        self.pointer = id(self)
        self.replays = 0
        self.is_capturing = False
        self._recorded: list[Work] = []

    def launch(self, work: Work) -> None:
        """Run a launch now, or at each replay."""
        if self.is_capturing:
            self._recorded.append(work)
        else:
            work.run()

    def begin_capture(self) -> None:
        assert not self.is_capturing, "a stream is captured once at a time"
        self._recorded, self.is_capturing = [], True

    def end_capture(self) -> None:
        assert self.is_capturing
        self.is_capturing = False
        self.module.graphs.append(list(self._recorded))

    def replay(self) -> None:
        self.replays += 1
        for work in self.module.order(self._recorded):
            work.run()

    def synchronize(self) -> None:
        assert not self.is_capturing, "a stream that is captured cannot be waited for"

    def start_timer(self) -> None:
        """Begin to time."""

    def stop_timer(self) -> float:
        """Return the milliseconds that the module was told to return."""
        return self.module.milliseconds


@dataclass(frozen=True)
class Launched:
    """One launch of a kernel: the addresses that it was given, and what they hold."""

    kernels: Kernels
    config: KernelConfig
    problem: Problem
    activations: int
    packed: int
    packed_bytes: int
    bias: int
    output: int
    alpha: float
    activation_number: int
    residual: int
    workspace: int
    workspace_bytes: int
    stream: int
    dependent: int
    device: int

    @property
    def out(self) -> npt.NDArray[Any]:
        """The output [m, n], or [m, n / 2], in place."""
        return memory_at(self.output, self.shape, "<f2")

    @property
    def activation(self) -> Activation:
        """The activation."""
        return list(Activation)[self.activation_number]

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the output."""
        return self.problem.m, CallEpilogue(self.activation).outputs(self.problem.n)

    def weight(self) -> QuantizedWeight:
        """Return the weight that was packed."""
        data = memory_at(self.packed, (self.packed_bytes,), "|u1")
        _, n, k, group_size = vars(self.problem).values()
        layout = layout_for(self.config.target, gated=self.activation.is_gated)
        key = (zlib.crc32(data.tobytes()), layout, n, k, group_size, self.config.mode)
        known = self.kernels.unpacked
        if key not in known:
            known[key] = PackedWeight(data.copy(), layout, n, k, group_size, self.config.mode).unpack()
        return known[key]

    def reference(self) -> npt.NDArray[Any]:
        """Return what the launch must compute."""
        a = memory_at(self.activations, (self.problem.m, self.problem.k), "<f2")
        bias = memory_at(self.bias, (self.problem.n,), "<f2") if self.bias else None
        residual = memory_at(self.residual, self.shape, "<f2") if self.residual else None
        exact = gemm_reference(
            a, self.weight(), alpha=self.alpha, bias=bias, activation=self.activation, residual=residual
        )
        return exact.astype(np.float16)

    def run(self) -> None:
        """Compute as the library's kernels do."""
        self.kernels.module.compute(self)


def compute(launched: Launched) -> None:
    """Write the right result."""
    launched.out[...] = launched.reference()


class Kernels(ExpertCalls):
    """The opened library of kernels, with the interface of the module's `KernelLibrary`."""

    invalid, unsupported = INVALID, UNSUPPORTED

    def __init__(self, module: FakeModule, _path: str) -> None:
        self.module, self.configs = module, module.configs
        self.unpacked: dict[object, QuantizedWeight] = {}
        self.accept = self._accept

    def _accept(self, call: Call) -> Outcome:
        if self.module.refusal is not None:
            return self.module.refusal
        self.module.expert_calls.append(call)
        self.module.stream_at(call.stream).launch(call)
        return OK

    def kernels(self) -> list[dict[str, object]]:
        return [
            {
                "name": config.name,
                "layout": TARGET_LAYOUTS[config.target],
                "stages": 4,
                "threads": 384,
                "shared_memory_bytes": 100_000,
                "grouped": config.is_grouped,
            }
            for config in self.configs
        ]

    def can_implement(self, kernel: int, *numbers: int) -> Outcome:
        why = why_cannot_run(self.configs[kernel], Problem(*numbers))
        return OK if why is None else (UNSUPPORTED, why)

    def packed_bytes(self, kernel: int, *numbers: int) -> Outcome:
        status, message = self.can_implement(kernel, 0, *numbers)
        if status:
            return status, message, 0
        config = self.configs[kernel]
        n, k, group_size = numbers
        return 0, "", PackedWeight(None, TARGET_LAYOUTS[config.target], n, k, group_size, config.mode).nbytes

    def workspace_bytes(self, kernel: int, *arguments: int) -> Outcome:
        *numbers, _sm_count, _device = arguments
        status, message = self.can_implement(kernel, *numbers)
        return (status, message, 0) if status else (0, "", self.module.workspace if numbers[0] else 0)

    def gemm(self, kernel: int, m: int, n: int, k: int, group_size: int, *arguments: Any) -> Outcome:
        assert not self.configs[kernel].is_grouped, "gemm runs no grouped kernel"
        launched = Launched(self, self.configs[kernel], Problem(m, n, k, group_size), *arguments)
        status, message, needed = self.workspace_bytes(kernel, m, n, k, group_size, 0, launched.device)
        if status:
            return status, message
        if launched.workspace_bytes < needed:
            found = launched.workspace_bytes
            return INVALID, f"workspace of {found} bytes must be at least {needed} bytes"
        if self.module.refusal is not None:
            return self.module.refusal
        self.module.launches.append(launched)
        self.module.stream_at(launched.stream).launch(launched)
        return OK

    def pack(self, kernel: int, n: int, k: int, group_size: int, *arguments: Any) -> Outcome:
        q, scales, zeros, target, size, faults, _stream, gated, _device = arguments
        mode = self.configs[kernel].mode
        shape = (k // group_size, n) if mode.is_grouped else (n,)
        added = memory_at(zeros, shape, "<f2") if zeros else None
        values = memory_at(q, (n, k), "|u1")
        if (values > MAX_Q).any():
            memory_at(faults, (1,), "<u4")[:] |= FakeModule.FAULT_VALUE
            return OK
        weight = QuantizedWeight(values, memory_at(scales, shape, "<f2"), added, group_size, mode)
        memory_at(target, (size,), "|u1")[:] = pack_weight(weight, gated=gated).data
        return OK

    def probe_read(self, *_: Any) -> Outcome:
        return OK

    def probe_multiply(self, rounds: int, *_: Any) -> Outcome:
        return 0, "", rounds * 10**9


class CallCache:
    """The module's class: repeats any call with a number of tokens that it has been told of."""

    def __init__(self, module: FakeModule, *_: Any) -> None:
        self._module = module
        self._known: set[tuple[int, int]] = set()

    def add(self, m: int, _kernel: int, epilogue: int) -> None:
        self._known.add((m, epilogue))

    def try_launch(self, *arguments: Any) -> str | None:
        *_, activation, residual = arguments
        call = CallEpilogue(Activation.of(activation), has_residual=residual is not None)
        if (arguments[0].shape[0], call.kernels.number) not in self._known:
            return None
        self._module.repeated.append(arguments)
        return "repeated"


class FakeModule(ModuleType):
    """The module; a test sets what its GPUs do."""

    INVALID_ARGUMENT, UNSUPPORTED, NO_HOPPER_GPU, CUDA_ERROR = INVALID, UNSUPPORTED, NO_HOPPER_GPU, CUDA_ERROR
    FAULT_VALUE, FAULT_RANGE = 1, 2

    def __init__(self, configs: Sequence[KernelConfig], devices: Sequence[Device]) -> None:
        super().__init__("_w4a16")
        self.configs = list(configs)
        self.found = list(devices)
        """The GPUs of the machine."""
        self.workspace = 0
        """The bytes that every launch needs."""
        self.refusal: Outcome | None = None
        """What the library answers instead of launching."""
        self.compute: Callable[[Launched], None] = compute
        """What a kernel does when it runs."""
        self.order: Callable[[Sequence[Work]], Sequence[Work]] = lambda recorded: recorded
        """The order in which a replay runs what a graph holds."""
        self.milliseconds = 1.0
        """What timing a replay gives."""
        self.launches: list[Launched] = []
        """Every launch of `gemm`, in the order of the calls."""
        self.expert_calls: list[Call] = []
        """Every call of the functions of experts, in their order."""
        self.repeated: list[tuple[Any, ...]] = []
        """The arguments of every call by the fast path."""
        self.graphs: list[list[Work]] = []
        """The launches of every captured graph."""
        self.streams: list[FakeStream] = [FakeStream(self, 0)]
        """The default stream, then those that were made."""
        self.buffers: weakref.WeakSet[Buffer] = weakref.WeakSet()
        self.DeviceBuffer = partial(Buffer, self)
        self.KernelLibrary = partial(Kernels, self)
        self.CallCache = partial(CallCache, self)
        self.Stream = self._new_stream

    def devices(self) -> list[dict[str, object]]:
        return [device.as_json() for device in self.found]

    def _new_stream(self, device: int) -> FakeStream:
        self.streams.append(FakeStream(self, device))
        return self.streams[-1]

    def stream_at(self, pointer: int) -> FakeStream:
        """Return the stream at an address, or the default one, which torch's also is."""
        return next((stream for stream in self.streams if stream.pointer == pointer), self.streams[0])

    @staticmethod
    def copy_to_host(pointer: int, host: np.ndarray, _stream: int, _device: int) -> Outcome:
        host[...] = memory_at(pointer, host.shape, host.dtype.str)
        return OK

    def is_capturing(self, pointer: int, _device: int) -> bool:
        return self.stream_at(pointer).is_capturing

    def pointer_device(self, pointer: int) -> int:
        for buffer in self.buffers:
            if buffer.pointer <= pointer < buffer.pointer + buffer.memory.size:
                return int(buffer.device)
        return -1
