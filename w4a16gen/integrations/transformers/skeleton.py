"""A model without values: its modules as transformers makes them, and its parameters on the meta device."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from w4a16gen.errors import InvalidValueError
from w4a16gen.integrations.transformers.gguf_config import check_rope, complete
from w4a16gen.integrations.transformers.packages import need_gguf
from w4a16gen.weights.importers.checkpoint import Checkpoint
from w4a16gen.weights.packed_checkpoint import PackedCheckpoint
from w4a16gen.weights.storage import as_path

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_QUANTIZED = ("quantization_config", "compression_config", "quantization")


def config_of(checkpoint: Checkpoint | PackedCheckpoint, given: Any = None) -> Any:
    """Return the configuration of a checkpoint's model, without that of its quantization.

    Args:
        checkpoint: the checkpoint.
        given: a configuration, a folder with config.json, or None for the checkpoint's own.

    Raises:
        InvalidValueError: if transformers does not know the model, or its rotary embedding cannot be read.
        MissingToolError: if the checkpoint is a GGUF file, and the package `gguf` is not installed.
    """
    if isinstance(given, transformers.PretrainedConfig):
        config = type(given).from_dict(given.to_dict())
    elif given is not None:
        config = _read(_folder_of(given))
    elif isinstance(checkpoint, Checkpoint) and checkpoint.method == "gguf":
        check_rope(checkpoint.config, checkpoint.path)
        need_gguf()
        file = next(iter(checkpoint.tensors.values())).file.path
        config = _read(file.parent, gguf_file=file.name)
        complete(config, checkpoint.config)
    else:
        config = _read(checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent)
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for name in _QUANTIZED:
            part.__dict__.pop(name, None)
    return config


def _folder_of(given: Any) -> Path:
    if not isinstance(given, (str, os.PathLike)):
        raise InvalidValueError(
            f"config of type {type(given).__name__} must be a folder with config.json, or a configuration of "
            "transformers, such as AutoConfig makes"
        )
    return as_path("config", given)


def _read(folder: Path, **options: Any) -> Any:
    """Return the configuration of a folder or a GGUF file; no code of it is run, and nothing is downloaded."""
    if not folder.is_dir():
        raise InvalidValueError(
            f"config {folder} must be a folder with config.json, or a configuration of transformers"
        )
    try:
        return transformers.AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, **options
        )
    except Exception as error:  # noqa: BLE001  (each configuration checks the file's values in its own way)
        raise InvalidValueError(
            f"transformers {transformers.__version__} cannot make a model of {folder}: {first_line(error)}"
        ) from None


def first_line(error: Exception) -> str:
    """Return the first line of what transformers says of a file, or the error's type."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def dtype_of(dtype: Any, config: Any) -> Any:
    """Return the dtype of a model: the given one, that of its configuration, or one that its values fit.

    Args:
        dtype: a dtype of torch, its name, or None.
        config: the configuration.

    Raises:
        InvalidValueError: if it is none of fp16, bf16 and fp32.
    """
    named = config.get_text_config()
    found = dtype if dtype is not None else getattr(config, "dtype", None) or getattr(named, "dtype", None)
    if found is None:  # Gemma's activations exceed fp16
        found = torch.bfloat16 if str(config.model_type).startswith("gemma") else torch.float16
    if isinstance(found, str):
        found = getattr(torch, found.removeprefix("torch."), found)
    if found not in DTYPES:
        raise InvalidValueError(f"dtype {found} must be torch.float16, torch.bfloat16 or torch.float32")
    return found


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Put parameters that this thread registers on the meta device; buffers get their values."""
    thread = threading.get_ident()

    def moved(_module: Any, _name: str, parameter: Any) -> Any:
        if threading.get_ident() != thread or parameter is None or parameter.is_meta:
            return None
        return torch.nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    handle = torch.nn.modules.module.register_module_parameter_registration_hook(moved)
    try:
        yield
    finally:
        handle.remove()


def make_model(config: Any, dtype: Any, model_class: Any = None, attn_implementation: str | None = None) -> Any:
    """Return a model in eval mode whose parameters are on the meta device.

    Args:
        config: its configuration.
        dtype: dtype of its parameters.
        model_class: a class of transformers, or None for the one that the configuration names, or else of a causal
            language model.
        attn_implementation: what computes attention, in transformers' terms, or None for its default.

    Raises:
        InvalidValueError: if transformers has no such model.
    """
    named = next(iter(getattr(config, "architectures", None) or ()), "")
    found = getattr(transformers, str(named), None)
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    maker = model_class or (found if is_model else transformers.AutoModelForCausalLM)
    options = {"dtype": dtype}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    make = getattr(maker, "from_config", None) or getattr(maker, "_from_config", None)
    if make is None:
        raise InvalidValueError(f"model_class {maker!r} must be a class of transformers, such as AutoModelForCausalLM")
    try:
        with _parameters_on_meta():
            model = make(config, **options)
    except Exception as error:  # noqa: BLE001  (models compute with the file's values before they check them)
        raise InvalidValueError(f"transformers cannot make the model: {first_line(error)}") from None
    return model.eval()
