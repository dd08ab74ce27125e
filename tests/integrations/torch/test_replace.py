"""Models whose linear layers become those of a checkpoint, one by one."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.checkpoints.gptq_layers import write_checkpoint

from w4a16gen import InvalidValueError

torch = pytest.importorskip("torch")
integration = pytest.importorskip("w4a16gen.integrations.torch")
N, K = 64, 128


class Block(torch.nn.Module):  # type: ignore[misc, name-defined]
    """A part of a model."""

    def __init__(self, n: int = N, k: int = K) -> None:
        super().__init__()
        self.up = torch.nn.Linear(k, n)
        self.rest = torch.nn.ModuleList([torch.nn.Linear(n, k, bias=False), torch.nn.LayerNorm(k)])

    def forward(self, x: Any) -> Any:
        for module in (self.up, *self.rest):
            x = module(x)
        return x


def test_layers_are_replaced_one_by_one_and_the_rest_is_left(tmp_path: Path, rng: np.random.Generator) -> None:
    checkpoint = write_checkpoint(tmp_path, rng, ("up", N, K, 2), ("rest.0", K, N, 2), ("other", N, K, 2))
    model = Block().bfloat16().eval()
    norm, bias = model.rest[1], model.up.bias.detach().clone()
    seen: list[Any] = []
    olds = [weakref.ref(model.up), weakref.ref(model.rest[0])]

    def progress(done: int, total: int, what: str) -> None:
        gc.collect()
        seen.append((done, total, what, [old() is None for old in olds]))

    report = integration.replace_linears(model, checkpoint, progress=progress)
    assert seen == [(1, 2, "up", [True, False]), (2, 2, "rest.0", [True, True])]
    assert report.replaced == ("up", "rest.0")
    assert (report.dense, report.dequantized, report.unused) == ({}, {}, ("other",))
    assert str(report) == "w4a16gen serves 2 of 2 linear layers"
    assert isinstance(model.up, integration.W4A16Linear)
    assert isinstance(model.rest[0], integration.W4A16Linear)
    assert not model.up.training
    assert model.rest[1] is norm
    assert torch.equal(model.up.bias, bias.half())
    assert model(torch.ones(2, K, dtype=torch.bfloat16)).shape == (2, K)
    assert torch.equal(model.up.packed, integration.W4A16Linear.from_checkpoint(checkpoint["up"]).packed)


def test_what_stays_dense_is_reported_with_the_reason(tmp_path: Path, rng: np.random.Generator) -> None:
    checkpoint = write_checkpoint(tmp_path, rng, ("up", 12 * 8, 40 * 8, 20), ("down", N, K, 2))
    model = Block(12 * 8, 40 * 8)
    report = integration.replace_linears(model, checkpoint)
    assert report.replaced == ()
    assert report.dense == {"rest.0": "the checkpoint holds no 4-bit layer of this name"}
    assert "group size 16 must be 320 (= k) or a multiple of 32" in report.dequantized["up"]
    x = torch.from_numpy(rng.standard_normal((2, 320)).astype(np.float32))
    layer = checkpoint["up"]
    expected = x.double().numpy()[:, layer.permutation] @ layer.quantized().dequantize().T
    found = model.up(x).double().detach().numpy() - model.up.bias.double().detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_layers_on_the_meta_device_need_a_device(tmp_path: Path, rng: np.random.Generator) -> None:
    checkpoint = write_checkpoint(tmp_path, rng, ("up", N, K, 2), ("rest.0", K, N, 2))
    with torch.device("meta"):
        model = Block()
    with pytest.raises(InvalidValueError, match="up is on the meta device: pass device="):
        integration.replace_linears(model, checkpoint)
    with pytest.raises(InvalidValueError, match="the checkpoint holds no bias of up"):
        integration.replace_linears(model, checkpoint, device="cpu")
    model.up.bias = None
    assert len(integration.replace_linears(model, checkpoint, device="cpu").replaced) == 2
    assert model.up.packed.device.type == "cpu"


def test_a_mapping_may_give_the_layers_other_names(tmp_path: Path, rng: np.random.Generator) -> None:
    checkpoint = write_checkpoint(tmp_path, rng, ("blk.0.ffn_up", N, K, 2))
    assert integration.replace_linears(Block(), {"up": checkpoint["blk.0.ffn_up"]}).replaced == ("up",)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    checkpoint = write_checkpoint(tmp_path, rng, ("up", N, 2 * K, 2))
    model = Block()
    with pytest.raises(InvalidValueError, match=r"is \[64, 256\], but the model's is \[64, 128\]"):
        integration.replace_linears(model, checkpoint)
    assert isinstance(model.up, torch.nn.Linear)
    with pytest.raises(InvalidValueError, match="model is a linear layer itself"):
        integration.replace_linears(model.up, checkpoint)


def test_a_layer_that_is_used_twice_is_replaced_in_both_places(tmp_path: Path, rng: np.random.Generator) -> None:
    checkpoint = write_checkpoint(tmp_path, rng, ("other", N, K, 2))
    model = torch.nn.ModuleDict({"one": torch.nn.Linear(K, N, bias=False)})
    model["other"] = model["one"]
    report = integration.replace_linears(model, checkpoint)
    assert report.replaced == ("one", "other")
    assert str(report) == "w4a16gen serves 2 of 2 linear layers"
    assert isinstance(model["one"], integration.W4A16Linear)
    assert model["one"] is model["other"]


class Doubled(torch.nn.Linear):  # type: ignore[misc, name-defined]
    """A linear layer whose forward does more."""

    def forward(self, x: Any) -> Any:
        return 2 * super().forward(x)


@pytest.mark.parametrize("kind", ["hook", "forward"])
def test_a_layer_that_does_more_keeps_doing_it(kind: str, tmp_path: Path, rng: np.random.Generator) -> None:
    checkpoint = write_checkpoint(tmp_path, rng, ("0", N, K, 2))
    model = torch.nn.Sequential((Doubled if kind == "forward" else torch.nn.Linear)(K, N, bias=False)).double()
    if kind == "hook":
        model[0].register_forward_hook(lambda _module, _inputs, y: 2 * y)
    report = integration.replace_linears(model, checkpoint)
    assert kind in report.dequantized["0"]
    x = torch.from_numpy(rng.standard_normal((3, K)))
    weight = integration.W4A16Linear.from_checkpoint(checkpoint["0"]).dequantize(torch.float64)
    torch.testing.assert_close(model(x), 2 * (x @ weight.T))


def test_attention_of_torch_reads_its_weights_as_before(tmp_path: Path, rng: np.random.Generator) -> None:
    checkpoint = write_checkpoint(tmp_path, rng, ("out_proj", K, K, 2))
    model = torch.nn.MultiheadAttention(K, 4).eval()
    report = integration.replace_linears(model, checkpoint)
    assert "MultiheadAttention reads its weight" in report.dequantized["out_proj"]
    x = torch.ones(2, 1, K)
    assert model(x, x, x)[0].shape == (2, 1, K)


def test_no_layer_is_replaced_if_one_is_of_another_model(tmp_path: Path, rng: np.random.Generator) -> None:
    checkpoint = write_checkpoint(tmp_path, rng, ("up", N, K, 2), ("rest.0", N, N, 2))
    model = Block()
    with pytest.raises(InvalidValueError, match=r"rest.0 of the checkpoint is \[64, 64\]"):
        integration.replace_linears(model, checkpoint)
    assert isinstance(model.up, torch.nn.Linear)


@pytest.mark.parametrize(
    ("model", "checkpoint", "message"),
    [
        (None, {}, "model of type NoneType must be a torch.nn.Module"),
        (Block(), "folder", "checkpoint of type str must be a mapping: call w4a16gen.open_checkpoint"),
        (Block(), {"up": 3}, "layer up of type int must be one of a checkpoint"),
    ],
)
def test_anything_but_a_model_and_layers_is_refused(model: Any, checkpoint: Any, message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        integration.replace_linears(model, checkpoint)


def test_devices_that_are_not_there_are_refused(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = write_checkpoint(tmp_path, rng, ("up", N, K, 2))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device, message in (("cuda", "torch finds no GPU"), ("warp", "must be a device of torch")):
        with pytest.raises(InvalidValueError, match=message):
            integration.replace_linears(Block(), checkpoint, device=device)
