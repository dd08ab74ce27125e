"""What estimates assume of a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fakes.devices import H100, H200

from w4a16gen.choose import cards
from w4a16gen.choose.cards import card_of


def test_names_are_compared_by_words() -> None:
    h20 = card_of(replace(H100, name="NVIDIA H20", sm_count=78))
    assert (h20.name, h20.memory_bandwidth) == ("NVIDIA H20", 4.0)
    assert card_of(H200).name == "NVIDIA H200"
    assert card_of(replace(H100, name="NVIDIA H1000")).name == "NVIDIA H1000"
    assert card_of(replace(H100, name="NVIDIA H20-3e", sm_count=78)).memory_bandwidth == 4.8


def test_a_slice_has_its_share_of_the_card() -> None:
    part = card_of(replace(H100, name="NVIDIA H100 80GB HBM3 MIG 3g.40gb", sm_count=66))
    assert part.sm_count == 66
    assert part.memory_bandwidth == pytest.approx(cards.H100.memory_bandwidth / 2)
    for sm_count in range(1, 133):
        assert cards.H100.resized(sm_count).tensor_rate == cards.H100.tensor_rate, "the cores of an SM stay the same"


def test_an_unknown_card_has_an_h100s_memory_and_tensor_cores_per_sm() -> None:
    card = card_of(replace(H100, name="NVIDIA H300", sm_count=264))
    assert card.memory_bandwidth == pytest.approx(2 * cards.H100.memory_bandwidth)
    assert card_of(None) == cards.H100
