"""A checkpoint in the terms of a model: which of its layers and tensors a module takes, and how they were changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from w4a16gen.errors import InvalidValueError
from w4a16gen.integrations.torch.linear import W4A16Linear
from w4a16gen.integrations.torch.replace import Replacement, replace_linears
from w4a16gen.integrations.torch.upload import Uploader
from w4a16gen.integrations.transformers.experts import alternatives, is_experts, one_place
from w4a16gen.integrations.transformers.packages import need_gguf
from w4a16gen.integrations.transformers.quantizer import placed
from w4a16gen.progress import Progress, no_progress
from w4a16gen.weights.expert_names import ExpertNames, find_experts, place_of
from w4a16gen.weights.importers.checkpoint import Checkpoint
from w4a16gen.weights.importers.gguf import ROTATED, GgufLayer, rotated_rows
from w4a16gen.weights.importers.layer import CheckpointLayer
from w4a16gen.weights.importers.mapped import shown_name
from w4a16gen.weights.importers.stored import Indices
from w4a16gen.weights.packed_checkpoint import PackedCheckpoint

Names = Callable[[str], Iterable[str]]
"""Returns the names that a module of the model may have in the checkpoint, the likeliest first."""
_PREFIXES = (
    ("", ""),
    ("model.language_model.", "language_model.model."),
    ("lm_head", "language_model.lm_head"),
    ("model.", "language_model.model."),
    ("model.", "model.language_model."),
    ("model.", ""),
)
"""How names of a model begin, and those of its checkpoints: of a part of it, or of a model of text and images."""
_WEIGHT = ".weight"
SHIFTED = ("gemma", "gemma2", "gemma3")
"""Architectures of GGUF whose files hold 1 + w for the weight w of each norm."""
ARCHITECTURES = ("llama", "qwen2", "qwen3", "smollm3", *SHIFTED)
"""Architectures of GGUF files that can be loaded."""


@dataclass(frozen=True)
class Stored:
    """A tensor of the checkpoint that a parameter takes.

    Attributes:
        name: its name in the checkpoint.
        rows: the row of the file that each row of the parameter takes, intp [rows], or None.
        shift: what to add to each value.
    """

    name: str
    rows: Indices | None = None
    shift: float = 0.0


class LayersOfModel(dict[str, CheckpointLayer]):
    """The layers of a checkpoint by the names that the model has for them."""

    unsupported: dict[str, str]
    """Why other modules, which are quantized in the checkpoint, are not among them."""


class Source:
    """A checkpoint by the names of a model."""

    def __init__(self, checkpoint: Checkpoint | PackedCheckpoint, names: Names) -> None:
        """Take a checkpoint and what its names are."""
        self.checkpoint = checkpoint
        self._names = names

    @cached_property
    def _experts(self) -> dict[str, ExpertNames]:
        return find_experts(self.checkpoint)

    @cached_property
    def _experts_of_any_kind(self) -> dict[str, ExpertNames]:
        weights = (name for name in self.checkpoint.dense if name.endswith(_WEIGHT))
        return find_experts([*self.checkpoint, *(name.removesuffix(_WEIGHT) for name in weights)])

    def experts(self, module: str, *, dense: bool = False) -> ExpertNames | None:
        """Return the names of the experts of a module, or None.

        Args:
            module: the module that holds all experts.
            dense: whether experts that are not of 4 bits count too.

        Raises:
            InvalidValueError: if the checkpoint has experts under two of the names that the module may have.
        """
        found = self._experts_of_any_kind if dense else self._experts
        return one_place(found, self._names(module))

    def refused_expert(self, module: str) -> str | None:
        """Return why an expert of a module, quantized in the checkpoint, cannot be read; None if all can."""
        refused: dict[str, str] = getattr(self.checkpoint, "unsupported", {})
        places = {name: place[0] for name in refused if (place := place_of(name)) is not None}
        wanted = set(self._names(module))
        return next((refused[name] for name, place in places.items() if place in wanted), None)

    def put_layers(self, model: Any, uploader: Uploader, progress: Progress | None) -> Replacement:
        """Replace the linear layers of a model by those of the checkpoint, one after the other.

        Args:
            model: the model.
            uploader: copies bytes to the device of the layers.
            progress: called with the layers done, the layers in all, and the name of the last one.

        Raises:
            InvalidValueError: if a layer is damaged, or of other sizes than the model's.
            NotBuiltError: on a GPU, if no native kernel of a layer's mode is built.
        """
        linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        return replace_linears(model, self.layers(linears), device=uploader.device, progress=progress)

    def layer(self, module: str) -> CheckpointLayer | None:
        """Return the 4-bit layer of a module, or None."""
        checkpoint = self.checkpoint
        if isinstance(checkpoint, PackedCheckpoint):
            return None
        found = next((name for name in self._names(module) if name in checkpoint), None)
        return None if found is None else checkpoint[found]

    def layers(self, modules: Iterable[str]) -> LayersOfModel:
        """Return the 4-bit layers of some modules."""
        layers = LayersOfModel()
        layers.unsupported = {}
        refused: dict[str, str] = getattr(self.checkpoint, "unsupported", {})
        for module in modules:
            reasons = [refused.get(name) for name in self._names(module)]
            layer = self.layer(module)
            if layer is not None:
                layers[module] = layer
            elif reason := next((reason for reason in reasons if reason), None):
                layers.unsupported[module] = reason
        return layers

    def stored(self, parameter: str) -> Stored | None:
        """Return the tensor that a parameter takes as it is, or None."""
        module, _, part = parameter.rpartition(".")
        names = [f"{name}.{part}" for name in self._names(module)]
        found = next((name for name in names if name in self.checkpoint.tensors), None)
        return None if found is None else Stored(found)


class GgufSource(Source):
    """A GGUF file by the names of a model."""

    def __init__(self, checkpoint: Checkpoint, config: Any) -> None:
        """Take a file and the configuration of the model.

        Raises:
            InvalidValueError: if its architecture cannot be loaded.
            MissingToolError: if the package `gguf` is not installed.
        """
        gguf = need_gguf()
        self.architecture = str(checkpoint.config.get("general.architecture"))
        if self.architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise InvalidValueError(
                f"architecture {shown_name(self.architecture)} of a GGUF file must be one of {known}"
            )
        number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture)
        table = gguf.get_tensor_name_map(number, config.num_hidden_layers)

        def names(module: str) -> list[str]:
            name = table.get_name(module)
            return [] if name is None else [name]

        super().__init__(checkpoint, names)
        self._heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}

    def layer(self, module: str) -> CheckpointLayer | None:
        """Return the 4-bit layer of a module, or None, with its rows in the order of the model."""
        layer = super().layer(module)
        rows = None if layer is None else self._rows(layer.name, layer.n)
        if layer is None or rows is None or not isinstance(layer.stored, GgufLayer):
            return layer
        return CheckpointLayer(layer.stored.with_rows(rows))

    def stored(self, parameter: str) -> Stored | None:
        """Return the tensor that a parameter takes, and how the file has changed it, or None."""
        found = super().stored(parameter)
        if found is None:
            return None
        module = found.name.rpartition(".")[0]
        rows = self._rows(module, self.checkpoint.tensors[found.name].shape[0])
        shifted = self.architecture in SHIFTED and found.name.endswith("norm.weight")
        return Stored(found.name, rows, -1.0 if shifted else 0.0)

    def _rows(self, module: str, n: int) -> Indices | None:
        heads = self._heads.get(module.rpartition(".")[2])
        return rotated_rows(n, heads) if heads is not None and self.architecture in ROTATED else None


class PackedSource(Source):
    """A folder of packed weights by the names of a model, which are its own."""

    checkpoint: PackedCheckpoint

    def put_layers(self, model: Any, uploader: Uploader, progress: Progress | None) -> Replacement:
        """Replace the linear layers of a model by the packed ones, one after the other.

        Args:
            model: the model.
            uploader: copies bytes to the device of the layers.
            progress: called with the layers done, the layers in all, and the name of the last one.

        Raises:
            InvalidValueError: if a packed layer is no linear layer of the model, or of other sizes.
        """
        linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        of_experts = (name for name, module in model.named_modules() if is_experts(module))
        experts = [found for name in of_experts if (found := self.experts(name)) is not None]
        names = placed(model, self.checkpoint, experts)
        for done, name in enumerate(names, 1):
            layer = self.checkpoint[name]
            weight = replace(layer.weight, data=uploader.bytes(layer.weight.host_data()))
            parts = {part: getattr(layer, part) for part in ("permutation", "input_scale")}
            made = W4A16Linear.from_packed(weight, layer.bias, alpha=layer.alpha, **parts)
            model.set_submodule(name, made.train(model.training))
            (progress or no_progress)(done, len(names), name)
        packed = set(names)
        dense = {name: "the folder holds no packed layer of this name" for name in linears if name not in packed}
        return Replacement(tuple(names), {}, dense, ())


def source_of(checkpoint: Checkpoint | PackedCheckpoint, config: Any) -> Source:
    """Return a checkpoint by the names of a model.

    Args:
        checkpoint: the checkpoint, or a folder of packed weights.
        config: the configuration of the model.

    Raises:
        InvalidValueError: if it is a GGUF file of an architecture that cannot be loaded.
        MissingToolError: if it is a GGUF file, and the package `gguf` is not installed.
    """
    if isinstance(checkpoint, Checkpoint) and checkpoint.method == "gguf":
        return GgufSource(checkpoint, config)
    beginnings = [*_PREFIXES, ("", f"{config.model_type}.")]

    def names(module: str) -> list[str]:
        found = [of_file + module.removeprefix(own) for own, of_file in beginnings if module.startswith(own)]
        return [alternative for name in found for alternative in alternatives(name)]

    return (PackedSource if isinstance(checkpoint, PackedCheckpoint) else Source)(checkpoint, names)
