"""The linear layers of known models, as problems for `bench --model` and `tune --model`, and layers of experts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.config import QuantMode
from w4a16gen.kernels.problem import Problem


@dataclass(frozen=True)
class Model:
    """The sizes that decide a decoder's linear layers, named as in Hugging Face's config.json."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    num_hidden_layers: int
    head_dim: int = 128

    def heads(self, tensor_parallel: int) -> tuple[int, int]:
        """Return the query heads, and the key and value heads, on one of `tensor_parallel` GPUs.

        If there are fewer key and value heads than GPUs, several GPUs hold the same head.

        Raises:
            InvalidValueError: if the query heads, or the key and value heads, cannot be divided.
        """
        heads, shared = self.num_attention_heads, self.num_key_value_heads
        if heads % tensor_parallel or (shared % tensor_parallel and tensor_parallel % shared):
            raise InvalidValueError(
                f"{heads} query heads and {shared} key and value heads cannot be divided among {tensor_parallel} GPUs"
            )
        return heads // tensor_parallel, max(shared // tensor_parallel, 1)

    def layers(self, tensor_parallel: int) -> list[tuple[str, int, int]]:
        """Return each layer's name, n and k on one of `tensor_parallel` GPUs.

        Query, key and value form one layer, and so do gate and up. GPUs divide the output channels of these two, and K
        of the others.

        Raises:
            InvalidValueError: if the query heads, or the key and value heads, cannot be divided.
        """
        queries, keys = (heads * self.head_dim for heads in self.heads(tensor_parallel))
        intermediate = self.intermediate_size // tensor_parallel
        return [
            ("qkv", queries + 2 * keys, self.hidden_size),
            ("o", self.hidden_size, queries),
            ("gate_up", 2 * intermediate, self.hidden_size),
            ("down", self.hidden_size, intermediate),
        ]


MODELS = {
    "llama-3-8b": Model(4096, 14336, 32, 8, 32),
    "llama-3-70b": Model(8192, 28672, 64, 8, 80),
    "qwen2.5-7b": Model(3584, 18944, 28, 4, 28),
    "qwen2.5-32b": Model(5120, 27648, 40, 8, 64),
    "qwen2.5-72b": Model(8192, 29568, 64, 8, 80),
    "qwen3-8b": Model(4096, 12288, 32, 8, 36),
    "qwen3-32b": Model(5120, 25600, 64, 8, 64),
    "mixtral-8x7b": Model(4096, 14336, 32, 8, 32),
    "mixtral-8x22b": Model(6144, 16384, 48, 8, 56),
}
"""From the models' config.json on Hugging Face. In a mixture of experts, gate_up and down are one expert's, and m
counts the tokens that are routed to it."""


@dataclass(frozen=True)
class Mixture:
    """The sizes that decide a layer of experts, named as in Hugging Face's config.json.

    GPUs divide the experts among them, and each computes the tokens of all.
    """

    hidden_size: int
    intermediate_size: int
    """Of one expert."""
    num_experts: int
    """On all GPUs."""
    num_experts_per_tok: int
    group_size: int = 128
    gpus: int = 1

    @property
    def experts(self) -> int:
        """Experts on one GPU."""
        return self.num_experts // self.gpus

    def problems(self, mode: QuantMode) -> tuple[Problem, Problem]:
        """Return the products of one expert, gate_up and down, with m of 1."""
        sizes = (2 * self.intermediate_size, self.hidden_size), (self.hidden_size, self.intermediate_size)
        first, second = (Problem(1, n, k, self.group_size if mode.is_grouped else k) for n, k in sizes)
        return first, second


MIXTURES = {
    "qwen3-30b-a3b": Mixture(2048, 768, 128, 8),
    "mixtral-8x7b": Mixture(4096, 14336, 8, 2),
    "kimi-k2-ep8": Mixture(7168, 2048, 384, 8, group_size=32, gpus=8),
    "deepseek-v3-ep8": Mixture(7168, 2048, 256, 8, gpus=8),
}
"""From the models' config.json on Hugging Face. In names that end in `ep8`, eight GPUs divide the experts."""


def model_problems(
    name: str, tokens: Iterable[int], *, tensor_parallel: int = 1, group_size: int = 128
) -> list[tuple[str, Problem]]:
    """Return the problems of a model's layers on one of `tensor_parallel` GPUs, each with its layer's name.

    Raises:
        InvalidValueError: if there is no such model, or a layer cannot be divided into groups of that size.
    """
    if name not in MODELS:
        raise InvalidValueError(f"model {name!r} is not one of {', '.join(MODELS)}")
    layers = MODELS[name].layers(tensor_parallel)
    for layer, _, k in layers:
        if k % group_size:
            raise InvalidValueError(
                f"layer {layer} of {name} on {tensor_parallel} GPUs has k of {k}, which groups of {group_size} do not "
                "divide: choose another group size or fewer GPUs"
            )
    return [
        (f"{name} {layer}" + (f" / {tensor_parallel}" if tensor_parallel > 1 else ""), Problem(m, n, k, group_size))
        for layer, n, k in layers
        for m in tokens
    ]
