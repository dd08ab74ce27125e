"""Folders that `w4a16gen convert` wrote, loaded by transformers' own `from_pretrained` and by this package's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import w4a16gen
from w4a16gen import InvalidValueError
from w4a16gen.weights.writers.convert import convert
from w4a16gen.weights.writers.quantize import Settings, quantize_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", exc_type=ImportError)
from fakes import tiny_models as tiny  # noqa: E402
from fakes.tiny_folders import folder_with, gptq_tensors  # noqa: E402

from w4a16gen.integrations.torch import W4A16Linear, replace_linears  # noqa: E402
from w4a16gen.integrations.transformers import W4A16Config, W4A16Quantizer, from_pretrained, quantizer  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def folders(model: Any, tmp_path: Path, **settings: Any) -> tuple[Path, Path]:
    """Return a folder of compressed-tensors of a model, and its packed form."""
    quantize_model(tiny.save(model, tmp_path / "dense"), tmp_path / "int4", Settings(group_size=32, **settings))
    convert(tmp_path / "int4", tmp_path / "packed")
    return tmp_path / "int4", tmp_path / "packed"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3"])
def test_transformers_loads_a_packed_folder(kind: str, dtype: Any, tmp_path: Path) -> None:
    original = tiny.tiny_model(kind, dtype)
    int4, packed = folders(original, tmp_path, zero_points=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(packed)
    replace_linears(original, w4a16gen.open_checkpoint(int4))
    assert torch.equal(model(tiny.tokens()).logits, original(tiny.tokens()).logits)
    assert sum(isinstance(module, W4A16Linear) for module in model.modules()) == 14
    assert not model.training
    assert isinstance(model.hf_quantizer, W4A16Quantizer)
    assert isinstance(model.config.quantization_config, W4A16Config)
    assert model.config.quantization_config.source == "compressed-tensors"
    assert model.generate(tiny.tokens(), max_new_tokens=2, min_new_tokens=2, do_sample=False).shape == (2, 14)


@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_both_loaders_of_a_packed_folder_agree(kind: str, tmp_path: Path) -> None:
    int4, packed = folders(tiny.tiny_model(kind), tmp_path)
    model = from_pretrained(packed, device="cpu")
    assert torch.equal(model(tiny.tokens()).logits, from_pretrained(int4, device="cpu")(tiny.tokens()).logits)
    assert str(model.w4a16gen_report) == "w4a16gen serves 14 of 15 linear layers"
    assert model.w4a16gen_report.unused == ()


class Parted:
    """A model whose head has a weight of its own, though its configuration says that it is the embedding."""

    def __init__(self, model: Any) -> None:
        self.model, self.config, self.dtype = model, model.config, model.dtype

    def named_modules(self) -> Any:
        return self.model.named_modules()

    def named_parameters(self) -> Any:
        return [*self.model.named_parameters(), ("lm_head.weight", self.model.lm_head.weight.flip(0))]


def test_a_packed_head_is_parted_from_the_embedding(tmp_path: Path) -> None:
    original = tiny.tiny_model("llama")
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
    int4 = folder_with(tmp_path / "int4", Parted(original), gptq_tensors, gptq, dense="embed")
    convert(int4, tmp_path / "packed")
    for model in (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed"),
        from_pretrained(tmp_path / "packed", device="cpu"),
        from_pretrained(int4, device="cpu"),
    ):
        assert isinstance(model.lm_head, W4A16Linear)
        assert torch.equal(model.model.embed_tokens.weight, original.model.embed_tokens.weight)
        assert not model.config.tie_word_embeddings
        assert torch.equal(model(tiny.tokens()).logits, from_pretrained(int4, device="cpu")(tiny.tokens()).logits)


def test_a_model_can_be_made_dense_again_but_is_not_saved(tmp_path: Path) -> None:
    int4, packed = folders(tiny.tiny_model("qwen2"), tmp_path)
    for model in (transformers.AutoModelForCausalLM.from_pretrained(packed), from_pretrained(int4, device="cpu")):
        with pytest.raises(ValueError, match="w4a16gen and is not serializable"):
            model.save_pretrained(tmp_path / "saved")
        weight = model.model.layers[0].mlp.up_proj.dequantize(torch.float16)
        dense = model.dequantize(torch.float16)
        assert torch.equal(dense.model.layers[0].mlp.up_proj.weight, weight)
        assert not any(isinstance(module, W4A16Linear) for module in dense.modules())
        assert dense(tiny.tokens()).logits.isfinite().all()


def test_folders_of_other_models_and_forms_are_refused(tmp_path: Path) -> None:
    packed = folders(tiny.tiny_model("llama"), tmp_path)[1]
    config = json.loads((packed / "config.json").read_text())
    index = json.loads((packed / "model.safetensors.index.json").read_text())
    for members, message in (
        ({"num_hidden_layers": 1}, "layers.1.* is no linear layer of LlamaForCausalLM: load the checkpoint"),
        ({"intermediate_size": 512}, r"is \[128, 256\], but the model's is \[128, 512\]"),
        ({"attention_bias": True}, "has no bias, unlike the model's"),
    ):
        (packed / "config.json").write_text(json.dumps({**config, **members}))
        with pytest.raises(InvalidValueError, match=message):
            from_pretrained(packed, device="cpu")
        with pytest.raises(InvalidValueError, match=message):
            transformers.AutoModelForCausalLM.from_pretrained(packed)
    (packed / "config.json").write_text(json.dumps(config))
    index["metadata"]["format"] = "w4a16gen.packed_checkpoint/0"
    (packed / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InvalidValueError, match="convert again"):
        transformers.AutoModelForCausalLM.from_pretrained(packed)


def test_a_tensor_that_was_cast_is_refused(tmp_path: Path) -> None:
    packed = w4a16gen.open_packed(folders(tiny.tiny_model("qwen2"), tmp_path)[1])
    place = quantizer.PackedLinear(packed["model.layers.0.self_attn.q_proj"]).to_empty(device="cpu")
    place.bias = place.bias.bfloat16()
    with pytest.raises(InvalidValueError, match=r"q_proj\.bias' was not read as its file holds it"):
        place.finished("q_proj")


def test_the_quantizer_is_registered_by_an_import_and_only_once(tmp_path: Path) -> None:
    packed = folders(tiny.tiny_model("llama"), tmp_path)[1]
    command = (
        "import w4a16gen.integrations.transformers as ours, transformers; ours.register(); "
        f"print(type(transformers.AutoModelForCausalLM.from_pretrained({str(packed)!r}).hf_quantizer).__name__)"
    )
    printed = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)  # noqa: S603
    assert printed.stdout.strip() == "W4A16Quantizer"
