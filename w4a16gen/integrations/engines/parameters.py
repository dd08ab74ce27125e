"""The parameters of vLLM and SGLang, which say along which dimension they are packed, read as plain tensors."""

from __future__ import annotations

from typing import Any

from w4a16gen.errors import InvalidValueError
from w4a16gen.integrations.torch.nibbles import expand


def matrix_of(name: str, parameter: Any, *, packed: str | None = None) -> Any:
    """Return a parameter as [input, output], whatever the order of its dimensions.

    Args:
        name: what messages call it.
        parameter: a parameter with `input_dim` and `output_dim`; one of them follows from the other.
        packed: along which dimension its words must be packed, `input` or `output`; None if it holds no words.

    Raises:
        InvalidValueError: if it is no matrix, its dimensions are unknown, or it is packed along the other one.
    """
    if parameter.dim() != 2:  # noqa: PLR2004
        raise InvalidValueError(f"{name} of shape {list(parameter.shape)} must have two dimensions")
    into: Any = getattr(parameter, "input_dim", None)
    out: Any = getattr(parameter, "output_dim", None)
    if into is None and out is None:
        raise InvalidValueError(f"{name} has neither input_dim nor output_dim: this release of the engine is not known")
    out = 1 - into if out is None else out
    if packed is not None and getattr(parameter, "packed_dim", None) != (out if packed == "output" else 1 - out):
        raise InvalidValueError(f"{name} must be packed along the {packed} dimension")
    return parameter.data.t() if out == 0 else parameter.data


def values_of(name: str, parameter: Any, k: int) -> Any:
    """Return q of words that are packed along the input.

    Args:
        name: what messages call the parameter.
        parameter: int32, [k / 8, n] or [n, k / 8].
        k: values of K; words may hold more.

    Returns:
        uint8 [n, k].
    """
    return expand(matrix_of(name, parameter, packed="input").t())[:, :k]


def points_of(name: str, parameter: Any, n: int) -> Any:
    """Return zero points of words that are packed along the output.

    Args:
        name: what messages call the parameter.
        parameter: int32, [groups, n / 8] or [n / 8, groups].
        n: output channels; words may hold more.

    Returns:
        uint8 [groups, n].
    """
    return expand(matrix_of(name, parameter, packed="output"))[:, :n]
