"""The quantizer `w4a16gen` of transformers: it loads folders that `w4a16gen convert` and `w4a16gen quantize` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from w4a16gen.errors import InvalidValueError
from w4a16gen.integrations.torch.linear import W4A16Linear
from w4a16gen.weights.importers.mapped import shown_name
from w4a16gen.weights.packed import PackedWeight
from w4a16gen.weights.packed_checkpoint import FORMAT, PackedCheckpoint, PackedLayer, open_packed

METHOD = "w4a16gen"
"""The quant_method of packed folders."""
_DTYPES = {"bias": torch.float16, "permutation": torch.int32, "input_scale": torch.float16}


class W4A16Config(QuantizationConfigMixin):  # type: ignore[misc, unused-ignore]
    """What config.json says of a folder's packed weights.

    Attributes:
        quant_method: `w4a16gen`.
        format: name and version of the folder's form.
        layout: tag of the layout of the weights.
        bits: 4.
        source: how the weights were quantized.
    """

    def __init__(self, format: str = FORMAT, layout: str = "", bits: int = 4, source: str = "", **_more: Any) -> None:  # noqa: A002
        """Take the members of the configuration; others are ignored."""
        self.quant_method = METHOD
        self.format = format
        self.layout = layout
        self.bits = bits
        self.source = source


class PackedLinear(torch.nn.Module):
    """The place of a packed layer, with the names of its tensors in the files, until their values are there."""

    def __init__(self, layer: PackedLayer) -> None:
        """Make buffers on the meta device."""
        super().__init__()
        weight = layer.weight
        self.facts = weight.layout, weight.n, weight.k, weight.group_size, weight.mode
        self.register_buffer("packed", torch.empty(weight.nbytes, dtype=torch.uint8, device="meta"))
        self.register_buffer("alpha", torch.empty(1, dtype=torch.float32, device="meta"))
        for name, dtype in _DTYPES.items():
            value = getattr(layer, name)
            tensor = None if value is None else torch.empty(value.shape, dtype=dtype, device="meta")
            self.register_buffer(name, tensor)

    def finished(self, name: str) -> W4A16Linear:
        """Return the layer, which shares the weight's memory.

        Raises:
            InvalidValueError: if a tensor was not read, or was cast.
        """
        tensors = {part: tensor for part, tensor in self.named_buffers() if tensor is not None}
        for part, tensor in tensors.items():
            wanted = {**_DTYPES, "packed": torch.uint8, "alpha": torch.float32}[part]
            if tensor.is_meta or tensor.dtype != wanted:
                raise InvalidValueError(
                    f"tensor {shown_name(f'{name}.{part}')} was not read as its file holds it: use "
                    "w4a16gen.integrations.transformers.from_pretrained"
                )
        layout, n, k, group_size, mode = self.facts
        weight = PackedWeight(self.packed, layout, n, k, group_size, mode)
        return W4A16Linear(
            weight,
            tensors.get("bias"),
            permutation=tensors.get("permutation"),
            input_scale=tensors.get("input_scale"),
            alpha=float(tensors["alpha"]),
        )


class W4A16Quantizer(HfQuantizer):  # type: ignore[misc, unused-ignore]
    """Puts layers of 4 bits into a model while transformers loads it.

    Nothing asks for a GPU until a layer on one is called; on the CPU each layer computes the reference, slowly.
    """

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **_more: Any) -> Any:
        folder = Path(checkpoint_files[0]).parent if checkpoint_files else Path(model.config.name_or_path)
        packed = open_packed(folder, verify=False)
        for name in placed(model, packed):
            model.set_submodule(name, PackedLinear(packed[name]))
        return model

    def _process_model_after_weight_loading(self, model: Any, **_more: Any) -> Any:
        for name, module in list(model.named_modules()):
            if isinstance(module, PackedLinear):
                model.set_submodule(name, module.finished(name).train(model.training))
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        return dequantized(model, dtype or torch.float16)

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Return that `save_pretrained` does not write packed folders: `w4a16gen convert` does."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Whether layers have a backward pass: no."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` may compile the model: yes."""
        return True


def placed(model: Any, packed: PackedCheckpoint) -> list[str]:
    """Return the names of a folder's layers, each of which is a linear layer of the model.

    Args:
        model: the model, whose head is parted from its embedding if the folder holds it in 4 bits.
        packed: the folder.

    Raises:
        InvalidValueError: if the model has no such linear layer, or one of other sizes.
    """
    for name, layer in packed.items():
        try:
            module = model.get_submodule(name)
        except AttributeError:
            module = None
        if not isinstance(module, torch.nn.Linear):
            raise InvalidValueError(
                f"{packed.path}: the packed layer {shown_name(name)} is no linear layer of {type(model).__name__}: "
                "load the checkpoint that the folder was converted from"
            )
        if (module.out_features, module.in_features) != (layer.weight.n, layer.weight.k):
            raise InvalidValueError(
                f"{packed.path}: the packed layer {shown_name(name)} is {[layer.weight.n, layer.weight.k]}, but the "
                f"model's is {[module.out_features, module.in_features]}: config.json is of another model"
            )
        if (module.bias is None) != (layer.bias is None):
            has = "no bias" if layer.bias is None else "a bias"
            raise InvalidValueError(f"{packed.path}: the packed layer {shown_name(name)} has {has}, unlike the model's")
    tied = getattr(model, "all_tied_weights_keys", None)
    if tied is not None and "lm_head" in packed:
        tied.pop("lm_head.weight", None)
        model.config.get_text_config().tie_word_embeddings = False
    return list(packed)


def dequantized(model: Any, dtype: Any) -> Any:
    """Replace the 4-bit layers of a model by dense ones, and return the model.

    Args:
        model: the model.
        dtype: dtype of the weights.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, W4A16Linear):
            with torch.device("meta"):
                linear = torch.nn.Linear(module.k, module.n, bias=module.bias is not None)
            linear.weight = torch.nn.Parameter(module.dequantize(dtype), requires_grad=False)
            if module.bias is not None:
                linear.bias = torch.nn.Parameter(module.bias.to(dtype), requires_grad=False)
            model.set_submodule(name, linear.train(module.training))
    return model


def mark(model: Any, config: W4A16Config) -> None:
    """Tell transformers that a model is quantized, as its own loader does."""
    model.hf_quantizer = W4A16Quantizer(config)
    model.is_quantized = True
    model.quantization_method = METHOD
    model.config.quantization_config = config


def register() -> None:
    """Make transformers know the quantizer, once per process."""
    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(METHOD)(W4A16Config)
        auto.register_quantizer(METHOD)(W4A16Quantizer)
