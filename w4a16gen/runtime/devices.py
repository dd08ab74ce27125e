"""The NVIDIA driver and its GPUs, read through libcuda itself: no build, no toolkit and no torch needed."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

from w4a16gen.errors import NoHopperGpuError
from w4a16gen.kernels.device import Device, driver_fault

_SM_COUNT = 16
_COMPUTE_CAPABILITY_MAJOR = 75
_COMPUTE_CAPABILITY_MINOR = 76
"""Values of CUdevice_attribute (CUDA driver API)."""


@dataclass(frozen=True)
class Driver:
    """The newest CUDA version that the driver supports, as (major, minor), and its GPUs."""

    cuda_version: tuple[int, int]
    gpus: tuple[Device, ...]


def find_driver() -> Driver | None:
    """Read the driver's version and GPUs; None if there is no driver, or it does not start (no GPU)."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    if cuda.cuInit(0) != 0:
        return None
    version, count = ctypes.c_int(), ctypes.c_int()
    if cuda.cuDriverGetVersion(ctypes.byref(version)) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return None
    gpus = tuple(_read_device(cuda, index) for index in range(count.value))
    return Driver((version.value // 1000, version.value % 1000 // 10), gpus)


def _read_device(cuda: ctypes.CDLL, index: int) -> Device:
    handle, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    cuda.cuDeviceGet(ctypes.byref(handle), index)
    cuda.cuDeviceGetName(name, len(name), handle)

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), number, handle)
        return value.value

    capability = attribute(_COMPUTE_CAPABILITY_MAJOR), attribute(_COMPUTE_CAPABILITY_MINOR)
    return Device(index, name.value.decode(), capability, attribute(_SM_COUNT))


def why_no_device(runtime: tuple[int, int]) -> str:
    """Return why the CUDA runtime finds no GPU; empty if it is simply that there is none.

    Args:
        runtime: the release of CUDA that the kernels were built with, as (major, minor).
    """
    driver = find_driver()
    fault = driver_fault(driver.cuda_version, runtime) if driver and driver.gpus else None
    return f"the NVIDIA driver {fault}" if fault else ""


def first_hopper(devices: Sequence[Device], why_none: str = "") -> Device:
    """Return the first Hopper GPU.

    Args:
        devices: the GPUs of this machine.
        why_none: what `why_no_device` says if there are none.

    Raises:
        NoHopperGpuError: if there is none; the text names the GPUs that are there.
    """
    for device in devices:
        if device.is_hopper:
            return device
    if why_none:
        raise NoHopperGpuError(f"no GPU can be used: {why_none}")
    others = ", ".join(device.name for device in devices) or "no CUDA GPU"
    raise NoHopperGpuError(f"this machine has {others}; running needs an NVIDIA Hopper GPU (H100, H800, H200)")
