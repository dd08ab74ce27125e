"""Arrays of the caller in host memory, read as numpy arrays. Torch is never imported."""

from __future__ import annotations

import sys
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt

from w4a16gen.errors import InvalidValueError

_NUMBERS = "biufcV"
"""Kinds of numpy dtypes that can be numbers; V covers extensions such as bfloat16."""


def is_tensor(value: Any) -> TypeGuard[Any]:
    """Return whether a value is a torch tensor. If torch is not imported, it cannot be one."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def host_array(name: str, value: Any, *, must_be: str | None = None) -> npt.NDArray[Any]:
    """Return a numpy array, a torch CPU tensor or nested lists as a plain numpy array.

    A torch parameter is detached. bfloat16 becomes float32, exactly.

    Args:
        name: what messages call the array.
        value: the array.
        must_be: the dtype that the caller needs if that is not bfloat16; None takes bfloat16.

    Raises:
        InvalidValueError: if it is masked, on a GPU, or not an array of numbers.
    """
    if isinstance(value, np.ma.MaskedArray):
        raise InvalidValueError(f"{name} is a masked array, but every value counts: pass {name}.filled(...)")
    if is_tensor(value):
        value = _readable_tensor(name, value, must_be)
    elif getattr(value, "__cuda_array_interface__", None) is not None:
        raise InvalidValueError(f"{name} is on a GPU: copy it to the host, or move all arrays to one GPU")
    try:
        array = np.asarray(value)
    except Exception as error:  # noqa: BLE001  (an array of another library may raise anything)
        raise InvalidValueError(f"{name} of type {type(value).__name__} cannot be read as an array: {error}") from None
    if array.dtype.kind not in _NUMBERS or value is None:
        raise InvalidValueError(f"{name} of type {type(value).__name__} must be an array of numbers")
    if array.dtype.name == "bfloat16" and must_be is None:
        return array.astype(np.float32)
    return array


def _readable_tensor(name: str, tensor: Any, must_be: str | None) -> Any:
    """Return a tensor that `np.asarray` can read."""
    if tensor.is_cuda:
        raise InvalidValueError(f"{name} is on a GPU: pass {name}.cpu(), or move all arrays to one GPU")
    tensor = tensor.detach()
    if str(tensor.dtype) != "torch.bfloat16":
        return tensor
    if must_be is not None:
        raise InvalidValueError(f"{name} of dtype bfloat16 must be {must_be}: convert the tensor first")
    return tensor.float()
