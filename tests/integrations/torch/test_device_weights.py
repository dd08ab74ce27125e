"""Layers that torch decodes: the same packed bytes as the numpy importers, for every format."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.checkpoints import packers
from fakes.checkpoints.cases import CASES
from fakes.checkpoints.expected import LAYER
from fakes.checkpoints.files import write_folder

import w4a16gen
from w4a16gen import InvalidValueError

torch = pytest.importorskip("torch")
device_weights = pytest.importorskip("w4a16gen.integrations.torch.device_weights")
formats = pytest.importorskip("w4a16gen.integrations.torch.formats")
nibbles = pytest.importorskip("w4a16gen.integrations.torch.nibbles")
linear = pytest.importorskip("w4a16gen.integrations.torch.linear")

ON_DEVICE = ("gptq", "autoround", "awq-gemm", "compressed-tensors", "gguf-q4")
TOO_FINE = {"compressed-tensors-part-of-a-word"}
"""Its groups of 12 are none that the layout holds."""


@pytest.fixture(params=sorted(CASES.keys() - TOO_FINE))
def layer(request: pytest.FixtureRequest, tmp_path: Path, rng: np.random.Generator) -> Any:
    """Return the layer of a checkpoint of each format."""
    expected = CASES[request.param](tmp_path, rng)
    return w4a16gen.open_checkpoint(expected.path)[expected.name]


def test_every_format_gives_the_bytes_of_the_numpy_importer(layer: Any) -> None:
    found = device_weights.load_layer(layer)
    expected = w4a16gen.pack_weight(layer.quantized())
    assert replace(found.packed, data=None).geometry == expected.geometry
    assert found.packed.layout == expected.layout
    np.testing.assert_array_equal(found.packed.data.numpy(), expected.data)
    assert found.alpha == layer.alpha
    if layer.permutation is None:
        assert found.permutation is None
    else:
        np.testing.assert_array_equal(found.permutation.numpy(), layer.permutation)


@pytest.mark.parametrize("name", sorted(CASES))
def test_common_formats_are_decoded_on_the_device(name: str, tmp_path: Path, rng: np.random.Generator) -> None:
    expected = CASES[name](tmp_path, rng)
    found = w4a16gen.open_checkpoint(expected.path)[expected.name]
    decoded = formats.decode(found, device_weights.Uploader("cpu"))
    assert (decoded is not None) == (name.startswith(ON_DEVICE) and "marlin" not in name)
    if decoded is not None:
        np.testing.assert_array_equal(decoded.q.numpy(), expected.q)
        np.testing.assert_array_equal(decoded.scales.numpy(), expected.scales.astype(np.float64))


def test_scales_that_do_not_fit_are_divided_as_on_the_host(tmp_path: Path, rng: np.random.Generator) -> None:
    q = rng.integers(0, 16, (64, 256)).astype(np.uint8)
    scales = (rng.uniform(1, 2, (2, 64)) * 2.0**20).astype(np.float32)
    tensors = {f"{LAYER}.qweight": packers.along_rows(q.T), f"{LAYER}.scales": scales}
    write_folder(tmp_path, tensors, {"quant_method": "gptq", "bits": 4, "sym": True})
    layer = w4a16gen.open_checkpoint(tmp_path)[LAYER]
    found = device_weights.load_layer(layer)
    assert found.alpha == layer.alpha > 1
    np.testing.assert_array_equal(found.packed.data.numpy(), w4a16gen.pack_weight(layer.quantized()).data)


def test_factors_that_are_not_finite_are_refused() -> None:
    decoded = nibbles.Decoded(torch.zeros(64, 256, dtype=torch.uint8), torch.full((2, 64), torch.nan).double(), None)
    with pytest.raises(InvalidValueError, match="scales and zeros must be finite"):
        device_weights.pack_decoded(decoded)


def test_doubles_are_rounded_once(rng: np.random.Generator) -> None:
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
    middles = (halves[:-1] + halves[1:]) / 2
    near = [np.nextafter(middles, np.inf), np.nextafter(middles, 0), middles * (1 + 2.0**-30), middles * (1 - 2.0**-30)]
    values = np.concatenate([halves, middles, *near, rng.standard_normal(1000) * 2.0 ** rng.integers(-30, 17, 1000)])
    for signed in (values, -values):
        with np.errstate(over="ignore"):
            expected = signed.astype(np.float16)
        found = nibbles.to_half(torch.from_numpy(signed)).numpy()
        np.testing.assert_array_equal(found.view(np.uint16), expected.view(np.uint16))
        halves = nibbles.round_to_half(torch.from_numpy(signed))
        np.testing.assert_array_equal(halves.values.numpy().view(np.uint16), expected.view(np.uint16))


@pytest.mark.parametrize(
    ("value", "fits"),
    [
        (1.0, True),
        (1.0 + 2.0**-30, True),  # rounded, but not too small or large
        (65504.0, True),
        (65504.0 + 2.0**-20, False),
        (1e300, False),
        (float("nan"), False),
        (float("-inf"), False),
        (2.0**-24, True),
        (1.5 * 2.0**-24, False),
        (2.0**-40, False),
        (1e-300, False),
        (0.0, True),
    ],
)
def test_rounding_says_whether_all_values_fit(value: float, *, fits: bool) -> None:
    assert nibbles.round_to_half(torch.tensor([[0.5, value]], dtype=torch.float64)).fit is fits


def tensors_of(name: str, folder: Path, rng: np.random.Generator) -> tuple[Any, dict[str, Any]]:
    """Return a layer, and its tensors by the last part of their names."""
    expected = CASES[name](folder, rng)
    checkpoint = w4a16gen.open_checkpoint(folder)
    found = {
        tensor.rpartition(".")[2]: torch.from_numpy(checkpoint.tensor(tensor).copy())
        for tensor in checkpoint[expected.name].tensor_names
    }
    words = {part: tensor.view(torch.int32) for part, tensor in found.items() if tensor.dtype == torch.uint32}
    return checkpoint[expected.name], found | words


@pytest.mark.parametrize("name", ["gptq-v1", "gptq-v2", "gptq-act-order", "gptq-channel", "gptq-v2-symmetric"])
def test_gptqs_own_tensors_make_the_layer_of_the_checkpoint(
    name: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    layer, parts = tensors_of(name, tmp_path, rng)
    made = linear.W4A16Linear.from_gptq(**parts, version=2 if "v2" in name else 1)
    assert_same_state(made, linear.W4A16Linear.from_checkpoint(layer))


def test_awqs_own_tensors_make_the_layer_of_the_checkpoint(tmp_path: Path, rng: np.random.Generator) -> None:
    layer, parts = tensors_of("awq-gemm", tmp_path, rng)
    assert_same_state(linear.W4A16Linear.from_awq(**parts), linear.W4A16Linear.from_checkpoint(layer))


@pytest.mark.parametrize("name", ["", "-asymmetric", "-channel", "-g_idx", "-bfloat16"])
def test_compressed_tensors_own_tensors_make_the_layer_of_the_checkpoint(
    name: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    layer, parts = tensors_of(f"compressed-tensors{name}", tmp_path, rng)
    parts.pop("weight_shape")
    made = linear.W4A16Linear.from_compressed_tensors(
        parts["weight_packed"], parts["weight_scale"], parts.get("weight_zero_point"), g_idx=parts.get("weight_g_idx")
    )
    assert_same_state(made, linear.W4A16Linear.from_checkpoint(layer))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q4_K"])
def test_blocks_of_gguf_make_the_layer_of_the_file(kind: str, tmp_path: Path, rng: np.random.Generator) -> None:
    expected = CASES[f"gguf-{kind.lower()}"](tmp_path, rng)
    layer = w4a16gen.open_checkpoint(expected.path)[expected.name]
    blocks = torch.from_numpy(layer.stored.tensors.raw(f"{layer.name}.weight").reshape(layer.n, -1).copy())
    assert_same_state(linear.W4A16Linear.from_gguf(blocks, kind), linear.W4A16Linear.from_checkpoint(layer))


def assert_same_state(made: Any, expected: Any) -> None:
    found, wanted = made.state_dict(), expected.state_dict()
    assert found.keys() == wanted.keys()
    assert [name for name in found if not torch.equal(found[name], wanted[name])] == []


WORDS = torch.zeros(32, 64, dtype=torch.int32)
SCALES = torch.ones(2, 64)
REFUSED: list[tuple[str, Any]] = [
    (r"scales of shape \[2, 63\] must be \[1 or more, 64\]", lambda: formats.gptq(WORDS, SCALES[:, 1:])),
    (r"qzeros of shape \[3, 8\] must be \[2, ", lambda: formats.gptq(WORDS, SCALES, WORDS[:3, :8])),
    ("version of 3 must be 1", lambda: formats.gptq(WORDS, SCALES, version=3)),
    (r"scales of shape \[2, 64\] must be \[1 or more, 512\]", lambda: formats.awq(WORDS, SCALES)),
    ("qweight of dtype int64 must be int32 or uint32", lambda: formats.gptq(WORDS.long(), SCALES)),
    ("qweight of dtype float32 must be int32", lambda: formats.awq(WORDS.float(), torch.ones(2, 512))),
    ("qweight of type ndarray must be a torch tensor", lambda: formats.gptq(WORDS.numpy(), SCALES)),
    ("qzeros of dtype int64 must be int32", lambda: formats.gptq(WORDS, SCALES, WORDS[:2, :8].long())),
    (r"qzeros of shape \[2, 9\] must be \[2, 8\]", lambda: formats.gptq(WORDS, SCALES, WORDS[:2, :9])),
    ("scales of dtype int32 must be float16", lambda: formats.gptq(WORDS, SCALES.int())),
    ("qweight is on the meta device", lambda: formats.gptq(WORDS.to("meta"), SCALES)),
    ("weight_packed of dtype uint8", lambda: formats.compressed_tensors(WORDS.byte(), torch.ones(32, 2))),
    ("k of type str must be an integer", lambda: formats.compressed_tensors(WORDS, torch.ones(32, 2), k="512")),
    (r"blocks of shape \[0, 18\] must be", lambda: formats.gguf(torch.zeros(0, 18, dtype=torch.uint8), "Q4_0")),
    ("g_idx of dtype float32 must be int64", lambda: formats.order_of(torch.zeros(8), 2, 8)),
    (r"g_idx of shape \[4\] must be \[8\]", lambda: formats.order_of(torch.tensor([0, 0, 1, 1]), 2, 8)),
    ("k of 0 must be 1 to 512", lambda: formats.compressed_tensors(WORDS, torch.ones(32, 2), k=0)),
    ("k of 600 must be 1 to 512", lambda: formats.compressed_tensors(WORDS, torch.ones(32, 2), k=600)),
    ("type 'Q6_K' of GGUF must be one of Q4_0", lambda: formats.gguf(WORDS.view(torch.uint8), "Q6_K")),
    ("a multiple of 18 bytes", lambda: formats.gguf(WORDS.view(torch.uint8), "Q4_0")),
    (
        "g_idx must name each of 2 groups 4 times",
        lambda: formats.order_of(torch.tensor([0, 0, 0] + [1] * 5), 2, 8),
    ),
    ("device 'warp' must be a device of torch", lambda: device_weights.Uploader("warp")),
    ("device meta must be a GPU", lambda: device_weights.Uploader("meta")),
]


@pytest.mark.parametrize(("message", "call"), REFUSED, ids=[message for message, _ in REFUSED])
def test_tensors_that_contradict_each_other_are_refused(message: str, call: Any) -> None:
    with pytest.raises(InvalidValueError, match=message):
        call()


def test_parameters_that_record_gradients_are_taken(rng: np.random.Generator) -> None:
    scales = torch.nn.Parameter(torch.from_numpy(rng.uniform(0.5, 1, (2, 64))).half())
    made, expected = (linear.W4A16Linear.from_gptq(WORDS, given) for given in (scales, scales.detach()))
    assert_same_state(made, expected)


@pytest.mark.parametrize("shape", [(1, 4), (4, 1), (1, 1), (3, 5)])
def test_words_in_any_memory_order_are_expanded(shape: tuple[int, int]) -> None:
    words = torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)
    turned = words.t().contiguous().t()
    assert torch.equal(nibbles.expand(turned), nibbles.expand(words))
    assert torch.equal(nibbles.expand_awq(turned), nibbles.expand_awq(words))
    assert torch.equal(
        nibbles.expand(words.t()), nibbles.expand(words.t().clone(memory_format=torch.contiguous_format))
    )
