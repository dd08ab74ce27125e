"""The GPUs that the packaged times apply to, and the figures by which estimates describe the others."""

from __future__ import annotations

from dataclasses import dataclass, replace

from w4a16gen.kernels.device import Device

SAME_MEMORY = 0.2
"""Cards share times if they have equally many SMs and their memory bandwidths differ by at most this share.

That includes the H800, the H100 NVL and the GH200 with HBM3. It leaves out the H200, and boards and MIG slices with
fewer SMs."""


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
    """TFLOP/s of dense FP16 products."""

    def describes(self, device: Device) -> bool:
        """Return whether the device's name begins with this card's words."""
        return device.name == self.name or device.name.startswith(f"{self.name} ")

    def resized(self, sm_count: int) -> Card:
        """Return a part of the card, such as a MIG slice: memory and tensor cores in proportion to its SMs."""
        share = sm_count / self.sm_count
        return replace(
            self,
            sm_count=sm_count,
            memory_bandwidth=self.memory_bandwidth * share,
            tensor_rate=self.tensor_rate * share,
        )

    def shares_times_with(self, other: Card) -> bool:
        """Return whether kernels take about as long on the other card; see `SAME_MEMORY`."""
        ratio = self.memory_bandwidth / other.memory_bandwidth
        return self.sm_count == other.sm_count and abs(ratio - 1) <= SAME_MEMORY


H100 = Card("NVIDIA H100", 132, 3.35, 989.0)
"""The card of the packaged times and of the cost model's constants: NVIDIA H100 80GB HBM3."""
CARDS = (
    Card("NVIDIA H100 64GB", 132, 2.02, 989.0),
    Card("NVIDIA H100 NVL", 132, 3.94, 835.0),
    Card("NVIDIA H100 PCIe", 114, 2.04, 756.0),
    H100,
    Card("NVIDIA H800 PCIe", 114, 2.04, 756.0),
    Card("NVIDIA H800", 132, 3.35, 989.0),
    Card("NVIDIA H200", 132, 4.8, 989.0),
    Card("NVIDIA H20-3e", 78, 4.8, 148.0),
    Card("NVIDIA H20", 78, 4.0, 148.0),
    Card("NVIDIA GH200 144G", 132, 4.9, 989.0),
    Card("NVIDIA GH200", 132, 4.0, 989.0),
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
