"""Modules of experts of transformers' models: which can be W4A16Experts, and what takes the place of the others.

Transformers 5 keeps all experts of a layer in two parameters of three dimensions, `gate_up_proj` and `down_proj`. Files
name each expert.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch

from w4a16gen.errors import InvalidValueError
from w4a16gen.integrations.torch.experts import W4A16Experts
from w4a16gen.integrations.torch.stack import stack_layers
from w4a16gen.integrations.torch.upload import Uploader
from w4a16gen.progress import Progress, no_progress
from w4a16gen.weights.expert_layers import MoeLayer, moe_layer
from w4a16gen.weights.expert_names import DOWN, GATE_UP, ExpertNames, find_experts
from w4a16gen.weights.importers.mapped import shown_name
from w4a16gen.weights.packed_checkpoint import PackedCheckpoint

PARAMETERS = ("gate_up_proj", "down_proj")
_RANK = 3
_ARGUMENTS = ["self", "hidden_states", "top_k_index", "top_k_weights"]
_TRAITS = {
    "has_gate": (True, "they have no gate"),
    "has_bias": (False, "they have biases"),
    "has_post_expert_norm": (False, "a norm follows each expert"),
    "is_concatenated": (True, "their gate and up rows alternate"),
    "is_transposed": (False, "their weights are stored as [k, n]"),
}
"""What transformers says of a class of experts: what it must be, and why others are not served."""
_LATER_TRAITS = {"has_post_expert_norm": False}
"""Traits that older versions of transformers, such as 5.17, do not know, and what is true of all experts there."""


@dataclass(frozen=True)
class PlacedExperts:
    """What became of the modules of experts of a model.

    Attributes:
        served: names of the modules that are W4A16Experts now.
        dense: names of those that stay as they are, with the reason.
        used: names of the checkpoint's tensors that the served ones hold.
    """

    served: tuple[str, ...] = ()
    dense: Mapping[str, str] = field(default_factory=dict)
    used: frozenset[str] = frozenset()


def alternatives(name: str) -> list[str]:
    """Return the names that a module of experts, or one beside it, may have in a file, the likeliest first.

    Mixtral's files say `block_sparse_moe` where the model says `mlp`. MLX says `switch_mlp` of experts.

    Args:
        name: a name of the model.
    """
    names = [name, re.sub(r"\.mlp(?=\.|$)", ".block_sparse_moe", name)]
    return list(dict.fromkeys([*names, *(re.sub(r"\.experts$", ".switch_mlp", one) for one in names)]))


def one_place(found: Mapping[str, ExpertNames], names: Iterable[str]) -> ExpertNames | None:
    """Return the experts that a checkpoint has under one of some names, or None.

    Args:
        found: the experts of the checkpoint, by the module that holds them.
        names: the names that a module of the model may have in the checkpoint.

    Raises:
        InvalidValueError: if there are experts under two of them, so that either could be meant.
    """
    places = [name for name in dict.fromkeys(names) if name in found]
    if len(places) > 1:
        raise InvalidValueError(
            f"the checkpoint has experts of one layer as {shown_name(places[0])} and as {shown_name(places[1])}: "
            "keep those of one name"
        )
    return found[places[0]] if places else None


def modules_of_experts(model: Any) -> dict[str, Any]:
    """Return the modules of a model that hold all experts of a layer in two parameters, by name.

    Args:
        model: the model.
    """
    return {name: module for name, module in model.named_modules() if _holds_experts(module)}


def is_experts(module: Any) -> bool:
    """Return whether a module holds all experts of a layer, served or dense."""
    return isinstance(module, W4A16Experts) or _holds_experts(module)


def _holds_experts(module: Any) -> bool:
    parts = [getattr(module, part, None) for part in PARAMETERS]
    return all(isinstance(part, torch.nn.Parameter) and part.dim() == _RANK for part in parts)


def why_not_served(module: Any) -> str | None:
    """Return why a module of experts cannot be W4A16Experts, or None.

    Args:
        module: one of `modules_of_experts`.
    """
    kind = type(module).__name__
    for trait, (wanted, reason) in _TRAITS.items():
        if getattr(module, trait, _LATER_TRAITS.get(trait)) is not wanted:
            return f"experts of {kind} are not served: {reason if hasattr(module, trait) else 'their kind is unknown'}"
    default = getattr(_moe_of_transformers(), "_default_apply_gate", None)
    if default is None or getattr(type(module), "_apply_gate", None) is not default:
        return f"experts of {kind} are not served: their result is not act(gate) * up"
    if list(inspect.signature(type(module).forward).parameters) != _ARGUMENTS or not callable(module.act_fn):
        return f"experts of {kind} are not served: they are called in another way"
    return None


def _moe_of_transformers() -> Any:
    """Return the module of transformers that describes experts, or None in versions before it."""
    try:
        return import_module("transformers.integrations.moe")
    except ImportError:
        return None


def put_experts(model: Any, source: Any, uploader: Uploader, progress: Progress | None = None) -> PlacedExperts:
    """Replace the modules of experts of a model by those of a checkpoint, one layer after the other.

    Args:
        model: the model, whose parameters are on the meta device.
        source: the checkpoint by the names of the model.
        uploader: copies bytes to the device of the experts.
        progress: called with the layers of experts done, those in all, and the name of the last one.

    Raises:
        InvalidValueError: if the checkpoint has other experts than the model.
        NotBuiltError: on a GPU, if no native kernel of the mode is built.
    """
    served, dense, used = [], {}, set()
    modules = modules_of_experts(model)
    for done, (name, module) in enumerate(modules.items(), 1):
        names = source.experts(name)
        reason = "the checkpoint holds no 4-bit experts of this name" if names is None else None
        reason = reason or names.why_incomplete() or why_not_served(module)
        if reason is None:
            layer = moe_layer(source.checkpoint, names)
            check_sizes(name, module, layer)
            check_routes(model, name, module)
            try:
                made = experts_of(layer, module, uploader)
            except InvalidValueError as error:  # such as a group size that the layout does not hold
                reason = str(error)
            else:
                model.set_submodule(name, made.train(module.training))
                served.append(name)
                used |= _tensors_of(layer)
        if reason is not None:
            dense[name] = reason
        (progress or no_progress)(done, len(modules), name)
    return PlacedExperts(tuple(served), dense, frozenset(used))


def _tensors_of(layer: MoeLayer) -> set[str]:
    """Return the names of the tensors of an opened checkpoint's experts."""
    of_layers = (one for of_role in layer.layers.values() for one in of_role)
    return {name for one in of_layers for name in getattr(one, "tensor_names", ())}


