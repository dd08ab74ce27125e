"""The state of a `W4A16Linear`: its facts as a tensor, and tensors that move without a change of their bits."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from w4a16gen.errors import InvalidValueError
from w4a16gen.integrations.torch.given import check_order, check_tensor
from w4a16gen.integrations.torch.nibbles import Tensor

STATE_FORMAT = "w4a16gen.linear/1"
"""What state dicts carry; the number changes with their tensors."""
_WRITTEN_LATER = {"activation": "none"}
"""Facts that older state dicts do not hold, and what they are there."""
_DAMAGED = "the state dict does not hold a layer of 4 bits: its facts are damaged"


def write_state(facts: dict[str, Any], scales: Mapping[str, Any], form: str = STATE_FORMAT) -> Tensor:
    """Return facts and scalars as bytes of JSON, uint8 [bytes].

    Args:
        facts: what a layer must agree with to take the state.
        scales: what the state brings: numbers, and lists of numbers.
        form: name and version of the state's form.
    """
    text = json.dumps({"format": form, **facts, **scales})
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def read_facts(facts: Mapping[str, Any], state: Any, form: str) -> dict[str, Any]:
    """Return what a state that `write_state` returned holds.

    Args:
        facts: what the state must agree with.
        state: the tensor.
        form: name and version of the state's form.

    Raises:
        InvalidValueError: if it is no such tensor, or describes another layer.
    """
    try:
        found: dict[str, Any] = json.loads(bytes(state.cpu().tolist()))
        version = found["format"]
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):  # RuntimeError: on meta, or nested deeply
        raise InvalidValueError(_DAMAGED) from None
    if version != form:
        raise InvalidValueError(f"the state dict is of format {version!r}, but this version reads {form!r}")
    for name, value in facts.items():
        held = found.get(name, _WRITTEN_LATER.get(name))
        if held != value:
            raise InvalidValueError(
                f"the state dict holds a weight with {name} = {held}, but this layer has {value}: make a layer of the "
                "same kind first"
            )
    return found


def read_state(facts: dict[str, Any], state: Any) -> dict[str, float]:
    """Return the scalars of a state that `write_state` returned.

    Args:
        facts: what the state must agree with.
        state: the tensor.

    Raises:
        InvalidValueError: if it is no such tensor, or describes another layer.
    """
    found = read_facts(facts, state, STATE_FORMAT)
    return {"alpha": number_of(found, "alpha"), **powers_of_two(found)}


def number_of(found: Mapping[str, Any], name: str) -> float:
    """Return a number of a state.

    Raises:
        InvalidValueError: if there is none of this name.
    """
    try:
        return float(found[name])
    except (KeyError, TypeError, ValueError):
        raise InvalidValueError(_DAMAGED) from None


def powers_of_two(found: Mapping[str, Any]) -> dict[str, float]:
    """Return the scales of activations and outputs that a state holds.

    Raises:
        InvalidValueError: if one is no power of two.
    """
    return {name: power_of_two(name, found.get(name)) for name in ("activation_scale", "output_scale")}


def check_tensors(module: torch.nn.Module, state_dict: Mapping[str, Any], prefix: str) -> None:
    """Raise unless the tensors of a state dict have the dtypes of a module's buffers: a cast would lose bits.

    Orders of columns must hold each column once. Others would fail in a call, or give wrong numbers.

    Raises:
        InvalidValueError: naming the tensor. Tensors of other shapes are left to torch, which lists all of them.
    """
    for name, buffer in module.named_buffers(recurse=False):
        found = state_dict.get(f"{prefix}{name}")
        if isinstance(found, torch.Tensor) and found.shape == buffer.shape:
            check_tensor(f"{prefix}{name} of the state dict", found, tuple(buffer.shape), buffer.dtype)
            if name == "permutation":
                check_order(f"{prefix}{name} of the state dict", found)


def power_of_two(name: str, value: Any) -> float:
    """Return a scale.

    Raises:
        InvalidValueError: if it is no power of two.
    """
    try:
        number = float(value) if isinstance(value, (int, float)) else math.nan
    except OverflowError:  # an integer that no float holds
        number = math.inf
    if not math.isfinite(number) or math.frexp(number)[0] != 0.5:  # noqa: PLR2004
        raise InvalidValueError(f"{name} of {value!r:.40} must be a power of two")
    return number


def moved_only(fn: Callable[[Any], Any], tensor: Any) -> Any:
    """Apply a function that moves or casts a tensor, so that it only moves it."""
    if not tensor.is_floating_point():
        moved = fn(tensor)
        return moved if moved.dtype == tensor.dtype else tensor
    moved = fn(tensor.view(torch.int16))
    return moved.view(tensor.dtype) if moved.dtype == torch.int16 else tensor


def set_buffer(module: torch.nn.Module, name: str, value: Any, *, persistent: bool) -> None:
    """Make a tensor a buffer of a module; None makes it a plain attribute.

    Args:
        module: the module.
        name: the attribute.
        value: the tensor, or None.
        persistent: whether state dicts hold it.
    """
    module._buffers.pop(name, None)  # noqa: SLF001
    module.__dict__.pop(name, None)
    if value is None:
        module.__dict__[name] = None
    else:
        module.register_buffer(name, value, persistent=persistent)
