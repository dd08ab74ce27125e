"""Which GPUs share the packaged times, and what estimates assume of the others."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fakes.devices import H100, H100_PCIE, H200, H800

from w4a16gen.choose import cards
from w4a16gen.choose.cards import card_of
from w4a16gen.kernels.device import Device

NAMES = {
    "NVIDIA H100 80GB HBM3": True,
    "NVIDIA H100 NVL": True,
    "NVIDIA H800": True,
    "NVIDIA GH200 480GB": True,
    "NVIDIA H100 64GB HBM2": False,
    "NVIDIA H200": False,
    "NVIDIA H200 NVL": False,
    "NVIDIA GH200 144G HBM3e": False,
}
"""GPUs with 132 SMs, and whether the packaged times are good for them."""


@pytest.mark.parametrize("name", NAMES)
def test_cards_with_as_many_sms_and_like_memory_share_times(name: str) -> None:
    assert card_of(replace(H100, name=name)).shares_times_with(cards.H100) is NAMES[name]


@pytest.mark.parametrize("device", [H100_PCIE, replace(H100, sm_count=60), replace(H800, sm_count=16)], ids=str)
def test_fewer_sms_do_not_share_times(device: Device) -> None:
    assert not card_of(device).shares_times_with(cards.H100)


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
    assert part.tensor_rate == pytest.approx(cards.H100.tensor_rate / 2)


def test_an_unknown_card_has_an_h100s_memory_and_tensor_cores_per_sm() -> None:
    card = card_of(replace(H100, name="NVIDIA H300", sm_count=264))
    assert card.memory_bandwidth == pytest.approx(2 * cards.H100.memory_bandwidth)
    assert not card.shares_times_with(cards.H100)
    assert card_of(None) == cards.H100
