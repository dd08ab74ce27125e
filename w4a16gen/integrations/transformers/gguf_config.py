"""What transformers does not read out of a GGUF file's metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from w4a16gen.errors import InvalidValueError

_ROPE_SCALING = "rope.scaling.type"
_TOKENS = {
    "bos_token_id": ("bos_token_id",),
    "eos_token_id": ("eos_token_id", "eot_token_id"),
    "pad_token_id": ("padding_token_id",),
}
"""Attributes of a configuration, and the keys of `tokenizer.ggml` that they are."""
_SCALED_BY_HIDDEN_SIZE = {"gemma2": 46, "gemma3": 62}
"""Layers of the models that scale queries by their hidden size per head, not by the size of a head: those of 27B."""


def check_rope(metadata: Mapping[str, Any], path: Any) -> None:
    """Raise if a file scales its rotary embedding, which its metadata do not describe in full.

    Raises:
        InvalidValueError: naming the kind of scaling.
    """
    scaling = metadata.get(f"{metadata.get('general.architecture')}.{_ROPE_SCALING}")
    if scaling not in (None, "", "none"):
        raise InvalidValueError(
            f"{path} scales its rotary embedding ({scaling}), which its metadata do not say in full: "
            "pass config=, a folder with the original model's config.json"
        )


def complete(config: Any, metadata: Mapping[str, Any]) -> None:
    """Set what transformers leaves at its defaults: special tokens, the size of a head, and the scale of queries.

    Args:
        config: the configuration that transformers read.
        metadata: the file's metadata.
    """
    for attribute, keys in _TOKENS.items():
        found = [metadata.get(f"tokenizer.ggml.{key}") for key in keys]
        tokens = list(dict.fromkeys(token for token in found if isinstance(token, int)))
        if tokens:
            setattr(config, attribute, tokens[0] if len(tokens) == 1 else tokens)
    architecture = metadata.get("general.architecture")
    head_dim = metadata.get(f"{architecture}.attention.key_length")
    if isinstance(head_dim, int):
        config.head_dim = head_dim
    if architecture in _SCALED_BY_HIDDEN_SIZE:
        of_hidden = config.num_hidden_layers == _SCALED_BY_HIDDEN_SIZE[architecture]
        config.query_pre_attn_scalar = (
            config.hidden_size // config.num_attention_heads if of_hidden else config.head_dim
        )
