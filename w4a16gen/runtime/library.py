"""A loaded build: its kernels described, chosen and called."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from w4a16gen.choose.chooser import Choice, Chooser
from w4a16gen.choose.overrides import kernels_in_use
from w4a16gen.choose.timing_table import TABLE
from w4a16gen.errors import InvalidValueError, NoHopperGpuError, NotBuiltError
from w4a16gen.kernels.config import KernelConfig, QuantMode, Target
from w4a16gen.kernels.device import Device
from w4a16gen.kernels.problem import Problem
from w4a16gen.runtime.arrays import DeviceArray, check, empty_like_library, record_stream, stream_pointer, view
from w4a16gen.runtime.artifact import Build
from w4a16gen.runtime.bindings import Bindings, KernelInfo, numbers_of
from w4a16gen.runtime.calls import LAYOUT_TARGETS, CallCache, GemmOptions, Launch, check_weight
from w4a16gen.runtime.devices import first_hopper
from w4a16gen.weights.layouts.fragments import TOO_WIDE_RANGE
from w4a16gen.weights.packed import TARGET_LAYOUTS, PackedWeight
from w4a16gen.weights.quantized import mode_and_group_size

_LAUNCHES_KEPT = 1 << 16


class Library:
    """A loaded build. Its methods may be called from several threads, for several GPUs, at once."""

    def __init__(self, build: Build) -> None:
        """Open the library of a finished build.

        Raises:
            NotBuiltError: if it cannot be loaded, or holds other kernels than its manifest says.
        """
        self.build = build
        self.bindings = Bindings(build)
        self.module = self.bindings.module
        """The pybind11 module: `Stream` and `DeviceBuffer` for programs without torch."""
        self.chooser = Chooser(build.content_hashes, build.folder / TABLE)
        self.calls = CallCache(self.bindings)
        self._indices = {info.config: index for index, info in enumerate(self.kernels)}
        self._launch = lru_cache(maxsize=_LAUNCHES_KEPT)(self._plan_launch)

    @property
    def kernels(self) -> tuple[KernelInfo, ...]:
        """What the library says of each kernel, in its order."""
        return self.bindings.kernels

    def configs(self) -> list[KernelConfig]:
        """Return the kernels that can be called, sorted."""
        return sorted(self._indices)

    def devices(self) -> list[Device]:
        """Return every CUDA GPU of this machine; empty where there is none."""
        return self.bindings.devices()

    def hopper_devices(self) -> list[Device]:
        """Return the GPUs that these kernels run on."""
        return [device for device in self.devices() if device.is_hopper]

    def hopper_device(self) -> Device:
        """Return the first GPU that these kernels run on.

        Raises:
            NoHopperGpuError: if there is none.
        """
        return first_hopper(self.devices())

    def why_cannot_run(self, config: KernelConfig, problem: Problem) -> str | None:
        """Return the sentence by which the built library refuses a problem, or None if it can run it. Needs no GPU."""
        return self.bindings.why_cannot_run(self.index_of(config), problem)

    def packed_bytes(self, config: KernelConfig, problem: Problem) -> int:
        """Return the bytes of the packed weight that a kernel reads. Needs no GPU."""
        return self.bindings.packed_bytes(self.index_of(config), problem)

    def workspace_bytes(
        self, config: KernelConfig, problem: Problem, *, sm_count: int | None = None, device: int = 0
    ) -> int:
        """Return the exact workspace of a problem, in bytes.

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
        return self.bindings.workspace_bytes(self.index_of(config), problem, sm_count or 0, device)

    def index_of(self, config: KernelConfig) -> int:
        """Return the number by which the library knows a kernel.

        Raises:
            NotBuiltError: if the build does not hold it.
        """
        try:
            return self._indices[config]
        except KeyError:
            raise NotBuiltError(
                f"{config.name} is not in {self.build.folder}: it holds {len(self._indices)} kernels, see "
                "`w4a16gen list --built`"
            ) from None

    def choose(
        self, problem: Problem, mode: QuantMode, *, target: Target | None = None, device: int | None = None
    ) -> Choice:
        """Return the kernel that a call of `gemm` gets if it names none, and why.

        Args:
            problem: the problem.
            mode: the weight's quantisation mode.
            target: the kernel family that reads the weight; None allows all that are built.
            device: the CUDA device number; None takes the first Hopper GPU, or none on a machine without one.

        Raises:
            NotBuiltError: if a kernel that `use_kernels` or W4A16GEN_KERNELS names is not built.
            UnsupportedProblemError: if none can run the problem.
        """
        return self.chooser.choose(problem, mode, target=target, device=self._device(device))

    def _device(self, index: int | None) -> Device | None:
        devices = self.devices()
        if index is None:
            return next((device for device in devices if device.is_hopper), None)
        return next((device for device in devices if device.index == index), None)

    def to_device(self, value: Any, device: int = 0) -> Any:
        """Copy a numpy array, or a packed weight, to a GPU.

        Raises:
            NoHopperGpuError: if there is no such GPU.
        """
        if device not in {found.index for found in self.devices()}:
            raise NoHopperGpuError(f"there is no CUDA device {device} on this machine")
        if isinstance(value, PackedWeight):
            data = DeviceArray.from_host(self.module, np.asarray(value.data), device)
            return PackedWeight(data, value.layout, value.n, value.k, value.group_size, value.mode)
        return DeviceArray.from_host(self.module, np.asarray(value), device)

    def pack(
        self, q: Any, scales: Any, zeros: Any = None, *, group_size: int | None = None, stream: Any = None
    ) -> PackedWeight:
        """Pack a canonical weight that is on a GPU for the native kernels, there; return when it is done.

        Args:
            q: uint8 [n, k], values 0 to 15, contiguous: any array with `__cuda_array_interface__` or `__dlpack__`.
            scales: fp16 [n] for per-column mode, or [k / group_size, n], on the same GPU.
            zeros: fp16 [k / group_size, n], (8 - zero point) * scale, or None.
            group_size: values of K per scale; None takes k / rows of the scales.
            stream: a stream object or address; None is torch's current stream for torch tensors, else the default.

        Returns:
            The packed weight, on the same GPU.

        Raises:
            InvalidValueError: if an array's dtype, shape, layout or device is off, a value of q is above 15, or a
                channel's scales or zeros span too wide a range for the layout.
            UnsupportedProblemError: if n, k or the group size are none that a kernel can run.
            NotBuiltError: if the build holds no native kernel of the mode.
        """
        seen = {"q": view("q", q, self.module), "scales": view("scales", scales, self.module)}
        if zeros is not None:
            seen["zeros"] = view("zeros", zeros, self.module)
        if len(seen["q"].shape) != 2:  # noqa: PLR2004
            raise InvalidValueError(f"q of shape {list(seen['q'].shape)} must be [n, k]")
        n, k = seen["q"].shape
        mode, size = mode_and_group_size(k, seen["scales"].shape, group_size, zeros=zeros is not None)
        shape = (k // size, n) if mode.is_grouped else (n,)
        device = seen["q"].device or 0
        for name, array in seen.items():
            is_q = name == "q"
            check(name, array, dtype="|u1" if is_q else "<f2", shape=(n, k) if is_q else shape, device=device)
        config = self._native_kernel(mode)
        problem = Problem(0, n, k, size)
        data = empty_like_library(q, self.module, (self.packed_bytes(config, problem),), "|u1", device)
        target = view("packed weight", data, self.module)
        faults = DeviceArray.from_host(self.module, np.zeros(1, np.uint32), device)
        outcome = self.bindings.library.pack(
            self.index_of(config),
            *numbers_of(problem)[1:],
            *(seen["q"].pointer, seen["scales"].pointer, seen["zeros"].pointer if "zeros" in seen else 0),
            *(target.pointer, target.nbytes, faults.buffer.pointer, stream_pointer(stream, q), device),
        )
        self.bindings.result_of(outcome)
        found = int(faults.to_host()[0])
        if found & self.module.FAULT_VALUE:
            raise InvalidValueError("q holds values above 15; it must hold 0 to 15")
        if found & self.module.FAULT_RANGE:
            raise InvalidValueError(f"scales or zeros {TOO_WIDE_RANGE}")
        return PackedWeight(data, TARGET_LAYOUTS[Target.NATIVE], n, k, size, mode)

    def _native_kernel(self, mode: QuantMode) -> KernelConfig:
        """Return a native kernel of a mode: all read the same layout."""
        found = [config for config in self.configs() if config.target is Target.NATIVE and config.mode is mode]
        if not found:
            raise NotBuiltError(f"no native kernel of mode {mode} is in {self.build.folder}: `w4a16gen build`")
        return found[0]

    def gemm(
        self,
        a: Any,
        w: PackedWeight,
        *,
        bias: Any = None,
        alpha: float = 1.0,
        config: KernelConfig | str | None = None,
        out: Any = None,
        workspace: Any = None,
        stream: Any = None,
        dependent_launch: bool = False,
    ) -> Any:
        """Launch C[m, n] = alpha * A[m, k] x W[k, n] + bias on a GPU; return without waiting for it.

        Args:
            a: fp16 [m, k], contiguous, on a Hopper GPU: any array with `__cuda_array_interface__` or `__dlpack__`.
            w: the packed weight, on the same GPU.
            bias: fp16 [n] on the same GPU, or None.
            alpha: factor of the product, fp32.
            config: the kernel, or its name; None chooses one.
            out: fp16 [m, n] to write into; None allocates (a torch tensor for a torch tensor, else a DeviceArray).
            workspace: uint8 array of at least `workspace_bytes`; None allocates it for the call, in stream order.
            stream: a stream object or address; None is torch's current stream for torch tensors, else the default.
            dependent_launch: let the kernel start and fetch weights while those before it on the stream still run
                (programmatic dependent launch). It waits for them before it reads anything else. Of dependent launches
                that follow one another, each may begin before the kernel that came before all of them has ended: what
                writes the weights must come before that one. Target `cutlass` does not use it.

        Returns:
            `out`.

        Raises:
            InvalidValueError: if an array's dtype, shape, layout, alignment or device is off, or the workspace short.
            UnsupportedProblemError: if the kernel, or every kernel, cannot run the problem.
            NoHopperGpuError: if the arrays are on another kind of GPU.
            CudaError: if the launch fails.
        """
        return self.run_call(a, w, GemmOptions(bias, alpha, config, out, workspace, stream, dependent_launch))

    def run_call(self, a: Any, w: PackedWeight, options: GemmOptions) -> Any:
        """Make one call of `gemm`: by the fast path if it can be repeated, otherwise with every check."""
        if options.may_repeat:
            repeated = self.calls.try_fast_path(
                a, w, options.bias, options.out, options.alpha, options.dependent_launch
            )
            if repeated is not None:
                return repeated
        seen = view("activations", a, self.module)
        if len(seen.shape) != 2:  # noqa: PLR2004
            raise InvalidValueError(f"activations of shape {list(seen.shape)} must be [m, k]")
        data = view("packed weight", w.data, self.module)
        device = data.device or 0
        overrides = kernels_in_use() if options.config is None else ()
        launch = self._launch(
            seen.shape[0], w.n, w.k, w.group_size, w.mode, w.layout, options.config, overrides, device
        )
        check("activations", seen, dtype="<f2", shape=(seen.shape[0], w.k), device=data.device)
        check("packed weight", data, dtype="|u1", shape=(launch.packed_bytes,))
        bias = None if options.bias is None else view("bias", options.bias, self.module)
        if bias is not None:
            check("bias", bias, dtype="<f2", shape=(w.n,), device=device)
        shape = (launch.problem.m, w.n)
        out = options.out
        if out is None:
            out = empty_like_library(a, self.module, shape, "<f2", device)
        output = view("output", out, self.module)
        check("output", output, dtype="<f2", shape=shape, device=device)
        address = stream_pointer(options.stream, a)
        workspace = self._workspace(launch, a, options, device)
        outcome = self.bindings.library.gemm(
            launch.kernel_index,
            *numbers_of(launch.problem),
            *(seen.pointer, data.pointer, launch.packed_bytes),
            *(0 if bias is None else bias.pointer, output.pointer, options.alpha),
            *((0, launch.workspace_bytes) if workspace is None else (workspace.pointer, workspace.nbytes)),
            *(address, options.dependent_launch, device),
        )
        self.bindings.result_of(outcome)
        if options.may_repeat:
            self.calls.add(w, launch, device)
        return out

    def _plan_launch(
        self,
        m: int,
        n: int,
        k: int,
        group_size: int,
        mode: QuantMode,
        layout: str,
        config: KernelConfig | str | None,
        overrides: tuple[KernelConfig, ...],
        device: int,
    ) -> Launch:
        problem = Problem(m, n, k, group_size)
        weight = PackedWeight(None, layout, n, k, group_size, mode)
        kernel = self._kernel_for(weight, problem, config, overrides, device)
        why = self.why_cannot_run(kernel, problem)
        workspace = 0 if why is not None else self.workspace_bytes(kernel, problem, device=device)
        return Launch(kernel, self.index_of(kernel), problem, weight.nbytes, workspace)

    def kernel_for(
        self, w: PackedWeight, problem: Problem, config: KernelConfig | str | None = None, *, device: int = 0
    ) -> KernelConfig:
        """Return the kernel that `gemm` launches: the one named, or the one that `choose` returns.

        Raises:
            InvalidValueError: if the kernel that is named reads other weights, or the name is no kernel's.
            NotBuiltError: if the build does not hold it.
            UnsupportedProblemError: if no built kernel can run the problem.
        """
        return self._kernel_for(w, problem, config, kernels_in_use() if config is None else (), device)

    def _kernel_for(
        self,
        w: PackedWeight,
        problem: Problem,
        config: KernelConfig | str | None,
        overrides: tuple[KernelConfig, ...],
        device: int,
    ) -> KernelConfig:
        if config is None:
            target = LAYOUT_TARGETS[w.layout]
            return self.chooser.choose(
                problem, w.mode, target=target, device=self._device(device), overrides=overrides
            ).kernel
        kernel = KernelConfig.parse(config) if isinstance(config, str) else config
        self.index_of(kernel)
        check_weight(kernel, w)
        return kernel

    def _workspace(self, launch: Launch, a: Any, options: GemmOptions, device: int) -> Any:
        """Return the workspace that was passed, or torch's for torch tensors; None leaves it to the module.

        Torch's allocator hands out memory in stream order, and inside a capture from the graph's own pool.
        """
        if options.workspace is not None:
            seen = view("workspace", options.workspace, self.module)
            check("workspace", seen, dtype="|u1", shape=seen.shape, device=device)
            return seen
        if launch.workspace_bytes == 0:
            return None
        allocated = empty_like_library(a, None, (launch.workspace_bytes,), "|u1", device)
        if allocated is None:
            return None
        if options.stream is not None:
            record_stream(allocated, stream_pointer(options.stream, a))
        return view("workspace", allocated, self.module)
