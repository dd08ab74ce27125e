"""How each rival is given a weight: its own form of it, in copies, and the call that multiplies by a copy."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Collection, Sequence
from copy import deepcopy
from typing import Any

from w4a16gen.errors import UnsupportedProblemError
from w4a16gen.kernels.config import QuantMode
from w4a16gen.measure.torch_weight import WORD_VALUES, TorchWeight

Product = Callable[[Any], Any]
"""Multiplies activations, of the shape and dtype that it was prepared for, by one copy of the weight. Returns the
output."""
GPTQ_ZERO_WORD = 0x77777777
"""Eight zero points of 8, each stored less 1."""
HummingTable = Sequence[tuple[int, int, dict[str, Any]]]
"""humming's kernels in ascending, adjoining ranges of rows: more than the first number, and at most the second one."""
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
        return lambda given: torch.matmul(given, copy.T, out=out)

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
        return lambda given: operators._weight_int4pack_mm(given, copy, weight.group_size, of_copy)  # noqa: SLF001

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


def humming_table(layer: Any, device: Any, **compute: Any) -> HummingTable:
    """Return the table from which humming takes the kernel of a call.

    Args:
        layer: a prepared layer of humming.
        device: torch's device.
        compute: what the calls pass as `compute_config`.
    """
    tune = importlib.import_module("humming.tune")
    table: HummingTable = tune.get_heuristics_config(layer.humming_config, device=device, **compute)
    return table


def humming_kernel(table: HummingTable, rows: int) -> dict[str, Any]:
    """Return the kernel of a table that a call with some rows takes."""
    return next(kernel for least, most, kernel in table if least < rows <= most)


def humming_tuning(table: HummingTable, counts: Collection[int]) -> str:
    """Return the `tuning_config` with which humming compiles only the kernels for some numbers of rows.

    Without it, a layer's first call compiles its whole table, about 30 kernels. The ranges begin at 0: humming takes
    the first one that a number is in, and looks for a range of one row in every call too.

    Args:
        table: the layer's table.
        counts: the numbers of rows.
    """
    used = [(0, most, kernel) for least, most, kernel in table if any(least < rows <= most for rows in counts)]
    return json.dumps(used)


def humming_products(a: Any, weight: TorchWeight, copies: int) -> Sequence[Product]:
    """Prepare humming's kernels from a symmetric weight in GPTQ's form."""
    layer_type = importlib.import_module("humming.layer").HummingLayer
    layer = layer_type(
        shape_n=weight.n, shape_k=weight.k, weight_config=gptq_weight_config(weight), torch_dtype=a.dtype
    ).to(a.device)
    layer.load_from_tensors(gptq_tensors(weight))
    layer.transform()
    tuning = humming_tuning(humming_table(layer, a.device), [a.shape[0]])
    out = weight.torch.empty((a.shape[0], weight.n), dtype=a.dtype, device=a.device)

    def product(copy: Any) -> Product:
        def multiply(given: Any) -> Any:
            copy(given, outputs=out, tuning_config=tuning)
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
        return lambda given: quack.gemm_w4a16(given, copy, of_copy, out=out, n_out=weight.n, wformat=form)

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
        def multiply(given: Any) -> Any:
            linear(given, copy, exec_plan=execution, out=out)
            return out

        return multiply

    return [product(copy) for copy in prepared]


def _refuse_zeros(weight: TorchWeight) -> None:
    if weight.zeros is not None:
        raise UnsupportedProblemError("zeros that are not multiples of the scale have no form of integers")
