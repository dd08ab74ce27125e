"""AutoRound's packings: those of GPTQ and AWQ, under its own names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from w4a16gen.errors import InvalidValueError
from w4a16gen.weights.importers import awq, gptq
from w4a16gen.weights.importers.config import flag, text
from w4a16gen.weights.importers.gptq import ZeroPointRules
from w4a16gen.weights.importers.mapped import shown_name
from w4a16gen.weights.importers.stored import StoredLayer
from w4a16gen.weights.importers.tensors import Tensors

_VERSION_1, _VERSION_2 = {"auto_round:auto_gptq", "auto_gptq"}, {"auto_round", "auto_round:gptqmodel", "gptqmodel"}
_AWQ = {"auto_round:auto_awq", "auto_awq"}


def stored_layers(tensors: Tensors, config: dict[str, Any]) -> dict[str, Callable[[], StoredLayer]]:
    """Return what makes each layer of an AutoRound checkpoint, by the layer's name.

    Raises:
        InvalidValueError: if its packing is another one.
    """
    packing = text(config, "packing_format", "auto_round:auto_gptq")
    if packing in _AWQ:
        return awq.stored_layers(tensors, {**config, "version": "gemm"})
    if packing not in _VERSION_1 | _VERSION_2:
        raise InvalidValueError(
            f"AutoRound's packing_format {shown_name(packing)} holds no 4-bit integers of GPTQ or AWQ: "
            "export the model as auto_gptq or auto_awq"
        )
    version = 1 if packing in _VERSION_1 else 2
    symmetric = flag(config, "sym", default=True)
    return gptq.stored_layers(tensors, ZeroPointRules(version, symmetric=symmetric, clamped=version == 1))
