"""How each rival is given a weight: its own form of it, in copies, and the call that multiplies by a copy."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

from w4a16gen.errors import UnsupportedProblemError
from w4a16gen.kernels.config import QuantMode
from w4a16gen.measure.torch_weight import WORD_VALUES, TorchWeight

Product = Callable[[], Any]
"""Multiplies the activations by one copy of the weight and returns the output."""
GPTQ_ZERO_WORD = 0x77777777
"""Eight zero points of 8, each stored less 1."""
QUACK_FORMATS = {32: "int4_g32", 64: "int4_g64", 128: "int4"}
"""QuACK's names of symmetric 4-bit weights, by group size."""
QUACK_TILE_K = 64
QUACK_TILE_CHANNELS = 128
"""QuACK pads n to a multiple of this, and then allocates its output itself."""


def cublas_products(a: Any, weight: TorchWeight, copies: int) -> Sequence[Product]:
    """Multiply by copies of the dequantised weight, less its zeros; `a` is fp16 [m, k] on the weight's device."""
    torch, dense = weight.torch, weight.dense()
    out = torch.empty((a.shape[0], weight.n), dtype=a.dtype, device=a.device)

    def product(copy: Any) -> Product:
        return lambda: torch.matmul(a, copy.T, out=out)

    return [product(dense), *(product(dense.clone()) for _ in range(copies - 1))]


def tinygemm_products(a: Any, weight: TorchWeight, copies: int) -> Sequence[Product]:
    """Prepare torch's own kernels, which compute (q - 8) * scale + zero in bf16."""
    if weight.mode is QuantMode.PER_COLUMN_SCALE_ONLY or weight.group_size not in (32, 64, 128, 256):
        raise UnsupportedProblemError("it supports groups of 32, 64, 128 and 256 only")
    if weight.k % 128:
        raise UnsupportedProblemError("it needs k in multiples of 128")
    torch, operators = weight.torch, weight.torch.ops.aten
    packed = operators._convert_weight_to_int4pack(weight.pairs(first_low=False), 8)  # noqa: SLF001
    zeros = torch.zeros_like(weight.scales) if weight.zeros is None else weight.zeros
    scales_and_zeros = torch.stack([weight.scales, zeros], -1).to(a.dtype).contiguous()

    def product(copy: Any, of_copy: Any) -> Product:
        return lambda: operators._weight_int4pack_mm(a, copy, weight.group_size, of_copy)  # noqa: SLF001

    return [product(packed.clone(), scales_and_zeros.clone()) for _ in range(copies)]


def gptq_weight_config(weight: TorchWeight) -> dict[str, Any]:
    """Return the configuration of a symmetric weight in GPTQ's form.

    Raises:
        UnsupportedProblemError: if the weight has zeros.
    """
    _refuse_zeros(weight)
    return {"quant_method": "gptq", "bits": 4, "group_size": weight.group_size, "sym": True}


def gptq_tensors(weight: TorchWeight) -> dict[str, Any]:
    """Return the tensors of a symmetric weight in GPTQ's form, by their names in checkpoints."""
    torch, device = weight.torch, weight.q.device
    zero_shape = (weight.scales.shape[0], weight.n // WORD_VALUES)
    return {
        "qweight": weight.gptq_words(),
        "scales": weight.scales.contiguous(),
        "qzeros": torch.full(zero_shape, GPTQ_ZERO_WORD, dtype=torch.int32, device=device),
        "g_idx": torch.arange(weight.k, dtype=torch.int32, device=device) // weight.group_size,
    }


def humming_products(a: Any, weight: TorchWeight, copies: int) -> Sequence[Product]:
    """Prepare humming's kernels from a symmetric weight in GPTQ's form."""
    layer_type = importlib.import_module("humming.layer").HummingLayer
    layer = layer_type(
        shape_n=weight.n, shape_k=weight.k, weight_config=gptq_weight_config(weight), torch_dtype=a.dtype
    ).to(a.device)
    layer.load_from_tensors(gptq_tensors(weight))
    layer.transform()
    out = weight.torch.empty((a.shape[0], weight.n), dtype=a.dtype, device=a.device)

    def product(copy: Any) -> Product:
        def multiply() -> Any:
            copy(a, outputs=out)
            return out

        return multiply

    return [product(layer), *(product(deepcopy(layer)) for _ in range(copies - 1))]


def quack_products(a: Any, weight: TorchWeight, copies: int) -> Sequence[Product]:
    """Prepare QuACK's W4A16 kernels, which multiply in bf16 by a symmetric weight."""
    quack = importlib.import_module("quack.gemm_w4")
    _refuse_zeros(weight)
    if weight.group_size not in QUACK_FORMATS:
        raise UnsupportedProblemError("it supports groups of 32, 64 and 128 only")
    if weight.k % QUACK_TILE_K:
        raise UnsupportedProblemError("it needs k in multiples of 64")
    torch, form = weight.torch, QUACK_FORMATS[weight.group_size]
    scales = weight.scales.T.contiguous().to(torch.bfloat16)
    blob, strip = quack.prepare_w4_weight(weight.pairs(first_low=True), scales, form)
    is_padded = bool(weight.n % QUACK_TILE_CHANNELS)
    out = None if is_padded else torch.empty((a.shape[0], weight.n), dtype=a.dtype, device=a.device)

    def product(copy: Any, of_copy: Any) -> Product:
        return lambda: quack.gemm_w4a16(a, copy, of_copy, out=out, n_out=weight.n, wformat=form)

    return [product(blob.clone(), strip.clone()) for _ in range(copies)]


def turbomind_products(a: Any, weight: TorchWeight, copies: int) -> Sequence[Product]:
    """Prepare lmdeploy's kernels from a symmetric weight in GPTQ's form; its own measurement picks the kernel."""
    linear_type = importlib.import_module("lmdeploy.turbomind.linear").Linear
    formats = importlib.import_module("lmdeploy.turbomind.weight_format")
    _refuse_zeros(weight)
    linear = linear_type()
    plan = linear.get_weight_plan(weight_format=formats.GPTQFormat(block_in=weight.group_size), dtype=a.dtype)
    words, scales = weight.gptq_words(), weight.scales.contiguous()
    prepared = [linear.prepare_weight(words, plan=plan, scales=scales) for _ in range(copies)]
    if not prepared[0].is_graph_compatible:
        raise UnsupportedProblemError("its kernel for this weight cannot be captured in a graph")
    execution, out, _ = linear.tune(a, prepared[0])

    def product(copy: Any) -> Product:
        def multiply() -> Any:
            linear(a, copy, exec_plan=execution, out=out)
            return out

        return multiply

    return [product(copy) for copy in prepared]


def _refuse_zeros(weight: TorchWeight) -> None:
    if weight.zeros is not None:
        raise UnsupportedProblemError("zeros that are not multiples of the scale have no form of integers")
