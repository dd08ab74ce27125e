"""Folders and arguments that transformers fails on in its own ways: each is refused with a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from w4a16gen import InvalidValueError
from w4a16gen.weights.writers.quantize import Settings, quantize_model

pytest.importorskip("torch")
pytest.importorskip("transformers", exc_type=ImportError)
from fakes import tiny_models as tiny

from w4a16gen.integrations import transformers as integration

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of compressed-tensors that can be loaded."""
    place = tmp_path_factory.mktemp("models")
    tiny.save(tiny.tiny_model("llama"), place / "dense")
    quantize_model(place / "dense", place / "int4", Settings(32))
    return place / "int4"


def changed(folder: Path, tmp_path: Path, **members: Any) -> Path:
    """Return a folder with the same weights and another configuration."""
    out = tmp_path / "changed"
    out.mkdir()
    for path in folder.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | members))
    return out


@pytest.mark.parametrize(
    "members", [{"hidden_size": "a"}, {"num_attention_heads": 0}, {"dtype": "nope"}, {"model_type": "nope"}]
)
def test_a_broken_configuration_is_refused(members: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match=r"^transformers .*cannot make "):
        integration.from_pretrained(changed(folder, tmp_path, **members), device="cpu")


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_broken_file_about_generation_is_named(text: str, folder: Path, tmp_path: Path) -> None:
    place = changed(folder, tmp_path)
    (place / "generation_config.json").write_text(text)
    with pytest.raises(InvalidValueError, match=r"generation_config\.json cannot be read: .*; mend it, or remove it"):
        integration.from_pretrained(place, device="cpu")


@pytest.mark.parametrize("config", [3, {"model_type": "llama"}])
def test_a_configuration_of_another_type_is_refused(config: Any, folder: Path) -> None:
    with pytest.raises(InvalidValueError, match=f"config of type {type(config).__name__} must be a folder"):
        integration.from_pretrained(folder, device="cpu", config=config)
