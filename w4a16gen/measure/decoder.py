"""One step of a decoder of a model's sizes: products of some kernels, and between them what every model computes.

The parts between products are the same for all kernels: residual sums with RMS norms, rotary embedding with the write
into the cache, attention, and SwiGLU. torch.compile fuses each part. Products read what parts return, so that a step
launches nothing that moves data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from w4a16gen.errors import InvalidValueError
from w4a16gen.kernels.problem import Problem
from w4a16gen.measure.models import Model
from w4a16gen.measure.rival_products import Product
from w4a16gen.wording import counted

EPSILON = 1e-5
"""Of RMS norms."""
ROTARY_BASE = 500_000.0


@dataclass(frozen=True)
class Step:
    """What a step computes, on one of `gpus` GPUs.

    A step of one new token per sequence decodes: its queries attend to the tokens of the context and to themselves. A
    step of more tokens is a prefill, from an empty cache.
    """

    name: str
    """The model's name, for reports."""
    model: Model
    gpus: int
    sequences: int
    new_tokens: int
    """Of each sequence."""
    context: int
    """Tokens of each sequence that are in the cache already."""
    group_size: int = 128
    layers: int | None = None
    """Layers to run; None runs all of the model's."""

    def __post_init__(self) -> None:
        """Check the sizes.

        Raises:
            InvalidValueError: if a number is not positive, or a prefill has a context.
        """
        for what in ("gpus", "sequences", "new_tokens", "depth"):
            if getattr(self, what) < 1:
                raise InvalidValueError(f"{what} of {getattr(self, what)} must be at least 1")
        if self.context < 0 or (self.context and self.new_tokens > 1):
            raise InvalidValueError(
                f"a context of {self.context} tokens must be 0 or more, and 0 for a step of {self.new_tokens} tokens"
            )

    @property
    def depth(self) -> int:
        """Layers that run."""
        return self.model.num_hidden_layers if self.layers is None else self.layers

    @property
    def tokens(self) -> int:
        """Rows of every product."""
        return self.sequences * self.new_tokens

    def problems(self) -> dict[str, Problem]:
        """Return the products of a layer by name: qkv, o, gate_up and down.

        Raises:
            InvalidValueError: if the GPUs or the groups do not divide a layer.
        """
        return {
            layer: Problem(self.tokens, n, k, self.group_size)
            for layer, n, k in self.model.layers(self.gpus)
            if self._divides(layer, k)
        }

    def _divides(self, layer: str, k: int) -> bool:
        if k % self.group_size:
            raise InvalidValueError(
                f"layer {layer} of {self.name} has k of {k}, which {self.group_size} does not divide"
            )
        return True

    def __str__(self) -> str:
        """Return the step in words."""
        shared = f" on one of {self.gpus} GPUs" if self.gpus > 1 else ""
        kind = f"context {self.context}" if self.new_tokens == 1 else f"prefill of {self.new_tokens} tokens"
        return f"{self.name}{shared}, {counted(self.depth, 'layer')}, {counted(self.sequences, 'sequence')}, {kind}"


