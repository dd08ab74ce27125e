"""Layers of experts: vLLM's methods, which load them, with this package's kernels.

The classes are combined with vLLM's at registration. vLLM creates the parameters and loads them. What is packed from
them runs as modular experts of vLLM, which dispatches tokens to other GPUs and reduces what comes back.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from typing import Any, ClassVar

from w4a16gen.errors import InvalidValueError
from w4a16gen.integrations.engines.count import ServedCount
from w4a16gen.integrations.engines.experts import ExpertsCall
from w4a16gen.integrations.engines.experts_store import PARTS, ExpertsStore
from w4a16gen.integrations.engines.layer import WAY_OUT, RawLayer
from w4a16gen.integrations.engines.limits import (
    ExpertsRequest,
    why_experts_not_served,
    why_not_plain_experts,
    why_not_type,
)
from w4a16gen.integrations.vllm.kernel import capability
from w4a16gen.integrations.vllm.modular_experts import FUSED_MOE

COUNT = ServedCount(logging.getLogger("vllm.w4a16gen"), "expert layer")
"""Counts the layers of experts of this process."""
_GATE_OPTIONS = ("swiglu_limit", "swiglu_alpha", "swiglu_beta")
"""What kernels cannot compute, by vLLM's name."""


class ExpertsMethod:
    """Packs a layer of experts that vLLM has loaded; vLLM's method of the format is its other base."""

    names: ClassVar[tuple[str, str, str]]
    """The parameters of words, scales and zero points, behind `w13_` and `w2_`."""
    experts: ClassVar[Any]
    """The modular experts of this package, combined with vLLM's base."""
    scale_dtype: ClassVar[Any] = None
    """The dtype in which files of the format store scales; None for that of the activations."""
    serves: bool = False
    """Whether this package serves the layer."""
    _store: ExpertsStore | None = None

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: Any,
        **extra_weight_attrs: Any,
    ) -> None:
        """Decide who serves the layer, and let vLLM register the parameters.

        Args:
            layer: vLLM's module.
            num_experts: experts on this rank.
            hidden_size: length of the activations.
            intermediate_size_per_partition: rows of a gate on this rank.
            params_dtype: dtype of the activations.
            **extra_weight_attrs: holds the loader of weights.
        """
        sizes = num_experts, hidden_size, intermediate_size_per_partition
        reason = self._why_not(layer, sizes, str(params_dtype), extra_weight_attrs)
        COUNT.asked(reason)
        self.serves = reason is None
        if reason is not None:
            self.leave(layer, reason)
        else:
            COUNT.expected()
            self.experts_cls = self.experts
            self._store = self._store or ExpertsStore(self.names)
            params_dtype = self.scale_dtype or params_dtype
        inherited: Any = super()
        inherited.create_weights(layer, *sizes, params_dtype, **extra_weight_attrs)

    def leave(self, layer: Any, reason: str) -> None:
        """Leave a layer to vLLM; methods of layers that vLLM cannot serve raise.

        Args:
            layer: vLLM's module.
            reason: why this package does not serve it.
        """

    def _why_not(self, layer: Any, sizes: tuple[int, int, int], dtype: str, attributes: dict[str, Any]) -> str | None:
        """Return why a layer is left to vLLM, or None."""
        moe: Any = getattr(self, "moe")  # noqa: B009  (of vLLM's base)
        if reason := why_not_type(self.weight_type, has_zeros=self.has_zeros):
            return reason
        activation = moe.activation.value
        request = ExpertsRequest(*sizes, self.scale_group, self.has_zeros, activation, dtype, capability())
        if reason := why_experts_not_served(request):
            return reason
        if moe.moe_backend != "auto":
            return f"moe_backend is {moe.moe_backend}: leave it out to use w4a16gen"
        if reason := why_not_plain_experts((moe, layer), _GATE_OPTIONS, has_bias=moe.has_bias):
            return reason
        unpadded = attributes.get("unpadded_hidden_size")
        if unpadded not in (None, sizes[1]):
            return f"hidden size {unpadded} must not be padded, but vLLM pads it to {sizes[1]}"
        experts: Any = self.experts
        return experts.is_supported_config(experts, moe, None, None, experts.activation_format())[1]  # type: ignore[no-any-return]

    @property
    def weight_type(self) -> Any:
        """The type of the stored values, in vLLM's terms."""
        return getattr(self, "quant_type")  # noqa: B009  (of vLLM's base)

    @property
    def has_zeros(self) -> bool:
        """Whether weights have zero points."""
        raise NotImplementedError

    @property
    def scale_group(self) -> int:
        """The values of K that share a scale; -1 for all."""
        return int(getattr(self, "quant_config").group_size)  # noqa: B009  (of vLLM's base)

    def read(self, words: Any, scales: Any, points: Any) -> RawLayer:
        """Return the weight of one expert.

        Args:
            words: int32, as the format packs them.
            scales: as the format stores them.
            points: int32, as the format packs zero points; None for symmetric weights.
        """
        raise NotImplementedError

    def process_weights_after_loading(self, layer: Any) -> None:
        """Pack a layer on the GPU and free the parameters that it was packed from. It may be called again.

        Args:
            layer: vLLM's module.

        Raises:
            InvalidValueError: if the layer has biases, or cannot be packed.
        """
        if not self.serves or self._store is None:
            inherited: Any = super()
            inherited.process_weights_after_loading(layer)
            return
        self._refuse_biases(layer)
        is_first = not self._store.is_filled
        moe: Any = getattr(self, "moe")  # noqa: B009  (of vLLM's base)
        sizes = len(self._store.weights(layer)[0]), moe.hidden_dim, moe.intermediate_size_per_partition
        mode = ExpertsRequest(*sizes, self.scale_group, self.has_zeros, "", "", None).mode
        call = self._store.fill(layer, self.read, mode, has_zeros=self.has_zeros, name=layer.layer_name, drop=("bias",))
        for part, weight in zip(PARTS, self._store.weights(layer), strict=True):
            setattr(layer, f"{part}_weight", weight)  # where vLLM looks for it
        self._set_up(layer, call)
        if is_first:
            COUNT.finished()

    def _refuse_biases(self, layer: Any) -> None:
        """Raise if the checkpoint has biases that the model does not name. Some writers store zeros."""
        for name in sorted(getattr(layer, "_loaded_expert_biases", ())):
            bias = getattr(layer, name, None)
            if bias is not None and bool(bias.any()):
                raise InvalidValueError(f"{layer.layer_name}: experts with biases are not served; {WAY_OUT}")

    def _set_up(self, layer: Any, call: ExpertsCall) -> None:
        """Make vLLM's kernel of the layer."""
        this: Any = self
        modular, config = (importlib.import_module(f"{FUSED_MOE}.{name}") for name in ("modular_kernel", "config"))
        prepare = importlib.import_module(f"{FUSED_MOE}.all2all_utils").maybe_make_prepare_finalize
        this.moe_quant_config = config.FUSED_MOE_UNQUANTIZED_CONFIG
        dispatched = prepare(
            moe=this.moe,
            quant_config=this.moe_quant_config,
            routing_tables=layer._expert_routing_tables(),  # noqa: SLF001
            allow_new_interface=True,
            use_monolithic=False,
        )
        experts = self.experts(moe_config=this.moe, quant_config=this.moe_quant_config)
        experts.call = call
        this.moe_kernel = modular.FusedMoEKernel(dispatched, experts)

    def get_fused_moe_quant_config(self, layer: Any) -> Any:
        """Return how vLLM shall quantize activations: not at all, where this package serves the layer.

        Args:
            layer: vLLM's module.
        """
        if self.serves:
            return importlib.import_module(f"{FUSED_MOE}.config").FUSED_MOE_UNQUANTIZED_CONFIG
        inherited: Any = super()
        return inherited.get_fused_moe_quant_config(layer)


class ExpertsOverride:
    """The configuration of an AWQ or a compressed-tensors model; vLLM's own class is its other base."""

    experts_methods: ClassVar[Mapping[type, type]] = {}
    """This package's method of experts for each of vLLM's."""

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        """Return vLLM's method of a layer, for experts with this package's kernels.

        Args:
            layer: vLLM's module.
            prefix: the module's name.
        """
        inherited: Any = super()
        return with_experts(inherited.get_quant_method(layer, prefix), self.experts_methods)


def with_experts(method: Any, methods: Mapping[type, type]) -> Any:
    """Return this package's method in place of vLLM's method of experts, with all that vLLM's one holds.

    Args:
        method: what vLLM's configuration chose for a layer.
        methods: this package's method of experts for each of vLLM's. Others are returned as they are.
    """
    kind = methods.get(type(method))
    if kind is None:
        return method
    ours: Any = object.__new__(kind)
    vars(ours).update(vars(method))
    return ours
