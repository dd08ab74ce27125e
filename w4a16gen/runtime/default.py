"""The functions that most programs need: load the default build, move arrays, multiply."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from w4a16gen.errors import InvalidValueError, UnsupportedProblemError
from w4a16gen.kernels.config import KernelConfig, Target
from w4a16gen.kernels.problem import Problem, why_cannot_run
from w4a16gen.runtime.arrays import is_on_gpu
from w4a16gen.runtime.artifact import MANIFEST, WHEEL_PACKAGE, load_build
from w4a16gen.runtime.calls import GemmOptions, check_weight
from w4a16gen.runtime.library import Library
from w4a16gen.weights import packed as packing
from w4a16gen.weights.packed import LAYOUTS, PackedWeight
from w4a16gen.weights.reference import gemm_reference

BUILD_FOLDER_VARIABLE = "W4A16GEN_BUILD_DIR"


def default_build_folder() -> Path:
    """Give the folder that builds go to and are loaded from: W4A16GEN_BUILD_DIR, or `build` in the current folder."""
    return Path(os.environ.get(BUILD_FOLDER_VARIABLE) or "build")


def _folder_to_load() -> Path:
    """Give the default folder, or that of an installed wheel of kernels if there is no build in it."""
    folder = default_build_folder()
    if os.environ.get(BUILD_FOLDER_VARIABLE) or (folder / MANIFEST).exists():
        return folder
    installed = importlib.util.find_spec(WHEEL_PACKAGE)
    if installed is None or installed.origin is None:
        return folder
    return Path(installed.origin).parent / "build"


def load(folder: Path | str | None = None) -> Library:
    """Load a finished build; the same library is loaded once per process.

    Args:
        folder: the build's folder; None takes W4A16GEN_BUILD_DIR, or `build` in the current folder, or an installed
            wheel of kernels. Functions that use
            the default build look for it when they first need it, and again when this is called without a folder.

    Raises:
        NotBuiltError: if there is no usable build in the folder.
    """
    if folder is not None:
        return _load_from(Path(folder))
    _InUse.library = _load_from(_folder_to_load())
    return _InUse.library


class _InUse:
    """The default build. It is not looked for at each call: that takes longer than a launch."""

    library: Library | None = None


def _library_in_use() -> Library:
    return load() if _InUse.library is None else _InUse.library


def _load_from(folder: Path) -> Library:
    build = load_build(folder)
    return _load(build.folder.resolve(), build.manifest.link_digest, build.manifest.library_sha256)


@cache
def _load(folder: Path, _link_digest: str, _library_sha256: str) -> Library:
    return Library(load_build(folder))


def configs() -> list[KernelConfig]:
    """Give the kernels of the default build, sorted; see `load`."""
    return _library_in_use().configs()


def to_device(value: Any, device: int = 0) -> Any:
    """Copy a numpy array or a packed weight to a GPU, with the default build's module; see `Library.to_device`."""
    return _library_in_use().to_device(value, device)


def pack(
    q: Any,
    scales: Any,
    zeros: Any = None,
    *,
    group_size: int | None = None,
    target: Target = Target.NATIVE,
) -> PackedWeight:
    """Pack a canonical weight for the kernels of a target, where it is: on the host, or on a GPU.

    Args:
        q: integers of 0 to 15, [n, k], output channels first; uint8 on a GPU.
        scales: fp16 [n] for per-column mode, or [k / group_size, n].
        zeros: fp16 [k / group_size, n], (8 - zero point) * scale, or None.
        group_size: values of K per scale; None takes k / rows of the scales.
        target: the kernel family that will read it; on a GPU only `native`.

    Returns:
        The packed weight in the memory that q is in; `to_device` moves it from the host to a GPU.

    Raises:
        InvalidValueError: if a dtype, a shape or a value is off, or the target packs on the host only.
        NotBuiltError: if q is on a GPU and no native kernel of the mode is built.
    """
    if not is_on_gpu(q):
        return packing.pack(q, scales, zeros, group_size=group_size, target=target)
    if target is not Target.NATIVE:
        raise InvalidValueError(f"weights for target {target} are packed on the host only: copy q there")
    return _library_in_use().pack(q, scales, zeros, group_size=group_size)


def gemm(
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
    """Compute C[m, n] = alpha * A[m, k] x W[k, n] + bias.

    On GPU arrays this launches a kernel of the default build: see `Library.gemm`. On numpy arrays it runs the numpy
    reference (float64, rounded once to fp16), on any machine and without a build, so that programs and tests run
    anywhere.

    Raises:
        InvalidValueError: if the arrays do not fit together, or some are on the host and some on a GPU.
        NotBuiltError: if the arrays are on a GPU and nothing is built.
    """
    library = _InUse.library
    if library is not None and config is None and workspace is None and stream is None:
        repeated = library.calls.try_fast_path(a, w, bias, out, alpha, dependent_launch)
        if repeated is not None:
            return repeated
    if is_on_gpu(a) or is_on_gpu(w.data):
        options = GemmOptions(bias, alpha, config, out, workspace, stream, dependent_launch)
        return (library or load()).run_call(a, w, options)
    return _gemm_on_host(a, w, bias, alpha, config, out)


def _gemm_on_host(a: Any, w: PackedWeight, bias: Any, alpha: float, config: KernelConfig | str | None, out: Any) -> Any:
    """Run the reference behind the checks that a kernel would make."""
    m = a.shape[0] if getattr(a, "ndim", 0) == 2 else "m"  # noqa: PLR2004
    _check_host("activations", a, (m, w.k))
    if bias is not None:
        _check_host("bias", bias, (w.n,))
    if out is not None:
        _check_host("output", out, (m, w.n))
    if w.layout not in LAYOUTS:
        raise InvalidValueError(f"the weight is packed as {w.layout!r}, which is not one of {', '.join(LAYOUTS)}")
    if config is not None:
        kernel = KernelConfig.parse(config) if isinstance(config, str) else config
        check_weight(kernel, w)
        reason = why_cannot_run(kernel, Problem(a.shape[0], w.n, w.k, w.group_size))
        if reason is not None:
            raise UnsupportedProblemError(reason)
    with np.errstate(over="ignore"):  # beyond 65504 is infinity, as on the GPU
        result = gemm_reference(a, w.unpack(), alpha=alpha, bias=bias).astype(np.float16)
    if out is None:
        return result
    out[...] = result
    return out


def _check_host(name: str, array: Any, shape: tuple[Any, ...]) -> None:
    """Raise unless an array is numpy, fp16 and of this shape."""
    if not isinstance(array, np.ndarray):
        raise InvalidValueError(f"{name} of type {type(array).__name__} must be a numpy array, or all be on one GPU")
    if array.dtype != np.float16:
        raise InvalidValueError(f"{name} of dtype {array.dtype} must be float16")
    if array.shape != shape:
        raise InvalidValueError(f"{name} of shape {list(array.shape)} must be [{', '.join(map(str, shape))}]")