class Parts:
    """The parts between products, in one dtype; each is compiled at its first call."""

    def __init__(self, torch: Any, step: Step, compiled: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Prepare the parts of a step.

        Args:
            torch: the module.
            step: the step.
            compiled: compiles a function, or returns it as it is.
        """
        self._torch, self._step = torch, step
        self._heads, self._shared_heads = step.model.heads(step.gpus)
        self.norm = compiled(self._norm)
        self.add_and_norm = compiled(self._add_and_norm)
        self.attend = compiled(self._attend)
        self.swiglu = compiled(self._swiglu)

    def _norm(self, residual: Any, weight: Any) -> Any:
        """Return the norm of the residual, [tokens, hidden], times a weight."""
        return self._torch.nn.functional.rms_norm(residual, (residual.shape[-1],), weight, EPSILON)

    def _add_and_norm(self, residual: Any, added: Any, weight: Any) -> Any:
        """Add to the residual, [tokens, hidden], and return its norm times a weight."""
        summed = residual + added
        residual.copy_(summed)
        return self._norm(summed, weight)

    def _attend(self, qkv: Any, angles: Any, keys: Any, values: Any) -> Any:
        """Rotate queries and keys, write keys and values into the cache, and attend.

        Args:
            qkv: [tokens, (heads + 2 * shared heads) * head_dim].
            angles: cosines and sines of the new tokens' places, [2, new_tokens, head_dim / 2], fp32.
            keys: the cache, [sequences, shared heads, context + new tokens, head_dim].
            values: the same.

        Returns:
            [tokens, heads * head_dim].
        """
        torch, step, width = self._torch, self._step, self._step.model.head_dim
        rows = qkv.view(step.sequences, step.new_tokens, -1, width).transpose(1, 2)
        queries, new_keys, new_values = rows.split((self._heads, self._shared_heads, self._shared_heads), 1)

        def rotated(vectors: Any) -> Any:
            first, second = vectors.float().chunk(2, -1)
            cosines, sines = angles[0], angles[1]
            turned = (first * cosines - second * sines, second * cosines + first * sines)
            return torch.cat(turned, -1).to(vectors.dtype)

        keys[:, :, step.context :] = rotated(new_keys)
        values[:, :, step.context :] = new_values
        attended = torch.nn.functional.scaled_dot_product_attention(
            rotated(queries), keys, values, is_causal=step.new_tokens > 1, enable_gqa=self._heads != self._shared_heads
        )
        return attended.transpose(1, 2).reshape(step.tokens, self._heads * width)

    def _swiglu(self, gate_up: Any) -> Any:
        """Return silu(gate) * up, [tokens, intermediate], of gate and up beside each other."""
        gate, up = gate_up.chunk(2, -1)
        return self._torch.nn.functional.silu(gate) * up


class Decoder:
    """The tensors of a step, and the step itself."""

    def __init__(self, torch: Any, step: Step, dtype: Any, device: Any, seed: int = 0) -> None:
        """Allocate and draw the tensors.

        Args:
            torch: the module.
            step: the step.
            dtype: of activations and cache.
            device: where the tensors are.
            seed: of hidden states, cache and norms' weights.
        """
        self.step, model = step, step.model
        source = torch.Generator(device).manual_seed(seed)
        options = {"dtype": dtype, "device": device}

        def normal(*shape: int) -> Any:
            return torch.randn(shape, generator=source, **options)

        self.examples = {
            name: torch.zeros((problem.m, problem.k), **options) for name, problem in step.problems().items()
        }
        """Activations of each product's shape, for which products are prepared."""
        self.hidden = normal(step.tokens, model.hidden_size)
        self.residual = torch.empty_like(self.hidden)
        self._nothing = torch.zeros_like(self.hidden)
        self._norms = torch.ones((model.hidden_size,), **options)
        places = step.context + step.new_tokens
        _, shared_heads = model.heads(step.gpus)
        shape = (step.sequences, shared_heads, places, model.head_dim)
        self.caches = [(normal(*shape), normal(*shape)) for _ in range(step.depth)]
        half = torch.arange(0, model.head_dim, 2, dtype=torch.float32, device=device) / model.head_dim
        turns = torch.arange(step.context, places, dtype=torch.float32, device=device)[:, None] * ROTARY_BASE**-half
        self._angles = torch.stack((turns.cos(), turns.sin()))

    def run(self, parts: Parts, products: Mapping[str, Sequence[Product]]) -> None:
        """Run one step from `hidden`, and leave the hidden state behind the last layer in `residual`.

        Args:
            parts: the parts between products.
            products: for each name of `Step.problems` a product per layer.
        """
        added = self._nothing
        self.residual.copy_(self.hidden)
        for layer, (keys, values) in enumerate(self.caches):
            x = parts.add_and_norm(self.residual, added, self._norms)
            x = parts.attend(products["qkv"][layer](x), self._angles, keys, values)
            x = parts.add_and_norm(self.residual, products["o"][layer](x), self._norms)
            x = parts.swiglu(products["gate_up"][layer](x))
            added = products["down"][layer](x)
        self.residual.add_(added)

    def run_fused(self, parts: Parts, products: Mapping[str, Sequence[Product]]) -> None:
        """Run the same step with products that compute more: o and down add to `residual`, and gate_up is gated.

        Args:
            parts: the parts between products.
            products: as for `run`; those of o and down write `residual`.
        """
        self.residual.copy_(self.hidden)
        for layer, (keys, values) in enumerate(self.caches):
            x = parts.norm(self.residual, self._norms)
            x = parts.attend(products["qkv"][layer](x), self._angles, keys, values)
            products["o"][layer](x)
            x = products["gate_up"][layer](parts.norm(self.residual, self._norms))
            products["down"][layer](x)
