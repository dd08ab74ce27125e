"""GPTQ models that vLLM's own configuration refuses: act-order with groups, zero points, any group size, any ranks.

The classes are combined with vLLM's at registration. What vLLM serves itself goes to vLLM's configuration, and from
there to the list of kernels.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from w4a16gen.errors import UnsupportedProblemError
from w4a16gen.integrations.engines.layer import RawLayer, pack_layer
from w4a16gen.integrations.engines.limits import LayerRequest, why_not_served
from w4a16gen.integrations.engines.order import plan_act_order, plan_order
from w4a16gen.integrations.engines.parameters import matrix_of, values_of
from w4a16gen.integrations.engines.store import LayerStore
from w4a16gen.integrations.engines.words import PER_WORD, gptq_zero_points, zero_point_rules
from w4a16gen.integrations.vllm.experts import with_experts
from w4a16gen.integrations.vllm.kernel import COUNT, capability

BITS = 4
VLLM_GROUP_SIZES = (-1, 32, 64, 128)
"""The group sizes that vLLM's own GPTQ method takes."""
_SKIPPED = "-:"
"""Begins a dynamic rule that leaves layers dense."""


class ConfigOverride:
    """The configuration of a GPTQ model; vLLM's own class is its other base."""

    linear_method: ClassVar[Any]
    """The method of layers that vLLM refuses."""
    experts_methods: ClassVar[Mapping[type, type]] = {}
    """This package's method of experts for each of vLLM's."""

    def __init__(
        self,
        weight_bits: int,
        group_size: int,
        desc_act: bool,
        is_sym: bool,
        lm_head_quantized: bool,
        dynamic: dict[str, dict[str, Any]],
        full_config: dict[str, Any],
        modules_in_block_to_quantize: list[str] | None = None,
    ) -> None:
        """Take the values of a model's configuration; vLLM's class checks all but those that it would refuse.

        Args:
            weight_bits: bits of a weight.
            group_size: values of K that share a scale, or -1.
            desc_act: whether the values of K are ordered by activation.
            is_sym: whether all zero points are 8.
            lm_head_quantized: whether the last layer is quantized.
            dynamic: rules for layers whose names match.
            full_config: the whole configuration.
            modules_in_block_to_quantize: the layers that are quantized.
        """
        inherited: Any = super()
        ours = weight_bits == BITS
        inherited.__init__(
            weight_bits,
            group_size,
            desc_act and not ours,
            is_sym or ours,
            lm_head_quantized,
            _without_order(dynamic) if ours else dynamic,
            full_config,
            modules_in_block_to_quantize,
        )
        if not ours:
            return
        scalar_types = importlib.import_module("vllm.scalar_type").scalar_types
        self.TYPE_MAP = {**getattr(self, "TYPE_MAP", {}), (BITS, False): scalar_types.uint4}
        self.group_size, self.dynamic = group_size, dynamic
        self.desc_act = desc_act and group_size != -1
        self.is_sym = is_sym
        self.quant_type = self.TYPE_MAP[weight_bits, is_sym]

    @property
    def keeps_order(self) -> bool:
        """Whether any layer has act-order with groups, so that files hold a `g_idx` that matters."""
        rules = [rule for name, rule in self.dynamic.items() if not name.startswith(_SKIPPED)]
        orders = [isinstance(rule, Mapping) and rule.get("desc_act", False) for rule in rules]
        return self.desc_act or any(orders)

    def get_checkpoint_weight_mapper(self) -> Any:
        """Return vLLM's mapping of tensor names, which drops every `g_idx`, or one that keeps them if they matter."""
        if not self.keeps_order:
            inherited: Any = super()
            return inherited.get_checkpoint_weight_mapper()
        return importlib.import_module("vllm.model_executor.models.utils").WeightsMapper()

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        """Return the method of a layer: this package's where vLLM has none, else what vLLM chooses.

        Args:
            layer: vLLM's module.
            prefix: the module's name.

        Raises:
            UnsupportedProblemError: if neither serves the layer.
        """
        inherited: Any = super()
        experts = importlib.import_module("vllm.model_executor.layers.fused_moe").RoutedExperts
        if isinstance(layer, experts):
            if self.keeps_order:
                raise UnsupportedProblemError(
                    f"{prefix}: neither vLLM nor w4a16gen serves experts of models with act-order: quantize them with "
                    "desc_act=False"
                )
            return with_experts(inherited.get_quant_method(layer, prefix), self.experts_methods)
        rules = importlib.import_module(f"{_QUANTIZATION}.utils.gptq_utils")
        method = rules.get_linear_quant_method(self, layer, prefix, _Candidate)
        if not isinstance(method, _Candidate):
            return method
        if not self.keeps_order and not method.is_refused_by_vllm(layer):
            return inherited.get_quant_method(layer, prefix)
        return self.linear_method(method.config, prefix)


