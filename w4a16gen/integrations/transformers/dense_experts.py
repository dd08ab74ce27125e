"""Experts that stay dense: the parameters of transformers, out of experts that a file names one by one."""

from __future__ import annotations

from typing import Any

import torch

from w4a16gen.errors import InvalidValueError
from w4a16gen.integrations.torch.device_weights import dense_weight
from w4a16gen.integrations.torch.stack import check_no_bias
from w4a16gen.integrations.torch.upload import Uploader
from w4a16gen.integrations.transformers.dense import fill
from w4a16gen.integrations.transformers.experts import PARAMETERS, modules_of_experts
from w4a16gen.integrations.transformers.sources import Source, Stored
from w4a16gen.weights.expert_names import DOWN, ExpertNames
from w4a16gen.weights.importers.mapped import shown_name
from w4a16gen.weights.packed_checkpoint import PackedLayer


def load_dense_experts(model: Any, source: Source, uploader: Uploader) -> set[str]:
    """Fill the modules of experts that are on the meta device, expert by expert.

    Args:
        model: the model, whose served experts are replaced already.
        source: the checkpoint.
        uploader: copies bytes to the device.

    Returns:
        The names of the tensors that were used. Parameters that the checkpoint does not have stay on the meta device.

    Raises:
        InvalidValueError: if some of the experts are missing, or one has another shape or values that are not finite.
    """
    used: set[str] = set()
    for name, module in modules_of_experts(model).items():
        names = source.experts(name, dense=True)
        if not module.gate_up_proj.is_meta or getattr(module, "is_transposed", False):
            continue
        if (reason := source.refused_expert(name)) is not None:
            raise InvalidValueError(reason)
        # Rows of gate and up that alternate are not those of a gate, and then of an up projection.
        if names is None or not getattr(module, "is_concatenated", True):
            continue
        _check(names, module)
        for part in PARAMETERS:
            parameter = getattr(module, part)
            values = torch.empty(parameter.shape, dtype=parameter.dtype, device=uploader.device)
            roles = [DOWN] if part == "down_proj" else [role for role in names.form if role != DOWN]
            for role in roles:
                rows = parameter.shape[1] // len(roles)
                place = slice(roles.index(role) * rows, (roles.index(role) + 1) * rows)
                for expert, one in enumerate(names.of_role(role)):
                    used |= _fill(values[expert, place], one, source, uploader)
            setattr(module, part, torch.nn.Parameter(values, requires_grad=False))
    return used


def _check(names: ExpertNames, module: Any) -> None:
    """Raise unless there are as many experts as the model has.

    Raises:
        InvalidValueError: naming both numbers.
    """
    if reason := names.why_incomplete():
        raise InvalidValueError(reason.replace(" a 4-bit ", " a "))
    wanted = module.gate_up_proj.shape[0]
    if names.experts != wanted:
        raise InvalidValueError(
            f"{shown_name(names.name)} has {names.experts} experts in the checkpoint, but the model has {wanted}: "
            "config.json is of another model"
        )


def _fill(values: Any, name: str, source: Source, uploader: Uploader) -> set[str]:
    """Write the weight of one projection of an expert, and return the names of its tensors."""
    checkpoint = source.checkpoint
    if name not in checkpoint:
        fill(values, Stored(f"{name}.weight"), source, uploader)
        return {f"{name}.weight"}
    layer: Any = checkpoint[name]
    check_no_bias(layer)
    weight = layer.weight.unpack() if isinstance(layer, PackedLayer) else layer.quantized()
    parts = [None if part is None else torch.from_numpy(part) for part in (layer.permutation, layer.input_scale)]
    exact = dense_weight(weight, layer.alpha, parts[0], parts[1])
    if tuple(exact.shape) != tuple(values.shape):
        raise InvalidValueError(
            f"layer {shown_name(name)} of the checkpoint is {list(exact.shape)}, but the model's is "
            f"{list(values.shape)}: config.json is of another model"
        )
    values.copy_(exact)
    if not bool(torch.isfinite(values).all()):
        dtype = str(values.dtype).removeprefix("torch.")
        raise InvalidValueError(f"layer {shown_name(name)} is not finite in {dtype}: pass dtype=torch.bfloat16")
    return set(getattr(layer, "tensor_names", ()))
