"""`W4A16MLP`: gate, up and down projection of a transformer's block as two kernels, and models that get it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from w4a16gen.errors import InvalidValueError
from w4a16gen.integrations.torch.apart import FUNCTIONS
from w4a16gen.integrations.torch.fuse import fuse_gated
from w4a16gen.integrations.torch.linear import W4A16Linear
from w4a16gen.integrations.torch.nibbles import Tensor
from w4a16gen.integrations.torch.packed_module import has_hooks
from w4a16gen.kernels.epilogue import Activation

_PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")
"""What the modules of Llama, Mistral, Qwen, Gemma and others call their parts."""
_FUNCTIONS = {activation: FUNCTIONS[activation.function] for activation in Activation if activation.is_gated}
_PROBE_TOLERANCE = 1e-5
"""The two forms of GELU differ by up to 5e-4, their implementations by a few roundings of fp32."""


class W4A16MLP(torch.nn.Module):
    """The feed-forward part of a transformer's block: down(function(gate(x)) * up(x)) + residual.

    One kernel computes both products, the function and their product, a second one the rest. This needs kernels with
    epilogues: `w4a16gen build --epilogue none --epilogue elementwise --epilogue gated`. With other builds the function
    and the sum follow the products as operations of torch. The results then differ by the rounding of these products to
    fp16.

    What lies between the kernels stays fp16, also in models of bf16: outputs beyond 65504 become infinite (see
    `check_overflow`).

    Attributes:
        gate_up: W4A16Linear with a gated activation.
        down: W4A16Linear.

    Example:
        >>> import torch
        >>> from w4a16gen.integrations.torch import W4A16Linear, W4A16MLP
        >>> gate, up = (W4A16Linear.from_linear(torch.nn.Linear(256, 512, bias=False)) for _ in range(2))
        >>> down = W4A16Linear.from_linear(torch.nn.Linear(512, 256, bias=False))
        >>> W4A16MLP.from_linears(gate, up, down, "swiglu")(torch.ones(2, 3, 256, dtype=torch.bfloat16)).shape
        torch.Size([2, 3, 256])
    """

    def __init__(self, gate_up: W4A16Linear, down: W4A16Linear) -> None:
        """Take the two layers; `from_linears` makes them of three.

        Args:
            gate_up: a layer with a gated activation, as `fuse_gated` returns it.
            down: a layer that takes its outputs.

        Raises:
            InvalidValueError: if they do not fit together.
        """
        super().__init__()
        if not isinstance(gate_up, W4A16Linear) or not isinstance(down, W4A16Linear):
            raise InvalidValueError("gate_up and down must be W4A16Linear")
        if not Activation.of(gate_up.activation).is_gated:
            raise InvalidValueError(
                f"gate_up with activation {gate_up.activation} must have a gated one: see fuse_gated"
            )
        if gate_up.out_features != down.in_features:
            raise InvalidValueError(
                f"down with k of {down.in_features} must take the {gate_up.out_features} outputs of gate_up"
            )
        self.gate_up = gate_up
        self.down = down

    @classmethod
    def from_linears(
        cls,
        gate: W4A16Linear,
        up: W4A16Linear,
        down: W4A16Linear,
        activation: Activation | str = Activation.SWIGLU,
    ) -> W4A16MLP:
        """Make the module of three layers, on their device.

        Args:
            gate: the layer whose outputs go through the function.
            up: the layer whose outputs they multiply.
            down: the layer that follows.
            activation: swiglu, geglu_tanh or geglu.

        Raises:
            InvalidValueError: if the layers do not fit together; see `fuse_gated`.
        """
        made = cls(fuse_gated(gate, up, activation), down)
        made.train(gate.training)
        return made

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return down(function(gate(x)) * up(x)) + residual, in the dtype of x.

        Args:
            x: floating point [..., k].
            residual: what is added, of the shape and dtype of the result, or None. In fp16 the kernel adds it if the
                build has kernels with epilogue elementwise.
        """
        hidden = self.gate_up(x, dtype=torch.float16, apart=True)
        return self.down(hidden, residual, dtype=x.dtype, apart=True)


