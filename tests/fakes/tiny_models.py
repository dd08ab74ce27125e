"""Tiny models of transformers with random values, and the folders and files that hold them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", exc_type=ImportError)

VOCABULARY = 96
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "rms_norm_eps": 2.0**-20,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": True}),
    "smollm3": ("SmolLM3Config", {}),
    "gemma2": ("Gemma2Config", {"query_pre_attn_scalar": 32}),
    "gemma3": ("Gemma3TextConfig", {"query_pre_attn_scalar": 32}),
}
_ROUTED = {"moe_intermediate_size": 64, "num_experts": 5, "num_experts_per_tok": 3}
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**_ROUTED, "norm_topk_prob": True, "mlp_only_layers": [0], "num_hidden_layers": 3},
    ),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen2_moe": ("Qwen2MoeConfig", {**_ROUTED, "shared_expert_intermediate_size": 96}),
}
"""Mixtures of experts: one with a dense layer, one with names of its own in files, one with a shared expert."""


def tiny_model(kind: str, dtype: Any = torch.float16, **changes: Any) -> Any:
    """Return a model of an architecture, whose every parameter is random."""
    name, options = {**CONFIGS, **MIXTURES}[kind]
    config = getattr(transformers, name)(**{**_SIZES, **options, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        scale = 0.2 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
        offset = 1.0 if "norm" in name and not kind.startswith("gemma") else 0.0
        values = offset + scale * torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(values)
    return model.eval().requires_grad_(requires_grad=False)


def save(model: Any, folder: Path) -> Path:
    """Write a model as transformers does, without an index, so that it is one file."""
    model.save_pretrained(folder)
    return folder


def tokens() -> Any:
    """Return ids of two texts of twelve tokens, int64 [2, 12]."""
    return torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(9))


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GEMMA_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_name(kind: str, parameter: str) -> str:
    """Return the name that llama.cpp gives a parameter."""
    names = {**GGUF_NAMES, **(_GEMMA_NAMES if kind.startswith("gemma") else {})}
    module, _, part = parameter.rpartition(".")
    if module in names:
        return f"{names[module]}.{part}"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{names[rest]}.{part}"


def in_rotary_order(rows: Any, heads: int) -> Any:
    """Return rows as llama.cpp's converter orders those of q and k: both halves of each head side by side."""
    size = len(rows) // heads
    result = rows.copy()
    for head in range(heads):
        for half in range(2):
            for place in range(size // 2):
                result[head * size + 2 * place + half] = rows[head * size + half * (size // 2) + place]
    return result


def write_gguf(
    kind: str,
    model: Any,
    file: Path,
    types: dict[str, str],
    *,
    metadata: dict[str, str] | None = None,
    tensors: dict[str, Any] | None = None,
) -> None:
    """Write a model as llama.cpp's converter does, with the writer of the package `gguf`.

    Args:
        kind: its architecture.
        model: the model.
        file: the file.
        types: types of tensors, by a part of their names; other matrices are of Q4_0.
        metadata: more texts of the metadata; an architecture is named here too.
        tensors: more tensors, fp32.
    """
    more = dict(metadata or {})
    gguf = pytest.importorskip("gguf")
    config = model.config
    architecture = more.pop("general.architecture", {"mistral": "llama"}.get(kind, kind))
    writer = gguf.GGUFWriter(str(file), architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_eot_token_id(5)
    writer.add_pad_token_id(config.pad_token_id)
    if kind.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    writer.add_vocab_size(config.vocab_size)
    writer.add_token_list([f"token {number}" for number in range(config.vocab_size)])
    for key, text in more.items():
        writer.add_string(key, text)
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, values)
    for name, values in _converted(kind, model):
        wanted = next((type_ for part, type_ in types.items() if part in name), "Q4_0" if values.ndim > 1 else "F32")
        number = gguf.GGMLQuantizationType[wanted]
        if wanted in ("F32", "F16"):
            writer.add_tensor(name, values.astype({"F32": np.float32, "F16": np.float16}[wanted]))
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _converted(kind: str, model: Any) -> Iterator[tuple[str, Any]]:
    """Yield llama.cpp's names, and the values as its converter changes them, fp32."""
    heads = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}
    for name, parameter in model.named_parameters():
        values = parameter.float().numpy()
        converted = gguf_name(kind, name)
        module = converted.split(".")[-2]
        if module in heads and kind in ("llama", "mistral", "smollm3"):
            values = in_rotary_order(values, heads[module])
        if kind.startswith("gemma") and converted.endswith("norm.weight"):
            values = values + 1
        yield converted, np.ascontiguousarray(values)
