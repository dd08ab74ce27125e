"""The numpy reference: round trips bit for bit, error bounds of the quantiser, exactness of the dequantiser."""

from __future__ import annotations

from fractions import Fraction

import hypothesis.extra.numpy as hnp
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from w4a16gen import PackedWeight, QuantMode, Target, pack, pack_weight, quantize
from w4a16gen.errors import InvalidValueError
from w4a16gen.weights.layouts.fragments import scale_exponents
from w4a16gen.weights.layouts.geometry import ALIGNMENT
from w4a16gen.weights.packed import LAYOUTS, TARGET_LAYOUTS
from w4a16gen.weights.quantized import QuantizedWeight, canonical, pack_nibbles, unpack_nibbles
from w4a16gen.weights.reference import gemm_reference, random_weight

finite_half = st.floats(-1000, 1000, width=16)
fractions = finite_half.filter(lambda value: value == 0 or value % 1 != 0)
"""Zeros: small integers beside small scales are refused, because they look like zero points."""


@st.composite
def weights(draw: st.DrawFn, mode: QuantMode | None = None) -> QuantizedWeight:
    """Draw canonical weights of any mode and of shapes that fill no tile."""
    mode = mode or draw(st.sampled_from(QuantMode))
    n, groups, size = draw(st.integers(1, 9)), draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 8, 24, 32, 64]))
    k = groups * size
    q = draw(hnp.arrays(np.uint8, (n, k), elements=st.integers(0, 15)))
    shape = (groups, n) if mode.is_grouped else (n,)
    scales = draw(hnp.arrays(np.float16, shape, elements=finite_half))
    zeros = draw(hnp.arrays(np.float16, shape, elements=fractions)) if mode.has_zeros else None
    return canonical(q, scales, zeros, group_size=size if mode.is_grouped else k)


def assert_same(a: QuantizedWeight, b: QuantizedWeight) -> None:
    """Assert that two weights are equal bit for bit."""
    assert (a.group_size, a.mode) == (b.group_size, b.mode)
    for left, right in ((a.q, b.q), (a.scales, b.scales), (a.zeros, b.zeros)):
        if left is None or right is None:
            assert left is right
        else:
            assert left.dtype == right.dtype
            assert left.shape == right.shape
            assert left.tobytes() == right.tobytes()


@given(
    hnp.arrays(
        np.uint8, st.tuples(st.integers(1, 7), st.integers(1, 20).map(lambda k: 2 * k)), elements=st.integers(0, 15)
    )
)
def test_nibbles_round_trip(q: npt.NDArray[np.uint8]) -> None:
    packed = pack_nibbles(q)
    assert packed.shape == (q.shape[0], q.shape[1] // 2)
    assert (packed & 15 == q[:, 0::2]).all()
    assert np.array_equal(unpack_nibbles(packed), q)


@given(weights(), st.sampled_from(Target))
def test_packed_weights_round_trip(weight: QuantizedWeight, target: Target) -> None:
    layout = LAYOUTS[TARGET_LAYOUTS[target]]
    if weight.group_size != weight.k and weight.group_size % layout.group_multiple != 0:
        with pytest.raises(InvalidValueError, match=r"or a multiple of 32 for target native"):
            pack_weight(weight, target=target)
        return
    packed = pack_weight(weight, target=target)
    assert packed.layout == TARGET_LAYOUTS[target]
    assert packed.data.nbytes == packed.nbytes
    assert packed.nbytes % ALIGNMENT == 0
    assert_same(packed.unpack(), weight)


def test_a_channel_of_too_wide_a_range_is_refused_for_native_kernels_only() -> None:
    q = np.full((16, 64), 3, np.uint8)
    scales = np.ones((2, 16), np.float16)
    scales[:, 9] = 60000, 6e-8
    assert pack(q, scales, target=Target.CUTLASS).unpack().scales.tolist() == scales.tolist()
    with pytest.raises(InvalidValueError, match="scales of channel 9 lie too far below the channel's largest scale"):
        pack(q, scales)
    with pytest.raises(InvalidValueError, match="zeros of channel 9 lie too far below the channel's largest scale"):
        pack(q, scales.clip(1, None), scales.clip(None, 1))


@pytest.mark.parametrize(("mode", "first_divided"), [("fgs", 2.0**-5), ("fgsz", 2.0**10)])
def test_scales_are_divided_where_they_would_overflow(mode: str, first_divided: float) -> None:
    scales = np.array([[0, first_divided / 2, first_divided * 0.999, first_divided, 4 * first_divided]], np.float16)
    assert scale_exponents(scales, QuantMode(mode)).tolist() == [0, 0, 0, 1, 3]


def test_the_packed_layout_is_the_documented_one() -> None:
    q = np.arange(16, dtype=np.uint8).reshape(1, 16).repeat(2, axis=0)
    scales = np.array([[1.0, 2.0]], np.float16)
    zeros = np.array([[3.0, 4.0]], np.float16)
    data = pack(q, scales, zeros, target=Target.CUTLASS).data
    # Two rows of 32 nibbles: k 0..15 with bit 3 flipped, lower nibble first, then padding that means weight 0.
    row = [0x98, 0xBA, 0xDC, 0xFE, 0x10, 0x32, 0x54, 0x76] + [0] * 8
    assert data[:32].tolist() == row * 2
    assert data[128:132].view(np.float16).tolist() == [1, 2]
    assert data[256:260].view(np.float16).tolist() == [3, 4]
    assert data.size == 384


@given(weights())
def test_dequantising_is_exact(weight: QuantizedWeight) -> None:
    values = weight.dequantize()
    n, k = weight.q.shape
    for channel, position in ((0, 0), (n - 1, k - 1)):
        group = position // weight.group_size
        at = (group, channel) if weight.mode.is_grouped else (channel,)
        exact = (int(weight.q[channel, position]) - 8) * Fraction(float(weight.scales[at]))
        if weight.zeros is not None:
            exact += Fraction(float(weight.zeros[at]))
        assert Fraction(float(values[channel, position])) == exact


matrices = hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.just(24)), elements=st.floats(-100, 100, width=32))


