"""Experts in one buffer: each is what the packer makes of it alone, and what differs is named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from w4a16gen import InvalidValueError, QuantizedWeight, QuantMode, pack_weight
from w4a16gen.weights.division import Axis, divide
from w4a16gen.weights.experts import PackedExperts, expert_stride, pack_experts
from w4a16gen.weights.importers.stored import MAX_EXPERTS
from w4a16gen.weights.layouts.geometry import WeightGeometry
from w4a16gen.weights.packed import GATED_LAYOUT, LAYOUTS
from w4a16gen.weights.reference import random_weight

MODES = pytest.mark.parametrize("mode", QuantMode, ids=str)
FGS = QuantMode.FINEGRAINED_SCALE_ONLY


def experts(
    rng: np.random.Generator, count: int, n: int = 64, k: int = 256, group_size: int = 64, mode: QuantMode = FGS
) -> list[QuantizedWeight]:
    return [random_weight(rng, n, k, group_size, mode) for _ in range(count)]


@MODES
@pytest.mark.parametrize("target", ["native", "cutlass"])
@pytest.mark.parametrize(("n", "k", "group_size"), [(64, 192, 64), (704, 352, 32), (24, 1408, 128), (320, 704, 64)])
def test_each_expert_is_packed_as_if_alone(
    n: int, k: int, group_size: int, target: str, mode: QuantMode, rng: np.random.Generator
) -> None:
    weights = experts(rng, 3, n, k, group_size, mode)
    packed = pack_experts(weights, target=target)
    assert packed.data.shape == (3, packed.stride)
    assert packed.stride % 128 == 0
    assert packed.nbytes == packed.data.nbytes
    assert (packed.experts, packed.n, packed.k, packed.mode, packed.order) == (3, n, k, mode, None)
    assert packed.group_size == (group_size if mode.is_grouped else k)
    for index, weight in enumerate(weights):
        alone = pack_weight(weight, target=target)
        expert = packed.expert(index)
        assert expert.layout == packed.layout == alone.layout
        np.testing.assert_array_equal(expert.data, alone.data)
        assert np.shares_memory(expert.data, packed.data)
        assert not packed.data[index, alone.nbytes :].any()
        assert 0 <= packed.stride - alone.nbytes < 128
        np.testing.assert_array_equal(expert.unpack().dequantize(), weight.dequantize())


@MODES
@pytest.mark.parametrize("n", [64, 704, 40])
def test_gate_and_up_are_joined_with_the_rows_of_the_gate_first(
    n: int, mode: QuantMode, rng: np.random.Generator
) -> None:
    gate, up = experts(rng, 2, n, mode=mode), experts(rng, 2, n, mode=mode)
    packed = pack_experts(gate, up)
    assert (packed.n, packed.order) == (2 * n, "gate_first")
    stacked = [packed.expert(index).unpack() for index in range(2)]
    for index, weight in enumerate(stacked):
        np.testing.assert_array_equal(weight.dequantize()[:n], gate[index].dequantize())
        np.testing.assert_array_equal(weight.dequantize()[n:], up[index].dequantize())
    again = pack_experts(stacked, gate_up=True)
    assert (again.n, again.order) == (2 * n, "gate_first")
    np.testing.assert_array_equal(again.data, packed.data)


@MODES
@pytest.mark.parametrize(("n", "k", "group_size"), [(64, 256, 64), (704, 352, 32), (40, 192, 64)])
def test_gates_and_factors_alternate_for_gated_kernels(
    n: int, k: int, group_size: int, mode: QuantMode, rng: np.random.Generator
) -> None:
    gate, up = experts(rng, 3, n, k, group_size, mode), experts(rng, 3, n, k, group_size, mode)
    plain, packed = pack_experts(gate, up), pack_experts(gate, up, gated=True)
    assert (packed.gated, packed.layout, packed.order) == (True, GATED_LAYOUT, "gate_first")
    assert (packed.n, packed.stride, packed.nbytes_of_expert) == (plain.n, plain.stride, plain.nbytes_of_expert)
    assert not plain.gated
    for index in range(3):
        joined, expert = plain.expert(index).unpack(), packed.expert(index)
        assert (expert.gated, expert.outputs) == (True, n)
        np.testing.assert_array_equal(expert.data, pack_weight(joined, gated=True).data)
        np.testing.assert_array_equal(expert.unpack().dequantize(), joined.dequantize())
        assert not packed.data[index, packed.nbytes_of_expert :].any()
    joined_already = pack_experts([plain.expert(index).unpack() for index in range(3)], gate_up=True, gated=True)
    np.testing.assert_array_equal(joined_already.data, packed.data)


def test_experts_that_gated_kernels_cannot_read_are_refused(rng: np.random.Generator) -> None:
    good = experts(rng, 2)
    for arguments, options, message in (
        ((good,), {}, "gated experts are gate and up projections: pass both, or gate_up=True"),
        ((good, good), {"gated": 1}, "gated of type int must be True or False"),
        ((good, good), {"target": "cutlass"}, "target cutlass compute no activations"),
        ((experts(rng, 2, n=24),), {"gate_up": True}, "expert 0 cannot be packed: n of 24 must be a multiple of 16"),
    ):
        with pytest.raises(InvalidValueError, match=message):
            pack_experts(*arguments, **{"gated": True} | options)
    packed = pack_experts(good, good, gated=True)
    with pytest.raises(InvalidValueError, match="n of 24 must be a multiple of 16"):
        replace(packed, n=24)


def test_groups_that_straddle_two_gpus_become_smaller(rng: np.random.Generator) -> None:
    whole = experts(rng, 2, 64, 768, 128)
    packed = pack_experts([divide(weight, Axis.REDUCTION, 4, rank=1) for weight in whole])
    assert (packed.k, packed.group_size) == (192, 64)
    values = packed.expert(1).unpack().dequantize()
    np.testing.assert_array_equal(values, whole[1].dequantize()[:, 192:384])


class OneByOne(Sequence[Any]):
    """Weights that are made when they are asked for, with the order of the requests."""

    def __init__(self, weights: list[QuantizedWeight]) -> None:
        self.weights, self.asked = weights, list[int]()

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, index: Any) -> Any:
        self.asked.append(index)
        return self.weights[index]


def test_weights_are_read_once_and_in_order(rng: np.random.Generator) -> None:
    lazy = OneByOne(experts(rng, 5))
    np.testing.assert_array_equal(pack_experts(lazy).data, pack_experts(lazy.weights).data)
    assert lazy.asked == [0, 1, 2, 3, 4]


def test_what_differs_is_named_with_both_values(rng: np.random.Generator) -> None:
    good = experts(rng, 2)
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"n": 72}, "expert 2 has n 72, but expert 0 has 64"),
        ({"k": 320}, "expert 2 has k 320, but expert 0 has 256"),
        ({"group_size": 32}, "expert 2 has group_size 32, but expert 0 has 64: bring all to one with .*regroup"),
        ({"mode": QuantMode.FINEGRAINED_SCALE_AND_ZEROS}, "expert 2 has mode fgsz, but expert 0 has fgs"),
    )
    for changes, message in cases:
        odd = random_weight(rng, **{"n": 64, "k": 256, "group_size": 64, "mode": FGS, **changes})
        with pytest.raises(InvalidValueError, match=message):
            pack_experts([*good, odd])
        with pytest.raises(
            InvalidValueError, match=message.replace("expert 2 has", "up of expert 1 has").split(",")[0]
        ):
            pack_experts(good, [good[0], odd])


def test_wrong_arguments_are_refused(rng: np.random.Generator) -> None:
    good = experts(rng, 2)
    for arguments, options, message in (
        (([],), {}, "weights of 0 experts must be of 1 to 4096"),
        (([good[0]] * (MAX_EXPERTS + 1),), {}, "weights of 4097 experts must be of 1 to 4096"),
        ((good[0],), {}, "weights of type QuantizedWeight must be a sequence"),
        ((good, good[:1]), {}, "2 gate and 1 up projections"),
        ((good, good), {"gate_up": True}, "joined already: pass them without up"),
        ((good,), {"gate_up": np.ones(2)}, "gate_up of type ndarray must be True or False"),
        ((good, good), {"order": "interleaved"}, "order of 'interleaved' must be one of gate_first"),
        (([good[0], "w"],), {}, "weight of expert 1 of type str must be a QuantizedWeight"),
        ((experts(rng, 1, n=7),), {"gate_up": True}, "n of 7 must be even"),
        ((good,), {"target": "turing"}, "'turing' is not one of"),
        ((experts(rng, 1, k=48, group_size=16),), {}, r"group size 16 must be 48 \(= k\) or a multiple of 32"),
    ):
        with pytest.raises(InvalidValueError, match=message):
            pack_experts(*arguments, **options)


def test_an_expert_that_the_layout_cannot_hold_is_named(rng: np.random.Generator) -> None:
    wide = experts(rng, 2)
    wide[1].scales[:, 13] = [6e4, 3e-7, 1, 1]
    with pytest.raises(InvalidValueError, match="expert 1 cannot be packed: scales of channel 13"):
        pack_experts(wide)


def test_a_buffer_of_other_sizes_and_missing_experts_are_refused(rng: np.random.Generator) -> None:
    packed = pack_experts(experts(rng, 2))
    for index in (2, -1):
        with pytest.raises(InvalidValueError, match=f"expert {index} must be 0 to 1"):
            packed.expert(index)
    facts = (packed.layout, packed.n, packed.k, packed.group_size, packed.mode)
    for data in (packed.data[:, 1:], packed.data[0], None):
        with pytest.raises(InvalidValueError, match=rf"must be \[experts, {packed.stride}\]"):
            PackedExperts(data, *facts)
    with pytest.raises(InvalidValueError, match="order of 'up_first' must be one of"):
        PackedExperts(packed.data, *facts, "up_first")


def test_experts_of_a_layout_of_any_size_are_aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd:
        group_multiple = 32

        @staticmethod
        def packed_bytes(_geometry: WeightGeometry) -> int:
            return 130

    layouts: dict[str, Any] = LAYOUTS
    monkeypatch.setitem(layouts, "odd", Odd)
    assert expert_stride("odd", WeightGeometry(64, 64, 32, FGS)) == 256
    packed = PackedExperts(np.arange(512, dtype=np.uint16).astype(np.uint8).reshape(2, 256), "odd", 64, 64, 32, FGS)
    assert packed.nbytes == 512
    np.testing.assert_array_equal(packed.expert(1).data, packed.data[1, :130])
