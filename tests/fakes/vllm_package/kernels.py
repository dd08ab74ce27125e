"""The list of mixed-precision kernels, and how one is chosen from it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

import torch


@dataclass(frozen=True)
class ScalarType:
    """A type of stored values."""

    name: str
    size_bits: int
    bias: int

    def __str__(self) -> str:
        return self.name


class scalar_types:  # noqa: N801  (vLLM's name)
    """vLLM's types by name."""

    uint4 = ScalarType("uint4", 4, 0)
    uint4b8 = ScalarType("uint4b8", 4, 8)
    uint8b128 = ScalarType("uint8b128", 8, 128)


class PlatformEnum(Enum):
    """Kinds of devices."""

    CUDA = 1
    CPU = 2


class Platform:
    """A machine whose GPU is a Hopper GPU, or what a test sets."""

    _enum = PlatformEnum.CUDA
    capability: ClassVar[tuple[int, int] | None] = (9, 0)

    @classmethod
    def is_cuda(cls) -> bool:
        return cls._enum is PlatformEnum.CUDA

    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> tuple[int, int] | None:
        assert device_id == 0
        return cls.capability


@dataclass
class MPLinearLayerConfig:
    """What a kernel is asked about."""

    full_weight_shape: tuple[int, int]
    partition_weight_shape: tuple[int, int]
    weight_type: Any
    act_type: torch.dtype
    group_size: int
    zero_points: bool
    out_type: torch.dtype | None = None


class MPLinearKernel:
    """The base of kernels."""

    @classmethod
    def get_min_capability(cls) -> int:
        raise NotImplementedError

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        raise NotImplementedError

    def __init__(
        self, c: MPLinearLayerConfig, w_q_param_name: str, w_s_param_name: str, w_zp_param_name: str | None = None
    ) -> None:
        self.config = c
        self.w_q_name, self.w_s_name, self.w_zp_name = w_q_param_name, w_s_param_name, w_zp_param_name

    def process_weights_after_loading(self, layer: Any) -> None:
        raise NotImplementedError

    def apply_weights(self, layer: Any, x: Any, bias: Any = None) -> Any:
        raise NotImplementedError


class MacheteLinearKernel(MPLinearKernel):
    """The kernel that takes what is left."""

    @classmethod
    def get_min_capability(cls) -> int:
        return 90

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        del c
        return True, None


_POSSIBLE_KERNELS: dict[PlatformEnum, list[type[MPLinearKernel]]] = {PlatformEnum.CUDA: [MacheteLinearKernel]}


def register_linear_kernel(kernel_class: type, platform: PlatformEnum, kernel_type: str = "mp") -> None:
    """Append a kernel."""
    assert kernel_type == "mp"
    _POSSIBLE_KERNELS[platform].append(kernel_class)


def choose_mp_linear_kernel(config: MPLinearLayerConfig, compute_capability: int | None = None) -> type[MPLinearKernel]:
    """Return the first kernel that takes a layer."""
    del compute_capability
    for kernel in _POSSIBLE_KERNELS[PlatformEnum.CUDA]:
        if kernel.can_implement(config)[0]:
            return kernel
    raise ValueError("no kernel")