@given(matrices, st.sampled_from([None, 1, 8, 24]))
def test_symmetric_quantisation_is_within_half_a_step(weight: npt.NDArray[np.float32], group: int | None) -> None:
    quantized = quantize(weight, group_size=group)
    assert quantized.mode is (QuantMode.FINEGRAINED_SCALE_ONLY if group else QuantMode.PER_COLUMN_SCALE_ONLY)
    size = group or 24
    per_group = np.atleast_2d(quantized.scales).T.astype(np.float64)
    error = np.abs(quantized.dequantize() - weight).reshape(len(weight), -1, size).max(axis=2)
    # Half a step by rounding; 7 steps times the scale's own rounding to fp16 (2^-11, or half a subnormal) by clipping.
    assert (error <= per_group * (0.5 + 7 * 2.0**-11) + 7 * 2.0**-25).all()


@given(matrices, st.sampled_from([1, 8, 24]))
def test_quantisation_with_zero_points_is_within_a_step(weight: npt.NDArray[np.float32], group: int) -> None:
    quantized = quantize(weight, group_size=group, zero_points=True)
    assert quantized.mode is QuantMode.FINEGRAINED_SCALE_AND_ZEROS
    assert quantized.zeros is not None
    per_group = quantized.scales.T.astype(np.float64)
    zero_rounding = 2.0**-11 * np.abs(quantized.zeros.T.astype(np.float64)) + 2.0**-25
    error = np.abs(quantized.dequantize() - weight).reshape(len(weight), -1, group).max(axis=2)
    # Half a step by rounding w, half a step by rounding the zero point, then the roundings to fp16.
    assert (error <= per_group * (1 + 15 * 2.0**-11) + zero_rounding + 15 * 2.0**-25).all()


@given(weights(QuantMode.FINEGRAINED_SCALE_ONLY))
@settings(max_examples=30)
def test_quantising_a_dequantised_weight_gives_it_back(weight: QuantizedWeight) -> None:
    n, k = weight.q.shape
    q = np.clip(weight.q, 1, 15)
    q.reshape(n, k // weight.group_size, weight.group_size)[..., 0] = 15  # the largest magnitude sets the scale
    scales = np.full_like(weight.scales, 0.5)
    again = quantize(
        canonical(q, scales, None, group_size=weight.group_size).dequantize(), group_size=weight.group_size
    )
    assert np.array_equal(again.q, q)
    assert np.array_equal(again.scales, scales)


def test_a_weight_of_zeros_stays_zero() -> None:
    for zero_points in (False, True):
        assert (quantize(np.zeros((4, 8)), group_size=4, zero_points=zero_points).dequantize() == 0).all()


def test_the_gptq_zero_point_convention() -> None:
    # GPTQ and AWQ: (q - zero point) * scale, with a zero point of 0 to 15 per group.
    q, scale, point = np.array([[0, 5, 10, 15]], np.uint8), np.float16(0.25), 5
    zeros = np.array([[(8 - point) * float(scale)]], np.float16)
    weight = canonical(q, np.array([[scale]]), zeros, group_size=4)
    assert weight.dequantize().tolist() == [[-1.25, 0, 1.25, 2.5]]


def test_the_reference_product(rng: np.random.Generator) -> None:
    weight = quantize(rng.standard_normal((6, 16)), group_size=8)
    a = rng.standard_normal((3, 16)).astype(np.float16)
    bias = rng.standard_normal(6).astype(np.float16)
    exact = [
        [
            -2 * sum(Fraction(float(x)) * Fraction(float(w)) for x, w in zip(row, channel, strict=True))
            + Fraction(float(shift))
            for channel, shift in zip(weight.dequantize(), bias, strict=True)
        ]
        for row in a
    ]
    got = gemm_reference(a, weight, alpha=-2.0, bias=bias)
    assert np.allclose(got, np.array(exact, dtype=np.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("group_size", [32, 64, 96, 128, 192, 384])
@pytest.mark.parametrize("mode", [QuantMode.FINEGRAINED_SCALE_ONLY, QuantMode.FINEGRAINED_SCALE_AND_ZEROS], ids=str)
def test_native_blocks_round_trip_with_every_number_of_scale_rows(
    rng: np.random.Generator, group_size: int, mode: QuantMode
) -> None:
    weight = random_weight(rng, 136, 384, group_size, mode)
    assert_same(pack_weight(weight, target=Target.NATIVE).unpack(), weight)


def test_foreign_and_damaged_packed_data_is_refused(rng: np.random.Generator) -> None:
    packed = pack_weight(quantize(rng.standard_normal((8, 16)), group_size=8), target=Target.CUTLASS)
    short = PackedWeight(packed.data[:-1], packed.layout, 8, 16, 8, packed.mode)
    with pytest.raises(InvalidValueError, match="packed data of 255 bytes must be 256 bytes"):
        short.unpack()
    assert set(TARGET_LAYOUTS.values()) <= LAYOUTS.keys()


def test_a_scale_of_which_eight_exceed_fp16_is_refused() -> None:
    largest = 65504.0 / 8 * 7  # of a symmetric weight, whose q is -7 to 7: -8 times its scale still is a value of fp16
    assert quantize(np.full((2, 64), largest - 100)).scales.max() * 8.0 <= 65504
    with pytest.raises(InvalidValueError, match="exceeds fp16"):
        quantize(np.full((2, 64), largest + 100))
