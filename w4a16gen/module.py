"""Calling the kernels of a loaded build: arrays, choices, workspaces, and the launch."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from w4a16gen.arrays import ArrayView, DeviceArray, check, empty_like_library, stream_pointer, view
from w4a16gen.built import Build
from w4a16gen.chooser import Choice, Chooser
from w4a16gen.config import KernelConfig, QuantMode, Target
from w4a16gen.dispatch import is_in_block, kernels_in_use
from w4a16gen.errors import InvalidValueError, NoHopperGpuError, NotBuiltError
from w4a16gen.loaded import LoadedBuild, numbers_of
from w4a16gen.packing import TARGET_LAYOUTS, TOO_WIDE_RANGE, PackedWeight
from w4a16gen.problem import Problem
from w4a16gen.quantize import mode_and_group_size


class _Plan(NamedTuple):
    """What calls of `gemm` with weights of one shape and so many tokens share."""

    kernel: KernelConfig
    problem: Problem
    kernel_index: int
    numbers: tuple[int, int, int, int]
    packed_shape: tuple[int]
    output_shape: tuple[int, int]


class Library(LoadedBuild):
    """A loaded build with what it takes to call its kernels: buffers, choices, and calls that were made before."""

    def __init__(self, build: Build) -> None:
        """Open the library of a finished build.

        Raises:
            NotBuiltError: if it cannot be loaded, or holds other kernels than its manifest says.
        """
        super().__init__(build)
        self._workspaces: dict[tuple[int, int], list[DeviceArray]] = {}
        self._chooser = Chooser(build.folder, build.manifest)
        self._choice = lru_cache(maxsize=1 << 16)(self._choose)
        self._plan = lru_cache(maxsize=1 << 16)(self._make_plan)
        self._workspace_needed = lru_cache(maxsize=1 << 16)(self._ask_workspace)
        self._lock = threading.Lock()
        self._known_calls: dict[int, tuple[weakref.ref[PackedWeight], Any]] = {}
        """By a weight's id: the calls with it that `again` makes, until the weight is gone."""

    def to_device(self, value: Any, device: int = 0) -> Any:
        """Copy a numpy array, or a packed weight, to a GPU.

        Raises:
            NoHopperGpuError: if there is no such GPU.
        """
        if device not in {found["index"] for found in self.devices()}:
            raise NoHopperGpuError(f"there is no CUDA device {device} on this machine")
        if isinstance(value, PackedWeight):
            data = DeviceArray.from_host(self.module, np.asarray(value.data), device)
            return PackedWeight(data, value.layout, value.n, value.k, value.group_size, value.mode)
        return DeviceArray.from_host(self.module, np.asarray(value), device)

    def pack(
        self, q: Any, scales: Any, zeros: Any = None, *, group_size: int | None = None, stream: Any = None
    ) -> PackedWeight:
        """Pack a canonical weight that is on a GPU for the native kernels, there; returns when it is done.

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
        outcome = self.kernel_library.pack(
            self.index_of(config),
            *numbers_of(problem)[1:],
            *(seen["q"].pointer, seen["scales"].pointer, seen["zeros"].pointer if "zeros" in seen else 0),
            *(target.pointer, target.nbytes, faults.buffer.pointer, stream_pointer(stream, q), device),
        )
        self.result_of(outcome)
        found = int(faults.to_host()[0])
        if found & self.module.FAULT_VALUE:
            raise InvalidValueError("q holds values above 15; it must hold 0 to 15")
        if found & self.module.FAULT_RANGE:
            raise InvalidValueError(f"scales or zeros {TOO_WIDE_RANGE}")
        return PackedWeight(data, TARGET_LAYOUTS[Target.NATIVE], n, k, size, mode)

    def _native_kernel(self, mode: QuantMode) -> KernelConfig:
        """Give a native kernel of a mode: all pack alike."""
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
        """Launch C[m, n] = alpha * A[m, k] x W[k, n] + bias on a GPU; returns without waiting for it.

        Args:
            a: fp16 [m, k], contiguous, on a Hopper GPU: any array with `__cuda_array_interface__` or `__dlpack__`.
            w: the packed weight, on the same GPU.
            bias: fp16 [n] on the same GPU, or None.
            alpha: factor of the product, fp32.
            config: the kernel, or its name; None chooses one.
            out: fp16 [m, n] to write into; None allocates (a torch tensor for a torch tensor, else a DeviceArray).
            workspace: uint8 array of at least `workspace_bytes`; None keeps one per GPU and stream, which grows.
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
        usual = config is None and workspace is None and stream is None
        if usual:
            made = self.again(a, w, bias, out, alpha, dependent_launch)
            if made is not None:
                return made
        seen = view("activations", a, self.module)
        if len(seen.shape) != 2:  # noqa: PLR2004
            raise InvalidValueError(f"activations of shape {list(seen.shape)} must be [m, k]")
        data = view("packed weight", w.data, self.module)
        device = data.device or 0
        used = kernels_in_use() if config is None else ()
        plan = self._plan(seen.shape[0], w.n, w.k, w.group_size, w.mode, w.layout, config, used, device)
        check("activations", seen, dtype="<f2", shape=(seen.shape[0], w.k), device=data.device)
        check("packed weight", data, dtype="|u1", shape=plan.packed_shape)
        biased = None if bias is None else view("bias", bias, self.module)
        if biased is not None:
            check("bias", biased, dtype="<f2", shape=(w.n,), device=device)
        if out is None:
            out = empty_like_library(a, self.module, plan.output_shape, "<f2", device)
        target = view("output", out, self.module)
        check("output", target, dtype="<f2", shape=plan.output_shape, device=device)
        address = stream_pointer(stream, a)
        space = self._workspace(plan.kernel, plan.problem, workspace, device, address)
        outcome = self.kernel_library.gemm(
            plan.kernel_index,
            *plan.numbers,
            *(seen.pointer, data.pointer, plan.packed_shape[0]),
            *(0 if biased is None else biased.pointer, target.pointer, alpha),
            *((0, 0) if space is None else (space.pointer, space.nbytes)),
            *(address, dependent_launch, device),
        )
        self.result_of(outcome)
        if usual and space is None and not is_in_block():
            self._know(w, plan, device)
        return out

    def knows(self, w: PackedWeight) -> bool:
        """Whether a call with this weight, which is on a GPU then, has been made in the usual way."""
        return id(w) in self._known_calls

    def again(self, a: Any, w: PackedWeight, bias: Any, out: Any, alpha: float, dependent_launch: bool) -> Any:
        """Make a call of `gemm` like one that was made before, in half the time; or give None, with nothing done.

        For tensors of a library with DLPack's C exchange API (torch from 2.10 on): the module reads, allocates and
        launches by itself. Before, a call with this weight and as many tokens must have gone the long way; and
        whatever is wrong with a call sends it there, for the message.
        """
        known = self._known_calls.get(id(w))
        if known is None or is_in_block():
            return None
        return known[1].gemm(a, w.data, bias, out, alpha, dependent_launch)

    def _know(self, w: PackedWeight, plan: _Plan, device: int) -> None:
        """Let `again` make calls like one that has been made."""
        m, n, k, group_size = plan.numbers
        key = id(w)
        if m > 0:
            if key not in self._known_calls:
                calls = self.module.KnownCalls(self.kernel_library, n, k, group_size, plan.packed_shape[0], device)
                self._known_calls[key] = weakref.ref(w, lambda _: self._known_calls.pop(key, None)), calls
            self._known_calls[key][1].add(m, plan.kernel_index)

    def _make_plan(
        self,
        m: int,
        n: int,
        k: int,
        group_size: int,
        mode: QuantMode,
        layout: str,
        config: KernelConfig | str | None,
        _used: tuple[KernelConfig, ...],
        device: int,
    ) -> _Plan:
        """Find out what all calls with these arguments share. What `use_kernels` names is one of them."""
        problem = Problem(m, n, k, group_size)
        weight = PackedWeight(None, layout, n, k, group_size, mode)
        kernel = self.kernel_for(weight, problem, config, device=device)
        return _Plan(kernel, problem, self.index_of(kernel), numbers_of(problem), (weight.nbytes,), (m, n))

    def kernel_for(
        self, w: PackedWeight, problem: Problem, config: KernelConfig | str | None = None, *, device: int = 0
    ) -> KernelConfig:
        """Give the kernel that `gemm` launches: the one named, by the call or by `use_kernels`, or one chosen.

        It is chosen as `choice` says, and once: a table that is written later counts in the next process.

        Raises:
            InvalidValueError: if the kernel that is named reads other weights, or the name is none.
            NotBuiltError: if the build does not hold it.
            UnsupportedProblemError: if no built kernel can run the problem.
        """
        for used in kernels_in_use() if config is None else ():
            if used.mode is w.mode and TARGET_LAYOUTS[used.target] == w.layout:
                config = used
                break
        if config is None:
            return self._choice(w.mode, w.layout, problem, device)
        kernel = KernelConfig.parse(config) if isinstance(config, str) else config
        self.index_of(kernel)
        check_weight(kernel, w)
        return kernel

    def _choose(self, mode: QuantMode, layout: str, problem: Problem, device: int) -> KernelConfig:
        """Choose among the kernels that read a layout."""
        readable = [found for found in self.indices if TARGET_LAYOUTS[found.target] == layout]
        return self.choice(mode, problem, readable, device=device).kernel

    def choice(
        self, mode: QuantMode, problem: Problem, configs: Iterable[KernelConfig] | None = None, *, device: int = 0
    ) -> Choice:
        """Say which kernel a call gets that names none, and why.

        Args:
            mode: the mode.
            problem: the problem.
            configs: kernels to choose among; None takes all that are built.
            device: the GPU.

        Raises:
            UnsupportedProblemError: if none can run the problem.
        """
        gpu = next((found for found in self.devices() if found["index"] == device), None)
        return self._chooser.choice(self.configs() if configs is None else configs, mode, problem, gpu)

    def _ask_workspace(self, kernel: KernelConfig, problem: Problem, device: int) -> int:
        return self.workspace_bytes(kernel, problem, device=device)

    def _workspace(
        self, kernel: KernelConfig, problem: Problem, given: Any, device: int, stream: int
    ) -> ArrayView | None:
        if given is not None:
            seen = view("workspace", given, self.module)
            check("workspace", seen, dtype="|u1", shape=seen.shape, device=device)
            return seen
        needed = self._workspace_needed(kernel, problem, device)
        if needed == 0:
            return None
        with self._lock:
            # Work on one stream runs in order, so its launches may share; outgrown buffers may still be in use.
            buffers = self._workspaces.setdefault((device, stream), [])
            if not buffers or buffers[-1].buffer.bytes < needed:
                buffers.append(DeviceArray(self.module, (max(needed, 1 << 20),), "|u1", device))
            return view("workspace", buffers[-1], self.module)


def check_weight(kernel: KernelConfig, w: PackedWeight) -> None:
    """Raise unless a kernel reads weights of this mode and layout.

    Raises:
        InvalidValueError: naming both.
    """
    if kernel.mode is not w.mode:
        raise InvalidValueError(f"the weight is of mode {w.mode}, but {kernel.name} is of mode {kernel.mode}")
    if w.layout != TARGET_LAYOUTS[kernel.target]:
        raise InvalidValueError(
            f"the weight is packed as {w.layout}, but {kernel.name} reads {TARGET_LAYOUTS[kernel.target]}: "
            "pack it for that target"
        )
