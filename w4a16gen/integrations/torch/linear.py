"""`W4A16Linear`: a linear layer of a torch model whose weight has 4 bits."""

from __future__ import annotations

from typing import Any

import torch

from w4a16gen.errors import InvalidValueError
from w4a16gen.integrations.torch import formats, given, ops
from w4a16gen.integrations.torch.device_weights import DeviceWeight, dense_weight, load_layer, pack_decoded
from w4a16gen.integrations.torch.nibbles import Tensor
from w4a16gen.integrations.torch.packed_module import Operands, PackedModule, product
from w4a16gen.integrations.torch.state import check_tensors, read_state, write_state
from w4a16gen.integrations.torch.upload import Uploader
from w4a16gen.kernels.config import QuantMode
from w4a16gen.kernels.epilogue import Activation
from w4a16gen.kernels.problem import Problem, why_never_runs
from w4a16gen.runtime.calls import GemmOptions, checked_weight
from w4a16gen.weights.importers.layer import CheckpointLayer
from w4a16gen.weights.packed import GATED_LAYOUT, PackedWeight, pack_weight
from w4a16gen.weights.quantize import quantize

_EXTRA_STATE = "_extra_state"
_NONE = str(Activation.NONE)


class W4A16Linear(PackedModule):
    """A linear layer with a 4-bit weight: y = activation(alpha * x W + bias).

    Where the weight asks for it, x is multiplied by `input_scale`, and permuted. x may be fp16, bf16 or fp32, [..., k].
    It is cast to fp16 before the kernel, and y is cast to the dtype of x. Both casts lie outside the operator, so that
    a compiler fuses them with their neighbours.

    `.to(device)`, `state_dict`, `copy.deepcopy`, pickle, `torch.compile`, `torch.export` and CUDA graphs work as with
    other modules. `.half()`, `.bfloat16()` and `.to(dtype)` change nothing: the kernels read these dtypes only.

    Attributes:
        packed: buffer, uint8 [bytes]: the packed weight.
        bias: buffer, fp16 [n], or None.
        permutation: buffer, int64 [k], or None: the columns of x in the order of the weight (act-order).
        input_scale: buffer, fp16 [k], or None: what x is multiplied by first.
        alpha: factor of the product.
        activation: the name of the activation, `none` without one. Weights that were packed with gated=True have a
            gated one, and half as many outputs as n.
        activation_scale: a power of two that x is divided by before its cast to fp16, and y multiplied by; see
            `calibrate`.
        output_scale: a power of two that y is divided by while it is fp16, and multiplied by after its cast.

    Example:
        >>> import torch
        >>> from w4a16gen.integrations.torch import W4A16Linear
        >>> linear = W4A16Linear.from_linear(torch.nn.Linear(256, 64), group_size=128)
        >>> linear(torch.ones(2, 3, 256, dtype=torch.bfloat16)).shape
        torch.Size([2, 3, 64])
    """

    bias: Tensor | None

    def __init__(
        self,
        weight: PackedWeight,
        bias: Any = None,
        *,
        permutation: Any = None,
        input_scale: Any = None,
        alpha: float = 1.0,
        activation: Activation | str | None = None,
    ) -> None:
        """Take a packed weight; `from_packed` converts arrays to tensors first.

        Args:
            weight: the packed weight; its data is a torch tensor on any device, also `meta`.
            bias: fp16 [n], or None.
            permutation: integers [k], or None.
            input_scale: fp16 [k], or None.
            alpha: factor of the product.
            activation: the activation, or None.

        Raises:
            InvalidValueError: if the sizes do not fit together, or the activation does not fit the weight.
        """
        super().__init__()
        checked_weight(weight)
        self.activation = str(GemmOptions(activation=activation).epilogue(weight).activation)
        self.n, self.k, self.group_size = weight.n, weight.k, weight.group_size
        self.mode, self.layout = str(weight.mode), weight.layout
        self.alpha = given.finite_alpha(alpha)
        given.check_tensor("packed", weight.data, (weight.nbytes,), torch.uint8)
        self.register_buffer("packed", weight.data)
        device = weight.data.device
        self.bias = None if bias is None else given.half("bias", bias, device, self.n)
        self.permutation = None if permutation is None else given.order("permutation", permutation, device, self.k)
        self.input_scale = None if input_scale is None else given.half("input_scale", input_scale, device, self.k)

    @classmethod
    def from_packed(
        cls,
        weight: PackedWeight,
        bias: Any = None,
        *,
        permutation: Any = None,
        input_scale: Any = None,
        alpha: float = 1.0,
        activation: Activation | str | None = None,
        device: Any = None,
    ) -> W4A16Linear:
        """Make a layer of a packed weight.

        Args:
            weight: the packed weight, of numpy, torch or another library.
            bias: [n], rounded to fp16, or None.
            permutation: the columns of x in the order of the weight, integers [k], or None.
            input_scale: what x is multiplied by, [k], or None.
            alpha: factor of the product.
            activation: the activation, or None.
            device: where the layer shall be; None leaves it where the weight is.

        Raises:
            InvalidValueError: if the sizes do not fit together.
        """
        moved = ops.on_torch(weight, device)
        arrays = {"bias": bias, "permutation": permutation, "input_scale": input_scale}
        tensors = {name: given.tensor_of(name, value) for name, value in arrays.items()}
        return cls(moved, **tensors, alpha=alpha, activation=activation)

    @classmethod
    def from_weight(cls, weight: DeviceWeight, bias: Any = None, *, input_scale: Any = None) -> W4A16Linear:
        """Make a layer of what `device_weights` returned, on the same device.

        Args:
            weight: the packed weight with its permutation and alpha.
            bias: [n], rounded to fp16, or None.
            input_scale: what x is multiplied by, [k], or None.
        """
        return cls.from_packed(
            weight.packed, bias, permutation=weight.permutation, input_scale=input_scale, alpha=weight.alpha
        )

    @classmethod
    def from_checkpoint(
        cls, layer: CheckpointLayer, *, device: Any = "cpu", uploader: Uploader | None = None
    ) -> W4A16Linear:
        """Read a layer of a checkpoint that `w4a16gen.open_checkpoint` opened, and pack it on a device.

        Args:
            layer: the layer.
            device: where the layer shall be.
            uploader: copies bytes to that device; pass one for all layers of a model.

        Raises:
            InvalidValueError: if the layer is damaged, or the layout cannot hold it.
            NotBuiltError: on a GPU, if no native kernel of the mode is built.
        """
        moved = uploader or Uploader(device)
        return cls.from_weight(load_layer(layer, device, uploader=moved), layer.bias, input_scale=layer.input_scale)

    @classmethod
    def from_linear(
        cls, linear: torch.nn.Linear, *, group_size: int | None = 128, zero_points: bool = False
    ) -> W4A16Linear:
        """Round a linear layer to the nearest 4-bit values, on the host; the result is where the layer is.

        Args:
            linear: the layer, of any floating dtype.
            group_size: values of K that share a scale; None for one scale per output channel.
            zero_points: whether each group has a zero point.

        Raises:
            InvalidValueError: if the group size does not divide k, a value is not finite, or n or k is no multiple of
                8.
        """
        if not isinstance(linear, torch.nn.Linear):
            raise InvalidValueError(f"linear of type {type(linear).__name__} must be a torch.nn.Linear")
        if reason := why_never_runs(Problem(1, linear.out_features, linear.in_features, linear.in_features)):
            raise InvalidValueError(reason)
        weight = linear.weight.detach()
        if weight.is_meta:
            raise InvalidValueError("the layer is on the meta device and has no values: load it first")
        packed = pack_weight(quantize(weight.cpu(), group_size=group_size, zero_points=zero_points))
        return cls.from_packed(packed, linear.bias, device=weight.device)

    @classmethod
    def from_gptq(
        cls, qweight: Any, scales: Any, qzeros: Any = None, *, g_idx: Any = None, bias: Any = None, version: int = 1
    ) -> W4A16Linear:
        """Make a layer of GPTQ's tensors, on their device; see `formats.gptq`.

        Args:
            qweight: int32 [k / 8, n].
            scales: [groups, n].
            qzeros: int32 [groups, n / 8], or None for zero points of 8.
            g_idx: the group of each value of K, [k], or None.
            bias: [n], or None.
            version: 1 if `checkpoint_format` is "gptq" or missing, 2 for "gptq_v2".

        Raises:
            InvalidValueError: if the tensors contradict each other, or the layout cannot hold the weight.
        """
        decoded = formats.gptq(qweight, scales, qzeros, version=version)
        return cls.from_weight(pack_decoded(decoded, formats.order_of(g_idx, len(scales), decoded.q.shape[1])), bias)

    @classmethod
    def from_awq(cls, qweight: Any, scales: Any, qzeros: Any = None, *, bias: Any = None) -> W4A16Linear:
        """Make a layer of the tensors of AWQ's version gemm, on their device.

        Args and errors are those of `formats.awq`.
        """
        return cls.from_weight(pack_decoded(formats.awq(qweight, scales, qzeros)), bias)

    @classmethod
    def from_compressed_tensors(
        cls,
        weight_packed: Any,
        weight_scale: Any,
        weight_zero_point: Any = None,
        *,
        g_idx: Any = None,
        bias: Any = None,
        k: int | None = None,
    ) -> W4A16Linear:
        """Make a layer of compressed-tensors' pack-quantized tensors, on their device.

        Args and errors are those of `formats.compressed_tensors`; g_idx is the group of each value of K, [k].
        """
        decoded = formats.compressed_tensors(weight_packed, weight_scale, weight_zero_point, k=k)
        order_of_k = formats.order_of(g_idx, weight_scale.shape[1], decoded.q.shape[1])
        return cls.from_weight(pack_decoded(decoded, order_of_k), bias)

    @classmethod
    def from_gguf(cls, blocks: Any, kind: str, *, bias: Any = None) -> W4A16Linear:
        """Make a layer of GGUF's blocks, on their device. Args and errors are those of `formats.gguf`."""
        return cls.from_weight(pack_decoded(formats.gguf(blocks, kind)), bias)

    @property
    def in_features(self) -> int:
        """The length of the reduction, k."""
        return self.k

    @property
    def out_features(self) -> int:
        """The number of outputs: n, or n / 2 where one half of the channels gates the other."""
        return self.n // 2 if self.layout == GATED_LAYOUT else self.n

    def forward(self, x: Tensor, residual: Tensor | None = None, *, dtype: Any = None, apart: bool = False) -> Tensor:
        """Return activation(alpha * x' W + bias) + residual, [..., out_features], in the dtype of x.

        Args:
            x: floating point [..., k], on the device of the layer.
            residual: what is added, of the shape and dtype of the result, or None. In fp16 the kernel adds it.
            dtype: another dtype for the result; fp16 saves casts between two layers.
            apart: whether an activation or a residual that no kernel of the build computes follows the product, as
                operations of torch. The product is then rounded to fp16 before them. Otherwise this is an error.

        Raises:
            InvalidValueError: if x or the residual is no tensor, or of another dtype, shape or device, or output_scale
                divides what goes into an activation.
            NotBuiltError: on a GPU, if no kernel of the build has the epilogue that the call needs, without `apart`.
        """
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            raise InvalidValueError(f"x of {given.kind_of(x)} must be a floating point tensor, [..., {self.k}]")
        if self.output_scale != 1 and self.activation != _NONE:
            raise InvalidValueError(
                f"output_scale of {self.output_scale} divides what goes into {self.activation}: it must be 1"
            )
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise InvalidValueError(f"dtype of {dtype!r} must be a floating point dtype of torch")
        if residual is not None and x.dim() > 0:
            shape = [*x.shape[:-1], self.out_features]
            given.check_residual(residual, shape, x.dtype if dtype is None else dtype, x.device)
        operands = Operands(self.packed, self.alpha, self.permutation, self.input_scale, self.bias)
        return product(self, x, operands, residual=residual, dtype=dtype, apart=apart)

    def weight_of(self) -> PackedWeight:
        """Return the packed weight, which shares the layer's memory."""
        mode = QuantMode.parse(self.mode)
        return PackedWeight(self.packed, self.layout, self.n, self.k, self.group_size, mode)

    def dequantize(self, dtype: Any = torch.float32) -> Tensor:
        """Return the weight of the equivalent torch.nn.Linear, [n, k], in the order of the activations.

        Alpha and the input scale are multiplied in. fp32 holds it exactly without an input scale, unless zeros and
        scales differ by many powers of two.

        Args:
            dtype: the dtype of the result.
        """
        weight = self.weight_of().to_host().unpack()
        exact = dense_weight(weight, self.alpha, self.permutation, self.input_scale)
        return exact.to(self.packed.device, dtype)

    def extra_repr(self) -> str:
        """Return what `print` shows of the layer."""
        parts = [f"in_features={self.k}, out_features={self.out_features}, bias={self.bias is not None}"]
        parts.append(f"group_size={self.group_size}, mode={self.mode}")
        if self.activation != _NONE:
            parts.append(f"activation={self.activation}")
        if self.permutation is not None:
            parts.append("act_order=True")
        parts += [f"{name}={value:g}" for name, value in self.scales.items() if value != 1]
        return ", ".join(parts)

    @property
    def facts(self) -> dict[str, Any]:
        """What a state dict must agree with: n, k, the group size, the mode, the layout and the activation."""
        return {name: getattr(self, name) for name in ("n", "k", "group_size", "mode", "layout", "activation")}

    @property
    def scales(self) -> dict[str, float]:
        """The scalars that a state dict brings: alpha, activation_scale and output_scale."""
        return {name: getattr(self, name) for name in ("alpha", "activation_scale", "output_scale")}

    def get_extra_state(self) -> Tensor:
        """Return the facts and the scalars as bytes of JSON in a tensor, which files of safetensors can hold."""
        return write_state(self.facts, self.scales)

    def set_extra_state(self, state: Any) -> None:
        """Take the scales out of the facts of a state dict.

        Raises:
            InvalidValueError: if they describe another layer.
        """
        for name, value in read_state(self.facts, state).items():
            setattr(self, name, value)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        """Refuse the state of another layer, or one that was cast, before any tensor is copied."""
        if f"{prefix}{_EXTRA_STATE}" in state_dict:
            read_state(self.facts, state_dict[f"{prefix}{_EXTRA_STATE}"])
        check_tensors(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *arguments)
