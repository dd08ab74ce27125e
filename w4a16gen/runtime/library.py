"""A loaded build: its kernels described, chosen and called."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, overload

import numpy as np

from w4a16gen.choose.cards import Card, card_of
from w4a16gen.choose.chooser import Choice, Chooser
from w4a16gen.choose.overrides import kernels_in_use
from w4a16gen.choose.timing_table import TABLE
from w4a16gen.errors import InvalidValueError, NoHopperGpuError, NotBuiltError
from w4a16gen.kernels.config import Epilogue, KernelConfig, QuantMode, Target
from w4a16gen.kernels.device import Device
from w4a16gen.kernels.epilogue import Activation
from w4a16gen.kernels.integers import integer
from w4a16gen.kernels.problem import Problem
from w4a16gen.runtime.arrays import DeviceArray, is_on_gpu, upload
from w4a16gen.runtime.artifact import Build
from w4a16gen.runtime.bindings import Bindings, KernelInfo, numbers_of
from w4a16gen.runtime.calls import CallCache, GemmOptions, Launch, check_weight, checked_launch, checked_weight
from w4a16gen.runtime.devices import first_hopper, why_no_device
from w4a16gen.runtime.expert_calls import MoeOptions
from w4a16gen.runtime.expert_rows import ExpertRows, RowLister
from w4a16gen.runtime.experts import ExpertLauncher
from w4a16gen.runtime.launcher import Launcher
from w4a16gen.runtime.packing import GpuPacker
from w4a16gen.runtime.typing import DependentLaunch
from w4a16gen.weights.experts import PackedExperts
from w4a16gen.weights.packed import LAYOUT_TARGETS, PackedWeight
from w4a16gen.weights.quantized import QuantizedWeight
from w4a16gen.wording import counted

_MAX_SM_COUNT = 1 << 16


class Library:
    """A loaded build. Its methods may be called from several threads, for several GPUs, at once."""

    def __init__(self, build: Build) -> None:
        """Open the library of a finished build.

        Args:
            build: what `load_build` returned; `w4a16gen.load` takes a folder.

        Raises:
            InvalidValueError: if it is not a Build.
            NotBuiltError: if it cannot be loaded.
        """
        if not isinstance(build, Build):
            raise InvalidValueError(
                f"build of type {type(build).__name__} must be a Build: w4a16gen.load takes a folder"
            )
        self.build = build
        self.bindings = Bindings(build)
        self.module = self.bindings.module
        """The pybind11 module: `Stream` and `DeviceBuffer` for programs without torch."""
        self.chooser = Chooser(build.content_hashes, build.folder / TABLE)
        self.calls = CallCache(self.bindings)
        self.launcher = Launcher(self.bindings, self.calls, self._plan_launch)
        self.packer = GpuPacker(self.bindings)
        self.row_lister = RowLister(self.bindings)
        self.experts = ExpertLauncher(self.bindings, self._card_of)
        self._indices = {info.config: index for index, info in enumerate(self.kernels)}

    @property
    def kernels(self) -> tuple[KernelInfo, ...]:
        """The library's description of each kernel, in its order."""
        return self.bindings.kernels

    def configs(self) -> list[KernelConfig]:
        """Return the kernels that `gemm` can call, sorted."""
        return sorted(config for config in self._indices if not config.is_grouped)

    def grouped_configs(self) -> list[KernelConfig]:
        """Return the kernels that `grouped_gemm` can call, sorted."""
        return sorted(config for config in self._indices if config.is_grouped)

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
        devices = self.devices()
        return first_hopper(devices, "" if devices else self.why_no_device())

    def why_no_device(self) -> str:
        """Return why `devices` is empty on a machine with GPUs, such as an old driver; empty if it has none."""
        return why_no_device(self.build.manifest.cuda_version)

    def why_cannot_run(self, config: KernelConfig, problem: Problem) -> str | None:
        """Return the sentence by which the built library refuses a problem, or None if it can run it. Needs no GPU.

        Args:
            config: the kernel.
            problem: the problem.

        Raises:
            NotBuiltError: if the build does not hold the kernel.
        """
        return self.bindings.why_cannot_run(self.index_of(config), problem)

    def packed_bytes(self, config: KernelConfig, problem: Problem) -> int:
        """Return the bytes of the packed weight that a kernel reads. Needs no GPU.

        Args:
            config: the kernel.
            problem: the problem; m does not matter.

        Raises:
            NotBuiltError: if the build does not hold the kernel.
            UnsupportedProblemError: if the kernel cannot run the problem.
        """
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
        index = integer("device", device)
        if sm_count is None:
            if index not in {found.index for found in self.devices()}:
                raise NoHopperGpuError(f"no CUDA device {index}: pass sm_count to ask for another machine's GPU")
            return self.bindings.workspace_bytes(self.index_of(config), problem, 0, index)
        count = integer("sm_count", sm_count)
        if not 0 < count < _MAX_SM_COUNT:
            raise InvalidValueError(f"sm_count of {count} must be at least 1 and below {_MAX_SM_COUNT}")
        return self.bindings.workspace_bytes(self.index_of(config), problem, count, 0)

    def index_of(self, config: KernelConfig | str) -> int:
        """Return the number by which the library knows a kernel.

        Raises:
            InvalidValueError: if it is no kernel.
            NotBuiltError: if the build does not hold it.
        """
        kernel = KernelConfig.of(config)
        try:
            return self._indices[kernel]
        except KeyError:
            raise NotBuiltError(
                f"{kernel.name} is not in {self.build.folder}: it holds {counted(len(self._indices), 'kernel')}, see "
                "`w4a16gen list --built`"
            ) from None

    def choose(
        self,
        problem: Problem,
        mode: QuantMode | str,
        *,
        target: Target | str | None = None,
        device: int | None = None,
        epilogue: Epilogue | str = Epilogue.NONE,
    ) -> Choice:
        """Return the kernel that a call of `gemm` gets if it names none, and why.

        Args:
            problem: the problem.
            mode: the weight's quantisation mode.
            target: the kernel family that reads the weight; None allows all that are built.
            device: the CUDA device number; None takes the first Hopper GPU, or none on a machine without one.
            epilogue: what the call needs: none, elementwise (an activation or a residual) or gated.

        Raises:
            InvalidValueError: if an argument is of another type.
            NotBuiltError: if a kernel that `use_kernels` or W4A16GEN_KERNELS names is not built, or none with the
                epilogue.
            UnsupportedProblemError: if none can run the problem.
        """
        numbers_of(problem)
        family = None if target is None else Target.parse(target)
        return self.chooser.choose(
            problem,
            QuantMode.parse(mode),
            target=family,
            device=self._device(device),
            epilogue=Epilogue.parse(epilogue),
        )

    def has_epilogue(self, mode: QuantMode | str, epilogue: Epilogue | str) -> bool:
        """Return whether the build has kernels of a mode with an epilogue.

        Args:
            mode: the quantisation mode.
            epilogue: none, elementwise or gated; see `choose`.

        Raises:
            InvalidValueError: if it is no mode, or no epilogue.
        """
        return self.chooser.has(QuantMode.parse(mode), Epilogue.parse(epilogue))

    def _device(self, index: int | None) -> Device | None:
        devices = self.devices()
        if index is None:
            return next((device for device in devices if device.is_hopper), None)
        number = integer("device", index)
        return next((device for device in devices if device.index == number), None)

    @overload
    def to_device(self, value: PackedWeight, device: int = 0) -> PackedWeight: ...

    @overload
    def to_device(self, value: PackedExperts, device: int = 0) -> PackedExperts: ...

    @overload
    def to_device(self, value: Any, device: int = 0) -> DeviceArray: ...

    def to_device(self, value: Any, device: int = 0) -> Any:
        """Copy a numpy array, a packed weight or packed experts to a GPU; see `w4a16gen.to_device`.

        Raises:
            InvalidValueError: if it is none of them, or on a GPU already.
            NoHopperGpuError: if there is no such GPU.
        """
        indices = {found.index for found in self.devices()}
        if not indices and (reason := self.why_no_device()):
            raise NoHopperGpuError(f"no GPU can be used: {reason}")
        if isinstance(value, QuantizedWeight):
            raise InvalidValueError("a QuantizedWeight is not read by kernels: pass w4a16gen.pack_weight(w)")
        if isinstance(value, PackedExperts):
            if is_on_gpu(value.data):
                raise InvalidValueError("the packed experts are on a GPU already")
            return replace(value, data=upload(self.module, "packed experts", value.data, device, indices))
        if not isinstance(value, PackedWeight):
            return upload(self.module, "value", value, device, indices)
        if is_on_gpu(value.data):
            raise InvalidValueError("the packed weight is on a GPU already: w.to_host() returns a host copy")
        return replace(value, data=upload(self.module, "packed data", value.host_data(), device, indices))

    def pack(
        self,
        q: Any,
        scales: Any,
        zeros: Any = None,
        *,
        zero_points: Any = None,
        group_size: int | None = None,
        stream: Any = None,
        gated: bool = False,
    ) -> PackedWeight:
        """Pack a canonical weight that is on a GPU for the native kernels, there; return when it is done.

        Args:
            q: uint8 [n, k], values 0 to 15, contiguous: any array with `__cuda_array_interface__` or `__dlpack__`.
            scales: fp16 [n] for per-column mode, or [k / group_size, n], on the same GPU.
            zeros: fp16 [k / group_size, n], (8 - zero point) * scale, or None.
            zero_points: integers of 0 to 15, [k / group_size, n], in place of the zeros; or None.
            group_size: values of K per scale; None takes k / rows of the scales.
            stream: a CUDA stream object or address; None is the current stream of torch or CuPy, else the default.
            gated: whether it is for gated activations; see `w4a16gen.pack`.

        Returns:
            The packed weight, on the same GPU.

        Raises:
            InvalidValueError: if an array's dtype, shape, layout or device is off, a value of q is above 15, a scale
                or zero is not finite, or a channel's scales or zeros span too wide a range for the layout.
            UnsupportedProblemError: if n, k or the group size are none that a kernel can run.
            NotBuiltError: if the build holds no native kernel of the mode.
        """
        return self.packer.pack(q, scales, zeros, zero_points, group_size, stream, gated=gated)

    def gemm(  # noqa: PLR0913  (the options of one call)
        self,
        a: Any,
        w: PackedWeight,
        *,
        bias: Any = None,
        alpha: float | np.floating[Any] = 1.0,
        config: KernelConfig | str | None = None,
        out: Any = None,
        workspace: Any = None,
        stream: Any = None,
        dependent_launch: DependentLaunch = False,
        activation: Activation | str | None = None,
        residual: Any = None,
    ) -> Any:
        """Launch C[m, n] = activation(alpha * A[m, k] x W[k, n] + bias) + residual on a GPU; do not wait for it.

        Args:
            a: fp16 [m, k], contiguous, on a Hopper GPU: any array with `__cuda_array_interface__` or `__dlpack__`.
            w: the packed weight, on the same GPU.
            bias: fp16 [n] on the same GPU, or None.
            alpha: factor of the product, fp32.
            config: the kernel, or its name; None chooses one.
            out: fp16 [m, n] to write into; None allocates (a torch tensor for a torch tensor, else a DeviceArray).
                Gated activations have n / 2 columns.
            workspace: uint8 array of at least `workspace_bytes`; None allocates it for the call, in stream order.
            stream: a CUDA stream object or address; None is the current stream of torch or CuPy, else the default.
            dependent_launch: let the kernel start and fetch weights while those before it on the stream still run
                (programmatic dependent launch). It waits for them before it reads anything else. Of dependent launches
                that follow one another, each may begin before the kernel that came before all of them has ended: what
                writes the weights must come before that one. Target `cutlass` does not use it. "auto" makes a launch
                dependent in a CUDA graph's capture, if it follows exactly one kernel that takes part: a native kernel
                of this package, or a dependent launch. Anywhere else it is ordinary. The bits stay the same.
            activation: the name of an Activation, or None. It needs a kernel with an epilogue, as
                `w4a16gen build --epilogue none --epilogue elementwise --epilogue gated` builds.
            residual: fp16 of the output's shape on the same GPU, possibly `out` itself, or None. It needs a kernel with
                an epilogue too.

        Returns:
            `out`.

        Raises:
            InvalidValueError: if an array's dtype, shape, layout, alignment or device is off, or the workspace short.
            UnsupportedProblemError: if the kernel, or every kernel, cannot run the problem.
            NotBuiltError: if no kernel that is built has the epilogue of the call.
            NoHopperGpuError: if the arrays are on another kind of GPU.
            CudaError: if the launch fails.
        """
        if config is None and workspace is None and stream is None:
            repeated = self.calls.try_fast_path(a, w, bias, out, alpha, dependent_launch, activation, residual)
            if repeated is not None:
                return repeated
        options = GemmOptions(bias, alpha, config, out, workspace, stream, dependent_launch, activation, residual)
        return self.launcher.run(a, w, options)

    def route_tokens(
        self,
        topk_ids: Any,
        experts: int,
        tile_tokens: int,
        *,
        expert_map: Any = None,
        stream: Any = None,
        dependent_launch: DependentLaunch = False,
    ) -> ExpertRows:
        """Launch the sorting of routes by expert, for `grouped_gemm`; do not wait for it.

        A route is a token's choice of an expert; its number is token * slots + slot. Rows are routes in the order of
        their experts, and within an expert in the order of their numbers.

        Args:
            topk_ids: int32 or int64 [tokens, slots], contiguous, on a Hopper GPU: the expert of each route. Other
                numbers, such as -1, are routes to no expert.
            experts: number of experts here, at most 1024.
            tile_tokens: CTA tokens of the kernels that will read the rows.
            expert_map: int32 [all experts] on the same GPU: the expert here for each id, or -1; None if ids are those.
            stream: a CUDA stream object or address; None is the current stream of torch or CuPy, else the default.
            dependent_launch: see `gemm`.

        Returns:
            The rows. Their arrays are on the GPU and are complete when the launch is. Without tokens all offsets are 0.

        Raises:
            InvalidValueError: if an array's dtype, shape, layout or device is off, or a number is out of range.
            UnsupportedProblemError: if the build has no grouped kernels.
            NoHopperGpuError: if the arrays are on another kind of GPU.
            CudaError: if the launch fails.
        """
        kind = checked_launch(dependent_launch)
        return self.row_lister.route_tokens(topk_ids, experts, tile_tokens, expert_map, stream, launch=kind)

    def list_rows(
        self,
        rows: int,
        tile_tokens: int,
        *,
        offsets: Any = None,
        counts: Any = None,
        stride: int | None = None,
        indices: Any = None,
        experts: int | None = None,
        stream: Any = None,
        dependent_launch: DependentLaunch = False,
    ) -> ExpertRows:
        """Launch the listing of experts' rows that are known already, for `grouped_gemm`; do not wait for it.

        Args:
            rows: rows of the activations. Rows of an expert that lie outside are left out.
            tile_tokens: CTA tokens of the kernels that will read the list.
            offsets: int32 [experts + 1] on a Hopper GPU: expert e has the rows offsets[e] to offsets[e + 1] - 1.
            counts: int32 [experts] there instead: expert e has counts[e] rows, from row e * stride on.
            stride: rows from one expert to the next, with counts.
            indices: int32 [rows] there instead: the expert of each row, or -1, as DeepGEMM's `m_indices`. The rows of
                an expert follow one another.
            experts: number of experts, with indices.
            stream: a CUDA stream object or address; None is the current stream of torch or CuPy, else the default.
            dependent_launch: see `gemm`.

        Raises:
            InvalidValueError: if an array's dtype, shape, layout or device is off, or a number is out of range.
            UnsupportedProblemError: if the build has no grouped kernels.
            NoHopperGpuError: if the arrays are on another kind of GPU.
            CudaError: if the launch fails.
        """
        kind = checked_launch(dependent_launch)
        return self.row_lister.list_rows(
            offsets, counts, stride, indices, experts, rows, tile_tokens, stream, launch=kind
        )

    def grouped_gemm(  # noqa: PLR0913  (the options of one call)
        self,
        a: Any,
        w: PackedExperts,
        rows: ExpertRows,
        *,
        bias: Any = None,
        alpha: float | np.floating[Any] = 1.0,
        config: KernelConfig | str | None = None,
        activation: Activation | str | None = None,
        out: Any = None,
        stream: Any = None,
        dependent_launch: DependentLaunch = False,
    ) -> Any:
        """Launch the product of each row with the weight of its expert; do not wait for it.

        Args:
            a: fp16 [rows, k], contiguous, on a Hopper GPU.
            w: the packed experts, on the same GPU.
            rows: what `route_tokens` or `list_rows` returned.
            bias: fp16 [experts, n] on the same GPU, or None.
            alpha: factor of the products, fp32.
            config: the kernel, or its name; None chooses one. Its CTA tokens must be those of `rows`.
            activation: swiglu, geglu_tanh or geglu for experts that are packed with gated=True, otherwise None.
            out: fp16 [rows, n] to write into, of gated experts [rows, n / 2]; None allocates. Rows of no expert are not
                written.
            stream: a CUDA stream object or address; None is the current stream of torch or CuPy, else the default.
            dependent_launch: see `gemm`.

        Returns:
            `out`.

        Raises:
            InvalidValueError: if an array's dtype, shape, layout, alignment or device is off.
            UnsupportedProblemError: if no kernel can run the product.
            NotBuiltError: if the build has no such grouped kernel.
            NoHopperGpuError: if the arrays are on another kind of GPU.
            CudaError: if the launch fails.
        """
        options = GemmOptions(bias, alpha, config, out, None, stream, dependent_launch, activation)
        return self.experts.grouped_gemm(a, w, rows, options)

    def moe(  # noqa: PLR0913  (the options of one call)
        self,
        hidden: Any,
        w13: PackedExperts,
        w2: PackedExperts,
        topk_ids: Any,
        topk_weights: Any,
        *,
        expert_map: Any = None,
        activation: str = "silu",
        weight_on_input: bool = False,
        invariant: bool = False,
        out: Any = None,
        workspace: Any = None,
        stream: Any = None,
        dependent_launch: DependentLaunch = False,
    ) -> Any:
        """Launch a layer of experts; do not wait for it, nor for anything on the GPU.

        out[t] = sum over the slots s of weights[t, s] * (act(x Wg) * (x Wu)) Wd, with the experts ids[t, s]. Products
        are rounded to fp16, as is what the activation returns. The sum is in fp32, in the order of the slots. Equal
        calls give equal bits. A captured call may be replayed with other hidden states, ids and weights.

        Args:
            hidden: fp16 [tokens, hidden], contiguous, on a Hopper GPU.
            w13: gate and up projections of the experts here, on the same GPU: `pack_experts(gate, up)`. Packed with
                gated=True, kernels with epilogue gated apply the gate themselves. Without those in the build, and for
                other weights, a launch between the products does.
            w2: down projections of the same experts, of the same mode.
            topk_ids: int32 or int64 [tokens, slots]: the expert of each route. Other numbers, such as -1, are skipped.
            topk_weights: fp32 [tokens, slots].
            expert_map: int32 [all experts]: the expert here for each id, or -1; None if ids are those.
            activation: function of the gate: silu, gelu or gelu_tanh.
            weight_on_input: multiply the hidden states by the weights instead of the results.
            invariant: choose the kernels without regard to the number of tokens, so that a token's result does not
                depend on the others.
            out: fp16 [tokens, hidden] to write into, possibly `hidden` itself; None allocates. Tokens without experts
                get 0.
            workspace: uint8 array of at least `moe_workspace_bytes`, of any content; None allocates it for the call.
            stream: a CUDA stream object or address; None is the current stream of torch or CuPy, else the default.
            dependent_launch: see `gemm`; that of the first kernel. The others always are.

        Returns:
            `out`.

        Raises:
            InvalidValueError: if an array's dtype, shape, layout, alignment or device is off, or the workspace short.
            UnsupportedProblemError: if no kernel can run a product.
            NotBuiltError: if the build has no grouped kernels for it.
            NoHopperGpuError: if the arrays are on another kind of GPU.
            CudaError: if a launch fails.
        """
        options = MoeOptions(
            expert_map, activation, weight_on_input, invariant, out, workspace, stream, dependent_launch
        )
        return self.experts.moe(hidden, w13, w2, topk_ids, topk_weights, options)

    def moe_workspace_bytes(
        self,
        tokens: int,
        slots: int,
        w13: PackedExperts,
        w2: PackedExperts,
        *,
        global_experts: int | None = None,
        invariant: bool = False,
        device: int = 0,
    ) -> int:
        """Return the workspace of a layer of experts, in bytes.

        Args:
            tokens: rows of the hidden states.
            slots: experts of a token.
            w13: gate and up projections; only their sizes matter.
            w2: down projections; only their sizes matter.
            global_experts: entries of the map of experts; None without a map.
            invariant: as in `moe`.
            device: the CUDA device number.

        Raises:
            InvalidValueError: if a size is out of range, or the weights do not fit together.
            NotBuiltError: if the build has no grouped kernels for it.
            UnsupportedProblemError: if no kernel can run a product.
        """
        return self.experts.workspace_bytes(
            tokens, slots, w13, w2, global_experts=global_experts, invariant=invariant, device=device
        )

    @cache  # noqa: B019  (libraries live as long as their process)
    def _card_of(self, index: int) -> Card:
        return card_of(self._device(index))

    def _plan_launch(
        self,
        w: PackedWeight,
        m: int,
        config: KernelConfig | None,
        overrides: tuple[KernelConfig, ...],
        device: int,
        epilogue: Epilogue,
    ) -> Launch:
        problem = Problem(m, w.n, w.k, w.group_size)
        kernel = self._kernel_for(w, problem, config, overrides, device, epilogue)
        why = self.why_cannot_run(kernel, problem)
        workspace = 0 if why is not None else self.workspace_bytes(kernel, problem, device=device)
        return Launch(kernel, self.index_of(kernel), problem, w.nbytes, workspace)

    def kernel_for(
        self,
        w: PackedWeight,
        problem: Problem,
        config: KernelConfig | str | None = None,
        *,
        device: int = 0,
        epilogue: Epilogue | str | None = None,
    ) -> KernelConfig:
        """Return the kernel that `gemm` launches: the one named, or the one that `choose` returns.

        Args:
            w: the packed weight; only its layout and mode matter.
            problem: the problem.
            config: the kernel, or its name; None chooses one.
            device: the CUDA device number.
            epilogue: what the call needs; None is gated for a weight that was packed with gated=True, else none.

        Raises:
            InvalidValueError: if the kernel that is named reads other weights, or the name is no kernel's.
            NotBuiltError: if the build does not hold it.
            UnsupportedProblemError: if no built kernel can run the problem.
        """
        numbers_of(problem)
        named = None if config is None else KernelConfig.of(config)
        of_weight = Epilogue.GATED if checked_weight(w).gated else Epilogue.NONE
        needed = of_weight if epilogue is None else Epilogue.parse(epilogue)
        return self._kernel_for(w, problem, named, kernels_in_use() if named is None else (), device, needed)

    def _kernel_for(
        self,
        w: PackedWeight,
        problem: Problem,
        config: KernelConfig | None,
        overrides: tuple[KernelConfig, ...],
        device: int,
        epilogue: Epilogue,
    ) -> KernelConfig:
        if config is None:
            target, gpu = LAYOUT_TARGETS[w.layout], self._device(device)
            choice = self.chooser.choose(
                problem, w.mode, target=target, device=gpu, overrides=overrides, epilogue=epilogue
            )
            return choice.kernel
        self.index_of(config)
        check_weight(config, w)
        return config
