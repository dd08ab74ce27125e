"""Activations, gates and residuals of the operator and of `W4A16Linear`, on the CPU."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest

import w4a16gen
from w4a16gen import InvalidValueError, QuantMode
from w4a16gen.kernels.epilogue import Activation
from w4a16gen.weights.reference import random_weight

torch = pytest.importorskip("torch")
ops = pytest.importorskip("w4a16gen.integrations.torch.ops")
linear = pytest.importorskip("w4a16gen.integrations.torch.linear")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:bf16 and fp16 are mixed:UserWarning")
N, K = 64, 256
FGS = QuantMode.FINEGRAINED_SCALE_ONLY


def half(rng: np.random.Generator, *shape: int) -> Any:
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float16))


def packed_for(rng: np.random.Generator, activation: Activation) -> Any:
    return ops.on_torch(w4a16gen.pack_weight(random_weight(rng, N, K, 128, FGS), gated=activation.is_gated))


@pytest.mark.parametrize("activation", Activation, ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
def test_the_operator_computes_what_gemm_computes(
    activation: Activation, with_residual: bool, rng: np.random.Generator
) -> None:
    packed, x, bias = packed_for(rng, activation), half(rng, 2, 3, K), half(rng, N)
    residual = half(rng, 2, 3, packed.outputs) if with_residual else None
    got = ops.gemm(x, packed, bias, alpha=0.5, activation=activation, residual=residual)
    flat = None if residual is None else residual.reshape(6, -1)
    wanted = w4a16gen.gemm(x.reshape(6, K), packed, bias=bias, alpha=0.5, activation=activation, residual=flat)
    assert got.shape == (2, 3, packed.outputs)
    assert torch.equal(got.reshape(6, -1), wanted)


@pytest.mark.parametrize("activation", [Activation.NONE, Activation.GELU, Activation.SWIGLU], ids=str)
def test_opcheck_passes(activation: Activation, rng: np.random.Generator) -> None:
    packed = packed_for(rng, activation)
    for residual in (None, half(rng, 2, 3, packed.outputs)):
        arguments = (
            half(rng, 2, 3, K),
            packed.data,
            half(rng, N),
            *ops.facts_of(packed),
            2.0,
            str(activation),
            residual,
        )
        for operator in (torch.ops.w4a16gen.gemm.default, torch.ops.w4a16gen.gemm_forward_only.default):
            torch.library.opcheck(operator, arguments)


def test_calls_without_an_epilogue_stay_as_they_were(rng: np.random.Generator) -> None:
    packed, x = packed_for(rng, Activation.NONE), half(rng, 3, K)
    short = torch.ops.w4a16gen.gemm(x, packed.data, None, *ops.facts_of(packed), 1.0)
    assert torch.equal(short, torch.ops.w4a16gen.gemm(x, packed.data, None, *ops.facts_of(packed), 1.0, "none", None))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("gated", "activation", "shape", "message"),
    [
        (False, "mish", None, "'mish' is not one of none, silu"),
        (False, "swiglu", None, "swiglu needs a weight whose gates and factors are interleaved"),
        (True, "none", None, "none does not fit a weight that was packed with gated=True"),
        (False, "none", (3, 32), r"residual of shape \[3, 32\] must be \[3, 64\]"),
        (False, "none", (2, 64), r"residual of shape \[2, 64\] must be \[3, 64\]"),
        (False, "none", (1, 3, 64), r"residual of shape \[1, 3, 64\] must be \[3, 64\]"),
        (True, "swiglu", (3, 64), r"residual of shape \[3, 64\] must be \[3, 32\]"),
    ],
)
def test_epilogues_that_do_not_fit_are_refused(
    gated: bool, activation: str, shape: tuple[int, ...] | None, message: str, device: str, rng: np.random.Generator
) -> None:
    packed = packed_for(rng, Activation.SWIGLU if gated else Activation.NONE)
    residual = None if shape is None else torch.ones(shape, dtype=torch.float16, device=device)
    x, data = half(rng, 3, K).to(device), packed.data.to(device)
    with pytest.raises(InvalidValueError, match=message):
        torch.ops.w4a16gen.gemm(x, data, None, *ops.facts_of(packed), 1.0, activation, residual)


def test_a_residual_that_is_no_tensor_or_wants_gradients_is_refused(rng: np.random.Generator) -> None:
    packed, x = packed_for(rng, Activation.NONE), half(rng, 3, K)
    with pytest.raises(InvalidValueError, match="residual of type ndarray must be a torch tensor"):
        ops.gemm(x, packed, residual=np.ones((3, N), np.float16))
    with pytest.raises(InvalidValueError, match="the kernels compute no gradients"):
        torch.ops.w4a16gen.gemm(
            x, packed.data, None, *ops.facts_of(packed), 1.0, "none", half(rng, 3, N).requires_grad_()
        )
    y = ops.gemm(x.clone().requires_grad_(), packed, activation="silu")
    with pytest.raises(InvalidValueError, match="the kernels compute no gradients"):
        y.sum().backward()


def test_a_residual_need_not_be_contiguous(rng: np.random.Generator) -> None:
    packed, x = packed_for(rng, Activation.NONE), half(rng, 6, K)
    residual = half(rng, N, 6).t()
    assert torch.equal(ops.gemm(x, packed, residual=residual), ops.gemm(x, packed, residual=residual.contiguous()))


def layer(rng: np.random.Generator, activation: Activation, **more: Any) -> Any:
    return linear.W4A16Linear.from_packed(packed_for(rng, activation), activation=activation, **more)


@pytest.mark.parametrize("activation", [Activation.RELU2, Activation.GEGLU_TANH], ids=str)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_layer_has_an_activation_and_adds_a_residual(
    activation: Activation, dtype: str, rng: np.random.Generator
) -> None:
    made = layer(rng, activation, bias=half(rng, N), alpha=0.5)
    x = half(rng, 2, 3, K).to(getattr(torch, dtype))
    assert made.out_features == (N // 2 if activation.is_gated else N)
    plain = ops.gemm(x.half(), made.weight_of(), made.bias, alpha=0.5, activation=activation)
    assert torch.equal(made(x), plain.to(x.dtype))
    residual = half(rng, 2, 3, made.out_features).to(x.dtype)
    fused = ops.gemm(x.half(), made.weight_of(), made.bias, alpha=0.5, activation=activation, residual=residual.half())
    wanted = fused if dtype == "float16" else plain.to(x.dtype) + residual
    assert torch.equal(made(x, residual), wanted)
    assert made(x, dtype=torch.float16).dtype == torch.float16
    assert f"activation={activation}" in repr(made)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda right: right[0, 0], r"residual of shape \[64\] must be \[2, 3, 64\], like the result"),
        (lambda right: right[..., :1], r"residual of shape \[2, 3, 1\] must be \[2, 3, 64\]"),
        (lambda right: right[None], r"residual of shape \[1, 2, 3, 64\] must be \[2, 3, 64\]"),
        (lambda right: right.double(), "residual of dtype float64 must be .*, like the result: cast it"),
        (lambda right: right.int(), "residual of dtype int32 must be .*, like the result: cast it"),
        (lambda right: right.to("meta"), "residual on meta must be on cpu, like x: move it"),
        (lambda right: right.float().numpy(), r"residual of type ndarray must be a torch tensor of shape \[2, 3, 64\]"),
        (lambda _right: 1.0, "residual of type float must be a torch tensor"),
    ],
)
def test_a_residual_unlike_the_result_is_refused_in_every_dtype(
    change: Any, message: str, dtype: str, rng: np.random.Generator
) -> None:
    made, x = layer(rng, Activation.NONE), half(rng, 2, 3, K).to(getattr(torch, dtype))
    for apart in (False, True):
        with pytest.raises(InvalidValueError, match=message):
            made(x, change(half(rng, 2, 3, N).to(x.dtype)), apart=apart)


@pytest.mark.parametrize("dtype", ["half", torch.int8, 3])
def test_a_result_of_no_floating_dtype_is_refused(dtype: Any, rng: np.random.Generator) -> None:
    with pytest.raises(InvalidValueError, match=r"dtype of .* must be a floating point dtype of torch"):
        layer(rng, Activation.NONE)(half(rng, 3, K), dtype=dtype)


def test_scales_go_past_activations_or_are_refused(rng: np.random.Generator) -> None:
    made, x = layer(rng, Activation.SILU), half(rng, 3, K)
    expected = made(x)
    made.activation_scale = 4.0
    assert torch.equal(made(x), expected)
    made.output_scale = 2.0
    with pytest.raises(InvalidValueError, match=r"output_scale of 2.0 divides what goes into silu: it must be 1"):
        made(x)
    plain = layer(rng, Activation.NONE)
    residual = half(rng, 3, N)
    plain.output_scale = 2.0
    assert torch.equal(plain(x, residual), ops.gemm(x, plain.weight_of(), alpha=0.5) * 2 + residual)


def test_a_state_knows_its_activation(rng: np.random.Generator) -> None:
    silu, plain = layer(rng, Activation.SILU), layer(rng, Activation.NONE)
    stored = io.BytesIO()
    torch.save(silu.state_dict(), stored)
    stored.seek(0)
    other = layer(np.random.default_rng(9), Activation.SILU)
    x = half(rng, 3, K)
    assert not torch.equal(other(x), silu(x))
    other.load_state_dict(torch.load(stored))
    assert torch.equal(other(x), silu(x))
    with pytest.raises(InvalidValueError, match="activation = silu, but this layer has none"):
        plain.load_state_dict(silu.state_dict())
    state = plain.state_dict()
    text = bytes(state["_extra_state"].tolist()).replace(b', "activation": "none"', b"")
    older = state | {"_extra_state": torch.frombuffer(bytearray(text), dtype=torch.uint8)}
    plain.load_state_dict(older)
    with pytest.raises(InvalidValueError, match="activation = none, but this layer has silu"):
        silu.load_state_dict(older)
    assert torch.equal(copy.deepcopy(silu)(x), silu(x))


def test_an_activation_that_does_not_fit_the_weight_is_refused(rng: np.random.Generator) -> None:
    for name, gated in (("swiglu", Activation.NONE), ("silu", Activation.SWIGLU), (None, Activation.SWIGLU)):
        with pytest.raises(InvalidValueError, match="gated=True"):
            linear.W4A16Linear.from_packed(packed_for(rng, gated), activation=name)
