"""Models of transformers on a Hopper GPU: loaded there, compared with the CPU, compiled, captured, and their memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from w4a16gen import Library
from w4a16gen.runtime import default
from w4a16gen.weights.writers.convert import convert
from w4a16gen.weights.writers.quantize import Settings, quantize_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", exc_type=ImportError)
from fakes import tiny_models as tiny  # noqa: E402
from fakes.tiny_folders import PLAIN_GPTQ, folder_with, plain_gptq_tensors  # noqa: E402

from w4a16gen.integrations.torch import W4A16Experts  # noqa: E402
from w4a16gen.integrations.transformers import from_pretrained  # noqa: E402
from w4a16gen.integrations.transformers.experts import modules_of_experts  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]


@pytest.fixture(autouse=True)
def library(gpu_library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the build of every kernel the default one."""
    if not torch.cuda.is_available():
        pytest.skip("this torch has no CUDA")
    monkeypatch.setattr(default._InUse, "library", gpu_library)  # noqa: SLF001


def folder_of(model: Any, tmp_path: Path) -> Path:
    """Return a folder of compressed-tensors of a model, with zero points."""
    settings = Settings(group_size=32, zero_points=True)
    quantize_model(tiny.save(model, tmp_path / "dense"), tmp_path / "int4", settings)
    return tmp_path / "int4"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", tiny.CONFIGS)
def test_a_model_computes_what_it_does_on_the_cpu(kind: str, dtype: Any, tmp_path: Path) -> None:
    folder = folder_of(tiny.tiny_model(kind, dtype), tmp_path)
    model = from_pretrained(folder)
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cuda"}
    found = model(tiny.tokens().cuda()).logits.cpu().float()
    expected = from_pretrained(folder, device="cpu", dtype=torch.float32)(tiny.tokens()).logits
    tolerance = 0.02 if dtype == torch.float16 else 0.1
    assert (found - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize("kind", tiny.MIXTURES)
def test_a_mixture_computes_what_it_does_on_the_cpu(kind: str, gpu_library: Library, tmp_path: Path) -> None:
    if not modules_of_experts(tiny.tiny_model(kind)):
        pytest.skip("this transformers has a module for each expert")
    if not gpu_library.grouped_configs():
        pytest.skip("the build that W4A16GEN_BUILD_DIR names has no grouped kernels")
    folder = folder_with(tmp_path / "int4", tiny.tiny_model(kind), plain_gptq_tensors, PLAIN_GPTQ)
    model = from_pretrained(folder)
    layers = [module for module in model.modules() if isinstance(module, W4A16Experts)]
    assert layers
    assert all(layer.is_grouped and layer.gate_up.weights_of().gated for layer in layers)
    ids = tiny.tokens().cuda()
    found = model(ids, use_cache=False).logits
    expected = from_pretrained(folder, device="cpu", dtype=torch.float32)(tiny.tokens()).logits
    error = (found.cpu().float() - expected).abs().amax(-1) / expected.abs().max()
    assert (error < 0.02).float().mean() > 0.9, "rounding may send a few tokens to other experts"
    assert torch.equal(model(ids, use_cache=False).logits, found)


@pytest.mark.parametrize("kind", tiny.MIXTURES)
def test_experts_have_the_bytes_that_they_have_on_the_cpu(kind: str, tmp_path: Path) -> None:
    if not modules_of_experts(tiny.tiny_model(kind)):
        pytest.skip("this transformers has a module for each expert")
    folder = folder_with(tmp_path / "int4", tiny.tiny_model(kind), plain_gptq_tensors, PLAIN_GPTQ)
    convert(folder, tmp_path / "packed")
    for path in (folder, tmp_path / "packed"):
        states = [from_pretrained(path, device=device).state_dict() for device in ("cpu", "cuda")]
        assert any(name.endswith("experts.gate_up.packed") for name in states[0])
        assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name].cpu())] == []


def test_a_gguf_file_and_a_packed_folder_give_the_same_layers_as_on_the_cpu(tmp_path: Path) -> None:
    tiny.write_gguf("llama", tiny.tiny_model("llama"), tmp_path / "model.gguf", {"attn_v": "Q4_1", "ffn_up": "Q5_0"})
    convert(folder_of(tiny.tiny_model("qwen2"), tmp_path), tmp_path / "packed")
    for path in (tmp_path / "model.gguf", tmp_path / "packed"):
        states = [from_pretrained(path, device=device).state_dict() for device in ("cpu", "cuda")]
        assert states[0].keys() == states[1].keys()
        assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name].cpu())] == []
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed").cuda()
    assert torch.equal(theirs(tiny.tokens().cuda()).logits, from_pretrained(path)(tiny.tokens().cuda()).logits)


def test_models_generate_compile_and_are_captured(tmp_path: Path) -> None:
    model = from_pretrained(folder_of(tiny.tiny_model("llama"), tmp_path))
    ids = tiny.tokens().cuda()
    assert model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape == (2, 16)
    static = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, cache_implementation="static")
    assert static.shape == (2, 16)
    with torch.inference_mode():
        expected = model(ids, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True)
        first = compiled(ids, use_cache=False).logits
        torch.testing.assert_close(first, expected, rtol=0, atol=0.02)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = compiled(ids, use_cache=False).logits
        graph.replay()
        assert torch.equal(captured, first)


def test_the_peak_while_loading_is_the_size_of_the_model(tmp_path: Path) -> None:
    model = tiny.tiny_model("llama", num_hidden_layers=8, hidden_size=1024, intermediate_size=4096, vocab_size=32000)
    folder = folder_of(model, tmp_path)
    del model
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    report = from_pretrained(folder).w4a16gen_report
    assert torch.cuda.max_memory_allocated() - before < 1.15 * (report.packed_bytes + report.dense_bytes)
