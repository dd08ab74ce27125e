"""The quantizer `w4a16gen` of transformers: it loads folders that `w4a16gen convert` and `w4a16gen quantize` wrote."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from w4a16gen.errors import InvalidValueError
from w4a16gen.integrations.torch.experts import W4A16Experts
from w4a16gen.integrations.torch.linear import W4A16Linear
from w4a16gen.integrations.torch.upload import Uploader
from w4a16gen.integrations.transformers.experts import dense_experts, experts_of, placed_experts
from w4a16gen.weights.expert_layers import moe_layer
from w4a16gen.weights.expert_names import ExpertNames
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


class ExpertsPlace(torch.nn.Module):
    """The place of the experts of a layer, with the names of their tensors in the files, until they have values."""

    def __init__(self, packed: PackedCheckpoint, names: ExpertNames, module: Any) -> None:
        """Make a place for each packed layer, under the words of its name that follow the module's."""
        super().__init__()
        self.names = names
        self.__dict__["module"] = module
        for name in sorted(names.names):
            expert, part = name.removeprefix(f"{names.name}.").split(".")
            if expert not in self._modules:
                self.add_module(expert, torch.nn.Module())
            self._modules[expert].add_module(part, PackedLinear(packed[name]))  # type: ignore[union-attr, unused-ignore]

    def finished(self) -> W4A16Experts:
        """Return the experts on the device of their values.

        Raises:
            InvalidValueError: if a tensor was not read, or was cast; or the projections of an expert cannot be joined.
        """
        layers = {name: self._layer(name) for name in self.names.names}
        device = next(iter(layers.values())).weight.data.device
        return experts_of(moe_layer(layers, self.names), self.module, Uploader(device))

    def _layer(self, name: str) -> PackedLayer:
        place: Any = self.get_submodule(name.removeprefix(f"{self.names.name}."))
        linear = place.finished(name)
        parts = {
            part: None if (tensor := getattr(linear, part)) is None else tensor.cpu().numpy()
            for part in ("bias", "permutation", "input_scale")
        }
        return PackedLayer(name, linear.weight_of(), linear.alpha, **parts)


class W4A16Quantizer(HfQuantizer):  # type: ignore[misc, unused-ignore]
    """Puts layers of 4 bits into a model while transformers loads it.

    Nothing asks for a GPU until a layer on one is called; on the CPU each layer computes the reference, slowly.
    """

    requires_calibration = False
    experts: Sequence[W4A16Experts] = ()
    """The model's layers of experts."""

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **_more: Any) -> Any:
        folder = Path(checkpoint_files[0]).parent if checkpoint_files else Path(model.config.name_or_path)
        packed = open_packed(folder, verify=False)
        experts = placed_experts(model, packed)
        for name in placed(model, packed, experts.values()):
            model.set_submodule(name, PackedLinear(packed[name]))
        for name, names in experts.items():
            model.set_submodule(name, ExpertsPlace(packed, names, model.get_submodule(name)))
        return model

    def _process_model_after_weight_loading(self, model: Any, **_more: Any) -> Any:
        places = [name for name, module in model.named_modules() if isinstance(module, ExpertsPlace)]
        for name in places:  # each place is freed before the next is finished
            model.set_submodule(name, model.get_submodule(name).finished().train(model.training))
        for name, module in list(model.named_modules()):
            if isinstance(module, PackedLinear):
                model.set_submodule(name, module.finished(name).train(model.training))
        self.experts = _experts_in(model)
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        self.experts = ()  # which would keep their memory
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
        """Whether `generate` may compile the model as a whole: not with experts whose calls wait for the device."""
        return not any(experts.waits for experts in self.experts)


def _experts_in(model: Any) -> list[W4A16Experts]:
    return [module for module in model.modules() if isinstance(module, W4A16Experts)]


def placed(model: Any, packed: PackedCheckpoint, experts: Iterable[ExpertNames] = ()) -> list[str]:
    """Return the names of a folder's layers, each of which is a linear layer of the model.

    Args:
        model: the model, whose head is parted from its embedding if the folder holds it in 4 bits.
        packed: the folder.
        experts: the folder's experts, whose layers are left out.

    Raises:
        InvalidValueError: if the model has no such linear layer, or one of other sizes.
    """
    of_experts = {name for names in experts for name in names.names}
    linears = [name for name in packed if name not in of_experts]
    for name in linears:
        layer = packed[name]
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
    return linears


def dequantized(model: Any, dtype: Any) -> Any:
    """Replace the 4-bit layers of a model by dense ones, and return the model.

    Args:
        model: the model.
        dtype: dtype of the weights.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, W4A16Experts):
            model.set_submodule(name, dense_experts(module, dtype))
        elif isinstance(module, W4A16Linear):
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
    model.hf_quantizer.experts = _experts_in(model)
    model.is_quantized = True
    model.quantization_method = METHOD
    model.config.quantization_config = config


def register() -> None:
    """Make transformers know the quantizer, once per process."""
    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantization_config(METHOD)(W4A16Config)
        auto.register_quantizer(METHOD)(W4A16Quantizer)
