"""Where an engine's layer keeps its packed weight: under the checkpoint's name, at an address that never changes."""

from __future__ import annotations

from collections.abc import Iterable
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

    def __init__(self, name: str) -> None:
        """Keep the packed weight under a name.

        Args:
            name: the parameter that held the words, which engines ask for its device.
        """
        self._name = name
        self._layer: EngineLayer | None = None

    @property
    def is_filled(self) -> bool:
        """Whether a weight has been packed."""
        return self._layer is not None

    def fill(self, module: Any, layer: EngineLayer, drop: Iterable[str] = ()) -> None:
        """Put a packed layer into a module, and free what it was packed from.

        Args:
            module: the engine's module.
            layer: the packed layer.
            drop: names of parameters that are not needed any more.

        Raises:
            InvalidValueError: if an earlier layer was of another shape, which captured graphs rely on.
        """
        kept = self._kept(layer)
        _put(module, self._name, kept.packed)
        for name in drop:
            _put(module, name, None)
        if kept.index is not None:
            module.register_buffer(INDEX, kept.index, persistent=False)

    def _kept(self, layer: EngineLayer) -> EngineLayer:
        """Return the layer, in the memory of the one before it if there is one."""
        old = self._layer
        if old is None or old.packed.device != layer.packed.device:
            self._layer = layer
            return layer
        if _facts(old) != _facts(layer):
            raise InvalidValueError(
                f"the new weight {_facts(layer)} differs from the old one {_facts(old)} in shape, order or alpha, and "
                "captured graphs hold those: restart the engine"
            )
        old.packed.copy_(layer.packed)
        if old.index is not None:
            old.index.copy_(layer.index)
        return old

    def apply(self, module: Any, x: Any, bias: Any = None) -> Any:
        """Return the product of activations and the module's weight, plus the bias.

        Args:
            module: the module that was filled.
            x: activations, fp16 or bf16 [..., k].
            bias: [n], or None.

        Raises:
            InvalidValueError: if no weight has been packed.
        """
        if self._layer is None:
            raise InvalidValueError(f"{self._name} has not been packed: call process_weights_after_loading first")
        return product(getattr(module, self._name), x, bias, self._layer.call, getattr(module, INDEX, None))


def _put(module: Any, name: str, tensor: Any) -> None:
    """Replace a parameter or buffer of a module; there is nothing to do where it has none of that name."""
    if name in dict(module.named_buffers(recurse=False)):
        module.register_buffer(name, tensor)
    elif tensor is not None:
        module.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
    elif name in dict(module.named_parameters(recurse=False)):
        module.register_parameter(name, None)


def _facts(layer: EngineLayer) -> tuple[Call, tuple[int, ...], bool]:
    return layer.call, tuple(layer.packed.shape), layer.index is not None
