"""vLLM's own methods: they register parameters as checkpoints store them, and hand them to the chosen kernel."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fakes.checkpoints import packers
from fakes.vllm_package import kernels, parameters
from fakes.vllm_package.layers import LinearMethodBase


class _Method(LinearMethodBase):
    """A method whose kernel comes from the list."""

    names: tuple[str, str, str]

    def __init__(self, config: Any) -> None:
        self.quant_config = config
        self.kernel: Any = None

    def choose(self, options: dict[str, Any], *, zero_points: bool, weight_type: Any) -> tuple[int, int, int]:
        """Choose the kernel, and return k, n and the rows of scales on this rank."""
        k, n = options["input_size_per_partition"], sum(options["output_partition_sizes"])
        group = self.quant_config.group_size
        config = kernels.MPLinearLayerConfig(
            full_weight_shape=(options["input_size"], options["output_size"]),
            partition_weight_shape=(k, n),
            weight_type=weight_type,
            act_type=options["params_dtype"],
            group_size=group,
            zero_points=zero_points,
        )
        q, s, zp = self.names
        kernel = kernels.choose_mp_linear_kernel(config)
        self.kernel = self.kernel or kernel(config, w_q_param_name=q, w_s_param_name=s, w_zp_param_name=zp)
        return k, n, 1 if group == -1 else k // group

    def process_weights_after_loading(self, layer: Any) -> None:
        self.kernel.process_weights_after_loading(layer)

    def apply(self, layer: Any, x: Any, bias: Any = None) -> Any:
        return self.kernel.apply_weights(layer, x, bias)


def scale_parameters(group: int, *, repeated: bool, scales: dict[str, Any], zeros: dict[str, Any]) -> tuple[Any, Any]:
    """Return the parameters of scales and zero points, repeated on all ranks or divided among them."""
    del group
    if repeated:
        scales.pop("input_dim")
        zeros.pop("input_dim")
        return parameters.ChannelQuantScaleParameter(**scales), parameters.PackedColumnParameter(**zeros)
    return parameters.GroupQuantScaleParameter(**scales), parameters.PackedvLLMParameter(**zeros)


class AutoGPTQLinearMethod(_Method):
    """GPTQ, symmetric."""

    names = ("qweight", "scales", "qzeros")

    def create_weights(self, layer: Any, *args: Any, **options: Any) -> None:
        assert not args
        assert self.quant_config.is_sym
        k, n, rows = self.choose(options, zero_points=False, weight_type=kernels.scalar_types.uint4b8)
        loader = {"weight_loader": options["weight_loader"]}
        words = torch.empty(k // 8, n, dtype=torch.int32)
        repeated = self.quant_config.group_size == -1 and k != options["input_size"]
        scales, zeros = scale_parameters(
            self.quant_config.group_size,
            repeated=repeated,
            scales={"data": torch.empty(rows, n, dtype=options["params_dtype"]), "input_dim": 0, "output_dim": 1}
            | loader,
            zeros={"data": torch.empty(rows, n // 8, dtype=torch.int32), "input_dim": 0, "output_dim": 1}
            | {"packed_dim": 1, "packed_factor": 8}
            | loader,
        )
        layer.register_parameter(
            "qweight",
            parameters.PackedvLLMParameter(
                data=words, input_dim=0, output_dim=1, packed_dim=0, packed_factor=8, **loader
            ),
        )
        layer.register_parameter("scales", scales)
        layer.register_parameter("qzeros", zeros)


class AutoAWQMarlinLinearMethod(_Method):
    """AWQ, loaded in its own order and handed on in the plain one."""

    names = ("qweight", "scales", "qzeros")

    def create_weights(self, layer: Any, *args: Any, **options: Any) -> None:
        assert not args
        k, n, rows = self.choose(options, zero_points=True, weight_type=kernels.scalar_types.uint4)
        more = {"weight_loader": options["weight_loader"], "input_dim": 0, "output_dim": 1}
        packed = {"packed_dim": 1, "packed_factor": 8}
        words = torch.empty(k, n // 8, dtype=torch.int32)
        points = torch.empty(rows, n // 8, dtype=torch.int32)
        scales = torch.empty(rows, n, dtype=options["params_dtype"])
        layer.register_parameter("qweight", parameters.PackedvLLMParameter(data=words, **more, **packed))
        layer.register_parameter("qzeros", parameters.PackedvLLMParameter(data=points, **more, **packed))
        layer.register_parameter("scales", parameters.GroupQuantScaleParameter(data=scales, **more))

    def process_weights_after_loading(self, layer: Any) -> None:
        q, points = (awq_values(getattr(layer, name)) for name in ("qweight", "qzeros"))
        plain: dict[str, Any] = {"packed_factor": 8, "weight_loader": None, "packed_dim": 0}
        device = layer.qweight.device
        words = torch.from_numpy(packers.along_rows(q)).to(device)
        layer.qweight = parameters.PackedvLLMParameter(data=words, input_dim=0, output_dim=1, **plain)
        words = torch.from_numpy(packers.along_rows(points.T)).to(device)
        layer.qzeros = parameters.PackedvLLMParameter(data=words, input_dim=1, output_dim=0, **plain)
        super().process_weights_after_loading(layer)


def awq_values(words: Any) -> Any:
    """Return the values of AWQ's words, [rows, n]."""
    unsigned = words.data.cpu().numpy().view(np.uint32)
    values = np.zeros((*unsigned.shape, 8), np.uint8)
    for place, column in enumerate(packers.AWQ_ORDER):
        values[..., column] = (unsigned >> np.uint32(4 * place)) & 15
    return values.reshape(len(unsigned), -1)


class CompressedTensorsLinearMethod(_Method):
    """compressed-tensors, with the output first."""

    names = ("weight_packed", "weight_scale", "weight_zero_point")

    def create_weights(self, layer: Any, *args: Any, **options: Any) -> None:
        assert not args
        symmetric = self.quant_config.is_sym
        kind = kernels.scalar_types.uint4b8 if symmetric else kernels.scalar_types.uint4
        k, n, rows = self.choose(options, zero_points=not symmetric, weight_type=kind)
        more = {"weight_loader": options["weight_loader"], "input_dim": 1, "output_dim": 0}
        words = torch.empty(n, k // 8, dtype=torch.int32)
        repeated = self.quant_config.group_size == -1 and k != options["input_size"]
        scale, zero = scale_parameters(
            self.quant_config.group_size,
            repeated=repeated,
            scales={"data": torch.empty(n, rows, dtype=options["params_dtype"])} | more,
            zeros={"data": torch.zeros(n // 8, rows, dtype=torch.int32), "packed_dim": 0, "packed_factor": 8} | more,
        )
        layer.register_parameter(
            "weight_packed", parameters.PackedvLLMParameter(data=words, packed_dim=1, packed_factor=8, **more)
        )
        layer.register_parameter("weight_scale", scale)
        if not symmetric:
            layer.register_parameter("weight_zero_point", zero)
