"""Packing on a Hopper GPU: the same bytes and the same refusals as on the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from w4a16gen import Library, QuantMode, pack, pack_weight
from w4a16gen.errors import InvalidValueError
from w4a16gen.weights.reference import random_weight

pytestmark = pytest.mark.gpu


@pytest.fixture
def library(gpu_library: Library) -> Library:
    """Return the build of every kernel."""
    return gpu_library


PACKED = [
    (QuantMode.PER_COLUMN_SCALE_ONLY, 200),
    *((mode, group) for mode in list(QuantMode)[1:] for group in (32, 64, 96, 128, 192, 256, 384, 768)),
]


@pytest.mark.parametrize(("mode", "group"), PACKED)
@pytest.mark.parametrize("size", [0.01, 3.0])
def test_packing_on_the_gpu_gives_the_same_bytes(library: Library, mode: QuantMode, group: int, size: float) -> None:
    k = 768 if mode.is_grouped else group
    weight = random_weight(np.random.default_rng(group), 136, k, group, mode, size=size)
    on_gpu = [None if part is None else library.to_device(part) for part in (weight.q, weight.scales, weight.zeros)]
    packed = library.pack(*on_gpu, group_size=weight.group_size)
    expected = pack_weight(weight)
    assert (packed.layout, packed.n, packed.k, packed.group_size, packed.mode) == (
        *(expected.layout, expected.n, expected.k, expected.group_size, expected.mode),
    )
    assert np.array_equal(packed.data.to_host(), expected.data)


def _refusal(call: Callable[[], object]) -> str:
    with pytest.raises(InvalidValueError) as error:
        call()
    return str(error.value)


SCALES = np.ones((2, 64), np.float16)
POINTS = np.arange(128).reshape(2, 64) % 16
TOO_FAR = SCALES.copy()
TOO_FAR[:, 9] = 60000, 6e-8
REFUSED: list[tuple[str, dict[str, Any]]] = [
    *(
        (f"{name} of {value} in {len(shape)} axes", {name: np.full(shape, value, np.float16)})
        for name, shape in (("scales", (2, 64)), ("scales", (64,)), ("zeros", (2, 64)))
        for value in (np.nan, np.inf, -np.inf)
    ),
    ("raw zero points", {"scales": SCALES * np.float16(0.01), "zeros": POINTS.astype(np.float16)}),
    ("zero points above 15", {"zero_points": POINTS + 1}),
    ("zero points transposed", {"zero_points": POINTS.T.copy()}),
    ("zero points of floats", {"zero_points": SCALES}),
    ("zeros and zero points", {"zeros": SCALES, "zero_points": POINTS}),
    ("zero points per column", {"scales": SCALES[0], "zero_points": POINTS[0]}),
    ("scales of fp32", {"scales": SCALES.astype(np.float32)}),
    ("scales transposed", {"scales": SCALES.T.copy()}),
    ("scales of another n", {"scales": SCALES[:, :8].copy()}),
    ("zeros of another shape", {"zeros": SCALES[:1].copy()}),
    ("a group size that does not divide", {"group_size": 48}),
    ("a group size of text", {"group_size": "128"}),
    ("too wide a range", {"scales": TOO_FAR}),
]


@pytest.mark.parametrize("change", [row[1] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_packing_on_the_gpu_refuses_what_packing_on_the_host_refuses(library: Library, change: dict[str, Any]) -> None:
    given: dict[str, Any] = {"q": np.full((64, 256), 3, np.uint8), "scales": SCALES} | change
    on_gpu: dict[str, Any] = {
        name: library.to_device(part) if isinstance(part, np.ndarray) else part for name, part in given.items()
    }
    on_host, there = _refusal(lambda: pack(**given)), _refusal(lambda: library.pack(**on_gpu))
    if "too far below" in on_host:  # the kernel does not tell which channel
        assert "too far below the channel's largest scale" in there
    else:
        assert there == on_host


def test_packing_on_the_gpu_refuses_values_above_15(library: Library) -> None:
    q = library.to_device(np.full((64, 256), 16, np.uint8))
    assert "q holds values above 15" in _refusal(lambda: library.pack(q, library.to_device(SCALES)))


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64])
def test_zero_points_on_the_gpu_give_the_same_bytes(library: Library, dtype: type[np.integer[Any]]) -> None:
    rng = np.random.default_rng(5)
    q = rng.integers(0, 16, (64, 256)).astype(np.uint8)
    scales, points = rng.uniform(0.001, 0.1, (2, 64)).astype(np.float16), POINTS.astype(dtype)
    expected = pack(q, scales, zero_points=points)
    packed = library.pack(*map(library.to_device, (q, scales)), zero_points=library.to_device(points))
    assert packed.mode is expected.mode is QuantMode.FINEGRAINED_SCALE_AND_ZEROS
    assert np.array_equal(packed.data.to_host(), expected.data)
    assert np.array_equal(packed.to_host().unpack().q, q)
