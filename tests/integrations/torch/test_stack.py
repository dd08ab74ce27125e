"""Stacks of experts that are made by torch hold the bytes that the packer of the weights makes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.checkpoints import packers
from fakes.checkpoints.files import write_folder
from fakes.checkpoints.gptq_layers import write_checkpoint

import w4a16gen
from w4a16gen import InvalidValueError
from w4a16gen.weights.expert_layers import MoeLayer, moe_layers
from w4a16gen.weights.experts import pack_experts
from w4a16gen.weights.packed_checkpoint import PackedLayer
from w4a16gen.weights.reference import random_weight
from w4a16gen.weights.writers.convert import convert

torch = pytest.importorskip("torch")
from w4a16gen.integrations.torch.linear import W4A16Linear  # noqa: E402
from w4a16gen.integrations.torch.stack import stack_layers  # noqa: E402
from w4a16gen.integrations.torch.upload import Uploader  # noqa: E402

EXPERTS = 3
CONFIG = {"quant_method": "gptq", "bits": 4, "sym": False, "checkpoint_format": "gptq_v2"}


def folder_of(folder: Path, rng: np.random.Generator, n: int = 64, k: int = 192, **changes: Any) -> Path:
    """Write experts of GPTQ, the last of which alone has zero points other than 8.

    Args:
        folder: the folder.
        rng: source of the numbers.
        n: rows of gate and up.
        k: their columns.
        changes: tensors of the first expert's up projection that are other than random.
    """
    folder.mkdir()
    tensors: dict[str, Any] = {}
    for expert in range(EXPERTS):
        for part, (rows, columns, group) in {
            "gate_proj": (n, k, 32),
            "up_proj": (n, k, 32),
            "down_proj": (k, n, 64 if n % 64 == 0 else 32),
        }.items():
            name, groups = f"mlp.experts.{expert}.{part}", columns // group
            points = np.full((groups, rows), 8) if expert < 2 else rng.integers(0, 16, (groups, rows))
            tensors[f"{name}.qweight"] = packers.along_rows(rng.integers(0, 16, (columns, rows)).astype(np.uint8))
            tensors[f"{name}.qzeros"] = packers.along_columns(points.astype(np.uint8))
            tensors[f"{name}.scales"] = rng.uniform(0.001, 0.01, (groups, rows)).astype(np.float16)
    for part, value in changes.items():
        tensors[f"mlp.experts.0.up_proj.{part}"] = value
    return write_folder(folder, tensors, CONFIG)


def stacks(layer: MoeLayer) -> tuple[Any, Any]:
    """Return gate and up joined, and down."""
    joint = list(zip(layer.layers["gate"], layer.layers["up"], strict=True))
    cpu = Uploader("cpu")
    return stack_layers(joint, cpu, gate_up=True), stack_layers(
        [(one,) for one in layer.layers["down"]], cpu, gate_up=False
    )


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize(("n", "k"), [(64, 192), (704, 96), (352, 320)])
def test_the_bytes_are_those_of_pack_experts(
    n: int, k: int, tmp_path: Path, rng: np.random.Generator, *, is_packed: bool
) -> None:
    folder = folder_of(tmp_path / "gptq", rng, n, k)
    (plain,) = moe_layers(w4a16gen.open_checkpoint(folder))
    if is_packed:
        convert(folder, tmp_path / "packed")
        folder = tmp_path / "packed"
    (layer,) = moe_layers(w4a16gen.open_packed(folder) if is_packed else w4a16gen.open_checkpoint(folder))
    wanted = pack_experts(plain.gate, plain.up, gated=True), pack_experts(plain.down)
    for made, packed in zip(stacks(layer), wanted, strict=True):
        assert made.facts == {
            "experts": EXPERTS,
            "order": packed.order,
            "n": packed.n,
            "k": packed.k,
            "group_size": packed.group_size,
            "mode": "fgsz",
            "layout": packed.layout,
        }
        np.testing.assert_array_equal(made.packed.numpy(), packed.data)
        assert made.permutation is None
        assert made.alphas == (1.0,) * EXPERTS


@pytest.mark.parametrize("is_packed", [False, True])
def test_each_expert_keeps_its_own_order_of_k(tmp_path: Path, rng: np.random.Generator, *, is_packed: bool) -> None:
    names = [f"mlp.experts.{expert}.down_proj" for expert in range(EXPERTS)]
    (tmp_path / "gptq").mkdir()
    opened: Any = write_checkpoint(tmp_path / "gptq", rng, *((name, 64, 128, 4) for name in names))
    x = torch.from_numpy(rng.standard_normal((3, 128)).astype(np.float16))
    wanted = [W4A16Linear.from_checkpoint(opened[name])(x) for name in names]
    if is_packed:
        convert(tmp_path / "gptq", tmp_path / "packed")
        opened = w4a16gen.open_packed(tmp_path / "packed")
    layers = [opened[name] for name in names]
    plain = stack_layers([(layer,) for layer in layers], Uploader("cpu"), gate_up=False)
    joint = stack_layers([(layer, layer) for layer in layers], Uploader("cpu"), gate_up=True)
    for expert in range(EXPERTS):
        assert torch.equal(plain(x, expert), wanted[expert])
        assert torch.equal(joint(x, expert), torch.cat([wanted[expert]] * 2, dim=1))


@pytest.mark.parametrize("inner", [24, 48, 64, 96])
@pytest.mark.parametrize("mode", w4a16gen.QuantMode, ids=str)
def test_gate_and_up_of_one_layer_are_packed_for_the_gate(
    inner: int, mode: w4a16gen.QuantMode, rng: np.random.Generator
) -> None:
    weights = [random_weight(rng, 2 * inner, 96, 32 if mode.is_grouped else 96, mode) for _ in range(EXPERTS)]
    layers = [
        PackedLayer(f"e.{expert}", w4a16gen.pack_weight(weight), 1.0, None, None, None)
        for expert, weight in enumerate(weights)
    ]
    made = stack_layers([(layer,) for layer in layers], Uploader("cpu"), gate_up=True)
    wanted = pack_experts(weights, gate_up=True, gated=True)
    assert (made.layout, made.order) == (wanted.layout, wanted.order)
    np.testing.assert_array_equal(made.packed.numpy(), wanted.data)


def test_layers_that_cannot_be_joined_or_stacked_are_named(tmp_path: Path, rng: np.random.Generator) -> None:
    shuffled = rng.permutation(np.repeat(np.arange(6), 32)).astype(np.int32)
    (layer,) = moe_layers(w4a16gen.open_checkpoint(folder_of(tmp_path / "order", rng, g_idx=shuffled)))
    with pytest.raises(InvalidValueError, match=r"gate_proj' and 'mlp.experts.0.up_proj' have different permutation"):
        stacks(layer)
    bias = np.eye(1, 64, 5, np.float16)[0]
    (layer,) = moe_layers(w4a16gen.open_checkpoint(folder_of(tmp_path / "bias", rng, bias=bias)))
    with pytest.raises(InvalidValueError, match=r"experts.0.up_proj' has a bias: experts with biases are not served"):
        stacks(layer)
    zeros = np.zeros(64, np.float16)
    (layer,) = moe_layers(w4a16gen.open_checkpoint(folder_of(tmp_path / "zeros", rng, bias=zeros)))
    assert stacks(layer)[0].experts == EXPERTS, "a bias of zeros is none"
    (layer,) = moe_layers(w4a16gen.open_checkpoint(folder_of(tmp_path / "sizes", rng)))
    mixed = [(layer.layers["gate"][0],), (layer.layers["down"][1],)]
    with pytest.raises(InvalidValueError, match=r"1.down_proj' is \[192, 64\], but that of expert 0 is \[64, 192\]"):
        stack_layers(mixed, Uploader("cpu"), gate_up=False)
    with pytest.raises(InvalidValueError, match="one expert or more"):
        stack_layers([], Uploader("cpu"), gate_up=False)


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("group", [64, 192])
def test_experts_of_other_group_sizes_are_brought_to_one(
    group: int, tmp_path: Path, rng: np.random.Generator, *, is_packed: bool
) -> None:
    groups = 192 // group
    other: dict[str, Any] = {
        "qzeros": packers.along_columns(np.full((groups, 64), 8, np.uint8)),
        "scales": rng.uniform(0.001, 0.01, (groups, 64)).astype(np.float16),
    }
    folder = folder_of(tmp_path / "gptq", rng, **other)
    opened: Any = w4a16gen.open_checkpoint(folder)
    assert opened["mlp.experts.0.up_proj"].group_size == group
    wanted = [opened[f"mlp.experts.{expert}.up_proj"].quantized().dequantize() for expert in range(EXPERTS)]
    if is_packed:
        convert(folder, tmp_path / "packed")
        opened = w4a16gen.open_packed(tmp_path / "packed")
    (layer,) = moe_layers(opened)
    joint = stacks(layer)[0]
    assert joint.group_size == 32
    np.testing.assert_array_equal(joint.packed.numpy(), pack_experts(layer.gate, layer.up, gated=True).data)
    for expert in range(EXPERTS):
        np.testing.assert_array_equal(joint.dequantize(torch.float64)[expert, 64:].numpy(), wanted[expert])


def test_factors_belong_to_their_experts_and_are_equal_within_one(rng: np.random.Generator) -> None:
    weights = [w4a16gen.quantize(rng.standard_normal((64, 96)), group_size=32) for _ in range(2)]
    parts = [
        PackedLayer(f"e.{number}", w4a16gen.pack_weight(weight), 2.0**number, None, None, None)
        for number, weight in enumerate(weights)
    ]
    made = stack_layers([(part,) for part in parts], Uploader("cpu"), gate_up=False)
    assert made.alphas == (1.0, 2.0)
    with pytest.raises(
        InvalidValueError, match=r"'e\.0' has another alpha than the projection beside it: load the check"
    ):
        stack_layers([parts], Uploader("cpu"), gate_up=True)


def test_an_order_or_a_scale_of_one_expert_changes_no_other(rng: np.random.Generator) -> None:
    weights = [w4a16gen.quantize(rng.standard_normal((64, 96)), group_size=32) for _ in range(EXPERTS)]
    order = rng.permutation(96)
    scale = rng.uniform(0.5, 2, 96).astype(np.float16)
    layers = [
        PackedLayer(f"e.{expert}", w4a16gen.pack_weight(weight), 1.0, None, order if expert == 1 else None, None)
        for expert, weight in enumerate(weights)
    ]
    layers[2] = replace(layers[2], input_scale=scale)
    made = (
        stack_layers([(layer,) for layer in layers], Uploader("cpu"), gate_up=False).dequantize(torch.float64).numpy()
    )
    np.testing.assert_array_equal(made[0], weights[0].dequantize())
    np.testing.assert_array_equal(made[1][:, order], weights[1].dequantize())
    np.testing.assert_array_equal(made[2], weights[2].dequantize() * scale)
