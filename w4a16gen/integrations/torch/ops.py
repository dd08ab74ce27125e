"""The operator `w4a16gen::gemm`: what torch's dispatcher, compiler, exporter and graphs need to know about `gemm`.

Its twin `gemm_forward_only` does the same where gradients are recorded, and refuses a backward pass. They are two
because an operator with a backward pass takes 10 us longer per call, also where no gradients are recorded.

The namespace is private. Every fact of a call is a plain argument, so that compiled and exported programs hold no
Python object. The operator is functional: it returns a new tensor, and writes to no argument.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch

from w4a16gen.errors import InvalidValueError
from w4a16gen.integrations.torch.apart import apart_from
from w4a16gen.integrations.torch.upload import device_of
from w4a16gen.kernels.config import QuantMode, Target
from w4a16gen.kernels.epilogue import Activation, CallEpilogue, check_epilogue
from w4a16gen.runtime.calls import AUTO, GemmOptions, checked_alpha, checked_weight
from w4a16gen.runtime.default import library_in_use
from w4a16gen.runtime.host import gemm_on_host
from w4a16gen.weights.packed import GATED_LAYOUT, LAYOUT_TARGETS, PackedWeight

NAMESPACE = "w4a16gen"
_ARGUMENTS = (
    "(Tensor x, Tensor weight, Tensor? bias, int n, int k, int group_size, str mode, str layout, float alpha, "
    'str activation="none", Tensor? residual=None, bool apart=False) -> Tensor'
)
_FIXED_ARGUMENTS = 11
"""Arguments beside x, of which no gradient is asked."""
_NO_GRADIENT = "no_gradient(Tensor gradient, int k) -> Tensor"
_NO_GRADIENTS = (
    "the kernels compute no gradients: train the model before it is quantized, or run this part within torch.no_grad()"
)
_NONE = str(Activation.NONE)
_ALIGNMENT = 16
"""Bytes. The kernels read rows of activations with TMA."""
_SHAPES_KEPT = 1 << 12


def gemm(
    x: Any,
    weight: PackedWeight,
    bias: Any = None,
    *,
    alpha: float = 1.0,
    activation: Activation | str | None = None,
    residual: Any = None,
) -> Any:
    """Multiply activations by a packed weight with the operator `torch.ops.w4a16gen.gemm`.

    This is `w4a16gen.gemm` for programs that are compiled, exported, or have more than two dimensions. On a GPU it
    launches a kernel of the default build on torch's current stream; in host memory it computes the reference.

    Args:
        x: activations, fp16 [..., k].
        weight: the packed weight; its data is a torch tensor, uint8 [bytes], on the same device.
        bias: fp16 [n] on the same device, or None.
        alpha: factor of the product.
        activation: the activation, as for `w4a16gen.gemm`, or None.
        residual: fp16 of the result's shape on the same device, added to it before its one rounding; or None.

    Returns:
        A new tensor, fp16 [..., n]; for gated activations [..., n / 2].

    Raises:
        InvalidValueError: if the tensors do not fit together. A backward pass raises it too.

    Example:
        >>> import torch, w4a16gen
        >>> packed = w4a16gen.pack_weight(w4a16gen.quantize(torch.eye(64, 256), group_size=128))
        >>> gemm(torch.ones(2, 3, 256, dtype=torch.float16), on_torch(packed)).shape
        torch.Size([2, 3, 64])
    """
    data = checked_weight(weight).data
    for name, given in (
        *(("x", x), ("data of the weight", data)),
        *((name, tensor) for name, tensor in (("bias", bias), ("residual", residual)) if tensor is not None),
    ):
        if not isinstance(given, torch.Tensor):
            raise InvalidValueError(f"{name} of type {type(given).__name__} must be a torch tensor: see from_packed")
    name = str(Activation.of(activation))
    return operator_for(x)(x, data, bias, *facts_of(weight), checked_alpha(alpha), name, residual)


def operator_for(x: Any) -> Any:
    """Return the operator for activations: the twin where gradients would have to flow through them."""
    records = torch.is_grad_enabled() and x.requires_grad
    return torch.ops.w4a16gen.gemm_forward_only if records else torch.ops.w4a16gen.gemm


def facts_of(weight: PackedWeight) -> tuple[int, int, int, str, str]:
    """Return the arguments of the operator that describe a weight: n, k, group size, mode and layout."""
    return weight.n, weight.k, weight.group_size, str(weight.mode), weight.layout


def on_torch(weight: PackedWeight, device: Any = None) -> PackedWeight:
    """Return a packed weight whose data is a torch tensor.

    Args:
        weight: the weight, in host memory or on a GPU.
        device: where the tensor shall be; None leaves it where the data is.

    Raises:
        InvalidValueError: if the data is no array of bytes.
    """
    data = checked_weight(weight).data
    if not isinstance(data, torch.Tensor):
        on_gpu = getattr(data, "__cuda_array_interface__", None) is not None
        index = getattr(data, "device", None)
        place = f"cuda:{index}" if isinstance(index, int) else "cuda"
        data = torch.as_tensor(data, device=place) if on_gpu else torch.from_numpy(weight.host_data().copy())
    return replace(weight, data=data if device is None else data.to(device_of(device)))


@lru_cache(maxsize=_SHAPES_KEPT)
def _shape_of(n: int, k: int, group_size: int, mode: str, layout: str, _device: int) -> PackedWeight:
    """Return a weight without data, which all weights of these facts on one GPU share."""
    return PackedWeight(None, layout, n, k, group_size, QuantMode.parse(mode))


def _check(x: Any, k: int) -> None:
    """Raise unless activations are fp16 [..., k]."""
    if x.dtype != torch.float16:
        raise InvalidValueError(
            f"x of dtype {str(x.dtype).removeprefix('torch.')} must be float16: cast it, as W4A16Linear does"
        )
    if x.dim() == 0 or x.shape[-1] != k:
        raise InvalidValueError(f"x of shape {list(x.shape)} must be [..., {k}]")


def _without_gradient(tensor: Any) -> Any:
    """Return a tensor, or None, that records no gradients.

    Raises:
        InvalidValueError: if it does, and nobody would refuse the backward pass.
    """
    if tensor is None or not tensor.requires_grad:
        return tensor
    if torch.is_grad_enabled():  # autograd switches this off around an operator that has a backward pass
        raise InvalidValueError(
            f"{_NO_GRADIENTS}; or call w4a16gen.integrations.torch.gemm, which refuses only backward()"
        )
    return tensor.detach()


def _rows_of(x: Any, k: int) -> Any:
    """Return activations [..., k] as [m, k], contiguous and aligned as kernels read them."""
    _check(x, k)
    return _aligned_rows(_without_gradient(x), k)


def _residual_rows(x: Any, residual: Any, columns: int) -> Any:
    """Return a residual [..., columns] as the kernels read it, or None.

    Raises:
        InvalidValueError: if it has not the shape of the result for these activations.
    """
    if residual is None:
        return None
    _check_residual(x, residual, columns)
    return _aligned_rows(_without_gradient(residual), columns)


def _check_residual(x: Any, residual: Any, columns: int) -> None:
    """Raise unless a residual has the shape and the dtype of the result."""
    if residual.dtype != torch.float16:
        raise InvalidValueError(f"residual of dtype {str(residual.dtype).removeprefix('torch.')} must be float16")
    if residual.dim() != x.dim() or residual.shape[-1] != columns or residual.shape[:-1] != x.shape[:-1]:
        shape = [*x.shape[:-1], columns]
        raise InvalidValueError(f"residual of shape {list(residual.shape)} must be {shape}, like the result")


def _aligned_rows(rows: Any, k: int) -> Any:
    rows = (rows if rows.dim() == 2 else rows.reshape(-1, k)).contiguous()  # noqa: PLR2004
    return rows.clone() if rows.data_ptr() % _ALIGNMENT else rows


def _on_gpu(  # noqa: PLR0913  (the operator's)
    x: Any,
    weight: Any,
    bias: Any,
    n: int,
    k: int,
    group_size: int,
    mode: str,
    layout: str,
    alpha: float,
    activation: str = _NONE,
    residual: Any = None,
    apart: bool = False,
) -> Any:
    """Launch a kernel of the default build on the current stream.

    With `apart`, an activation and a residual that no built kernel computes follow the plain product as operations of
    torch, which round more often.
    """
    rows, added = _rows_of(x, k), _without_gradient(bias)
    library = library_in_use()
    if apart:
        call = CallEpilogue(Activation.of(activation), has_residual=residual is not None)
        if not library.has_epilogue(mode, call.kernels):  # any kernel that has it runs what the plain ones run
            check_epilogue(call, LAYOUT_TARGETS[layout], gated_weight=layout == GATED_LAYOUT)
            if residual is not None:
                _check_residual(x, residual, call.outputs(n))
            plain = partial(_on_gpu, n=n, k=k, group_size=group_size, mode=mode, alpha=alpha)
            return apart_from(partial(plain, x, weight), bias, n, layout, call, residual)
    shape = _shape_of(n, k, group_size, mode, layout, x.get_device())
    more = activation, _residual_rows(x, residual, shape.outputs)
    out = library.calls.try_fast_path(rows, shape, added, None, alpha, AUTO, *more, data=weight)
    if out is None:
        options = GemmOptions(
            added, alpha, dependent_launch=AUTO, activation=more[0], residual=more[1], remembered=shape
        )
        out = library.launcher.run(rows, replace(shape, data=weight), options)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], shape.outputs)  # noqa: PLR2004


def _on_host(  # noqa: PLR0913  (the operator's)
    x: Any,
    weight: Any,
    bias: Any,
    n: int,
    k: int,
    group_size: int,
    mode: str,
    layout: str,
    alpha: float,
    activation: str = _NONE,
    residual: Any = None,
    apart: bool = False,
) -> Any:
    """Compute the reference, which has every epilogue."""
    del apart
    packed = PackedWeight(weight, layout, n, k, group_size, QuantMode.parse(mode))
    added = _residual_rows(x, residual, packed.outputs)
    options = GemmOptions(_without_gradient(bias), alpha, activation=activation, residual=added)
    return gemm_on_host(_rows_of(x, k), packed, options).view(*x.shape[:-1], packed.outputs)


def _fake(  # noqa: PLR0913  (the operator's)
    x: Any,
    weight: Any,
    bias: Any,
    n: int,
    k: int,
    group_size: int,
    mode: str,
    layout: str,
    alpha: float,
    activation: str = _NONE,
    residual: Any = None,
    apart: bool = False,
) -> Any:
    """Return a tensor of the result's shape, for tracing."""
    del group_size, mode, alpha, apart
    _check(x, k)
    columns = CallEpilogue(Activation.of(activation)).outputs(n)
    check_epilogue(
        CallEpilogue(Activation.of(activation), has_residual=residual is not None),
        LAYOUT_TARGETS.get(layout, Target.NATIVE),
        gated_weight=layout == GATED_LAYOUT,
    )
    if residual is not None:
        _check_residual(x, residual, columns)
    for name, tensor in (("weight", weight), ("bias", bias), ("residual", residual)):
        if tensor is not None and tensor.device != x.device:  # dispatched here if one of them is on the meta device
            raise InvalidValueError(f"x is on {x.device}, but the {name} on {tensor.device}: move them to one device")
    return x.new_empty((*x.shape[:-1], columns))


