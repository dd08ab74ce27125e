"""The rules for tensors and numbers that a caller passes to a layer."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from w4a16gen.errors import InvalidValueError
from w4a16gen.integrations.torch.nibbles import INTEGERS, Tensor
from w4a16gen.runtime.calls import checked_alpha


def kind_of(value: Any) -> str:
    """Return what a message calls a value: the dtype of a tensor, or else the type."""
    if isinstance(value, torch.Tensor):
        return f"dtype {str(value.dtype).removeprefix('torch.')}"
    return f"type {type(value).__name__}"


def check_tensor(name: str, tensor: Any, shape: tuple[int, ...], dtype: Any) -> None:
    """Raise unless a value is a tensor of a shape and a dtype.

    Raises:
        InvalidValueError: naming what it is and what it must be.
    """
    if not isinstance(tensor, torch.Tensor):
        raise InvalidValueError(f"{name} of type {type(tensor).__name__} must be a torch tensor: see from_packed")
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        found = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        raise InvalidValueError(f"{name} of {found} must be {str(dtype).removeprefix('torch.')} {list(shape)}")


def check_residual(residual: Any, shape: list[Any], dtype: Any, device: Any) -> None:
    """Raise unless a residual is a tensor like the result: a sum would broadcast it, or be of another dtype.

    Args:
        residual: what is added.
        shape: the sizes of the result.
        dtype: that of the result.
        device: that of the result.

    Raises:
        InvalidValueError: naming what it is and what it must be.
    """
    if not isinstance(residual, torch.Tensor):
        raise InvalidValueError(f"residual of {kind_of(residual)} must be a torch tensor of shape {shape}")
    if list(residual.shape) != shape:
        raise InvalidValueError(f"residual of shape {list(residual.shape)} must be {shape}, like the result")
    if residual.dtype != dtype:
        wanted = str(dtype).removeprefix("torch.")
        raise InvalidValueError(f"residual of {kind_of(residual)} must be {wanted}, like the result: cast it")
    if residual.device != device:
        raise InvalidValueError(f"residual on {residual.device} must be on {device}, like x: move it")


def tensor_of(name: str, values: Any) -> Any:
    """Return what a caller passed as a tensor without gradients; None stays None.

    Raises:
        InvalidValueError: if torch cannot read it.
    """
    if values is None:
        return None
    try:  # torch takes no arrays that are reversed
        given = np.ascontiguousarray(values) if isinstance(values, np.ndarray) else values
        return torch.as_tensor(given).detach()
    except (RuntimeError, TypeError, ValueError):
        raise InvalidValueError(f"{name} of {kind_of(values)} must be a tensor or an array of numbers") from None


def finite_alpha(alpha: Any) -> float:
    """Return the factor of the product.

    Raises:
        InvalidValueError: if it is no finite number that fp32 holds.
    """
    value = checked_alpha(alpha.item() if isinstance(alpha, torch.Tensor) and alpha.numel() == 1 else alpha)
    if math.isinf(value):
        raise InvalidValueError(f"alpha of {value} must be finite")
    return value


def order(name: str, values: Any, device: Any, k: int) -> Tensor:
    """Return an order of columns, int64 [k], on a device. Waits for the device.

    Raises:
        InvalidValueError: if it does not hold each of 0 to k - 1 once.
    """
    if values.dtype not in INTEGERS:
        raise InvalidValueError(f"{name} of {kind_of(values)} must be integers [{k}]")
    check_tensor(name, values, (k,), values.dtype)
    moved = values.to(device, torch.int64)
    check_order(name, moved)
    return moved


def check_order(name: str, orders: Any) -> None:
    """Raise unless each row holds each of 0 to k - 1 once. Waits for the device.

    Args:
        name: what the message calls the orders.
        orders: int64 [..., k]; on the meta device they are not checked.

    Raises:
        InvalidValueError: naming the orders.
    """
    k = orders.shape[-1]
    if not orders.is_meta and bool((orders.sort(dim=-1).values != torch.arange(k, device=orders.device)).any()):
        raise InvalidValueError(f"{name} must hold each of 0 to {k - 1} once")


def half(name: str, values: Any, device: Any, size: int | None = None) -> Tensor:
    """Return values rounded to fp16, on a device.

    Args:
        name: what messages call them.
        values: a tensor.
        device: the device.
        size: how many they must be, in one dimension; None allows any shape.

    Raises:
        InvalidValueError: if they are no real numbers, another number of them, or one does not fit.
    """
    if values.is_complex():
        raise InvalidValueError(f"{name} of {kind_of(values)} must be real")
    if size is not None:
        check_tensor(name, values, (size,), values.dtype)
    rounded = values.to(device, torch.float16)
    if values.dtype != torch.float16 and not rounded.is_meta and not bool(torch.isfinite(rounded).all()):
        raise InvalidValueError(f"{name} holds values that are not finite in fp16, beyond 65504: leave the layer dense")
    return rounded
