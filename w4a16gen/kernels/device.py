"""A GPU as a value: what the choice of a kernel, a measurement and a report need to know of it."""

from __future__ import annotations

from dataclasses import dataclass

HOPPER = (9, 0)
"""The compute capability that these kernels are compiled for (sm_90a)."""
_DRIVER_OF_CUDA = {12: "525", 13: "580"}
"""Oldest NVIDIA driver of each major release of CUDA, on Linux."""


def needed_driver(runtime: tuple[int, int]) -> str:
    """Return the driver that a release of the CUDA runtime needs, for example `driver 580 or newer`."""
    driver = _DRIVER_OF_CUDA.get(runtime[0])
    return f"driver {driver} or newer" if driver else f"a driver for CUDA {runtime[0]}.0 or newer"


def driver_fault(driver: tuple[int, int], runtime: tuple[int, int]) -> str | None:
    """Return why a driver cannot run kernels that were built with a release of CUDA, or None if it can.

    Args:
        driver: the newest release that the driver supports, as (major, minor).
        runtime: the release that the kernels were built with; any of the driver's major release will do.
    """
    if driver[0] >= runtime[0]:
        return None
    return (
        f"supports CUDA {driver[0]}.{driver[1]}; kernels built with CUDA {runtime[0]}.{runtime[1]} need "
        f"{needed_driver(runtime)}"
    )


@dataclass(frozen=True)
class Device:
    """One CUDA GPU of this machine."""

    index: int
    """The CUDA device number."""
    name: str
    """The name that the driver gives, such as `NVIDIA H100 80GB HBM3`."""
    compute_capability: tuple[int, int]
    sm_count: int
    """Streaming multiprocessors."""

    @property
    def is_hopper(self) -> bool:
        """Whether these kernels run on it."""
        return self.compute_capability == HOPPER

    def __str__(self) -> str:
        return f"{self.name} (compute capability {'.'.join(map(str, self.compute_capability))})"

    def as_json(self) -> dict[str, object]:
        """Return the object that JSON output carries."""
        return {
            "index": self.index,
            "name": self.name,
            "compute_capability": list(self.compute_capability),
            "sm_count": self.sm_count,
        }
