"""Checkpoints that become models of transformers: every layer of 4 bits, every dense tensor, every architecture."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import w4a16gen
from w4a16gen import InvalidValueError
from w4a16gen.weights.writers.quantize import Settings, quantize_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", exc_type=ImportError)
safetensors = pytest.importorskip("safetensors.torch")
from fakes import tiny_models as tiny  # noqa: E402
from fakes.tiny_folders import awq_tensors, folder_with, gptq_tensors  # noqa: E402

from w4a16gen.integrations.torch import W4A16Linear, replace_linears  # noqa: E402
from w4a16gen.integrations.transformers import from_pretrained  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def quantized_folder(model: Any, tmp_path: Path, **settings: Any) -> Path:
    """Return a folder of compressed-tensors of a model."""
    quantize_model(tiny.save(model, tmp_path / "dense"), tmp_path / "int4", Settings(group_size=32, **settings))
    return tmp_path / "int4"


def served(model: Any, folder: Path) -> Any:
    """Return a model that has its values already, with the linear layers of a checkpoint."""
    replace_linears(model, w4a16gen.open_checkpoint(folder))
    return model


@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_each_architecture_computes_what_its_own_model_does_with_the_same_layers(kind: str, tmp_path: Path) -> None:
    original = tiny.tiny_model(kind)
    folder = quantized_folder(original, tmp_path, zero_points=True)
    model = from_pretrained(folder, device="cpu")
    assert model.dtype == torch.float16
    assert type(model) is type(original)
    assert torch.equal(model(tiny.tokens()).logits, served(original, folder)(tiny.tokens()).logits)
    report = model.w4a16gen_report
    assert str(report) == "w4a16gen serves 14 of 15 linear layers"
    assert report.unused == ()
    assert list(report.dense) == ["lm_head"]
    tied = model.config.tie_word_embeddings
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert ("the embedding" in report.dense["lm_head"]) is tied


ROUTES = {
    "gptq": (gptq_tensors, {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": True}),
    "awq": (awq_tensors, {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("route", ROUTES)
def test_formats_and_dtypes_reach_the_same_model(route: str, dtype: Any, tmp_path: Path) -> None:
    original = tiny.tiny_model("qwen2", dtype)
    folder = folder_with(tmp_path / "model", original, *ROUTES[route])
    model = from_pretrained(folder, device="cpu")
    assert model.dtype == dtype
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model(tiny.tokens()).logits, served(original, folder)(tiny.tokens()).logits)
    permuted = [module.permutation is not None for module in model.modules() if isinstance(module, W4A16Linear)]
    assert permuted == [route == "gptq"] * 14


def test_a_model_generates_and_compiles(tmp_path: Path) -> None:
    model = from_pretrained(quantized_folder(tiny.tiny_model("llama"), tmp_path), device="cpu")
    greedy = model.generate(tiny.tokens(), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert greedy.shape == (2, 16)
    assert torch.equal(greedy[:, 12], model(tiny.tokens()).logits[:, -1].argmax(-1))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(tiny.tokens(), use_cache=False).logits, model(tiny.tokens()).logits)


def test_the_dtype_can_be_another_than_the_configuration_says(tmp_path: Path) -> None:
    folder = quantized_folder(tiny.tiny_model("llama"), tmp_path)
    assert from_pretrained(folder, device="cpu", dtype="bfloat16").model.norm.weight.dtype == torch.bfloat16
    with pytest.raises(InvalidValueError, match=r"dtype torch.int8 must be torch\.float16"):
        from_pretrained(folder, device="cpu", dtype="int8")
    large = tiny.tiny_model("llama", torch.bfloat16)
    large.model.norm.weight.data.fill_(1e6)
    folder = quantized_folder(large, tmp_path / "large")
    with pytest.raises(InvalidValueError, match=r"not finite in float16: pass dtype=torch\.bfloat16"):
        from_pretrained(folder, device="cpu", dtype=torch.float16)


def renamed(folder: Path, change: Any, drop: str = "") -> Path:
    """Rename the tensors of a folder, and drop one."""
    file = folder / "model.safetensors"
    tensors = safetensors.load_file(file)
    safetensors.save_file({change(name): tensor for name, tensor in tensors.items() if name != drop}, file)
    for index in folder.glob("*.index.json"):
        index.unlink()
    return folder


def only_file(folder: Path) -> Path:
    """Rename the shard of a folder to the name of a single file."""
    (shard,) = folder.glob("*.safetensors")
    shard.rename(folder / "model.safetensors")
    for index in folder.glob("*.index.json"):
        index.unlink()
    return folder


def test_names_of_a_part_or_of_a_larger_model_are_understood(tmp_path: Path) -> None:
    original = tiny.tiny_model("qwen3")
    folder = only_file(quantized_folder(original, tmp_path))
    logits = from_pretrained(folder, device="cpu")(tiny.tokens()).logits
    renamed(folder, lambda name: name.removeprefix("model."))
    assert torch.equal(from_pretrained(folder, device="cpu")(tiny.tokens()).logits, logits)
    renamed(folder, lambda name: f"language_model.model.{name}")
    assert torch.equal(from_pretrained(folder, device="cpu")(tiny.tokens()).logits, logits)


def test_what_is_missing_or_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = only_file(quantized_folder(tiny.tiny_model("llama"), tmp_path))
    renamed(folder, lambda name: name, drop="model.layers.1.input_layernorm.weight")
    with pytest.raises(InvalidValueError, match=r"lacks 1 parameters .* such as model.layers.1.input_layernorm.weight"):
        from_pretrained(folder, device="cpu")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    with pytest.raises(InvalidValueError, match=r"embed_tokens.weight' of shape \[96, 128\] must be \[100, 128\]"):
        from_pretrained(folder, device="cpu")
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "no such model"}))
    with pytest.raises(InvalidValueError, match=r"transformers .* cannot make a model of"):
        from_pretrained(folder, device="cpu")
    renamed(folder, lambda name: f"other.{name}")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidValueError, match="none that LlamaForCausalLM can use: it is of another model"):
        from_pretrained(folder, device="cpu")


def test_what_the_model_does_not_have_is_reported(tmp_path: Path) -> None:
    folder = only_file(quantized_folder(tiny.tiny_model("llama", num_hidden_layers=3), tmp_path))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    report = from_pretrained(folder, device="cpu").w4a16gen_report
    assert len(report.served) == 14
    assert {name.split(".")[2] for name in report.unused} == {"2"}
    assert len(report.unused) == 9


def test_code_of_a_folder_is_not_run(tmp_path: Path) -> None:
    folder = quantized_folder(tiny.tiny_model("llama"), tmp_path)
    (folder / "odd.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    config = json.loads((folder / "config.json").read_text())
    changed = {**config, "model_type": "odd", "auto_map": {"AutoConfig": "odd.OddConfig"}}
    (folder / "config.json").write_text(json.dumps(changed))
    with pytest.raises(InvalidValueError, match="cannot make a model"):
        from_pretrained(folder, device="cpu")
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["AutoTokenizer"]}))
    assert type(from_pretrained(folder, device="cpu")).__name__ == "LlamaForCausalLM"
    assert not (tmp_path / "ran").exists()


def test_generation_follows_the_folder(tmp_path: Path) -> None:
    folder = quantized_folder(tiny.tiny_model("llama"), tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    assert from_pretrained(folder, device="cpu").generation_config.eos_token_id == [3, 4]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_missing_gpu_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match=r"torch finds no GPU\. device='cpu' computes the reference, slowly"):
        from_pretrained(tmp_path)


def test_loading_holds_no_second_copy_of_the_model(tmp_path: Path) -> None:
    model = tiny.tiny_model("llama", num_hidden_layers=4, intermediate_size=2048, hidden_size=512, vocab_size=4096)
    folder = quantized_folder(model, tmp_path)
    del model
    alive: list[int] = []

    def progress(done: int, total: int, _what: str) -> None:
        if done < total:
            return
        gc.collect()
        tensors = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor and not thing.is_meta]
        alive.append(sum(tensor.nbytes for tensor in tensors))

    report = from_pretrained(folder, device="cpu", progress=progress).w4a16gen_report
    assert alive[-1] < 1.15 * (report.packed_bytes + report.dense_bytes)


def test_the_package_alone_imports_neither_torch_nor_transformers() -> None:
    command = (
        "import sys, w4a16gen; w4a16gen.open_checkpoint; "
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)  # noqa: S603
    assert printed.stdout.strip() == "[]"
