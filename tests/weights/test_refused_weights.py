"""Weights that would give wrong numbers in silence are refused, with what they look like and the way out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import w4a16gen
from w4a16gen import InvalidValueError, QuantizedWeight, QuantMode, Target, pack, pack_weight, quantize
from w4a16gen.weights.reference import random_weight

N, K, GROUP = 64, 256, 128
Q = np.arange(N * K, dtype=np.uint8).reshape(N, K) % 16
S = np.full((K // GROUP, N), 0.01, np.float16)
POINTS = np.arange(2 * N).reshape(2, N) % 16
WORDS = np.full((N, K // 8), 0x76543210, np.int32)

PACK: list[tuple[str, Callable[[], object], str]] = [
    ("raw zero points", lambda: pack(Q, S, POINTS.astype(np.float16)), r"zeros = \(8 - zero point\) \* scale"),
    ("signed zero points", lambda: pack(Q, S, (POINTS - 8).astype(np.float16)), "look like zero points"),
    ("zero points of integers", lambda: pack(Q, S, POINTS.astype(np.uint8)), "zeros of dtype uint8 must be float16"),
    ("both", lambda: pack(Q, S, S, zero_points=POINTS), "pass one of them"),
    ("zero points above 15", lambda: pack(Q, S, zero_points=POINTS + 1), "zero_points hold 1 to 16"),
    (
        "zero points transposed",
        lambda: pack(Q, S, zero_points=POINTS.T),
        r"\[64, 2\] must be \[2, 64\]: they look trans",
    ),
    ("packed qzeros", lambda: pack(Q, S, zero_points=np.zeros((2, N // 8), np.int32)), "look like packed qzeros"),
    ("zero points of floats", lambda: pack(Q, S, zero_points=S), "zero_points of dtype float16 must be integers"),
    ("zero points per column", lambda: pack(Q, S[0], zero_points=POINTS[0]), r"reshape both to \[1, n\]"),
    (
        "zero points too large",
        lambda: pack(Q, np.full_like(S, 30000), zero_points=POINTS),
        r"\(8 - zero point\) \* scale exceeds",
    ),
    ("packed qweight", lambda: pack(WORDS, S), "look like GPTQ's or AWQ's packed qweight"),
    ("packed bytes", lambda: pack(Q * np.uint8(17), S), "if each byte packs two values, unpack them"),
    ("signed values", lambda: pack(Q.astype(np.int8) - 8, S), r"signed values need \+ 8"),
    ("q transposed", lambda: pack(Q.T, S[:, :N]), "transposed"),
    (
        "scales transposed",
        lambda: pack(Q, S.T),
        r"\[64, 2\] must be \[k / group size, n\] = \[rows, 64\]: they look trans",
    ),
    ("scales of one column", lambda: pack(Q, S.T[:, :1]), r"pass scales\[:, 0\]"),
    ("rows that do not divide", lambda: pack(Q, np.ones((3, N), np.float16)), "3 rows of scales do not divide k = 256"),
    ("masked q", lambda: pack(np.ma.masked_equal(Q, 3), S), r"q is a masked array, .* pass q.filled"),
    ("masked scales", lambda: pack(Q, np.ma.masked_equal(S, 3)), "scales is a masked array"),
    ("no scales", lambda: pack(Q, None), "scales of type NoneType must be an array of numbers"),
    ("text", lambda: pack("weights", S), "q of type str must be an array of numbers"),
    ("ragged lists", lambda: pack([[1], [2, 3]], S), "q of type list cannot be read as an array"),
    ("infinite scales", lambda: pack(Q, np.full_like(S, np.inf)), "scales must be finite"),
    ("NaN per column", lambda: pack(Q, np.full_like(S[0], np.nan)), "scales must be finite"),
    ("infinite zeros", lambda: pack(Q, S, np.full_like(S, -np.inf)), "zeros must be finite"),
    ("a group size of text", lambda: pack(Q, S, group_size="128"), "group_size of type str must be an integer"),  # type: ignore[arg-type]
    ("a group size of True", lambda: pack(Q, S, group_size=True), "group_size of type bool must be an integer"),
    ("a group size of float", lambda: quantize(np.ones((8, 64)), group_size=32.0), "type float must be an integer"),  # type: ignore[arg-type]
    ("a target that is none", lambda: pack(Q, S, target="cutlas"), "'cutlas' is not one of cutlass, native"),
    ("zero_points of text", lambda: quantize(Q / 3, zero_points="no"), "zero_points of type str must be True or False"),  # type: ignore[arg-type]
    ("packed twice", lambda: pack_weight(pack(Q, S)), "weight of type PackedWeight must be what quantize returns"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("call", "text"), [row[1:] for row in PACK], ids=[row[0] for row in PACK])
def test_a_weight_is_refused_with_the_way_out(call: Callable[[], object], text: str) -> None:
    with pytest.raises(InvalidValueError, match=text):
        call()


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
@pytest.mark.parametrize("target", ["native", "cutlass"])
def test_zero_points_are_taken_as_checkpoints_store_them(dtype: type[np.integer[Any]], target: str) -> None:
    packed = pack(Q, S, zero_points=POINTS.astype(dtype), target=target)
    assert packed.mode is QuantMode.FINEGRAINED_SCALE_AND_ZEROS
    exact = (Q.astype(float) - np.repeat(POINTS, GROUP, axis=0).T) * np.repeat(S.astype(float), GROUP, axis=0).T
    # The product (8 - zero point) * scale is rounded to fp16 once.
    assert np.abs(packed.unpack().dequantize() - exact).max() <= 8 * 0.01 * 2.0**-11


@pytest.mark.parametrize("scale", [0.001, 0.5, 3.0])
def test_multiplied_zeros_are_not_taken_for_zero_points(scale: float) -> None:
    for zeros in (0.0, 8 * scale, -7 * scale, scale):
        pack(Q, np.full_like(S, scale), np.full_like(S, zeros))


@pytest.mark.parametrize("kind", [np.int8, np.int64, np.uint16, int])
def test_integers_of_numpy_are_group_sizes(kind: Callable[[int], int]) -> None:
    assert pack(Q, np.ones((4, N), np.float16), group_size=kind(64)).group_size == 64
    assert type(quantize(Q / 3, group_size=kind(64)).group_size) is int


BY_HAND: list[tuple[str, dict[str, Any], str]] = [
    ("q above 15", {"q": Q + np.uint8(1)}, "q holds 1 to 16"),
    ("q of int8", {"q": Q.astype(np.int8)}, "q of dtype int8 must be uint8"),
    ("q of lists", {"q": Q.tolist()}, "q of type list must be a numpy array"),
    ("masked q", {"q": np.ma.masked_equal(Q, 3)}, "q of type MaskedArray must be a numpy array"),
    ("NaN scales", {"scales": S * np.float16(np.nan)}, "scales must be finite"),
    ("scales of fp32", {"scales": S.astype(np.float32)}, "scales of dtype float32 must be float16"),
    ("zeros in fgs", {"zeros": S}, "zeros must be None in mode fgs"),
    ("no zeros in fgsz", {"mode": QuantMode.FINEGRAINED_SCALE_AND_ZEROS}, "zeros must be an array in mode fgsz"),
    ("another group size", {"group_size": 64}, r"scales of shape \[2, 64\] must be \[4, 64\]"),
    ("no divisor", {"group_size": 96}, "group size 96 must divide k = 256"),
    ("a mode of text", {"mode": "fgs"}, "mode of type str must be a QuantMode"),
    ("per column", {"mode": QuantMode.PER_COLUMN_SCALE_ONLY}, r"must be 256 \(= k\) in per-column mode"),
]


@pytest.mark.parametrize(("change", "text"), [row[1:] for row in BY_HAND], ids=[row[0] for row in BY_HAND])
def test_a_weight_made_by_hand_is_checked(change: dict[str, Any], text: str) -> None:
    right: dict[str, Any] = {"q": Q, "scales": S, "zeros": None, "group_size": GROUP}
    with pytest.raises(InvalidValueError, match=text):
        QuantizedWeight(**({"mode": QuantMode.FINEGRAINED_SCALE_ONLY} | right | change))


def test_a_weight_that_was_changed_in_place_is_checked_again() -> None:
    weight = quantize(Q / 3, group_size=GROUP)
    weight.q[3, 4] = 16
    with pytest.raises(InvalidValueError, match="q holds 8 to 16"):
        pack_weight(weight)


def test_weights_compare_by_identity() -> None:
    weight = quantize(Q / 3, group_size=GROUP)
    packed = pack_weight(weight)
    for value in (weight, packed):
        assert value == value  # noqa: PLR0124  (what the test is about)
        assert value != dataclasses.replace(value)
        assert len({value, dataclasses.replace(value)}) == 2


PACKED_BY_HAND: list[tuple[str, dict[str, Any], str]] = [
    ("a foreign layout", {"layout": "marlin"}, "packed as 'marlin', which is not one of"),
    ("n of 0", {"n": 0}, "n of 0 must be positive"),
    ("k of text", {"k": "256"}, "k of type str must be an integer"),
    ("a mode of text", {"mode": "fgs"}, "mode of type str must be a QuantMode"),
    ("a group size of no layout", {"group_size": 16}, r"group size 16 must be 256 \(= k\) or a multiple of 32"),
    ("data of int8", {"data": np.zeros(8704, np.int8)}, "packed data of dtype int8 must be uint8"),
    ("data cut short", {"data": np.zeros(8703, np.uint8)}, "packed data of 8703 bytes must be 8704"),
    ("data of two axes", {"data": np.zeros((2, 4352), np.uint8)}, r"packed data of shape \[2, 4352\] must be \[8704\]"),
    ("data of a list", {"data": [1, 2]}, "packed data of type list must be an array"),
    ("masked data", {"data": np.ma.zeros(8704, np.uint8)}, "packed data is a masked array"),
    ("data of zeros", {"data": np.zeros(8704, np.uint8)}, "packed data is damaged"),
    ("another group size", {"group_size": 256}, "packed data is damaged, or its group size"),
]


@pytest.mark.parametrize(
    ("change", "text"), [row[1:] for row in PACKED_BY_HAND], ids=[row[0] for row in PACKED_BY_HAND]
)
def test_a_packed_weight_made_by_hand_is_checked(change: dict[str, Any], text: str, rng: np.random.Generator) -> None:
    packed = pack_weight(random_weight(rng, N, K, GROUP, QuantMode.FINEGRAINED_SCALE_ONLY))
    assert packed.nbytes == 8704
    with pytest.raises(InvalidValueError, match=text):
        w4a16gen.gemm(np.ones((1, K), np.float16), dataclasses.replace(packed, **change))


@pytest.mark.parametrize("mode", QuantMode, ids=str)
def test_no_random_bytes_end_in_another_error(mode: QuantMode, rng: np.random.Generator) -> None:
    for target in Target:
        packed = pack_weight(random_weight(rng, 16, 128, 64 if mode.is_grouped else 128, mode), target=target)
        for _ in range(50):
            data = rng.integers(0, 256, packed.nbytes).astype(np.uint8)
            try:
                dataclasses.replace(packed, data=data).unpack()
            except InvalidValueError:
                continue
            assert target is Target.CUTLASS or not mode.is_grouped, "the native layout's factors are powers of two"


@pytest.mark.parametrize(
    ("index", "text"),
    [
        (np.array([0, N]), "index holds 0 to 64; it must hold 0 to 63"),
        (np.array([-1]), "index holds -1 to -1; it must hold 0 to 63"),
        (np.array([1.5]), r"index of dtype float64, shape \[1\] must be a slice, or a numpy array of integers"),
        (np.zeros((1, 1), np.intp), r"index of dtype int64, shape \[1, 1\] must be"),
        (np.zeros(0, np.intp), r"index of dtype int64, shape \[0\] must be"),
        (3, "index of type int must be"),
        (slice(0, 0), r"q of shape \[0, 256\]"),
    ],
)
def test_channels_outside_the_weight_are_refused(index: Any, text: str) -> None:
    with pytest.raises(InvalidValueError, match=text):
        random_weight(np.random.default_rng(0), N, K, GROUP, QuantMode.FINEGRAINED_SCALE_ONLY).channels(index)
