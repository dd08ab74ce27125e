"""The functions that most programs need: load the default build, pack, move arrays, multiply."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt

from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.config import KernelConfig, Target
from w4a16gen.kernels.epilogue import Activation
from w4a16gen.runtime.arrays import DeviceArray, is_on_gpu
from w4a16gen.runtime.artifact import Build, load_build
from w4a16gen.runtime.calls import GemmOptions, checked_weight
from w4a16gen.runtime.expert_calls import MoeOptions, check_packed
from w4a16gen.runtime.expert_rows import ExpertRows
from w4a16gen.runtime.folders import load_default_build
from w4a16gen.runtime.host import gemm_on_host
from w4a16gen.runtime.host_experts import moe_on_host
from w4a16gen.runtime.library import Library
from w4a16gen.weights import packed as packing
from w4a16gen.weights.experts import PackedExperts
from w4a16gen.weights.packed import PackedWeight
from w4a16gen.weights.storage import as_path

if TYPE_CHECKING:
    from w4a16gen.runtime.typing import DependentLaunch, GpuArray, OutT, Tensor, TensorT


def load(folder: Path | str | None = None) -> Library:
    """Load a finished build. The same build is loaded once per process.

    A build is code: name only folders whose writers you trust.

    Args:
        folder: the build's folder; None takes W4A16GEN_BUILD_DIR, or `build` in the current folder, or an installed
            wheel of kernels. Functions that use the default build look for it when they first need it, and again when
            this is called without a folder.

    Returns:
        The loaded library. A folder that was built again since gives a new one.

    Raises:
        InvalidValueError: if the folder is neither text nor a path.
        NotBuiltError: if there is no usable build in the folder. Without a folder, also if the build in the current
            folder may have been written by another user.

    Example:
        >>> import w4a16gen
        >>> library = w4a16gen.load("build")  # doctest: +SKIP
        >>> print(library.configs()[0])  # doctest: +SKIP
        w4a16_sm90_native_cs_cta64x8x128_cluster1x1x1_warps8_persistent
    """
    if folder is not None:
        return _open(load_build(as_path("folder", folder)))
    _InUse.library = _open(load_default_build())
    return _InUse.library


class _InUse:
    """The default build. It is not looked for at each call: that takes longer than a launch."""

    library: Library | None = None


def library_in_use() -> Library:
    """Return the default build, loaded if no call has needed it yet; see `load`."""
    return load() if _InUse.library is None else _InUse.library


_opened: dict[tuple[Path, str, str], Library] = {}
"""By folder and digests, so that a folder that was built again is opened again."""
_opening = threading.Lock()


def _open(build: Build) -> Library:
    manifest = build.manifest
    key = build.folder.resolve(), manifest.library_sha256, manifest.module_sha256
    with _opening:
        if key not in _opened:
            _opened[key] = Library(build)
        return _opened[key]


def configs() -> list[KernelConfig]:
    """Return the kernels of the default build, sorted; see `load`.

    Raises:
        NotBuiltError: if there is no usable build.

    Example:
        >>> import w4a16gen
        >>> [config.name for config in w4a16gen.configs()]  # doctest: +SKIP
        ['w4a16_sm90_native_cs_cta64x8x128_cluster1x1x1_warps8_persistent', ...]
    """
    return library_in_use().configs()


@overload
def to_device(value: PackedWeight, device: int = 0) -> PackedWeight: ...


@overload
def to_device(value: PackedExperts, device: int = 0) -> PackedExperts: ...


@overload
def to_device(value: npt.NDArray[Any] | Tensor, device: int = 0) -> DeviceArray: ...


def to_device(value: Any, device: int = 0) -> Any:
    """Copy a packed weight, packed experts or an array from the host to a GPU, through the default build's module.

    Args:
        value: a PackedWeight, PackedExperts, a numpy array, or a torch tensor in host memory.
        device: the CUDA device number.

    Returns:
        A PackedWeight or PackedExperts for what is packed, else a DeviceArray. Torch and CuPy read all without a copy.

    Raises:
        InvalidValueError: if it is no array, or on a GPU already.
        NoHopperGpuError: if there is no such GPU.
        NotBuiltError: if there is no usable build.

    Example:
        >>> import w4a16gen
        >>> packed = w4a16gen.PackedWeight.load("layer.safetensors")  # doctest: +SKIP
        >>> on_gpu = w4a16gen.to_device(packed)  # doctest: +SKIP
    """
    return library_in_use().to_device(value, device)


def pack(
    q: Any,
    scales: Any,
    zeros: Any = None,
    *,
    zero_points: Any = None,
    group_size: int | None = None,
    target: Target | str = Target.NATIVE,
    gated: bool = False,
) -> PackedWeight:
    """Pack a weight that is quantised already, for the kernels of a target, on the host or on a GPU.

    The weight is (q - 8) * scale + zero. GPTQ's and AWQ's (q - zero point) * scale is the same with
    zero = (8 - zero point) * scale: pass `zero_points`, and the zeros are computed, rounded once to fp16.

    Args:
        q: integers of 0 to 15, [n, k], output channels first; uint8 on a GPU.
        scales: fp16 [n] for per-column mode, or [k / group_size, n].
        zeros: fp16 [k / group_size, n], (8 - zero point) * scale, or None.
        zero_points: integers of 0 to 15, [k / group_size, n], in place of the zeros; or None.
        group_size: values of K per scale; None takes k / rows of the scales.
        target: the kernel family that will read it, `native` or `cutlass`; on a GPU only `native`.
        gated: whether it is for gated activations (swiglu, geglu_tanh, geglu): the first half of its channels gates
            the second, and n is a multiple of 16. Only for target `native`.

    Returns:
        The packed weight in the memory that q is in; `to_device` moves it from the host to a GPU.

    Raises:
        InvalidValueError: if a dtype, a shape or a value is off, or the target packs on the host only.
        NotBuiltError: if q is on a GPU and no native kernel of the mode is built.

    Example:
        >>> import numpy as np
        >>> import w4a16gen
        >>> q = np.full((64, 256), 9, np.uint8)
        >>> scales = np.full((2, 64), 0.5, np.float16)
        >>> packed = w4a16gen.pack(q, scales, zero_points=np.full((2, 64), 7))
        >>> float(w4a16gen.gemm(np.ones((1, 256), np.float16), packed)[0, 0])
        256.0
    """
    family = Target.parse(target)
    if not is_on_gpu(q):
        return packing.pack(
            q, scales, zeros, zero_points=zero_points, group_size=group_size, target=family, gated=gated
        )
    if family is not Target.NATIVE:
        raise InvalidValueError(f"weights for target {family} are packed on the host only: copy q there")
    return library_in_use().pack(q, scales, zeros, zero_points=zero_points, group_size=group_size, gated=gated)


def route_tokens(
    topk_ids: Any,
    experts: int,
    tile_tokens: int,
    *,
    expert_map: Any = None,
    stream: Any = None,
    dependent_launch: DependentLaunch = False,
) -> ExpertRows:
    """Launch the sorting of routes by expert with the default build, for `grouped_gemm`; do not wait for it.

    `Library.route_tokens` has the details and the errors.

    Args:
        topk_ids: int32 or int64 [tokens, slots] on a Hopper GPU: the expert of each route. Others are skipped.
        experts: number of experts here, at most 1024.
        tile_tokens: CTA tokens of the kernels that will read the rows.
        expert_map: int32 [all experts]: the expert here for each id, or -1; None if ids are those.
        stream: a CUDA stream object or address; None is the current stream of torch or CuPy, else the default.
        dependent_launch: see `gemm`.

    Example:
        >>> import torch, w4a16gen  # doctest: +SKIP
        >>> ids = torch.tensor([[2, 0], [0, -1]], device="cuda")  # doctest: +SKIP
        >>> w4a16gen.route_tokens(ids, experts=3, tile_tokens=8).offsets.to_host()  # doctest: +SKIP
        array([0, 2, 2, 3], dtype=int32)
    """
    return library_in_use().route_tokens(
        topk_ids, experts, tile_tokens, expert_map=expert_map, stream=stream, dependent_launch=dependent_launch
    )


def list_rows(
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
    """Launch the listing of experts' rows that are known with the default build, for `grouped_gemm`; do not wait.

    `Library.list_rows` has the details and the errors.

    Args:
        rows: rows of the activations.
        tile_tokens: CTA tokens of the kernels that will read the list.
        offsets: int32 [experts + 1] on a Hopper GPU: expert e has the rows offsets[e] to offsets[e + 1] - 1.
        counts: int32 [experts] there instead: expert e has counts[e] rows, from row e * stride on.
        stride: rows from one expert to the next, with counts.
        indices: int32 [rows] there instead: the expert of each row, or -1, as DeepGEMM's `m_indices`. The rows of an
            expert follow one another.
        experts: number of experts, with indices.
        stream: a CUDA stream object or address; None is the current stream of torch or CuPy, else the default.
        dependent_launch: see `gemm`.

    Example:
        >>> import torch, w4a16gen  # doctest: +SKIP
        >>> counts = torch.tensor([3, 0, 7], dtype=torch.int32, device="cuda")  # doctest: +SKIP
        >>> w4a16gen.list_rows(rows=48, tile_tokens=8, counts=counts, stride=16).experts  # doctest: +SKIP
        3
    """
    return library_in_use().list_rows(
        rows,
        tile_tokens,
        offsets=offsets,
        counts=counts,
        stride=stride,
        indices=indices,
        experts=experts,
        stream=stream,
        dependent_launch=dependent_launch,
    )


def grouped_gemm(  # noqa: PLR0913  (the options of one call)
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
    """Launch the product of each row with the weight of its expert with the default build; do not wait for it.

    `Library.grouped_gemm` has the details and the errors.

    Args:
        a: fp16 [rows, k], contiguous, on a Hopper GPU.
        w: the packed experts, on the same GPU.
        rows: what `route_tokens` or `list_rows` returned.
        bias: fp16 [experts, n], or None.
        alpha: factor of the products, fp32.
        config: the kernel, or its name; None chooses one. Its CTA tokens must be those of `rows`.
        activation: swiglu, geglu_tanh or geglu for experts that are packed with gated=True, otherwise None.
        out: fp16 [rows, n], or of gated experts [rows, n / 2]; None allocates. Rows of no expert are not written.
        stream: a CUDA stream object or address; None is the current stream of torch or CuPy, else the default.
        dependent_launch: see `gemm`.

    Example:
        >>> import torch, w4a16gen  # doctest: +SKIP
        >>> rows = w4a16gen.route_tokens(topk_ids, experts=w.experts, tile_tokens=16)  # doctest: +SKIP
        >>> w4a16gen.grouped_gemm(a, w, rows).shape  # doctest: +SKIP
        torch.Size([32, 1536])
    """
    options = GemmOptions(bias, alpha, config, out, None, stream, dependent_launch, activation)
    return library_in_use().experts.grouped_gemm(a, w, rows, options)


def moe(  # noqa: PLR0913  (the options of one call)
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
    """Compute a layer of experts: the sum over a token's slots of weight * (act(x Wg) * (x Wu)) Wd.

    On arrays in GPU memory this launches grouped kernels of the default build and waits for nothing; `Library.moe` has
    the roundings. On arrays in host memory, numpy's or torch's, it runs the numpy reference (float64, rounded once to
    fp16), on any machine and without a build; invariant, workspace, stream and dependent_launch have no effect there.

    Args:
        hidden: fp16 [tokens, hidden], contiguous.
        w13: gate and up projections, in the same memory: `pack_experts(gate, up)`. Packed with gated=True,
            kernels with epilogue gated apply the gate themselves. Without those in the build, and for other weights, a
            launch between the products does.
        w2: down projections of the same experts, of the same mode.
        topk_ids: int32 or int64 [tokens, slots]: the expert of each route. Other numbers, such as -1, are skipped.
        topk_weights: fp32 [tokens, slots].
        expert_map: int32 [all experts]: the expert here for each id, or -1; None if ids are those.
        activation: function of the gate: silu, gelu or gelu_tanh.
        weight_on_input: multiply the hidden states by the weights instead of the results.
        invariant: choose the kernels without regard to the number of tokens, so that a token's result does not depend
            on the others.
        out: fp16 [tokens, hidden] to write into, possibly `hidden` itself; None allocates.
        workspace: uint8 array of at least `Library.moe_workspace_bytes`; None allocates it for the call.
        stream: a CUDA stream object or address; None is the current stream of torch or CuPy, else the default.
        dependent_launch: see `gemm`; that of the first kernel. The others always are.

    Returns:
        `out` if it was passed. Otherwise a new array: a torch tensor for a torch tensor, a numpy array for a numpy
        array, else a DeviceArray.

    Raises:
        InvalidValueError: if the arrays do not fit together, or some are on the host and some on a GPU.
        UnsupportedProblemError: if no kernel can run a product.
        NotBuiltError: if the arrays are on a GPU and the build has no grouped kernels for it.
        NoHopperGpuError: if the arrays are on another kind of GPU.
        CudaError: if a launch fails.

    Example:
        >>> import numpy as np
        >>> import w4a16gen
        >>> weights = [w4a16gen.quantize(np.eye(64) * (1 + i), group_size=32) for i in range(4)]
        >>> w13, w2 = w4a16gen.pack_experts(weights, weights), w4a16gen.pack_experts(weights)
        >>> ids, weights = np.array([[0, 3], [2, -1]]), np.full((2, 2), 0.5, np.float32)
        >>> w4a16gen.moe(np.ones((2, 64), np.float16), w13, w2, ids, weights).shape
        (2, 64)
    """
    options = MoeOptions(expert_map, activation, weight_on_input, invariant, out, workspace, stream, dependent_launch)
    check_packed("w13", w13)
    check_packed("w2", w2)
    if any(is_on_gpu(array) for array in (hidden, w13.data, w2.data)):
        return library_in_use().experts.moe(hidden, w13, w2, topk_ids, topk_weights, options)
    return moe_on_host(hidden, w13, w2, topk_ids, topk_weights, options)


@overload
def gemm(
    a: npt.NDArray[Any],
    w: PackedWeight,
    *,
    bias: npt.NDArray[np.float16] | None = None,
    alpha: float | np.floating[Any] = 1.0,
    config: KernelConfig | str | None = None,
    out: npt.NDArray[np.float16] | None = None,
    workspace: None = None,
    stream: None = None,
    dependent_launch: DependentLaunch = False,
    activation: Activation | str | None = None,
    residual: npt.NDArray[np.float16] | None = None,
) -> npt.NDArray[np.float16]: ...


@overload
def gemm(
    a: TensorT,
    w: PackedWeight,
    *,
    bias: TensorT | None = None,
    alpha: float | np.floating[Any] = 1.0,
    config: KernelConfig | str | None = None,
    out: TensorT | None = None,
    workspace: Any = None,
    stream: Any = None,
    dependent_launch: DependentLaunch = False,
    activation: Activation | str | None = None,
    residual: TensorT | None = None,
) -> TensorT: ...


@overload
def gemm(
    a: GpuArray,
    w: PackedWeight,
    *,
    bias: Any = None,
    alpha: float | np.floating[Any] = 1.0,
    config: KernelConfig | str | None = None,
    out: None = None,
    workspace: Any = None,
    stream: Any = None,
    dependent_launch: DependentLaunch = False,
    activation: Activation | str | None = None,
    residual: Any = None,
) -> DeviceArray: ...


@overload
def gemm(
    a: GpuArray,
    w: PackedWeight,
    *,
    bias: Any = None,
    alpha: float | np.floating[Any] = 1.0,
    config: KernelConfig | str | None = None,
    out: OutT,
    workspace: Any = None,
    stream: Any = None,
    dependent_launch: DependentLaunch = False,
    activation: Activation | str | None = None,
    residual: Any = None,
) -> OutT: ...


def gemm(  # noqa: PLR0913  (the options of one call)
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
    """Compute C[m, n] = activation(alpha * A[m, k] x W[k, n] + bias) + residual, in fp32 up to one rounding to fp16.

    On arrays in GPU memory this launches a kernel of the default build and returns without waiting for it. On arrays
    in host memory, numpy's or torch's, it runs the numpy reference (float64, rounded once to fp16) behind the same
    checks, on any machine and without a build; workspace, stream and dependent_launch have no effect there.

    Args:
        a: activations, fp16 [m, k], row-major.
        w: the packed weight, in the same memory.
        bias: fp16 [n], contiguous, in the same memory, or None.
        alpha: factor of the product, one finite or infinite number that fp32 holds.
        config: the kernel, or its name; None chooses one.
        out: fp16 [m, n] to write into, contiguous, apart from the other arrays; None allocates. Gated activations have
            n / 2 columns.
        workspace: uint8 array of at least `Library.workspace_bytes`; None allocates it for the call, in stream order.
        stream: a CUDA stream object or address; None is the current stream of torch or CuPy, else the default.
        dependent_launch: let the kernel start while those before it on the stream still run; "auto" does so where it
            gains. See `Library.gemm`.
        activation: silu, gelu_tanh, gelu or relu2; for weights that were packed with gated=True swiglu, geglu_tanh
            or geglu; None for none. Only for weights of target native.
        residual: fp16 of the output's shape, contiguous, in the same memory, or None. It may be `out` itself. Only for
            weights of target native.

    Returns:
        `out` if it was passed. Otherwise a new array: a torch tensor for a torch tensor, a numpy array for a numpy
        array, else a DeviceArray.

    Raises:
        InvalidValueError: if the arrays do not fit together, or some are on the host and some on a GPU.
        UnsupportedProblemError: if the kernel, or every kernel, cannot run the problem.
        NotBuiltError: if the arrays are on a GPU and nothing is built.
        NoHopperGpuError: if the arrays are on another kind of GPU.
        CudaError: if the launch fails.

    Example:
        >>> import numpy as np
        >>> import w4a16gen
        >>> packed = w4a16gen.pack_weight(w4a16gen.quantize(np.eye(64, 256), group_size=128))
        >>> w4a16gen.gemm(np.ones((4, 256), np.float16), packed, alpha=2.0)[0, :3]
        array([2., 2., 2.], dtype=float16)

        Gates and their factors in one weight, and the product of both:

        >>> both = w4a16gen.pack_weight(w4a16gen.quantize(np.eye(64, 256), group_size=128), gated=True)
        >>> w4a16gen.gemm(np.ones((4, 256), np.float16), both, activation="swiglu").shape
        (4, 32)
    """
    library = _InUse.library
    if library is not None and config is None and workspace is None and stream is None:
        repeated = library.calls.try_fast_path(a, w, bias, out, alpha, dependent_launch, activation, residual)
        if repeated is not None:
            return repeated
    options = GemmOptions(bias, alpha, config, out, workspace, stream, dependent_launch, activation, residual)
    if is_on_gpu(a) or is_on_gpu(checked_weight(w).data):
        return (library or load()).launcher.run(a, w, options)
    return gemm_on_host(a, checked_weight(w), options)
