"""The operator `w4a16gen::gemm` on the CPU: what the dispatcher, the compiler and the exporter rely on."""

from __future__ import annotations

import importlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import w4a16gen
from w4a16gen import InvalidValueError, QuantMode
from w4a16gen.weights.reference import random_weight

torch = pytest.importorskip("torch")
ops = pytest.importorskip("w4a16gen.integrations.torch.ops")
N, K, GROUP = 64, 256, 128


@pytest.fixture(params=QuantMode, ids=str)
def packed(request: pytest.FixtureRequest, rng: np.random.Generator) -> Any:
    """Return a packed weight of each mode, in torch's memory."""
    group = GROUP if request.param.is_grouped else K
    return ops.on_torch(w4a16gen.pack_weight(random_weight(rng, N, K, group, request.param)))


def half(rng: np.random.Generator, *shape: int) -> Any:
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float16))


def arguments(packed: Any, x: Any, bias: Any = None, alpha: float = 1.0) -> tuple[Any, ...]:
    return x, packed.data, bias, *ops.facts_of(packed), alpha


@pytest.mark.parametrize("leading", [(), (1,), (5,), (2, 3), (2, 0, 3), (0,), (1, 2, 1, 3)])
def test_leading_dimensions_are_kept(packed: Any, leading: tuple[int, ...], rng: np.random.Generator) -> None:
    x, bias = half(rng, *leading, K), half(rng, N)
    got = ops.gemm(x, packed, bias, alpha=0.5)
    expected = w4a16gen.gemm(x.reshape(-1, K), packed, bias=bias, alpha=0.5)
    assert got.shape == (*leading, N)
    assert torch.equal(got.reshape(-1, N), expected)


def test_opcheck_passes(packed: Any, rng: np.random.Generator) -> None:
    for shape in ((3, K), (2, 3, K), (0, K)):
        for bias in (None, half(rng, N)):
            for operator in (torch.ops.w4a16gen.gemm.default, torch.ops.w4a16gen.gemm_forward_only.default):
                torch.library.opcheck(operator, arguments(packed, half(rng, *shape), bias, 2.0))


def test_activations_need_not_be_contiguous_or_aligned(packed: Any, rng: np.random.Generator) -> None:
    x = half(rng, K, 6).t()
    shifted = half(rng, 6 * K + 1)[1:].view(6, K)
    for given in (x, x[::2], x.view(2, 3, K).transpose(0, 1), shifted):
        assert torch.equal(ops.gemm(given, packed), ops.gemm(given.contiguous().clone(), packed))


def test_the_result_of_tracing_has_the_shape_of_the_result(packed: Any) -> None:
    x = torch.empty(2, 3, K, dtype=torch.float16, device="meta")
    weight = torch.empty_like(packed.data, device="meta")
    got = torch.ops.w4a16gen.gemm(x, weight, None, *ops.facts_of(packed), 1.0)
    assert (got.shape, got.dtype, got.device.type) == ((2, 3, N), torch.float16, "meta")


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((3, K), "bfloat16", "x of dtype bfloat16 must be float16: cast it"),
        ((3, K), "float32", "x of dtype float32 must be float16"),
        ((3, N), "float16", r"x of shape \[3, 64\] must be \[..., 256\]"),
        ((), "float16", r"x of shape \[\] must be \[..., 256\]"),
    ],
)
def test_activations_that_do_not_fit_are_refused(
    packed: Any, device: str, shape: tuple[int, ...], dtype: str, message: str
) -> None:
    x = torch.ones(shape, dtype=getattr(torch, dtype), device=device)
    with pytest.raises(InvalidValueError, match=message):
        torch.ops.w4a16gen.gemm(x, packed.data.to(device), None, *ops.facts_of(packed), 1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 128}, "packed data of .* bytes must be"),
        ({"layout": "rows"}, "the weight is packed as 'rows', which is not one of"),
        ({"mode": "int8"}, "'int8' is not one of cs, fgs, fgsz"),
        ({"bias": "short"}, r"bias of shape \[63\] must be \[64\]"),
    ],
)
def test_facts_that_contradict_the_weight_are_refused(
    change: dict[str, Any], message: str, rng: np.random.Generator
) -> None:
    weight = random_weight(rng, N, K, GROUP, QuantMode.FINEGRAINED_SCALE_ONLY)
    packed = ops.on_torch(w4a16gen.pack_weight(weight))
    facts = dict(zip(("n", "k", "group_size", "mode", "layout"), ops.facts_of(packed), strict=True))
    bias = half(rng, 63) if change.pop("bias", None) else None
    with pytest.raises(InvalidValueError, match=message):
        torch.ops.w4a16gen.gemm(half(rng, 3, K), packed.data, bias, *(facts | change).values(), 1.0)


def test_a_backward_pass_is_refused_though_the_forward_pass_runs(packed: Any, rng: np.random.Generator) -> None:
    x = half(rng, 2, 3, K)
    expected = ops.gemm(x, packed)
    for function in (ops.gemm, torch.compile(ops.gemm, fullgraph=True, backend="aot_eager")):
        y = function(x.clone().requires_grad_(), packed)
        assert torch.equal(y.detach(), expected)
        with pytest.raises(InvalidValueError, match="the kernels compute no gradients"):
            y.sum().backward()
    with pytest.raises(InvalidValueError, match="which refuses only backward"):
        torch.ops.w4a16gen.gemm(*arguments(packed, x.clone().requires_grad_()))
    with torch.no_grad():
        torch.ops.w4a16gen.gemm(*arguments(packed, x.clone().requires_grad_()))
        assert not ops.gemm(x.clone().requires_grad_(), packed).requires_grad


def test_loading_the_module_again_registers_nothing_twice(rng: np.random.Generator) -> None:
    packed = ops.on_torch(w4a16gen.pack_weight(random_weight(rng, N, K, GROUP, QuantMode.FINEGRAINED_SCALE_ONLY)))
    x = half(rng, 3, K)
    expected = ops.gemm(x, packed)
    importlib.reload(ops)
    assert torch.equal(ops.gemm(x, packed), expected)
    command = "import runpy, w4a16gen.integrations.torch as t; runpy.run_path(t.ops.__file__); print(t.ops._library)"
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-W", "ignore", "-c", command], capture_output=True, text=True, check=True
    )
    assert "Library" in done.stdout


def test_the_package_imports_no_torch() -> None:
    command = (
        "import sys, w4a16gen; [getattr(w4a16gen, name) for name in w4a16gen.__all__]; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)  # noqa: S603
    assert done.stdout == "False\n"
