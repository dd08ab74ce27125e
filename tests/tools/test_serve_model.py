"""The tool that compares a 4-bit model with its dequantized self, on a tiny model and the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from w4a16gen.weights.writers.quantize import Settings, quantize_model

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", exc_type=ImportError)
from fakes import tiny_models as tiny  # noqa: E402

serve_model = pytest.importorskip("serve_model", exc_type=ImportError)

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def test_models_are_compared_token_by_token(tmp_path: Path) -> None:
    quantize_model(tiny.save(tiny.tiny_model("llama"), tmp_path / "dense"), tmp_path / "int4", Settings(group_size=32))
    (tmp_path / "prompts").write_text("5 6 7\n8 9 10 11\n")
    options = ["--device", "cpu", "--tokens", "8", "--steps", "2", "--no-compile"]
    options += ["--prompts", str(tmp_path / "prompts"), "--json", str(tmp_path / "result.json")]
    serve_model.main([str(tmp_path / "int4"), *options])
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["loading"]["layers"] == "w4a16gen serves 14 of 15 linear layers"
    assert 0.9 <= result["same_after_same_text"] <= 1
    assert [prompt["prompt"] for prompt in result["prompts"]] == ["5 6 7", "8 9 10 11"]
    assert all(prompt["largest_error"] < 0.05 for prompt in result["prompts"])
    assert result["microseconds_per_token"]["4-bit"]["eager"] > 0
    assert result["microseconds_per_token"]["dense"]["eager"] > 0


def test_differences_are_found_and_measured() -> None:
    left, right = tiny.tiny_model("llama"), tiny.tiny_model("llama")
    right.model.norm.weight.data.neg_()
    ids = tiny.tokens()[:1]
    same = serve_model.compare(left, left, "", ids, 6)
    assert (same.same_after_same_text, same.same_alone, same.first_difference, same.differences) == (6, 6, None, [])
    other = serve_model.compare(left, right, "", ids, 6)
    assert other.first_difference == 0
    assert other.same_after_same_text == 6 - len(other.differences)
    assert all(difference.dense_gap > 0 and difference.packed_gap > 0 for difference in other.differences)


def test_a_decoder_agrees_with_generate() -> None:
    model, ids = tiny.tiny_model("gemma3"), tiny.tokens()[:1]
    greedy = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, eos_token_id=None)
    assert serve_model.continuation(serve_model.Decoder(model, ids, 6), 6)[0] == greedy[0, 12:].tolist()
    decoder = serve_model.Decoder(model, ids, 6)
    first = decoder.step(ids[:, -1:])
    decoder.rewind()
    assert torch.equal(decoder.step(ids[:, -1:]), first)
