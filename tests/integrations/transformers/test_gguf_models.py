"""GGUF files that become models of transformers: names, orders of rows, norms, and blocks of other types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

gguf = pytest.importorskip("gguf")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", exc_type=ImportError)
from fakes import tiny_models as tiny  # noqa: E402

from w4a16gen.integrations.torch import W4A16Linear  # noqa: E402
from w4a16gen.integrations.transformers import from_pretrained  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
MIXED = {"token_embd": "Q8_0", "ffn_down": "Q5_0", "blk.1.attn_k.weight": "F16", "blk.1.attn_v.weight": "Q4_1"}


def with_blocks(model: Any, types: dict[str, str]) -> Any:
    """Round the matrices of a model as the blocks of a file do, by the package `gguf` alone."""
    kind = model.config.model_type.removesuffix("_text")
    for name, parameter in model.named_parameters():
        converted = tiny.gguf_name(kind, name)
        wanted = next((type_ for part, type_ in types.items() if part in converted), "Q4_0")
        if parameter.dim() > 1 and wanted != "F16":
            number = gguf.GGMLQuantizationType[wanted]
            blocks = gguf.quants.quantize(parameter.float().numpy(), number)
            parameter.data.copy_(torch.from_numpy(gguf.quants.dequantize(blocks, number)))
    return model


@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_a_file_becomes_the_model_that_it_was_made_of(kind: str, tmp_path: Path) -> None:
    original = tiny.tiny_model(kind)
    tiny.write_gguf(kind, original, tmp_path / "model.gguf", MIXED)
    model = from_pretrained(tmp_path / "model.gguf", device="cpu", dtype=torch.float32, config=original.config)
    expected = with_blocks(tiny.tiny_model(kind).float(), MIXED)
    names = [name for name, _ in expected.named_parameters()]
    for name in names:
        module = model.get_submodule(name.rpartition(".")[0])
        if name.endswith("bias"):
            assert torch.equal(module.bias, expected.get_parameter(name).half())
        elif isinstance(module, W4A16Linear):
            values = module.dequantize(torch.float32)
            exact = name.endswith("layers.1.self_attn.v_proj.weight")  # Q4_1 rounds its minima to fp16
            torch.testing.assert_close(values, expected.get_parameter(name), rtol=0, atol=2e-3 if exact else 0)
        else:
            assert torch.equal(model.get_parameter(name), expected.get_parameter(name)), name
    logits, wanted = model(tiny.tokens()).logits, expected(tiny.tokens()).logits
    assert (logits - wanted).abs().max() < 0.01 * wanted.abs().max()
    report = model.w4a16gen_report
    assert len(report.served) == (11 if model.config.tie_word_embeddings else 12)
    assert report.unused == ()
    assert "type Q5_0 holds no 4-bit integers" in report.dense["model.layers.0.mlp.down_proj"]
    assert "model.layers.1.self_attn.k_proj" in report.dense


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_the_configuration_is_read_from_the_metadata(kind: str, tmp_path: Path) -> None:
    original = tiny.tiny_model(kind)
    tiny.write_gguf(kind, original, tmp_path / "model.gguf", {})
    model = from_pretrained(tmp_path / "model.gguf", device="cpu")
    assert model.dtype == (torch.bfloat16 if kind.startswith("gemma") else torch.float16)
    assert type(model) is type(original)
    for name in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "intermediate_size", "vocab_size"):
        assert getattr(model.config, name) == getattr(original.config, name)
    assert model.config.rope_parameters == original.config.rope_parameters
    assert (model.config.bos_token_id, model.config.pad_token_id) == (1, 0)
    assert model.generation_config.eos_token_id == [2, 5]
    assert model.config.tie_word_embeddings == original.config.tie_word_embeddings
    own = from_pretrained(tmp_path / "model.gguf", device="cpu", dtype=model.dtype, config=original.config)
    assert torch.equal(model(tiny.tokens()).logits, own(tiny.tokens()).logits)
