"""GPUs as values."""

from __future__ import annotations

from dataclasses import replace

from w4a16gen.kernels.device import HOPPER, Device

H100 = Device(0, "NVIDIA H100 80GB HBM3", HOPPER, 132)
H100_PCIE = Device(0, "NVIDIA H100 PCIe", HOPPER, 114)
H200 = Device(0, "NVIDIA H200", HOPPER, 132)
H800 = Device(0, "NVIDIA H800", HOPPER, 132)
A100 = Device(0, "NVIDIA A100-SXM4-80GB", (8, 0), 108)


def numbered(*devices: Device) -> list[Device]:
    """Return the GPUs as one machine numbers them."""
    return [replace(device, index=index) for index, device in enumerate(devices)]