def _refuse_gradient(_gradient: Any, _k: int) -> Any:
    raise InvalidValueError(_NO_GRADIENTS)


def _keep_k(ctx: Any, inputs: Any, output: Any) -> None:
    del output
    ctx.k = inputs[4]  # torch passes all three by name


def _backward(ctx: Any, gradient: Any) -> Any:
    """Return a gradient whose computation refuses, so that forward passes can be traced together with backward ones."""
    return torch.ops.w4a16gen.no_gradient(gradient, ctx.k), *[None] * _FIXED_ARGUMENTS


def _register() -> Any:
    """Define the operators once per process, and return the object that keeps them."""
    if hasattr(torch.ops.w4a16gen, "gemm"):
        return None
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    for name in ("gemm", "gemm_forward_only"):
        library.define(name + _ARGUMENTS, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_contiguous_strides))
        library.impl(name, _on_gpu, "CUDA")
        library.impl(name, _on_host, "CPU")
        torch.library.register_fake(f"{NAMESPACE}::{name}", _fake, lib=library)
    torch.library.register_autograd(f"{NAMESPACE}::gemm_forward_only", _backward, setup_context=_keep_k, lib=library)
    library.define(_NO_GRADIENT, tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("CUDA", "CPU"):
        library.impl("no_gradient", _refuse_gradient, device)
    torch.library.register_fake(
        f"{NAMESPACE}::no_gradient", lambda gradient, k: gradient.new_empty((*gradient.shape[:-1], k)), lib=library
    )
    return library


_library = _register() or globals().get("_library")
"""Keeps the operators registered; a module that is loaded again keeps the first."""
