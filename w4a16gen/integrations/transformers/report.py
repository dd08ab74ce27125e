"""What was loaded: which layers have 4 bits, and which stay dense and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from w4a16gen.integrations.torch.packed_module import PackedModule
from w4a16gen.integrations.torch.replace import Replacement
from w4a16gen.integrations.transformers.experts import PlacedExperts

_TIED = "its weight is that of the embedding"


@dataclass(frozen=True)
class LoadReport:
    """What `from_pretrained` loaded. It is the attribute `w4a16gen_report` of the model.

    Attributes:
        served: names of the modules that are W4A16Linear.
        dense: names of the linear modules that are not, with the reason.
        unused: names of the checkpoint's layers and tensors that the model does not have.
        packed_bytes: bytes of all 4-bit layers.
        dense_bytes: bytes of all other parameters.
        experts: names of the modules that are W4A16Experts.
        dense_experts: names of the modules of experts that are not, with the reason.
    """

    served: tuple[str, ...]
    dense: Mapping[str, str]
    unused: tuple[str, ...]
    packed_bytes: int
    dense_bytes: int
    experts: tuple[str, ...] = ()
    dense_experts: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        text = f"w4a16gen serves {len(self.served)} of {len(self.served) + len(self.dense)} linear layers"
        layers = len(self.experts) + len(self.dense_experts)
        return f"{text} and the experts of {len(self.experts)} of {layers} layers" if layers else text


def report_of(model: Any, replacement: Replacement, experts: PlacedExperts, unused: tuple[str, ...]) -> LoadReport:
    """Return the report of a loaded model.

    Args:
        model: the model.
        replacement: which linear layers were replaced.
        experts: which modules of experts were replaced.
        unused: names of what the model does not have.
    """
    dense = {**replacement.dense, **replacement.dequantized}
    embedding = model.get_input_embeddings().weight
    for name in dense:
        if model.get_submodule(name).weight is embedding:
            dense[name] = _TIED
    packed = [module for module in model.modules() if isinstance(module, PackedModule)]
    return LoadReport(
        served=replacement.replaced,
        dense=dense,
        unused=unused,
        packed_bytes=sum(tensor.nbytes for module in packed for tensor in module.buffers()),
        dense_bytes=sum(parameter.nbytes for parameter in model.parameters()),
        experts=experts.served,
        dense_experts=experts.dense,
    )
