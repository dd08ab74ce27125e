"""Experts of checkpoints: found by their names in every form, complete, in order, and read one layer at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.checkpoints import packers
from fakes.checkpoints.files import write_folder

import w4a16gen
from w4a16gen import InvalidValueError, QuantMode
from w4a16gen.weights.expert_layers import moe_layers
from w4a16gen.weights.expert_names import find_experts, place_of
from w4a16gen.weights.experts import pack_experts
from w4a16gen.weights.importers.checkpoint import Checkpoint
from w4a16gen.weights.importers.layer import CheckpointLayer
from w4a16gen.weights.quantized import QuantizedWeight
from w4a16gen.weights.reference import random_weight
from w4a16gen.weights.writers.convert import convert

EXPERTS = 12
QWEN = ("gate_proj", "up_proj", "down_proj")
MIXTRAL = ("w1", "w3", "w2")


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.mlp.experts.17.gate_proj", ("model.layers.3.mlp.experts", "gate", 17)),
        ("model.layers.3.block_sparse_moe.experts.5.w1", ("model.layers.3.block_sparse_moe.experts", "gate", 5)),
        ("model.layers.3.block_sparse_moe.experts.5.w3", ("model.layers.3.block_sparse_moe.experts", "up", 5)),
        ("model.layers.3.block_sparse_moe.experts.5.w2", ("model.layers.3.block_sparse_moe.experts", "down", 5)),
        ("model.layers.0.mlp.switch_mlp.up_proj.7", ("model.layers.0.mlp.switch_mlp", "up", 7)),
        ("blk.11.ffn_down_exps.120", ("blk.11", "down", 120)),
        ("mlp.experts.gate_up_proj.0", ("mlp.experts", "gate_up", 0)),
        ("model.layers.3.mlp.gate_proj", None),
        ("model.layers.3.mlp.shared_expert.gate_proj", None),
        ("model.layers.3.mlp.shared_experts.down_proj", None),
        ("model.layers.3.w1", None),
        ("model.layers.3.mlp.experts.\u0663.gate_proj", None),
        ("model.layers.3.mlp.experts.\u00b2.gate_proj", None),
        ("model.layers.3.mlp.experts.-1.gate_proj", None),
        ("blk.3.ffn_gate", None),
        ("w1", None),
        ("", None),
    ],
)
def test_names_tell_the_place(name: str, place: Any) -> None:
    assert place_of(name) == place


def test_what_is_missing_doubled_or_of_two_forms_is_named() -> None:
    def reason(names: list[str]) -> str | None:
        (found,) = find_experts(names).values()
        return found.why_incomplete()

    whole = [f"e.experts.{i}.{part}" for i in range(EXPERTS) for part in QWEN]
    assert reason(whole) is None
    gap = [name for name in whole if name != "e.experts.7.up_proj"]
    assert reason(gap) == "experts of 'e.experts': 1 of 12 lack a 4-bit up projection: number 7"
    gone = [name for name in whole if "down" not in name]
    assert str(reason(gone)).endswith("12 of 12 lack a 4-bit down projection: number 0, 1, 2, 3, ...")
    assert "'e.experts.3.w3' is doubled" in str(reason([*whole, "e.experts.3.w3"]))
    assert "'e.experts.03.w3' is doubled" in str(reason([*whole, "e.experts.03.w3"]))
    assert "have a gate projection beside gate_up and down" in str(reason([*whole, "e.experts.3.gate_up_proj"]))
    (found,) = find_experts(gap).values()
    with pytest.raises(InvalidValueError, match="number 7"):
        found.of_role("gate")


@pytest.mark.parametrize(("number", "largest"), [("4096", 4096), ("999999999", 999999999), ("9" * 5000, 10**9)])
def test_numbers_beyond_those_of_any_layer_are_named_at_once(number: str, largest: int) -> None:
    names = [f"e.experts.{i}.{part}" for i in ("0", number) for part in QWEN]
    (found,) = find_experts(names).values()
    assert found.why_incomplete() == f"experts of 'e.experts': the largest number, {largest}, must be 0 to 4095"
    (found,) = find_experts(f"e.experts.{'0' * 5000}{i}.{part}" for i in range(4096) for part in QWEN).values()
    assert found.why_incomplete() is None, "zeros in front do not count"


def weights_of(rng: np.random.Generator, zeros: int | None) -> list[dict[str, QuantizedWeight]]:
    """Return three projections for each expert; that of the given number alone has zero points other than 8."""
    result = []
    for index in range(EXPERTS):
        mode = QuantMode.FINEGRAINED_SCALE_ONLY
        sizes = {"gate": (64, 96), "up": (64, 96), "down": (96, 64)}
        made = {role: random_weight(rng, n, k, 32, mode) for role, (n, k) in sizes.items()}
        if index == zeros:
            one = made["up"]
            mode = QuantMode.FINEGRAINED_SCALE_AND_ZEROS
            made["up"] = QuantizedWeight(one.q, one.scales, one.scales * np.float16(3), 32, mode)  # zero points of 5
        result.append(made)
    return result


def gptq_folder(
    folder: Path, weights: list[dict[str, QuantizedWeight]], parts: tuple[str, str, str], layers: int = 2
) -> Path:
    """Write the same experts for several layers, with the numbers of the experts in the order of text: 0, 1, 10, 11."""
    tensors: dict[str, Any] = {"model.layers.0.mlp.gate.weight": np.ones((EXPERTS, 96), np.float16)}
    for layer in range(layers):
        for index in sorted(range(EXPERTS), key=str):
            for part, weight in zip(parts, weights[index].values(), strict=True):
                name = f"model.layers.{layer}.mlp.experts.{index}.{part}"
                points = 8 if weight.zeros is None else 5
                tensors[f"{name}.qweight"] = packers.along_rows(weight.q.T)
                tensors[f"{name}.scales"] = weight.scales
                tensors[f"{name}.qzeros"] = packers.along_columns(np.full(weight.scales.shape, points, np.uint8))
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "checkpoint_format": "gptq_v2"}
    folder.mkdir()
    return write_folder(folder, tensors, config)


@pytest.mark.parametrize("zeros", [None, 9])
@pytest.mark.parametrize("parts", [QWEN, MIXTRAL])
@pytest.mark.parametrize("is_packed", [False, True])
def test_experts_come_in_the_order_of_their_numbers(
    is_packed: bool, parts: tuple[str, str, str], zeros: int | None, tmp_path: Path, rng: np.random.Generator
) -> None:
    weights = weights_of(rng, zeros)
    folder = gptq_folder(tmp_path / "gptq", weights, parts)
    if is_packed:
        convert(folder, tmp_path / "packed")
    found = list(
        moe_layers(w4a16gen.open_packed(tmp_path / "packed") if is_packed else w4a16gen.open_checkpoint(folder))
    )
    assert [layer.name for layer in found] == [f"model.layers.{i}.mlp.experts" for i in range(2)]
    for layer in found:
        assert layer.experts == EXPERTS
        for role in ("gate", "up", "down"):
            stack = getattr(layer, role)
            assert len(stack) == EXPERTS
            for index, weight in enumerate(stack):
                np.testing.assert_array_equal(weight.dequantize(), weights[index][role].dequantize())
                has_zeros = zeros is not None and role != "down"
                assert weight.mode.has_zeros is has_zeros, "gate and up have one mode, so that they can be joined"
            np.testing.assert_array_equal(stack[2:4][1].dequantize(), weights[3][role].dequantize())
            assert stack[2:4][1].mode is stack[0].mode
        assert pack_experts(layer.gate, layer.up).n == 128
        assert pack_experts(layer.down).k == 64


def test_experts_that_a_format_stores_together_are_found(tmp_path: Path, rng: np.random.Generator) -> None:
    weights = weights_of(rng, None)
    tensors: dict[str, Any] = {}
    for part, role in zip(QWEN, ("gate", "up", "down"), strict=True):
        name = f"model.layers.0.mlp.switch_mlp.{part}"
        scales = np.stack([one[role].scales.T for one in weights])
        words = np.stack([packers.along_columns(one[role].q) for one in weights])
        tensors |= {f"{name}.weight": words.view(np.uint32), f"{name}.scales": scales, f"{name}.biases": scales * -8}
    folder = write_folder(tmp_path, tensors, {"bits": 4, "group_size": 32}, key="quantization")
    (layer,) = moe_layers(w4a16gen.open_checkpoint(folder))
    assert layer.name == "model.layers.0.mlp.switch_mlp"
    for index in range(EXPERTS):
        np.testing.assert_array_equal(layer.up[index].dequantize(), weights[index]["up"].dequantize())


def test_rows_that_are_joined_in_the_file_are_parted(rng: np.random.Generator) -> None:
    gate_up = [random_weight(rng, 128, 96, 32, QuantMode.FINEGRAINED_SCALE_ONLY) for _ in range(2)]
    down = [random_weight(rng, 96, 64, 32, QuantMode.FINEGRAINED_SCALE_ONLY) for _ in range(2)]
    mapping = {
        **{f"mlp.experts.gate_up_proj.{i}": Plain(weight) for i, weight in enumerate(gate_up)},
        **{f"mlp.experts.down_proj.{i}": Plain(weight) for i, weight in enumerate(down)},
    }
    (layer,) = moe_layers(mapping)
    np.testing.assert_array_equal(layer.gate[1].dequantize(), gate_up[1].dequantize()[:64])
    np.testing.assert_array_equal(layer.up[1].dequantize(), gate_up[1].dequantize()[64:])
    np.testing.assert_array_equal(layer.down[1].dequantize(), down[1].dequantize())
    odd = random_weight(rng, 63, 96, 32, QuantMode.FINEGRAINED_SCALE_ONLY)
    (layer,) = moe_layers({**mapping, "mlp.experts.gate_up_proj.1": Plain(odd)})
    for half in (layer.gate, layer.up):
        with pytest.raises(InvalidValueError, match="layer 'layer' of 63 rows must have an even number"):
            half[1]


class Plain:
    """A layer of a checkpoint that is a weight and nothing else."""

    def __init__(self, weight: QuantizedWeight, **parts: Any) -> None:
        self.name, self.weight, self.mode, self.group_size = "layer", weight, weight.mode, weight.group_size
        self.permutation = self.input_scale = self.bias = None
        self.alpha = 1.0
        for name, value in parts.items():
            setattr(self, name, value)

    def quantized(self) -> QuantizedWeight:
        return self.weight


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("permutation", np.arange(96), "an order of the activations"),
        ("input_scale", np.ones(96), "scales of the activations"),
        ("bias", np.ones(64), "a bias"),
        ("alpha", 0.5, "an alpha"),
    ],
)
def test_a_layer_that_is_more_than_a_weight_is_not_read_as_one(
    part: str, value: Any, message: str, rng: np.random.Generator
) -> None:
    weight = random_weight(rng, 64, 96, 32, QuantMode.FINEGRAINED_SCALE_ONLY)
    names = [f"mlp.experts.0.{name}" for name in QWEN]
    (layer,) = moe_layers({name: Plain(weight, **{part: value}) for name in names})
    with pytest.raises(InvalidValueError, match=f"layer 'layer' has {message}.* beside its weight"):
        layer.up[0]


def test_nothing_is_read_before_it_is_asked_for(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint: Checkpoint = w4a16gen.open_checkpoint(gptq_folder(tmp_path / "gptq", weights_of(rng, 9), QWEN))
    read: list[str] = []
    quantized = CheckpointLayer.quantized

    def counted(layer: CheckpointLayer) -> QuantizedWeight:
        read.append(layer.name)
        return quantized(layer)

    monkeypatch.setattr(CheckpointLayer, "quantized", counted)
    layers = moe_layers(checkpoint)
    first = next(layers)
    assert read == []
    pack_experts(first.down)
    assert read == [f"model.layers.0.mlp.experts.{i}.down_proj" for i in range(EXPERTS)]


def test_the_form_of_all_experts_is_found_once(rng: np.random.Generator) -> None:
    weight = random_weight(rng, 64, 64, 32, QuantMode.FINEGRAINED_SCALE_ONLY)
    asked: list[str] = []

    class Counted(Plain):
        @property
        def mode(self) -> QuantMode:
            asked.append(self.name)
            return weight.mode

        @mode.setter
        def mode(self, _mode: QuantMode) -> None:
            pass

    names = [f"mlp.experts.{i}.{part}" for i in range(EXPERTS) for part in QWEN]
    (layer,) = moe_layers({name: Counted(weight) for name in names})
    for role in ("gate", "up", "down"):
        for index in range(EXPERTS):
            np.testing.assert_array_equal(getattr(layer, role)[index].q, weight.q)
            assert len(getattr(layer, role)[index : index + 1][0].q) == 64
    assert len(asked) == (2 + 2 + 1) * EXPERTS


def test_an_incomplete_checkpoint_is_refused_before_anything_is_yielded(rng: np.random.Generator) -> None:
    names = [f"a.experts.0.{part}" for part in QWEN] + ["b.experts.0.up_proj"]
    weight = random_weight(rng, 64, 96, 32, QuantMode.FINEGRAINED_SCALE_ONLY)
    with pytest.raises(InvalidValueError, match=r"experts of 'b\.experts': 1 of 1 lack a 4-bit gate projection"):
        moe_layers({name: Plain(weight) for name in names})


@pytest.mark.parametrize("checkpoint", ["model-moe", Path("model-moe"), None, ["model.layers.0.mlp.experts.0.w1"]])
def test_experts_are_sought_in_an_open_checkpoint_only(checkpoint: Any) -> None:
    with pytest.raises(InvalidValueError, match=f"of type {type(checkpoint).__name__} must be what w4a16gen"):
        moe_layers(checkpoint)
