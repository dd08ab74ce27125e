"""Parameters that are not of 4 bits: read from the memory map in pieces, so that no second copy of any exists."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from w4a16gen.errors import InvalidValueError
from w4a16gen.integrations.torch.upload import Uploader
from w4a16gen.integrations.transformers.packages import need_gguf
from w4a16gen.integrations.transformers.sources import Source, Stored
from w4a16gen.weights.importers.layer import CheckpointLayer
from w4a16gen.weights.importers.mapped import shown_name
from w4a16gen.weights.importers.tensors import DTYPES, TensorInfo
from w4a16gen.weights.quantized import QuantizedWeight

_PIECE_VALUES = 1 << 20
"""Values that are read at once, so that what is beside the finished model is a few MB."""
_FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


def load_dense(model: Any, source: Source, uploader: Uploader) -> set[str]:
    """Fill the parameters that are on the meta device from a checkpoint, one after the other.

    Args:
        model: the model, whose 4-bit layers are replaced already.
        source: the checkpoint.
        uploader: copies bytes to the device.

    Returns:
        The names of the tensors that were used. Parameters that the checkpoint does not have stay on the meta device.

    Raises:
        InvalidValueError: if a tensor has another shape, or values that the parameter's dtype cannot hold.
    """
    used = set()
    for name, parameter in list(model.named_parameters()):
        if not parameter.is_meta:
            continue
        module, _, part = name.rpartition(".")
        stored = source.stored(name)
        layer = source.layer(module) if part == "weight" else None
        if stored is not None:
            values = _filled(parameter, stored, source, uploader)
            used.add(stored.name)
        elif layer is not None:
            values = _dequantized(parameter, layer, uploader)
            used |= layer.tensor_names
        else:
            continue
        model.get_submodule(module).register_parameter(part, torch.nn.Parameter(values, requires_grad=False))
    return used


def _filled(parameter: Any, stored: Stored, source: Source, uploader: Uploader) -> Any:
    """Return a tensor of the checkpoint in the parameter's dtype, on the device."""
    values = torch.empty(parameter.shape, dtype=parameter.dtype, device=uploader.device)
    fill(values, stored, source, uploader)
    return values


def fill(values: Any, stored: Stored, source: Source, uploader: Uploader) -> None:
    """Write a tensor of the checkpoint to a contiguous tensor on the device, in its dtype.

    Raises:
        InvalidValueError: if the checkpoint's tensor has another shape, or values that the dtype cannot hold.
    """
    info = source.checkpoint.tensors[stored.name]
    _check_shape(stored.name, values, info.shape)
    is_finite = torch.ones((), dtype=torch.bool, device=uploader.device)
    rows = values.view(len(values), -1) if values.dim() > 1 else values.view(1, -1)
    raw = source.checkpoint.tensors.raw(stored.name).reshape(len(rows), -1)
    if stored.rows is not None and values.dim() == 1:
        rows, raw = rows.view(-1, 1), raw.reshape(values.numel(), -1)
    for start, end in _pieces(*rows.shape):
        part = raw[start:end] if stored.rows is None else raw[stored.rows[start:end]]
        piece = _decoded(stored.name, info, part, uploader)
        rows[start:end].copy_(piece.float() + stored.shift if stored.shift else piece)
        is_finite &= torch.isfinite(rows[start:end]).all()
    _finite(stored.name, values, is_finite)


def _decoded(name: str, info: TensorInfo, raw: npt.NDArray[np.uint8], uploader: Uploader) -> Any:
    """Return the values of some rows, on the device."""
    if info.dtype in _FLOATS:
        return uploader.bytes(raw.reshape(-1)).view(_FLOATS[info.dtype]).view(len(raw), -1)
    if info.dtype in DTYPES:
        raise InvalidValueError(f"tensor {shown_name(name)} of dtype {info.dtype} must be of floating point")
    gguf = need_gguf()
    try:
        values = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[info.dtype])
    except (KeyError, NotImplementedError):
        raise InvalidValueError(
            f"tensor {shown_name(name)} of type {info.dtype} is unknown to gguf: update it"
        ) from None
    return uploader.array(values)


def _dequantized(parameter: Any, layer: CheckpointLayer, uploader: Uploader) -> Any:
    """Return a 4-bit weight that no linear layer takes, such as an embedding, in the parameter's dtype."""
    _check_shape(layer.name, parameter, (layer.n, layer.k))
    values = torch.empty(parameter.shape, dtype=parameter.dtype, device=uploader.device)
    is_finite = torch.ones((), dtype=torch.bool, device=uploader.device)
    weight = layer.quantized()
    if layer.permutation is not None or layer.input_scale is not None:
        raise InvalidValueError(f"layer {shown_name(layer.name)} must have neither act-order nor scales of activations")
    scales = weight.scales.reshape(-1, weight.n)
    for start, end in _pieces(weight.n, weight.k):
        part = QuantizedWeight(
            weight.q[start:end],
            scales[:, start:end] if weight.mode.is_grouped else scales[0, start:end],
            None if weight.zeros is None else weight.zeros[:, start:end],
            weight.group_size,
            weight.mode,
        )
        values[start:end].copy_(uploader.array(part.dequantize() * layer.alpha))
        is_finite &= torch.isfinite(values[start:end]).all()
    return _finite(layer.name, values, is_finite)


def _pieces(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    step = max(1, _PIECE_VALUES // max(1, columns))
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def _check_shape(name: str, parameter: Any, shape: tuple[int, ...]) -> None:
    if tuple(parameter.shape) != shape:
        raise InvalidValueError(
            f"tensor {shown_name(name)} of shape {list(shape)} must be {list(parameter.shape)}: "
            "the configuration is of another model"
        )


def _finite(name: str, values: Any, is_finite: Any) -> Any:
    """Return the values if all pieces were finite: checking them at once takes twice their memory."""
    if bool(is_finite):
        return values
    dtype = str(values.dtype).removeprefix("torch.")
    raise InvalidValueError(
        f"tensor {shown_name(name)} holds values that are not finite in {dtype}: pass dtype=torch.bfloat16"
    )
