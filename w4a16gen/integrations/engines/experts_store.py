"""Where an engine's layer of experts keeps its packed weights, for vLLM and SGLang."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from w4a16gen.integrations.engines.experts import ExpertsCall, pack_projection
from w4a16gen.integrations.engines.layer import RawLayer
from w4a16gen.integrations.engines.store import LayerStore
from w4a16gen.kernels.config import QuantMode

GATE_UP, DOWN = PARTS = ("w13", "w2")
"""What the engines' names of parameters begin with."""


class ExpertsStore:
    """Packs the parameters of a layer of experts, and puts what is packed in the place of the words."""

    def __init__(self, names: tuple[str, str, str]) -> None:
        """Keep the names of a format.

        Args:
            names: the parameters of words, scales and zero points, behind `w13_` and `w2_`.
        """
        self._names = names
        self._stores = {part: LayerStore(f"{part}_{names[0]}") for part in PARTS}

    @property
    def is_filled(self) -> bool:
        """Whether a layer has been packed."""
        return self._stores[DOWN].is_filled

    def weights(self, module: Any) -> tuple[Any, Any]:
        """Return the words of a module's parameters, packed if it was filled: gate and up, and down.

        Args:
            module: the engine's module.
        """
        return getattr(module, f"{GATE_UP}_{self._names[0]}"), getattr(module, f"{DOWN}_{self._names[0]}")

    def fill(
        self,
        module: Any,
        read: Callable[[Any, Any, Any], RawLayer],
        mode: QuantMode,
        *,
        has_zeros: bool,
        name: str,
        drop: Iterable[str] = (),
    ) -> ExpertsCall:
        """Pack a module's experts on their device, and free what they were packed from.

        Args:
            module: the engine's module, with the parameters of the format.
            read: returns the weight of one expert from its words, scales and zero points.
            mode: the mode of both projections.
            has_zeros: whether the module has zero points; else `read` gets None.
            name: what messages call the module.
            drop: other parameters that are not needed any more, behind `w13_` and `w2_`.

        Raises:
            InvalidValueError: if an expert cannot be packed, or an earlier layer was of another shape.
        """
        calls = []
        for part, store in self._stores.items():
            words, scales = (getattr(module, f"{part}_{each}").data for each in self._names[:2])
            points = getattr(module, f"{part}_{self._names[2]}").data if has_zeros else None

            def expert(index: int, words: Any = words, scales: Any = scales, points: Any = points) -> RawLayer:
                return read(words[index], scales[index], None if points is None else points[index])

            called = f"{part} of {name}"
            packed = pack_projection(expert, len(words), mode, gated=part == GATE_UP, name=called)
            store.fill(module, packed, [f"{part}_{each}" for each in (*self._names[1:], *drop)])
            calls.append(packed.call)
        return ExpertsCall(*calls)
