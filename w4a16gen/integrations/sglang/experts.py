"""Functions around the methods of SGLang's schemes for layers of experts.

SGLang creates the parameters and loads them. Its standard dispatcher turns the numbers of experts into those of this
GPU, with -1 for experts of other GPUs. What is packed from the parameters returns the sum of each token's experts.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from w4a16gen.integrations.engines.count import ServedCount
from w4a16gen.integrations.engines.limits import why_experts_not_served, why_not_plain_experts
from w4a16gen.integrations.sglang.experts_formats import FORMATS, ExpertsFacts, ExpertsFormat
from w4a16gen.integrations.sglang.kernels import BITS, LOGGER
from w4a16gen.integrations.sglang.served_experts import ServedExperts, request_of

COUNT = ServedCount(LOGGER, "expert layer")
"""Counts the layers of experts of this process."""
_SERVED = "w4a16gen_experts"
"""Attribute of a scheme whose layer is served."""
_GATE_OPTIONS = ("swiglu_limit", "gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit")
"""What kernels cannot compute, by SGLang's name."""


def why_not_experts(layer: Any, kind: ExpertsFormat, facts: ExpertsFacts) -> str | None:
    """Return why a layer of experts is left to SGLang, or None.

    Args:
        layer: SGLang's module, with loaded parameters.
        kind: the format of its parameters.
        facts: what its scheme says.
    """
    if facts.bits != BITS:
        return f"weights of {facts.bits} bits must have {BITS}"
    if facts.reason:
        return facts.reason
    if reason := why_experts_not_served(request_of(layer, facts)):
        return reason
    config = layer.moe_runner_config
    if reason := why_not_plain_experts((config,), _GATE_OPTIONS, has_bias=layer.with_bias):
        return reason
    if not config.is_gated or config.no_combine:
        return f"experts {'whose results are not added' if config.is_gated else 'without gates'} are not served"
    if config.apply_router_weight_on_input and config.top_k != 1:
        return f"weights on the input of {config.top_k} experts for each token must be of 1"
    return _why_not_settings(layer, kind)


def _why_not_settings(layer: Any, kind: ExpertsFormat) -> str | None:
    """Return which setting of SGLang leaves experts to it, or None."""
    method = type(layer.quant_method).__name__
    if method != kind.method:
        return f"experts under {method} are not served: it moves or wraps their weights"
    utils, context = (importlib.import_module(f"sglang.srt.{name}") for name in ("layers.moe.utils", "runtime_context"))
    for option, backend in (
        ("--moe-runner-backend", utils.get_moe_runner_backend()),
        ("--moe-a2a-backend", utils.get_moe_a2a_backend()),
    ):
        if backend.value not in ("auto", "none"):
            return f"{option} is {backend.value}: leave it out to use w4a16gen"
    lora = context.get_lora()
    return "experts with LoRA are not served" if lora.enable_lora or lora.lora_paths else None


def around_create(original: Callable[..., Any], scheme: Any, *args: Any, **options: Any) -> Any:
    """Expect the weights of a layer.

    Args:
        original: SGLang's method.
        scheme: the scheme of the layer.
        *args: the method's arguments.
        **options: the method's arguments by name.
    """
    result = original(scheme, *args, **options)
    if type(scheme).__name__ in FORMATS:
        COUNT.expected()
    return result


def around_process(original: Callable[..., Any], scheme: Any, layer: Any) -> None:
    """Pack a layer's weights on their device, or let SGLang process them. It may be called again.

    Args:
        original: SGLang's method.
        scheme: the scheme of the layer.
        layer: SGLang's module.

    Raises:
        InvalidValueError: if the weights cannot be packed.
    """
    kind = FORMATS.get(type(scheme).__name__)
    if kind is None:  # a class of SGLang for another device inherits the method
        original(scheme, layer)
        return
    facts, served = kind.facts(scheme), getattr(scheme, _SERVED, None)
    if served is not None:
        served.fill(layer, facts)
        return
    reason = why_not_experts(layer, kind, facts)
    COUNT.asked(reason)
    if reason is None:
        served = ServedExperts(kind)
        served.fill(layer, facts)
        setattr(scheme, _SERVED, served)
    else:
        original(scheme, layer)
    COUNT.finished(is_served=reason is None)


def around_restore(original: Callable[..., Any], scheme: Any, layer: Any) -> None:
    """Let SGLang load a layer's weights again.

    Args:
        original: SGLang's method.
        scheme: the scheme of the layer.
        layer: SGLang's module.
    """
    served = getattr(scheme, _SERVED, None)
    if served is None:
        original(scheme, layer)
    else:
        served.restore(layer)


def around_apply(original: Callable[..., Any], scheme: Any, layer: Any, dispatch_output: Any) -> Any:
    """Return the sum of each token's experts.

    Args:
        original: SGLang's method.
        scheme: the scheme of the layer.
        layer: SGLang's module.
        dispatch_output: what SGLang's standard dispatcher returns: activations and routes.

    Raises:
        UnsupportedProblemError: if the routes have another form.
    """
    served = getattr(scheme, _SERVED, None)
    return original(scheme, layer, dispatch_output) if served is None else served.apply(layer, dispatch_output)
