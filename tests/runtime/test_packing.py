"""Packing on a stand-in of a GPU: the word for faults is kept, and cleared before each weight."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from fakes.library import FakeLibrary

from w4a16gen import pack_weight
from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.config import QuantMode
from w4a16gen.kernels.spaces import enumerate_space
from w4a16gen.weights.reference import random_weight

WEIGHT = random_weight(np.random.default_rng(0), 64, 256, 128, QuantMode.FINEGRAINED_SCALE_ONLY)


@pytest.fixture
def library() -> FakeLibrary:
    return FakeLibrary(enumerate_space("default"))


def pack(library: FakeLibrary, offset: int = 0) -> np.ndarray:
    """Return the bytes of a weight whose values are moved by an offset."""
    q, scales = library.to_device(WEIGHT.q + np.uint8(offset)), library.to_device(WEIGHT.scales)
    data = library.pack(q, scales, group_size=128).to_host().data
    assert isinstance(data, np.ndarray)
    return data


def test_a_refused_weight_does_not_spoil_the_next_one(library: FakeLibrary) -> None:
    expected = pack_weight(WEIGHT).data
    assert np.array_equal(pack(library), expected)
    with pytest.raises(InvalidValueError, match="q holds values above 15"):
        pack(library, 16)
    assert np.array_equal(pack(library), expected)


def test_threads_do_not_share_their_faults(library: FakeLibrary) -> None:
    def outcome(offset: int) -> bool:
        try:
            return np.array_equal(pack(library, offset), pack_weight(WEIGHT).data)
        except InvalidValueError:
            return False

    with ThreadPoolExecutor(4) as pool:
        offsets = [0, 16] * 20
        assert list(pool.map(outcome, offsets)) == [offset == 0 for offset in offsets]
