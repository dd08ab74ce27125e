"""The GPUs of compute capability 9.0, and the figures by which estimates tell them apart."""

from __future__ import annotations

from dataclasses import dataclass, replace

from w4a16gen.kernels.device import Device


@dataclass(frozen=True)
class Card:
    """A model of GPU, by the figures that its maker publishes."""

    name: str
    """The first words of the name that the driver gives."""
    sm_count: int
    """Streaming multiprocessors."""
    memory_bandwidth: float
    """TB/s."""
    tensor_rate: float
    """TFLOP/s of dense FP16 products on each SM, so that a part of a card has exactly the card's."""

    def describes(self, device: Device) -> bool:
        """Return whether the device's name begins with this card's words."""
        return device.name == self.name or device.name.startswith(f"{self.name} ")

    def resized(self, sm_count: int) -> Card:
        """Return a part of the card, such as a MIG slice: its memory is in proportion to its SMs."""
        share = sm_count / self.sm_count
        return replace(self, sm_count=sm_count, memory_bandwidth=self.memory_bandwidth * share)


H100 = Card("NVIDIA H100", 132, 3.35, 989.0 / 132)
"""NVIDIA H100 80GB HBM3, which the cost model's constants refer to."""
CARDS = (
    Card("NVIDIA H100 64GB", 132, 2.02, 989.0 / 132),
    Card("NVIDIA H100 NVL", 132, 3.94, 835.0 / 132),
    Card("NVIDIA H100 PCIe", 114, 2.04, 756.0 / 114),
    H100,
    Card("NVIDIA H800 PCIe", 114, 2.04, 756.0 / 114),
    Card("NVIDIA H800", 132, 3.35, 989.0 / 132),
    Card("NVIDIA H200", 132, 4.8, 989.0 / 132),
    Card("NVIDIA H20-3e", 78, 4.8, 148.0 / 78),
    Card("NVIDIA H20", 78, 4.0, 148.0 / 78),
    Card("NVIDIA GH200 144G", 132, 4.9, 989.0 / 132),
    Card("NVIDIA GH200", 132, 4.0, 989.0 / 132),
)
"""Cards with compute capability 9.0; the first that describes a device counts. Figures are the data sheets'."""


def card_of(device: Device | None) -> Card:
    """Return the card that estimates are made for.

    Args:
        device: the GPU; None, on a machine without one, stands for an H100.

    Returns:
        The card with the device's own number of SMs. An unknown card has an H100's memory and tensor cores per SM.
    """
    if device is None:
        return H100
    card = next((card for card in CARDS if card.describes(device)), replace(H100, name=device.name))
    return card.resized(device.sm_count)
