"""A layer of experts of SGLang that this package serves: packed, called, and made ready to be loaded again."""

from __future__ import annotations

import importlib
import math
from typing import Any, NamedTuple

import torch

from w4a16gen.errors import UnsupportedProblemError
from w4a16gen.integrations.engines.experts import ExpertsCall, traced_sum_of_experts
from w4a16gen.integrations.engines.experts_store import PARTS, ExpertsStore
from w4a16gen.integrations.engines.layer import WAY_OUT
from w4a16gen.integrations.engines.limits import ExpertsRequest
from w4a16gen.integrations.sglang.experts_formats import ExpertsFacts, ExpertsFormat
from w4a16gen.integrations.sglang.kernels import capability_of


class _Blank(NamedTuple):
    """A parameter as SGLang created it, without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    attributes: dict[str, Any]

    def made(self, packed: Any) -> Any:
        """Return a parameter, in the memory of what was packed from it if that is large enough, else beside it."""
        size = math.prod(self.shape) * self.dtype.itemsize
        if packed.nbytes < size:
            memory = torch.empty(self.shape, dtype=self.dtype, device=packed.device)
        else:
            memory = packed.flatten()[:size].view(self.dtype).view(self.shape)
        parameter = torch.nn.Parameter(memory, requires_grad=False)
        vars(parameter).update(self.attributes)
        return parameter


class ServedExperts:
    """A layer of experts that is served."""

    def __init__(self, kind: ExpertsFormat) -> None:
        """Keep the format.

        Args:
            kind: the format of the layer's parameters.
        """
        self._store = ExpertsStore(kind.names)
        self._kind = kind
        self._blanks: dict[str, _Blank] = {}
        self._call: ExpertsCall
        self._combine = importlib.import_module("sglang.srt.layers.moe.token_dispatcher").StandardCombineInput

    def fill(self, layer: Any, facts: ExpertsFacts) -> None:
        """Pack a layer that SGLang has loaded; there is nothing to do if it is packed already.

        Args:
            layer: SGLang's module.
            facts: what its scheme says.

        Raises:
            InvalidValueError: if the weights cannot be packed.
        """
        words = self._store.weights(layer)[0]
        if words.dtype == torch.uint8:
            return
        parameters = {name: parameter for name, parameter in layer.named_parameters(recurse=False) if _is_part(name)}
        self._blanks = {
            name: _Blank(tuple(parameter.shape), parameter.dtype, dict(vars(parameter)))
            for name, parameter in parameters.items()
        }
        request = request_of(layer, facts)
        kept = {f"{part}_{self._kind.names[0]}" for part in PARTS}
        drop = {name.split("_", 1)[1] for name in parameters if name not in kept}
        self._call = self._store.fill(
            layer,
            self._kind.reader(facts),
            request.mode,
            has_zeros=facts.has_zeros,
            name=layer.layer_name,
            drop=sorted(drop),
        )

    def restore(self, layer: Any) -> None:
        """Register parameters as SGLang created them, before it loads others.

        A whole model is restored before it is loaded, so words go to the memory of the packed weight, which is packed
        from them again. Only scales take more.

        Args:
            layer: SGLang's module.
        """
        weights = self._store.weights(layer)
        if weights[0].dtype != torch.uint8:
            return
        for part, packed in zip(PARTS, weights, strict=True):
            beside = packed.data[:0]
            words = f"{part}_{self._kind.names[0]}"
            for name, blank in self._blanks.items():
                if name.startswith(f"{part}_"):
                    layer.register_parameter(name, blank.made(packed.data if name == words else beside))

    def apply(self, layer: Any, dispatched: Any) -> Any:
        """Return the sum of each token's experts, as SGLang combines it with that of other GPUs.

        Args:
            layer: SGLang's module.
            dispatched: what SGLang's standard dispatcher returns: activations and routes.

        Raises:
            UnsupportedProblemError: if the routes have another form.
        """
        config, routes = layer.moe_runner_config, dispatched.topk_output
        if not hasattr(routes, "topk_ids"):
            raise UnsupportedProblemError(
                f"{layer.layer_name}: routes of type {type(routes).__name__} are not served, only SGLang's standard "
                f"ones; {WAY_OUT}"
            )
        x, weights = dispatched.hidden_states, routes.topk_weights
        if config.apply_router_weight_on_input:  # of one expert for each token
            x, weights = x * weights.to(x.dtype), torch.ones_like(weights)
        if config.routed_scaling_factor is not None:
            weights = weights.float() * config.routed_scaling_factor
        packed = self._store.weights(layer)
        result = traced_sum_of_experts(x, packed, self._call, routes.topk_ids, weights, activation=config.activation)
        return self._combine(hidden_states=result)


def _is_part(name: str) -> bool:
    return name.startswith(tuple(f"{part}_" for part in PARTS))


def request_of(layer: Any, facts: ExpertsFacts) -> ExpertsRequest:
    """Return a layer of SGLang as plug-ins of engines describe it.

    Args:
        layer: SGLang's module.
        facts: what its scheme says.
    """
    config, device = layer.moe_runner_config, next(layer.parameters()).device
    return ExpertsRequest(
        config.num_local_experts,
        config.hidden_size,
        config.intermediate_size_per_partition,
        facts.group_size,
        facts.has_zeros,
        config.activation,
        str(config.params_dtype),
        capability_of(device),
    )