def experts_of(layer: MoeLayer, module: Any, uploader: Uploader) -> W4A16Experts:
    """Return the experts of a layer of a checkpoint, in the place of a module.

    Args:
        layer: the layer of the checkpoint.
        module: the module, whose parameters have no values yet.
        uploader: copies bytes to the device of the experts.

    Raises:
        InvalidValueError: if a weight is damaged, or the layout cannot hold it.
        NotBuiltError: on a GPU, if no native kernel of the mode is built.
    """
    roles = [role for role in layer.layers if role != DOWN]
    joint = stack_layers(list(zip(*(layer.layers[role] for role in roles), strict=True)), uploader, gate_up=True)
    down = stack_layers([(one,) for one in layer.layers[DOWN]], uploader, gate_up=False)
    made = W4A16Experts(joint, down, module.act_fn)
    made.__dict__["dense_form"] = module.to("meta")  # no submodule: state dicts must not hold it
    return made


def check_sizes(name: str, module: Any, layer: MoeLayer) -> None:
    """Raise unless a checkpoint has the experts of a module.

    Raises:
        InvalidValueError: naming the module and both sizes.
    """
    experts, rows, hidden = module.gate_up_proj.shape
    if layer.experts != experts:
        raise InvalidValueError(
            f"{shown_name(layer.name)} has {layer.experts} experts in the checkpoint, but the model's {name} has "
            f"{experts}: config.json is of another model"
        )
    wanted = {DOWN: (hidden, rows // 2), GATE_UP: (rows, hidden)}
    for role, of_role in layer.layers.items():
        for one in of_role:
            sizes = getattr(one, "weight", one)
            if (sizes.n, sizes.k) != wanted.get(role, (rows // 2, hidden)):
                raise InvalidValueError(
                    f"layer {shown_name(one.name)} of the checkpoint is {[sizes.n, sizes.k]}, but the model's is "
                    f"{list(wanted.get(role, (rows // 2, hidden)))}: config.json is of another model"
                )


def check_routes(model: Any, name: str, module: Any) -> None:
    """Raise if a model's configuration has each token take more experts than a module has, or none.

    Raises:
        InvalidValueError: naming the module and both numbers.
    """
    slots = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
    experts = len(module.gate_up_proj)
    if isinstance(slots, int) and not 1 <= slots <= experts:
        raise InvalidValueError(
            f"num_experts_per_tok of {slots} in config.json must be 1 to {experts}, the number of experts of {name}"
        )


def placed_experts(model: Any, packed: PackedCheckpoint) -> dict[str, ExpertNames]:
    """Return the experts of a folder that take the place of modules of a model, by the modules' names.

    Args:
        model: the model.
        packed: the folder.

    Raises:
        InvalidValueError: if the folder has other experts than the model, or lacks some, or the model's experts cannot
            be served.
    """
    found = find_experts(packed)
    result = {}
    for name, module in modules_of_experts(model).items():
        names = one_place(found, alternatives(name))
        if names is not None:
            if reason := names.why_incomplete() or why_not_served(module):
                raise InvalidValueError(f"{packed.path}: {reason}")
            check_sizes(name, module, moe_layer(packed, names))
            check_routes(model, name, module)
            result[name] = names
    return result


def dense_experts(experts: W4A16Experts, dtype: Any) -> Any:
    """Return the dense module that experts have taken the place of, with their weights.

    Args:
        experts: the experts.
        dtype: dtype of the weights.
    """
    dense = copy.deepcopy(experts.__dict__["dense_form"])
    for part, projection in zip(PARAMETERS, (experts.gate_up, experts.down), strict=True):
        setattr(dense, part, torch.nn.Parameter(projection.dequantize(dtype), requires_grad=False))
    return dense.train(experts.training)
