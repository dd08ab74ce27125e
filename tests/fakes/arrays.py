"""Arrays that claim to be on a GPU."""

from __future__ import annotations


class GpuArray:
    """An empty array on a GPU, as far as checks that need no GPU can tell."""

    def __init__(self, shape: tuple[int, ...], typestr: str = "<f2", strides: tuple[int, ...] | None = None) -> None:
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": typestr,
            "data": (0, False),
            "strides": strides,
            "version": 3,
        }