_QUANTIZATION = "vllm.model_executor.layers.quantization"


def _without_order(dynamic: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return dynamic rules that vLLM's class does not refuse because of act-order."""
    return {name: {**rule, "desc_act": False} if isinstance(rule, Mapping) else rule for name, rule in dynamic.items()}


class _Candidate:
    """Stands for a layer that is quantized, with the configuration that the dynamic rules leave it."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def is_refused_by_vllm(self, layer: Any) -> bool:
        """Return whether vLLM's own method cannot load a layer."""
        config = self.config
        if config.weight_bits != BITS:
            return False
        group = config.group_size
        k = getattr(layer, "input_size_per_partition", None) or layer.input_size
        straddles = group not in (-1, layer.input_size) and k % group != 0
        return not config.is_sym or group not in VLLM_GROUP_SIZES or straddles


class LinearMethod:
    """Loads and runs a layer of a GPTQ model; vLLM's `LinearMethodBase` is its other base."""

    input_dtype: Any = None
    """vLLM sets this on every GPTQ method."""

    def __init__(self, config: Any, prefix: str) -> None:
        """Take a layer's configuration.

        Args:
            config: the configuration after the dynamic rules.
            prefix: the layer's name.
        """
        self.quant_config = config
        self._name = prefix
        self._store = LayerStore("qweight")
        self._k = self._input_size = self._group = self._n = self._parts = 0
        self._orders: set[bool] = set()
        """Whether orders of K were loaded since the last packing, by whether it was on the meta device."""

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: Any,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the parameters that the checkpoint's tensors are loaded into.

        Args:
            layer: vLLM's module.
            input_size_per_partition: reduction length on this rank.
            output_partition_sizes: output channels of each fused part on this rank.
            input_size: reduction length of the whole layer.
            output_size: output channels of the whole layer.
            params_dtype: dtype of the activations.
            **extra_weight_attrs: holds the loader of weights.

        Raises:
            UnsupportedProblemError: if the layer is not served; vLLM does not serve it either.
        """
        del output_size
        config = self.quant_config
        self._k, self._n, self._input_size = input_size_per_partition, sum(output_partition_sizes), input_size
        self._parts = len(output_partition_sizes)
        self._group = input_size if config.group_size == -1 else config.group_size
        reason = self._why_not(str(params_dtype))
        COUNT.asked(reason)
        if reason is not None:
            raise UnsupportedProblemError(
                f"{self._name}: vLLM has no kernel for this GPTQ layer (desc_act={config.desc_act}, "
                f"sym={config.is_sym}, group size {config.group_size}), and w4a16gen does not serve it: {reason}"
            )
        COUNT.expected()
        self._register(layer, extra_weight_attrs.get("weight_loader"))

    def _why_not(self, dtype: str) -> str | None:
        config = self.quant_config
        if config.weight_bits != BITS:
            return f"weights of {config.weight_bits} bits in a model with act-order must have {BITS} bits"
        if self._input_size % self._group != 0:
            return f"group size {self._group} must divide k = {self._input_size}"
        group = -1 if self._group == self._input_size else self._group
        request = LayerRequest(self._n, self._k, group, not config.is_sym, dtype, capability(), regroups=True)
        return why_not_served(request)

    @property
    def _repeats_scales(self) -> bool:
        """Whether every rank holds all scales, because its groups are not a run of whole ones."""
        is_row_parallel = self._k != self._input_size
        return is_row_parallel and (self.quant_config.desc_act or self._k % self._group != 0)

    def _register(self, layer: Any, loader: Any) -> None:
        parameters = importlib.import_module("vllm.model_executor.parameter")
        rows = (self._input_size if self._repeats_scales else self._k) // self._group
        packing = {"packed_factor": PER_WORD, "weight_loader": loader}
        words = torch.empty(self._k // PER_WORD, self._n, dtype=torch.int32)
        points = torch.empty(rows, self._n // PER_WORD, dtype=torch.int32)
        scales = torch.empty(rows, self._n, dtype=torch.float16)  # as GPTQ stores them: bf16 would lose bits
        layer.register_parameter(
            "qweight",
            parameters.PackedvLLMParameter(data=words, input_dim=0, output_dim=1, packed_dim=0, **packing),
        )
        if self._repeats_scales:
            scale = parameters.ChannelQuantScaleParameter(data=scales, output_dim=1, weight_loader=loader)
            zero = parameters.PackedColumnParameter(data=points, output_dim=1, packed_dim=1, **packing)
        else:
            scale = parameters.GroupQuantScaleParameter(data=scales, input_dim=0, output_dim=1, weight_loader=loader)
            zero = parameters.PackedvLLMParameter(data=points, input_dim=0, output_dim=1, packed_dim=1, **packing)
        layer.register_parameter("scales", scale)
        layer.register_parameter("qzeros", zero)
        if self.quant_config.keeps_order:
            index = torch.empty(self._k, dtype=torch.int32)
            order = parameters.RowvLLMParameter(data=index, input_dim=0, weight_loader=self._loader_of_order(loader))
            layer.register_parameter("g_idx", order)

    def _loader_of_order(self, loader: Any) -> Any:
        """Return a loader that loads the order of K of a fused layer's first part, and compares those of the others.

        vLLM counts what is copied to know when a layer is complete, so the others are not copied. It may load twice,
        first to the meta device to count.
        """

        @functools.wraps(loader)
        def load(param: Any, loaded_weight: Any, *args: Any, **options: Any) -> Any:
            if self._parts == 1 or param.is_meta not in self._orders:
                self._orders.add(param.is_meta)
                return loader(param, loaded_weight, *args, **options)
            if not param.is_meta and not torch.equal(param.data, loaded_weight.to(param.device, param.dtype)):
                raise UnsupportedProblemError(
                    f"{self._name}: the parts of this fused layer have different g_idx, so they cannot share "
                    "activations: quantize them together"
                )
            return None

        return load

    def process_weights_after_loading(self, layer: Any) -> None:
        """Pack a layer's weight on the GPU and free the parameters that it was packed from. It may be called again.

        Args:
            layer: vLLM's module.

        Raises:
            InvalidValueError: if the weight cannot be packed.
        """
        config, words = self.quant_config, layer.qweight
        points = None
        if not config.is_sym:
            points = gptq_zero_points(matrix_of("qzeros", layer.qzeros), **zero_point_rules(config.full_config))
        raw = RawLayer(values_of("qweight", words, self._k), matrix_of("scales", layer.scales), points)
        packed = pack_layer(raw, self._order(layer), name=self._name)
        is_first = not self._store.is_filled
        self._store.fill(layer, packed, ("scales", "qzeros", "g_idx"))
        self._orders.clear()
        if is_first:
            COUNT.finished()

    def _order(self, layer: Any) -> Any:
        """Return the order of K on this rank."""
        words = layer.qweight
        if self.quant_config.desc_act:
            return plan_act_order(layer.g_idx.data, self._group)
        start = getattr(words, "tp_rank", 0) * self._k if self._repeats_scales else 0
        group = min(self._group, self._k) if not self._repeats_scales else self._group
        return plan_order(self._k, group, start=start, device=words.device)

    def apply(self, layer: Any, x: Any, bias: Any = None) -> Any:
        """Return the product of activations and a layer's weight, plus the bias.

        Args:
            layer: vLLM's module.
            x: activations, fp16 or bf16 [..., k].
            bias: [n], or None.
        """
        return self._store.apply(layer, x, bias)
