"""As much of torch as the package asks for, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType, SimpleNamespace


@dataclass(frozen=True)
class Tensor:
    """What the package reads of a tensor."""

    shape: tuple[int, ...]
    dtype: str = "torch.float16"
    device: int = 0
    address: int = 4096
    is_cuda: bool = True
    requires_grad: bool = False
    contiguous: bool = True

    def data_ptr(self) -> int:
        return self.address

    def get_device(self) -> int:
        return self.device

    def is_contiguous(self) -> bool:
        return self.contiguous

    def new_empty(self, shape: tuple[int, ...], *, dtype: str) -> Tensor:
        return Tensor(shape, dtype, self.device)

    @property
    def __cuda_array_interface__(self) -> dict[str, object]:
        raise AssertionError("slow, and refused by tensors that require gradients")


def fake_torch(*, grad_enabled: bool = True, stream: int = 77) -> ModuleType:
    """Return a module to put into `sys.modules` as torch.

    Args:
        grad_enabled: whether gradients are recorded.
        stream: the address of the current stream.
    """
    torch = ModuleType("torch")
    torch.__dict__.update(
        Tensor=Tensor,
        float16="torch.float16",
        int32="torch.int32",
        uint8="torch.uint8",
        is_grad_enabled=lambda: grad_enabled,
        cuda=SimpleNamespace(current_stream=lambda _device: SimpleNamespace(cuda_stream=stream)),
        _C=SimpleNamespace(),
    )
    return torch
