"""A checkpoint in the terms of a model: which of its layers and tensors a module takes, and how they were changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from w4a16gen.errors import InvalidValueError
from w4a16gen.integrations.transformers.packages import need_gguf
from w4a16gen.weights.importers.checkpoint import Checkpoint
from w4a16gen.weights.importers.gguf import ROTATED, GgufLayer, rotated_rows
from w4a16gen.weights.importers.layer import CheckpointLayer
from w4a16gen.weights.importers.mapped import shown_name
from w4a16gen.weights.importers.stored import Indices

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

    def __init__(self, checkpoint: Checkpoint, names: Names) -> None:
        """Take a checkpoint and what its names are."""
        self.checkpoint = checkpoint
        self._names = names

    def layer(self, module: str) -> CheckpointLayer | None:
        """Return the 4-bit layer of a module, or None."""
        found = next((name for name in self._names(module) if name in self.checkpoint), None)
        return None if found is None else self.checkpoint[found]

    def layers(self, modules: Iterable[str]) -> LayersOfModel:
        """Return the 4-bit layers of some modules."""
        layers = LayersOfModel()
        layers.unsupported = {}
        for module in modules:
            reasons = [self.checkpoint.unsupported.get(name) for name in self._names(module)]
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


def source_of(checkpoint: Checkpoint, config: Any) -> Source:
    """Return a checkpoint by the names of a model.

    Args:
        checkpoint: the checkpoint.
        config: the configuration of the model.

    Raises:
        InvalidValueError: if it is a GGUF file of an architecture that cannot be loaded.
        MissingToolError: if it is a GGUF file, and the package `gguf` is not installed.
    """
    if checkpoint.method == "gguf":
        return GgufSource(checkpoint, config)
    beginnings = [*_PREFIXES, ("", f"{getattr(config, 'model_type', '')}.")]
    return Source(
        checkpoint,
        lambda module: [
            ending + module.removeprefix(beginning) for beginning, ending in beginnings if module.startswith(beginning)
        ],
    )
