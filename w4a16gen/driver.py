"""The NVIDIA driver and its GPUs, asked through libcuda itself: no build, no toolkit, no torch needed."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

_COMPUTE_CAPABILITY_MAJOR = 75
_COMPUTE_CAPABILITY_MINOR = 76
"""Values of CUdevice_attribute (CUDA driver API)."""
HOPPER = (9, 0)


@dataclass(frozen=True)
class Gpu:
    """One GPU as the driver lists it."""

    name: str
    compute_capability: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.name} (compute capability {'.'.join(map(str, self.compute_capability))})"


@dataclass(frozen=True)
class Driver:
    """The newest CUDA version that the driver supports, as (major, minor), and its GPUs."""

    cuda_version: tuple[int, int]
    gpus: tuple[Gpu, ...]


def find_driver() -> Driver | None:
    """Ask the driver; None if there is none or it does not start (no GPU, or a container without one)."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    if cuda.cuInit(0) != 0:
        return None
    version, count = ctypes.c_int(), ctypes.c_int()
    if cuda.cuDriverGetVersion(ctypes.byref(version)) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return None
    gpus = []
    for index in range(count.value):
        device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
        major, minor = ctypes.c_int(), ctypes.c_int()
        cuda.cuDeviceGet(ctypes.byref(device), index)
        cuda.cuDeviceGetName(name, len(name), device)
        cuda.cuDeviceGetAttribute(ctypes.byref(major), _COMPUTE_CAPABILITY_MAJOR, device)
        cuda.cuDeviceGetAttribute(ctypes.byref(minor), _COMPUTE_CAPABILITY_MINOR, device)
        gpus.append(Gpu(name.value.decode(), (major.value, minor.value)))
    return Driver((version.value // 1000, version.value % 1000 // 10), tuple(gpus))
