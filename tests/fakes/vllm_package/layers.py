"""Linear layers, which own the parameters of their method, and load a rank's share of a checkpoint."""

from __future__ import annotations

from typing import Any

import torch

from fakes.vllm_package.parameters import World

WEIGHT_LOADER_V2_SUPPORTED = ["AutoGPTQLinearMethod", "AutoAWQMarlinLinearMethod", "CompressedTensorsLinearMethod"]


def register_weight_loader_v2_supported_method(cls: Any) -> Any:
    """Let layers use parameters' own loaders with a method."""
    WEIGHT_LOADER_V2_SUPPORTED.append(cls.__name__)
    return cls


class LinearMethodBase:
    """The base of methods."""

    def create_weights(self, layer: Any, *args: Any, **options: Any) -> None:
        raise NotImplementedError

    def apply(self, layer: Any, x: Any, bias: Any = None) -> Any:
        raise NotImplementedError


class UnquantizedLinearMethod(LinearMethodBase):
    """A dense layer."""


class LinearBase(torch.nn.Module):  # type: ignore[misc]
    """A layer with a method."""

    def __init__(
        self,
        input_size: int,
        outputs: list[int],
        quant_config: Any,
        prefix: str = "",
        *,
        params_dtype: Any = torch.float16,
        is_row_parallel: bool = False,
    ) -> None:
        """Divide the sizes among ranks: the input if it is row-parallel, else each of the fused outputs."""
        super().__init__()
        self.input_size, self.output_size, self.prefix = input_size, sum(outputs), prefix
        self.is_row_parallel = is_row_parallel
        ranks = World.size
        self.input_size_per_partition = input_size // ranks if is_row_parallel else input_size
        self.output_partition_sizes = outputs if is_row_parallel else [size // ranks for size in outputs]
        self.quant_method = quant_config.get_quant_method(self, prefix)
        assert type(self.quant_method).__name__ in WEIGHT_LOADER_V2_SUPPORTED
        self.create(params_dtype)

    def create(self, params_dtype: Any = torch.float16) -> None:
        """Register parameters, as before the first load and before each other one."""
        self.quant_method.create_weights(
            self,
            input_size_per_partition=self.input_size_per_partition,
            output_partition_sizes=self.output_partition_sizes,
            input_size=self.input_size,
            output_size=self.output_size,
            params_dtype=params_dtype,
            weight_loader=self.load,
        )

    def load(self, param: Any, loaded: Any, part: int = 0) -> None:
        """Load this rank's share of one fused part."""
        if self.is_row_parallel:
            param.load_row_parallel_weight(loaded_weight=loaded)
            return
        offset, size = sum(self.output_partition_sizes[:part]), self.output_partition_sizes[part]
        param.load_merged_column_weight(loaded_weight=loaded, shard_offset=offset, shard_size=size, shard_id=part)

    def load_parts(self, parts: list[dict[str, Any]]) -> None:
        """Load all tensors of a checkpoint, by part, and process them."""
        for number, tensors in enumerate(parts):
            for name, tensor in tensors.items():
                if name in dict(self.named_parameters()):
                    parameter = getattr(self, name)
                    parameter.weight_loader(parameter, tensor, number)
        self.quant_method.process_weights_after_loading(self)

    def forward(self, x: Any, bias: Any = None) -> Any:
        return self.quant_method.apply(self, x, bias)
