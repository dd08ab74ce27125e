"""The slow path of `gemm`: every check, the launch that the call's shapes ask for, and its output and workspace."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from w4a16gen.choose.overrides import kernels_in_use
from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.config import Epilogue, KernelConfig, QuantMode
from w4a16gen.runtime.arrays import ArrayView, check, check_activations_shape, view
from w4a16gen.runtime.bindings import Bindings, numbers_of
from w4a16gen.runtime.calls import CallCache, GemmOptions, Launch, check_kernel, checked_weight
from w4a16gen.runtime.streams import empty_like_library, is_torchs_stream, stream_pointer
from w4a16gen.weights.packed import PackedWeight

_LAUNCHES_KEPT = 1 << 16
Plan = Callable[[PackedWeight, int, KernelConfig | None, tuple[KernelConfig, ...], int, Epilogue], Launch]
"""Returns the launch for a weight, a number of tokens, the kernel that is named, overrides, a GPU, and an epilogue."""


class Launcher:
    """Launches of one build. Several threads may launch at once, for several GPUs."""

    def __init__(self, bindings: Bindings, calls: CallCache, plan: Plan) -> None:
        """Launch with this build.

        Args:
            bindings: the opened build.
            calls: where calls go that the fast path can repeat.
            plan: chooses the kernel of a launch and asks for its sizes.
        """
        self._bindings = bindings
        self._calls = calls
        self._plan = plan
        self._launch = lru_cache(maxsize=_LAUNCHES_KEPT)(self._plan_shape)

    def run(self, a: Any, w: PackedWeight, options: GemmOptions) -> Any:
        """Check a call of `gemm`, launch it, and return its output; see `Library.gemm`."""
        w = checked_weight(w)
        alpha, config, kind = options.scalars()
        epilogue = options.epilogue(w)
        module = self._bindings.module
        activations, packed = view("activations", a, module), view("packed weight", w.data, module)
        check_activations_shape(activations.shape, w.k)
        m, device = activations.shape[0], packed.device or 0
        check("activations", activations, dtype="<f2", shape=(m, w.k), device=packed.device)
        overrides = kernels_in_use() if config is None else ()
        needed = epilogue.kernels
        launch = self._launch(m, w.n, w.k, w.group_size, w.mode, w.layout, config, overrides, device, needed)
        check_kernel(launch.kernel, w, epilogue)
        check("packed weight", packed, dtype="|u1", shape=(launch.packed_bytes,))
        bias = None if options.bias is None else view("bias", options.bias, module)
        if bias is not None:
            check("bias", bias, dtype="<f2", shape=(w.n,), device=device)
            if bias.pointer == 0:  # which the library takes for no bias
                raise InvalidValueError("bias must not be null")
        shape = m, epilogue.outputs(w.n)
        residual = None if options.residual is None else view("residual", options.residual, module)
        if residual is not None:
            check("residual", residual, dtype="<f2", shape=shape, device=device)
            if residual.pointer == 0 and m > 0:  # which the library takes for no residual
                raise InvalidValueError("residual must not be null")
        stream = stream_pointer(options.stream, a)
        out = self._new_output(a, shape, device, stream) if options.out is None else options.out
        output = view("output", out, module)
        check("output", output, dtype="<f2", shape=shape, device=device, written=True)
        workspace = self._workspace(launch, a, options.workspace, device, stream)
        outcome = self._bindings.library.gemm(
            launch.kernel_index,
            *numbers_of(launch.problem),
            *(activations.pointer, packed.pointer, launch.packed_bytes),
            *(0 if bias is None else bias.pointer, output.pointer, alpha),
            *(epilogue.activation.number, 0 if residual is None else residual.pointer),
            *((0, launch.workspace_bytes) if workspace is None else (workspace.pointer, workspace.nbytes)),
            *(stream, kind, device),
        )
        self._bindings.result_of(outcome)
        if options.may_repeat:
            self._calls.add(options.remembered or w, launch, device, needed)
        return out

    def _plan_shape(  # noqa: PLR0913  (the key of the cache)
        self,
        m: int,
        n: int,
        k: int,
        group_size: int,
        mode: QuantMode,
        layout: str,
        config: KernelConfig | None,
        overrides: tuple[KernelConfig, ...],
        device: int,
        epilogue: Epilogue,
    ) -> Launch:
        return self._plan(PackedWeight(None, layout, n, k, group_size, mode), m, config, overrides, device, epilogue)

    def _new_output(self, a: Any, shape: tuple[int, int], device: int, stream: int) -> Any:
        """Allocate the output. Torch does it in the order of the stream, in a capture from the graph's own pool.

        Raises:
            InvalidValueError: if a graph would write to memory that is freed with the array.
        """
        module = self._bindings.module
        if not is_torchs_stream(a, stream) and module.is_capturing(stream, device):
            raise InvalidValueError("pass out= in a capture: the graph writes into it at every replay")
        return empty_like_library(a, module, shape, "<f2", device, stream=stream)

    def _workspace(self, launch: Launch, a: Any, given: Any, device: int, stream: int) -> ArrayView | None:
        """Return the workspace that was passed, or torch's if the launch is on torch's current stream.

        None leaves it to the module, which allocates in the order of the stream, or for the graph that is captured.
        """
        module = self._bindings.module
        if given is not None:
            seen = view("workspace", given, module)
            check("workspace", seen, dtype="|u1", shape=seen.shape, device=device, written=True)
            return seen
        if launch.workspace_bytes == 0 or not is_torchs_stream(a, stream):
            return None
        allocated = empty_like_library(a, module, (launch.workspace_bytes,), "|u1", device)
        return view("workspace", allocated, module)
