"""A GPU as a value: what the choice of a kernel, a measurement and a report need to know of it."""

from __future__ import annotations

from dataclasses import dataclass

HOPPER = (9, 0)
"""The compute capability that these kernels are compiled for (sm_90a)."""


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
