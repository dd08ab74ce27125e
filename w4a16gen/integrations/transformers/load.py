"""Load a checkpoint of any readable format into a model of transformers."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
import transformers

from w4a16gen.errors import InvalidValueError
from w4a16gen.integrations.torch.upload import Uploader
from w4a16gen.integrations.transformers.dense import load_dense
from w4a16gen.integrations.transformers.dense_experts import load_dense_experts
from w4a16gen.integrations.transformers.experts import put_experts
from w4a16gen.integrations.transformers.quantizer import METHOD, W4A16Config, mark
from w4a16gen.integrations.transformers.report import report_of
from w4a16gen.integrations.transformers.skeleton import config_of, dtype_of, first_line, make_model
from w4a16gen.integrations.transformers.sources import Source, source_of
from w4a16gen.progress import Progress
from w4a16gen.weights.importers.checkpoint import Checkpoint, open_checkpoint
from w4a16gen.weights.importers.config import section
from w4a16gen.weights.importers.folder import read_json
from w4a16gen.weights.packed_checkpoint import PackedCheckpoint, open_packed
from w4a16gen.weights.storage import as_path

_ROPE_FACTORS = "rope_freqs.weight"


def from_pretrained(
    path: str | os.PathLike[str],
    *,
    device: Any = "cuda",
    dtype: Any = None,
    config: Any = None,
    model_class: Any = None,
    attn_implementation: str | None = None,
    progress: Progress | None = None,
) -> Any:
    """Load a 4-bit checkpoint into a model of transformers, for `generate`, `torch.compile` and the like.

    Linear layers become W4A16Linear, and the experts of a layer W4A16Experts, one after the other; all else is dense,
    in the given dtype. No second copy of the model exists at any time. The attribute `w4a16gen_report` says which
    layers have 4 bits, and why others do not.

    Args:
        path: what `w4a16gen.open_checkpoint` opens: a folder of GPTQ, AWQ, compressed-tensors and so on, or a GGUF
            file; or a folder that `w4a16gen convert` wrote. Nothing is downloaded, and no code of the folder runs.
        device: where the model shall be, in torch's terms. On the CPU each layer computes the reference, slowly.
        dtype: of activations and dense parameters: fp16, bf16 or fp32; None takes that of the configuration, or else
            fp16, and bf16 for Gemma.
        config: a configuration of transformers, or a folder with config.json, where the checkpoint has none, as a GGUF
            file does; None takes the checkpoint's own.
        model_class: a class of transformers, such as AutoModel; None takes the one that the configuration names, or
            else AutoModelForCausalLM.
        attn_implementation: what computes attention, in transformers' terms.
        progress: called with the layers done, the layers in all, and the name of the last one: first for the layers of
            experts, if the model has any, and then for the linear layers.

    Returns:
        The model in eval mode; no parameter records gradients.

    Raises:
        InvalidValueError: if the checkpoint cannot be read, is of another model than its configuration says, or lacks
            parameters.
        MissingToolError: if a package that the checkpoint needs is not installed.
        NotBuiltError: on a GPU, if no native kernel of a layer's mode is built.

    Example:
        >>> from w4a16gen.integrations.transformers import from_pretrained
        >>> model = from_pretrained("Qwen3-8B-GPTQ")  # doctest: +SKIP
        >>> print(model.w4a16gen_report)  # doctest: +SKIP
        w4a16gen serves 252 of 253 linear layers
    """
    uploader = Uploader(device)
    checkpoint = _opened(path)
    described = config_of(checkpoint, config)
    source = source_of(checkpoint, described.get_text_config())
    if source.layer("lm_head") is not None or _has_own_head(source):
        described.tie_word_embeddings = False  # such a head cannot be the embedding
    model = make_model(described, dtype_of(dtype, described), model_class, attn_implementation)
    experts = put_experts(model, source, uploader, progress)
    replacement = source.put_layers(model, uploader, progress)
    if not replacement.replaced and not replacement.dequantized and not experts.served:
        reason = next(iter(experts.dense.values()), "it is of another model than its configuration says")
        raise InvalidValueError(
            f"{checkpoint.path} has {len(checkpoint)} 4-bit layers, such as {next(iter(checkpoint))}, but none that "
            f"{type(model).__name__} can use: {reason}"
        )
    used = load_dense(model, source, uploader) | load_dense_experts(model, source, uploader) | experts.used
    _load_rope_factors(model, source, used)
    model.tie_weights()
    _check_complete(model, source)
    model.to(uploader.device).requires_grad_(requires_grad=False)
    _load_generation_config(model, checkpoint.path)
    mark(model, W4A16Config(source=getattr(checkpoint, "method", METHOD)))
    unused = _unused(source, used, (*replacement.replaced, *replacement.dequantized))
    model.w4a16gen_report = report_of(model, replacement, experts, unused)
    return model


def _opened(path: str | os.PathLike[str]) -> Checkpoint | PackedCheckpoint:
    """Open a checkpoint, or a folder of packed weights."""
    place = as_path("path", path)
    if place.is_dir() and section(read_json(place, "config.json"), "quantization_config").get("quant_method") == METHOD:
        return open_packed(place, verify=False)
    return open_checkpoint(place)


def _has_own_head(source: Source) -> bool:
    """Return whether a checkpoint holds a dense head with other values than its embedding, whatever config.json says.

    Files of tied models may hold a second copy of the embedding.
    """
    head, embedding = source.stored("lm_head.weight"), source.stored("model.embed_tokens.weight")
    if head is None or embedding is None or head.name == embedding.name:
        return False
    tensors = source.checkpoint.tensors
    found = [(tensors[one.name].dtype, tensors[one.name].shape) for one in (head, embedding)]
    return found[0] != found[1] or not np.array_equal(tensors.raw(head.name), tensors.raw(embedding.name))


def _load_rope_factors(model: Any, source: Source, used: set[str]) -> None:
    """Divide the rotary frequencies by the factors that files of GGUF hold for Llama 3.1 and later."""
    tensors = source.checkpoint.tensors
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    if _ROPE_FACTORS not in tensors or rope.get("rope_type", "default") != "default":
        return
    used.add(_ROPE_FACTORS)
    factors = torch.from_numpy(tensors.array(_ROPE_FACTORS).astype("float32"))
    for module in model.modules():
        for name in ("inv_freq", "original_inv_freq"):
            frequencies = getattr(module, name, None)
            if isinstance(frequencies, torch.Tensor):
                if frequencies.shape != factors.shape:
                    raise InvalidValueError(
                        f"tensor {_ROPE_FACTORS} of shape {list(factors.shape)} must be {list(frequencies.shape)}"
                    )
                module.register_buffer(name, frequencies / factors.to(frequencies.device), persistent=False)


def _check_complete(model: Any, source: Source) -> None:
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise InvalidValueError(
            f"{source.checkpoint.path} lacks {len(missing)} parameters of {type(model).__name__}, such as "
            f"{missing[0]}: it is incomplete, or of another model than its configuration says"
        )


def _load_generation_config(model: Any, path: Any) -> None:
    """Take how the checkpoint's authors generate, where they say so."""
    if not (path / "generation_config.json").is_file() or not model.can_generate():
        return
    try:
        model.generation_config = transformers.GenerationConfig.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # noqa: BLE001  (the file may hold anything)
        raise InvalidValueError(
            f"{path / 'generation_config.json'} cannot be read: {first_line(error)}; mend it, or remove it"
        ) from None


def _unused(source: Source, used: set[str], replaced: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of what nothing of the model took."""
    checkpoint = source.checkpoint
    left = []
    if isinstance(checkpoint, Checkpoint):
        served = {layer.name for module in replaced if (layer := source.layer(module)) is not None}
        left = [name for name, layer in checkpoint.items() if name not in served and not layer.tensor_names <= used]
    return tuple(name for name in (*left, *checkpoint.dense) if name not in used)
