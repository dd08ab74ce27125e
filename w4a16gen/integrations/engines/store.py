"""Where an engine's layer keeps its packed weight: under the checkpoint's name, at an address that never changes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from w4a16gen.errors import InvalidValueError
from w4a16gen.integrations.engines.layer import Call, EngineLayer, product

INDEX = "w4a16gen_index"
"""Name of the buffer with the layer's index."""


class LayerStore:
    """Puts a packed layer into a module of an engine, and calls it.

    Captured graphs hold addresses. When an engine loads weights again, the new ones are copied to the old addresses.
    """

    def __init__(self, name: str, *, keeps_address: bool = True) -> None:
        """Keep the packed weight under a name.

        Args:
            name: the parameter or buffer that held the words, which engines ask for its device.
            keeps_address: whether weights that are loaded again go to the old memory. Modules that move between devices
                say False, because the old memory would not be freed.
        """
        self._name = name
        self._keeps_address = keeps_address
        self._facts: _Facts | None = None
        self._parameter: Any = None
        self._index: Any = None

    @property
    def is_filled(self) -> bool:
        """Whether a weight has been packed."""
        return self._facts is not None

    def fill(self, module: Any, layer: EngineLayer, drop: Iterable[str] = ()) -> None:
        """Put a packed layer into a module, and free what it was packed from.

        Args:
            module: the engine's module.
            layer: the packed layer.
            drop: names of parameters and buffers that are not needed any more.

        Raises:
            InvalidValueError: if an earlier layer was of another shape, which captured graphs rely on.
        """
        facts = _Facts(layer.call, tuple(layer.packed.shape), layer.index is not None)
        if self._facts not in (None, facts):
            raise InvalidValueError(
                f"the new weight {facts} differs from the old one {self._facts} in shape, order or alpha, and captured "
                "graphs hold those: restart the engine"
            )
        self._facts = facts
        for name in drop:
            _put(module, name, None)
        if self._keeps_address:
            self._parameter = _kept(
                self._parameter, layer.packed, torch.nn.Parameter(layer.packed, requires_grad=False)
            )
            self._index = _kept(self._index, layer.index, layer.index)
            _put(module, self._name, self._parameter)
        else:
            _put(module, self._name, layer.packed)
        if layer.index is not None:
            module.register_buffer(INDEX, self._index if self._keeps_address else layer.index, persistent=False)

    def apply(self, module: Any, x: Any, bias: Any = None) -> Any:
        """Return the product of activations and the module's weight, plus the bias.

        Args:
            module: the module that was filled.
            x: activations, fp16 or bf16 [..., k].
            bias: [n], or None.

        Raises:
            InvalidValueError: if no weight has been packed.
        """
        if self._facts is None:
            raise InvalidValueError(f"{self._name} has not been packed: call process_weights_after_loading first")
        index = getattr(module, INDEX) if self._facts.has_index else None
        return product(getattr(module, self._name), x, bias, self._facts.call, index)


@dataclass(frozen=True)
class _Facts:
    """What must not change when weights are loaded again."""

    call: Call
    shape: tuple[int, ...]
    has_index: bool


def _kept(old: Any, values: Any, new: Any) -> Any:
    """Return the old tensor with new values, or the new one if there is no old one where it should be.

    An engine that offloads weights moves a parameter's memory to the host; that memory is not the old one any more.
    """
    if old is None or old.device != values.device:
        return new
    old.data.copy_(values)
    return old


def _put(module: Any, name: str, tensor: Any) -> None:
    """Replace a parameter or buffer of a module; there is nothing to do where it has none of that name."""
    if name in dict(module.named_buffers(recurse=False)):
        module.register_buffer(name, tensor)
    elif tensor is not None:
        module.register_parameter(name, tensor)
    elif name in dict(module.named_parameters(recurse=False)):
        module.register_parameter(name, None)
