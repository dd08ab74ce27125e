"""GGUF files that become models of transformers: names, orders of rows, norms, and blocks of other types."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

gguf = pytest.importorskip("gguf")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", exc_type=ImportError)
from fakes import tiny_models as tiny  # noqa: E402

from w4a16gen import InvalidValueError, MissingToolError  # noqa: E402
from w4a16gen.integrations.torch import W4A16Linear  # noqa: E402
from w4a16gen.integrations.transformers import from_pretrained, packages  # noqa: E402
from w4a16gen.integrations.transformers.gguf_config import complete  # noqa: E402

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


def changed(file: Path, **metadata: Any) -> Path:
    """Write a file of a tiny Llama with more metadata; `_` stands for a point."""
    model = tiny.tiny_model("llama")
    tiny.write_gguf(
        "llama", model, file, {}, metadata={key.replace("__", "."): value for key, value in metadata.items()}
    )
    return file


def test_rotary_embeddings_that_metadata_do_not_describe_need_a_configuration(tmp_path: Path) -> None:
    file = changed(tmp_path / "a.gguf", llama__rope__scaling__type="yarn")
    with pytest.raises(InvalidValueError, match=r"scales its rotary embedding \(yarn\).*pass config="):
        from_pretrained(file, device="cpu")
    assert from_pretrained(file, device="cpu", config=tiny.tiny_model("llama").config)
    tiny.tiny_model("llama").config.save_pretrained(tmp_path / "config")
    assert from_pretrained(file, device="cpu", config=tmp_path / "config")
    with pytest.raises(InvalidValueError, match=r"must be a folder with config\.json, or a configuration"):
        from_pretrained(file, device="cpu", config=tmp_path / "nothing")


def test_factors_of_rotary_frequencies_are_those_of_llama_3(tmp_path: Path) -> None:
    scaled = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 32}
    scaled |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    original = tiny.tiny_model("llama", rope_parameters=scaled)
    plain = tiny.tiny_model("llama").model.rotary_emb.inv_freq
    factors = (plain / original.model.rotary_emb.inv_freq).numpy()  # as llama.cpp's converter stores them
    tiny.write_gguf("llama", original, tmp_path / "a.gguf", {}, tensors={"rope_freqs.weight": factors})
    model = from_pretrained(tmp_path / "a.gguf", device="cpu")
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, original.model.rotary_emb.inv_freq, rtol=1e-6, atol=0)
    assert model.w4a16gen_report.unused == ()
    own = from_pretrained(tmp_path / "a.gguf", device="cpu", config=original.config)
    torch.testing.assert_close(own(tiny.tokens()).logits, model(tiny.tokens()).logits, rtol=0, atol=0.01)
    assert own.w4a16gen_report.unused == ("rope_freqs.weight",)  # the configuration says it all
    tiny.write_gguf("llama", original, tmp_path / "b.gguf", {}, tensors={"rope_freqs.weight": factors[:-1]})
    with pytest.raises(InvalidValueError, match=r"rope_freqs.weight of shape \[15\] must be \[16\]"):
        from_pretrained(tmp_path / "b.gguf", device="cpu")


def test_other_architectures_are_refused_by_name(tmp_path: Path) -> None:
    file = changed(tmp_path / "a.gguf", general__architecture="gptj")
    with pytest.raises(InvalidValueError, match=r"architecture 'gptj' of a GGUF file must be one of llama, qwen2"):
        from_pretrained(file, device="cpu", config=tiny.tiny_model("llama").config)
    with pytest.raises(InvalidValueError, match=r"transformers .* cannot make a model of"):
        from_pretrained(file, device="cpu")


def test_the_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = changed(tmp_path / "a.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingToolError, match=r"gguf is not installed.*w4a16gen\[transformers\]"):
        from_pretrained(file, device="cpu")
    with pytest.raises(MissingToolError):
        packages.need_gguf()


@pytest.mark.parametrize(("layers", "scale"), [(46, 144), (42, 256)])
def test_the_largest_gemma_scales_queries_by_its_hidden_size(layers: int, scale: int) -> None:
    config = transformers.Gemma2Config(num_hidden_layers=layers, hidden_size=4608, num_attention_heads=32)
    complete(config, {"general.architecture": "gemma2", "gemma2.attention.key_length": 256})
    assert config.query_pre_attn_scalar == scale


def test_an_embedding_of_four_bits_is_dequantized(tmp_path: Path) -> None:
    original = tiny.tiny_model("mistral")
    tiny.write_gguf("mistral", original, tmp_path / "a.gguf", {"token_embd": "Q4_0"})
    model = from_pretrained(tmp_path / "a.gguf", device="cpu", dtype=torch.float32)
    expected = with_blocks(tiny.tiny_model("mistral").float(), {})
    assert torch.equal(model.model.embed_tokens.weight, expected.model.embed_tokens.weight)