@dataclass(frozen=True)
class FusedMlps:
    """What `fuse_mlps` did.

    Attributes:
        fused: names of the modules that are W4A16MLP now.
        kept: names of the modules with the same parts that are as they were, with the reason.
    """

    fused: tuple[str, ...]
    kept: Mapping[str, str]

    def __str__(self) -> str:
        return f"w4a16gen fused {len(self.fused)} of {len(self.fused) + len(self.kept)} feed-forward modules"


def fuse_mlps(model: torch.nn.Module) -> FusedMlps:
    """Replace each feed-forward module of 4-bit layers by a W4A16MLP.

    A module is replaced if its parts are gate_proj, up_proj, down_proj and act_fn, as in Llama, Mistral, Qwen and
    Gemma, its three layers are W4A16Linear, act_fn is SiLU or GELU, and it computes down(act(gate(x)) * up(x)). The
    last two are found by calling a copy of the module with small layers. Call it after `replace_linears`. The new
    module uses the kernels with epilogues that the build has; see `W4A16MLP`.

    Args:
        model: the model. Parts of it are replaced in place.

    Returns:
        What was fused, what was not, and why.

    Raises:
        InvalidValueError: if the model is no module.

    Example:
        report = replace_linears(model, checkpoint, device="cuda")
        print(fuse_mlps(model))
    """
    if not isinstance(model, torch.nn.Module):
        raise InvalidValueError(f"model of type {type(model).__name__} must be a torch.nn.Module")
    places: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name and all(hasattr(module, part) for part in _PARTS):
            places.setdefault(id(module), []).append(name)
    fused: list[str] = []
    kept: dict[str, str] = {}
    for names in places.values():
        made = _fused_or_reason(model.get_submodule(names[0]))
        if isinstance(made, str):
            kept |= dict.fromkeys(names, made)
            continue
        for name in names:
            model.set_submodule(name, made)
        fused += names
    return FusedMlps(tuple(fused), kept)


def _fused_or_reason(module: Any) -> W4A16MLP | str:
    """Return the module that takes the place of a feed-forward module, or why there is none."""
    layers = [getattr(module, part) for part in _PARTS[:3]]
    if not all(isinstance(layer, W4A16Linear) for layer in layers):
        return "its layers are not all W4A16Linear: call replace_linears before"
    if {name for name, _ in module.named_children()} - set(_PARTS):
        return f"it has more parts than {', '.join(_PARTS)}"
    if any(has_hooks(one) for one in (module, *layers, module.act_fn)):
        return "it has hooks, which would be lost: register them after fuse_mlps"
    activation = _activation_of(module)
    if activation is None:
        return "its act_fn is none of SiLU and GELU, or it computes something else than down(act(gate(x)) * up(x))"
    try:
        gate, up, down = layers
        made = W4A16MLP.from_linears(gate, up, down, activation)
    except InvalidValueError as error:  # such as layers with different input scales
        return str(error)
    made.train(module.training)
    return made


def _activation_of(module: Any) -> Activation | None:
    """Return the gated activation that a feed-forward module computes, or None: call a copy of it with small layers."""
    generator = torch.Generator().manual_seed(0)  # the model's own random numbers stay as they are
    gate, up, down = (_small_layer(generator, k, n) for k, n in ((4, 6), (4, 6), (6, 4)))
    small = copy.copy(module)
    small._modules = {**module._modules, "gate_proj": gate, "up_proj": up, "down_proj": down}  # noqa: SLF001
    x = torch.linspace(-6, 6, 128, dtype=torch.float32, device="cpu").reshape(32, 4)
    with torch.no_grad():
        try:
            got = small(x)
        except Exception:  # noqa: BLE001  (a module of somebody else may raise anything)
            return None
        for activation, function in _FUNCTIONS.items():
            wanted = down(function(gate(x)) * up(x))
            is_like = isinstance(got, torch.Tensor) and got.shape == wanted.shape
            if is_like and torch.allclose(got, wanted, rtol=0, atol=_PROBE_TOLERANCE):
                return activation
    return None


def _small_layer(generator: Any, k: int, n: int) -> Any:
    """Return a linear layer in host memory with weights of a generator."""
    layer = torch.nn.utils.skip_init(torch.nn.Linear, k, n, bias=False, dtype=torch.float32, device="cpu")
    layer.weight.data.copy_(torch.randn(n, k, generator=generator, dtype=torch.float32) / k**0.5)
    return layer
