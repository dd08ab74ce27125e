"""Which format a checkpoint has, by its configuration; the tensors' names and shapes must then agree with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from w4a16gen.errors import InvalidValueError
from w4a16gen.weights.importers import (
    autoround,
    awq,
    compressed_tensors,
    gptq,
    hqq,
    marlin,
    mlx,
    modelopt,
    torchao,
)
from w4a16gen.weights.importers.config import flag, section, text
from w4a16gen.weights.importers.folder import read_json
from w4a16gen.weights.importers.mapped import shown_name
from w4a16gen.weights.importers.stored import StoredLayer
from w4a16gen.weights.importers.tensors import Tensors

Layers = dict[str, Callable[[], StoredLayer]]


def _gptq(tensors: Tensors, config: dict[str, Any]) -> Layers:
    """Return the layers of GPTQ, in its own form or in Marlin's."""
    if text(config, "checkpoint_format", "") == "marlin" or flag(config, "is_marlin_format", default=False):
        words, scales = ("B", "s") if any(name.endswith(".B") for name in tensors) else ("qweight", "scales")
        return marlin.stored_layers(tensors, words, scales, "gptq-marlin")
    return gptq.stored_layers(tensors, gptq.rules_of(config))


FORMATS: dict[str, Callable[[Tensors, dict[str, Any]], Layers]] = {
    "gptq": _gptq,
    "awq": awq.stored_layers,
    "compressed-tensors": compressed_tensors.stored_layers,
    "auto-round": autoround.stored_layers,
    "hqq": hqq.stored_layers,
    "torchao": lambda tensors, _: torchao.stored_layers(tensors),
    "mlx": mlx.stored_layers,
    "modelopt": modelopt.stored_layers,
}
"""What finds the layers of each format, by the method that configurations name."""
SYNONYMS = {"auto_gptq": "gptq", "gptqmodel": "gptq", "intel/auto-round": "auto-round", "auto_awq": "awq"}
_UNEVEN = "levels that are not evenly spaced"
_OTHER_BITS = "no 4-bit integers"
REFUSED = {
    "bitsandbytes": "a code book (nf4, fp4) or 8-bit integers",
    **dict.fromkeys(("mxfp4", "nvfp4", "fp4", "modelopt_fp4", "petit_nvfp4", "gpt_oss_mxfp4"), _UNEVEN),
    **dict.fromkeys(("fp8", "fbgemm_fp8", "bitnet", "eetq", "deepspeedfp", "ptpc_fp8", "modelopt_fp8"), _OTHER_BITS),
    **dict.fromkeys(("aqlm", "quip", "quip#", "vptq", "higgs", "spqr", "exl2", "exl3", "squeezellm"), "a code book"),
    "inc": "neural-compressor's own packing",
}
"""What each method stores that cannot be a weight of this package."""
_SIDE_FILES = (("quantize_config.json", "gptq"), ("quant_config.json", "awq"), ("hf_quant_config.json", "modelopt"))
"""Files that hold the configuration beside config.json, and the method that they stand for."""


def configuration_of(folder: Path) -> tuple[str, dict[str, Any]]:
    """Return the method and the configuration of the quantization of a folder.

    Args:
        folder: the folder of the checkpoint.

    Raises:
        InvalidValueError: if there is none, or a file is broken.
    """
    model = read_json(folder, "config.json")
    config = section(model, "quantization_config") or section(section(model, "text_config"), "quantization_config")
    config = config or section(model, "compression_config")  # older compressed-tensors
    of_mlx = section(model, "quantization")
    if of_mlx and "quant_method" not in config:  # MLX writes its configuration under both names
        return "mlx", of_mlx
    if config:
        method = text(config, "quant_method", "modelopt" if "quant_algo" in config else "")
        return SYNONYMS.get(method, method), config
    for name, method in _SIDE_FILES:
        if side := read_json(folder, name):
            return method, section(side, "quantization") if method == "modelopt" else side
    raise InvalidValueError(
        f"{folder} has no quantization_config in config.json, and no quantize_config.json, quant_config.json or "
        "hf_quant_config.json: the format of its weights is not known. "
        "A model in FP16 is quantized first: `w4a16gen quantize`"
    )


def find_layers(tensors: Tensors, method: str, config: dict[str, Any]) -> Layers:
    """Return what makes each layer, by the layer's name.

    Args:
        tensors: the checkpoint's tensors.
        method: the method that the configuration names.
        config: the configuration.

    Raises:
        InvalidValueError: if the method is not one that can be read, with the reason.
    """
    if method == "w4a16gen":
        raise InvalidValueError(
            "the weights are packed for this package already: open them with w4a16gen.open_packed, or name the "
            "checkpoint that they were converted from"
        )
    if method in REFUSED:
        raise InvalidValueError(
            f"a checkpoint of {method} holds {REFUSED[method]}, which uint4 kernels cannot represent: "
            "quantize the original model with GPTQ, AWQ or compressed-tensors"
        )
    if method not in FORMATS:
        known = ", ".join(FORMATS)
        raise InvalidValueError(f"quant_method {shown_name(method)} must be one of {known}, or the file a .gguf file")
    return FORMATS[method](tensors, config)
