"""Layers of experts of GPTQ, AWQ and compressed-tensors, as SGLang's schemes of these formats load them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from w4a16gen.integrations.engines.experts import awq_expert, gptq_expert
from w4a16gen.integrations.engines.layer import RawLayer
from w4a16gen.integrations.torch.nibbles import PER_WORD

_ORDERED = "experts of models with act-order are not served: quantize them without it"
_ZEROS = "zero points of compressed-tensors experts are not served: SGLang loads them without transposing them"
Reader = Callable[[Any, Any, Any], RawLayer]
"""Returns the weight of one expert from its words, scales and zero points."""


class ExpertsFacts(NamedTuple):
    """What a scheme of SGLang says about the experts of a layer."""

    bits: int
    group_size: int
    """The values of K that share a scale; -1 for all."""
    has_zeros: bool
    reason: str = ""
    """Why the format's experts are not served; empty if they are."""


class ExpertsFormat(NamedTuple):
    """How SGLang loads the experts of a format."""

    method: str
    """SGLang's method of a layer whose parameters nobody else moves."""
    names: tuple[str, str, str]
    """The parameters of words, scales and zero points, behind `w13_` and `w2_`."""
    facts: Callable[[Any], ExpertsFacts]
    """Reads a scheme."""
    reader: Callable[[ExpertsFacts], Reader]


def _gptq_facts(scheme: Any) -> ExpertsFacts:
    config = scheme.quant_config
    return ExpertsFacts(config.weight_bits, config.group_size, False, _ORDERED if config.desc_act else "")


def _awq_facts(scheme: Any) -> ExpertsFacts:
    config = scheme.quant_config
    return ExpertsFacts(config.weight_bits, config.group_size, True)


def _compressed_facts(scheme: Any) -> ExpertsFacts:
    order = getattr(scheme.actorder, "value", scheme.actorder)
    reason = _ORDERED if order in ("group", "dynamic") else "" if scheme.sym else _ZEROS
    return ExpertsFacts(scheme.num_bits, scheme.group_size, not scheme.sym, reason)


def _gptq_reader(facts: ExpertsFacts) -> Reader:
    def read(words: Any, scales: Any, points: Any) -> RawLayer:
        """Return an expert of int32 [k / 8, n] and floats [groups or more, n].

        With tensor parallelism SGLang makes room for the scales of all ranks, and loads this rank's first.
        """
        groups = 1 if facts.group_size == -1 else len(words) * PER_WORD // facts.group_size
        return gptq_expert(words, scales[:groups], points)

    return read


def _awq_reader(facts: ExpertsFacts) -> Reader:
    del facts
    return awq_expert


FORMATS = {
    "GPTQMarlinMoEScheme": ExpertsFormat(
        "GPTQMarlinMoEMethod", ("qweight", "scales", "qzeros"), _gptq_facts, _gptq_reader
    ),
    "AWQMoEScheme": ExpertsFormat("AWQMoEMethod", ("qweight", "scales", "qzeros"), _awq_facts, _awq_reader),
    "CompressedTensorsWNA16MoE": ExpertsFormat(
        "CompressedTensorsFusedMoEMethod",
        ("weight_packed", "weight_scale", "weight_zero_point"),
        _compressed_facts,
        _gptq_reader,
    ),
}
"""By the class of SGLang's scheme."""
