"""Replace the linear layers of a model by those of a 4-bit checkpoint, one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from w4a16gen.errors import InvalidValueError
from w4a16gen.integrations.torch.device_weights import dense_weight
from w4a16gen.integrations.torch.given import half
from w4a16gen.integrations.torch.linear import W4A16Linear
from w4a16gen.integrations.torch.nibbles import Tensor
from w4a16gen.integrations.torch.upload import Uploader
from w4a16gen.kernels.problem import Problem, why_never_runs
from w4a16gen.progress import Progress, no_progress
from w4a16gen.weights.importers.layer import CheckpointLayer
from w4a16gen.weights.packed_checkpoint import PackedCheckpoint

_NOT_THERE = "the checkpoint holds no 4-bit layer of this name"


@dataclass(frozen=True)
class Replacement:
    """What `replace_linears` did.

    Attributes:
        replaced: names of the modules that are W4A16Linear now.
        dequantized: names of the modules that cannot be W4A16Linear, with the reason. They are torch.nn.Linear as
            before, with the weight of the checkpoint.
        dense: names of the modules that were left as they were, with the reason. Their weights were not loaded.
        unused: names of the checkpoint's layers that the model does not have.
    """

    replaced: tuple[str, ...]
    dequantized: Mapping[str, str]
    dense: Mapping[str, str]
    unused: tuple[str, ...]

    def __str__(self) -> str:
        linears = len(self.replaced) + len(self.dequantized) + len(self.dense)
        return f"w4a16gen serves {len(self.replaced)} of {linears} linear layers"


def replace_linears(
    model: torch.nn.Module,
    checkpoint: Mapping[str, CheckpointLayer],
    *,
    device: Any = None,
    progress: Progress | None = None,
) -> Replacement:
    """Replace each torch.nn.Linear that a checkpoint holds in 4 bits by a W4A16Linear.

    Layers are read, packed and replaced one after the other, so that no second copy of the model exists. Nothing else
    is loaded: embeddings, norms and dense layers keep their values. A layer that the model uses in several places is
    replaced in all of them. A layer with hooks or a `forward` of its own stays a torch.nn.Linear, as does the output
    projection of torch.nn.MultiheadAttention, which reads the weight itself.

    Args:
        model: the model, on any device; linear layers may be on the meta device.
        checkpoint: what `w4a16gen.open_checkpoint` returned, or a mapping from the model's names to its layers.
        device: where the new layers shall be; None takes the device of each old layer.
        progress: called with the layers done, the layers in all, and the name of the last one.

    Returns:
        What was replaced, what was not, and why.

    Raises:
        InvalidValueError: if a layer of the checkpoint has other sizes than the model's, before any is replaced; or if
            one is damaged.
        NotBuiltError: on a GPU, if no native kernel of a layer's mode is built.

    Example:
        checkpoint = w4a16gen.open_checkpoint("Qwen3-8B-GPTQ")
        report = replace_linears(model, checkpoint, device="cuda")
        print(report)
    """
    _check(model, checkpoint)
    places = places_of_linears(model)
    held = {name: names for names in places if (name := next((name for name in names if name in checkpoint), None))}
    for name in held:
        _check_sizes(checkpoint[name], name, model.get_submodule(name))
    served = {name for names in held.values() for name in names}
    known = {name for names in places for name in names}
    unsupported: Mapping[str, str] = getattr(checkpoint, "unsupported", {})
    dense = {name: unsupported.get(name, _NOT_THERE) for names in places for name in names if name not in served}
    replaced: list[str] = []
    dequantized: dict[str, str] = {}
    uploaders = dict[Any, Uploader]()
    for done, (name, names) in enumerate(held.items(), 1):
        reason = _replace(model, names, checkpoint[name], device, uploaders)
        if reason is None:
            replaced += names
        else:
            dequantized |= dict.fromkeys(names, reason)
        (progress or no_progress)(done, len(held), name)
    return Replacement(tuple(replaced), dequantized, dense, tuple(name for name in checkpoint if name not in known))


def _check(model: Any, checkpoint: Any) -> None:
    """Raise unless the arguments are a model and layers of checkpoints.

    Raises:
        InvalidValueError: naming the argument and the way out.
    """
    if not isinstance(model, torch.nn.Module):
        raise InvalidValueError(f"model of type {type(model).__name__} must be a torch.nn.Module")
    if isinstance(model, torch.nn.Linear):
        raise InvalidValueError("model is a linear layer itself: use W4A16Linear.from_checkpoint")
    if isinstance(checkpoint, PackedCheckpoint):
        raise InvalidValueError(
            f"{checkpoint.path} holds packed weights: make each layer with W4A16Linear.from_packed, or load the folder "
            "with w4a16gen.integrations.transformers.from_pretrained"
        )
    if not isinstance(checkpoint, Mapping):
        raise InvalidValueError(
            f"checkpoint of type {type(checkpoint).__name__} must be a mapping: call w4a16gen.open_checkpoint(path)"
        )


def places_of_linears(model: torch.nn.Module) -> list[list[str]]:
    """Return the names of each torch.nn.Linear of a model; one that is used in several places has several."""
    places: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, torch.nn.Linear):
            places.setdefault(id(module), []).append(name)
    return list(places.values())


def _check_sizes(layer: Any, name: str, linear: torch.nn.Linear) -> None:
    """Raise unless a layer of the checkpoint is one, and has the model's sizes.

    Raises:
        InvalidValueError: naming the layer.
    """
    if not isinstance(layer, CheckpointLayer):
        raise InvalidValueError(
            f"layer {name} of type {type(layer).__name__} must be one of a checkpoint: call w4a16gen.open_checkpoint"
        )
    if (layer.n, layer.k) != (linear.out_features, linear.in_features):
        raise InvalidValueError(
            f"layer {layer.name} of the checkpoint is {[layer.n, layer.k]}, but the model's is "
            f"{[linear.out_features, linear.in_features]}: the checkpoint is of another model"
        )


def _replace(
    model: torch.nn.Module, names: Sequence[str], layer: CheckpointLayer, device: Any, uploaders: dict[Any, Uploader]
) -> str | None:
    """Replace one linear layer in all its places, and free it; or load its dense weight, and return why.

    Raises:
        InvalidValueError: if it has no device.
    """
    linear = model.get_submodule(names[0])
    uploader = Uploader(_device_of(names[0], linear) if device is None else device)
    uploader = uploaders.setdefault(uploader.device, uploader)
    made = _layer_or_reason(layer, linear, uploader)
    if isinstance(made, str):
        _load_dense(layer, linear, uploader.device)
        return made
    made.train(linear.training)
    for name in names:
        model.set_submodule(name, made)
    return None


def _why_not_alone(linear: torch.nn.Linear) -> str | None:
    """Return why a linear layer is more than a weight that only the layer itself reads, or None."""
    if isinstance(linear, NonDynamicallyQuantizableLinear):
        return "torch.nn.MultiheadAttention reads its weight, and never calls it"
    if type(linear).forward is not torch.nn.Linear.forward or "forward" in vars(linear):
        return f"its forward is not that of torch.nn.Linear, but of {type(linear).__name__}"
    if linear._forward_hooks or linear._forward_pre_hooks:  # noqa: SLF001
        return "it has hooks, which would be lost: register them after replace_linears"
    return None


def _device_of(name: str, linear: torch.nn.Linear) -> Any:
    if linear.weight.is_meta:
        raise InvalidValueError(f"{name} is on the meta device: pass device= to say where it shall be")
    return linear.weight.device


def _layer_or_reason(layer: CheckpointLayer, linear: torch.nn.Linear, uploader: Uploader) -> W4A16Linear | str:
    """Return the packed layer, or why it cannot take the place of the linear layer."""
    reason = _why_not_alone(linear) or why_never_runs(Problem(1, layer.n, layer.k, layer.group_size))
    if reason is not None:
        return reason
    try:
        made = W4A16Linear.from_checkpoint(layer, uploader=uploader)
    except InvalidValueError as error:  # such as a group size that the layout does not hold
        return str(error)
    if made.bias is None and linear.bias is not None:
        made.bias = half("bias", _bias_of_model(layer.name, linear.bias), uploader.device)
    return made


def _bias_of_model(name: str, bias: Tensor) -> Tensor:
    if bias.is_meta:
        raise InvalidValueError(f"the checkpoint holds no bias of {name}, and the model's has no values: load it first")
    return bias.detach()


def _load_dense(layer: CheckpointLayer, linear: torch.nn.Linear, device: Any) -> None:
    """Put the exact weight of the checkpoint, rounded to the dtype, into a linear layer."""
    permutation, scale = (
        None if array is None else torch.from_numpy(array) for array in (layer.permutation, layer.input_scale)
    )
    exact = dense_weight(layer.quantized(), layer.alpha, permutation, scale)
    bias = layer.bias
    parts = {"weight": exact, "bias": None if bias is None else torch.from_numpy(bias)}
    if bias is None and linear.bias is not None:
        parts["bias"] = _bias_of_model(layer.name, linear.bias)
    for part, values in parts.items():
        if values is not None:
            moved = values.to(device, linear.weight.dtype)
            setattr(linear, part, torch.nn.Parameter(moved, requires_grad=linear.weight.requires_grad))
