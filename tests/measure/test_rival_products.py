"""The form in which each rival is given a weight, read back by stand-ins that follow the rivals' own descriptions."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from fakes.humming import kernel_taken
from fakes.words import unpacked

from w4a16gen import Problem, QuantMode
from w4a16gen.errors import UnsupportedProblemError
from w4a16gen.measure.rival_products import (
    cublas_products,
    humming_products,
    quack_products,
    tinygemm_products,
    turbomind_products,
)
from w4a16gen.measure.rivals import relative_error
from w4a16gen.measure.torch_weight import TorchWeight
from w4a16gen.weights.importers.gptq import gptq_words

torch: Any = pytest.importorskip("torch", reason="rivals run through torch, which is not installed")

SYMMETRIC, WITH_ZEROS = QuantMode.FINEGRAINED_SCALE_ONLY, QuantMode.FINEGRAINED_SCALE_AND_ZEROS
M, N, K = 5, 128, 512


def drawn(mode: QuantMode = SYMMETRIC, group_size: int = 128, *, n: int = N) -> TorchWeight:
    return TorchWeight.drawn(torch, Problem(0, n, K, group_size), mode, 7, torch.device("cpu"))


def everything(weight: TorchWeight) -> Any:
    return weight.channels(np.arange(weight.n))


def activations(dtype: Any, m: int = M) -> Any:
    return torch.randn((m, K), generator=torch.Generator().manual_seed(3)).to(dtype)


def error_of(product: Any, a: Any, weight: TorchWeight) -> float:
    exact = a.double().numpy() @ everything(weight).dequantize().T
    return relative_error(product(a).double().numpy(), exact)


@pytest.mark.parametrize("mode", QuantMode, ids=str)
def test_a_drawn_weight_is_canonical_and_the_same_for_a_seed(mode: QuantMode) -> None:
    weight = drawn(mode, 128 if mode.is_grouped else K)
    host = everything(weight)
    assert (host.mode, host.n, host.k, host.group_size) == (mode, N, K, 128 if mode.is_grouped else K)
    assert set(np.unique(host.q)) == set(range(16))
    assert np.all((host.scales >= 0.0049) & (host.scales <= 0.0201))
    some = weight.channels(np.array([3, 100]))
    assert np.array_equal(some.dequantize(), host.dequantize()[[3, 100]])
    again = everything(drawn(mode, host.group_size))
    assert np.array_equal(again.dequantize(), host.dequantize())
    copied = everything(TorchWeight.of(torch, host, torch.device("cpu")))
    assert np.array_equal(copied.dequantize(), host.dequantize())


def test_words_and_pairs_are_those_of_checkpoints() -> None:
    weight = drawn()
    q = everything(weight).q
    assert np.array_equal(weight.gptq_words().numpy(), gptq_words(q.T.copy(), 0))
    assert np.array_equal(unpacked(weight.gptq_words()).numpy(), q.T)
    assert np.array_equal(weight.pairs(first_low=True).numpy(), q[:, ::2] | q[:, 1::2] << 4)
    assert np.array_equal(weight.pairs(first_low=False).numpy(), q[:, ::2] << 4 | q[:, 1::2])


@pytest.mark.parametrize("mode", [QuantMode.PER_COLUMN_SCALE_ONLY, SYMMETRIC], ids=str)
def test_cublas_multiplies_by_the_dequantised_weight(mode: QuantMode) -> None:
    weight = drawn(mode, 128 if mode.is_grouped else K)
    products = cublas_products(activations(torch.float16), weight, 3)
    assert len(products) == 3
    for product in products:
        assert error_of(product, activations(torch.float16), weight) < 0.002


class HummingLayer:
    """Multiplies by what it was loaded with, read as a symmetric GPTQ weight."""

    tunings: ClassVar[list[str]] = []
    """What calls were given."""

    def __init__(self, *, shape_n: int, shape_k: int, weight_config: dict[str, Any], torch_dtype: Any) -> None:
        assert (shape_n, shape_k, torch_dtype) == (N, K, torch.float16)
        assert weight_config == {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}
        self.humming_config = (shape_n, shape_k)
        self.dense: Any = None

    def to(self, _device: Any) -> HummingLayer:
        return self

    def load_from_tensors(self, tensors: dict[str, Any]) -> None:
        points = unpacked(tensors["qzeros"].T.contiguous()).T + 1
        scales, groups = tensors["scales"].float(), tensors["g_idx"].long()
        self.dense = (unpacked(tensors["qweight"]) - points[groups]) * scales[groups]

    def transform(self) -> None:
        """Do nothing: only humming's own layout needs it."""

    def __call__(self, a: Any, *, outputs: Any, tuning_config: str) -> None:
        self.tunings.append(tuning_config)
        outputs.copy_(a.float() @ self.dense)


@pytest.fixture
def humming(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Install a stand-in for humming; return what its layers' calls are given to choose their kernel by."""

    def table(config: Any, *, device: Any) -> list[list[Any]]:
        assert (config, device) == ((N, K), torch.device("cpu"))
        return [[0, 1, "one"], [1, 4, "few"], [4, 8, "more"], [8, 1 << 30, "many"]]

    monkeypatch.setitem(sys.modules, "humming.layer", SimpleNamespace(HummingLayer=HummingLayer))
    monkeypatch.setitem(sys.modules, "humming.tune", SimpleNamespace(get_heuristics_config=table))
    HummingLayer.tunings.clear()
    return HummingLayer.tunings


@pytest.mark.parametrize(
    ("rows", "kernel"), [(1, "one"), (2, "few"), (4, "few"), (5, "more"), (8, "more"), (9, "many"), (9000, "many")]
)
def test_humming_compiles_only_the_kernel_of_its_own_choice(humming: list[str], rows: int, kernel: str) -> None:
    a = activations(torch.float16, rows)
    for product in humming_products(a, drawn(), 2):
        product(a)
    assert len(humming) == 2
    for tuning in humming:
        assert kernel_taken(tuning, rows) == kernel
        assert len(json.loads(tuning)) == 1


@pytest.mark.usefixtures("humming")
def test_humming_gets_gptqs_form() -> None:
    weight, a = drawn(), activations(torch.float16)
    products = humming_products(a, weight, 2)
    assert len(products) == 2
    assert max(error_of(product, a, weight) for product in products) < 0.002


class Quack:
    """Multiplies by pairs of values, the first in the low half, and one bf16 scale per channel and group."""

    def __init__(self) -> None:
        self.outputs: set[bool] = set()

    def prepare_w4_weight(self, pairs: Any, scales: Any, form: str) -> tuple[Any, Any]:
        assert form == {128: "int4", 64: "int4_g64", 32: "int4_g32"}[2 * pairs.shape[1] // scales.shape[1]]
        return pairs, scales

    def gemm_w4a16(self, a: Any, blob: Any, strip: Any, *, out: Any, n_out: int, wformat: str) -> Any:
        assert a.dtype is torch.bfloat16
        assert n_out == blob.shape[0]
        assert wformat.startswith("int4")
        self.outputs.add(out is not None)
        q = torch.stack([blob & 15, blob >> 4], -1).reshape(n_out, -1).float()
        dense = (q - 8) * strip.float().repeat_interleave(q.shape[1] // strip.shape[1], 1)
        product = (a.float() @ dense.T).to(torch.bfloat16)
        return product if out is None else out.copy_(product)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_quack_gets_pairs_and_bf16_scales(group_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    quack = Quack()
    monkeypatch.setitem(sys.modules, "quack.gemm_w4", quack)
    a = activations(torch.bfloat16)
    for n in (N, N + 64):
        weight = drawn(group_size=group_size, n=n)
        assert max(error_of(product, a, weight) for product in quack_products(a, weight, 2)) < 0.01
    assert quack.outputs == {True, False}, "an output of padded channels is QuACK's own"


class Linear:
    """Multiplies by a GPTQ weight without zero points, which are 8."""

    graphs = True

    def get_weight_plan(self, *, weight_format: Any, dtype: Any) -> Any:
        assert dtype is torch.float16
        return weight_format

    def prepare_weight(self, words: Any, *, plan: int, scales: Any) -> Any:
        dense = (unpacked(words) - 8) * scales.float().repeat_interleave(plan, 0)
        return SimpleNamespace(dense=dense, is_graph_compatible=self.graphs)

    def tune(self, a: Any, weight: Any) -> tuple[str, Any, None]:
        return "plan", torch.empty((a.shape[0], weight.dense.shape[1]), dtype=a.dtype), None

    def __call__(self, a: Any, weight: Any, *, exec_plan: str, out: Any) -> None:
        assert exec_plan == "plan"
        out.copy_(a.float() @ weight.dense)


def turbomind(monkeypatch: pytest.MonkeyPatch, linear: type[Linear]) -> None:
    monkeypatch.setitem(sys.modules, "lmdeploy.turbomind.linear", SimpleNamespace(Linear=linear))
    formats = SimpleNamespace(GPTQFormat=lambda *, block_in: block_in)
    monkeypatch.setitem(sys.modules, "lmdeploy.turbomind.weight_format", formats)


def test_turbomind_gets_gptqs_form_and_must_be_fit_for_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    turbomind(monkeypatch, Linear)
    weight, a = drawn(), activations(torch.float16)
    assert max(error_of(product, a, weight) for product in turbomind_products(a, weight, 2)) < 0.002
    turbomind(monkeypatch, type("Ungraphed", (Linear,), {"graphs": False}))
    with pytest.raises(UnsupportedProblemError, match="cannot be captured"):
        turbomind_products(a, weight, 2)


def test_what_a_rival_has_no_form_for_is_said_before_it_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("humming.layer", "quack.gemm_w4", "lmdeploy.turbomind.linear", "lmdeploy.turbomind.weight_format"):
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(HummingLayer=None, Linear=None))
    for prepare in (humming_products, quack_products, turbomind_products):
        with pytest.raises(UnsupportedProblemError, match="no form of integers"):
            prepare(None, drawn(WITH_ZEROS), 1)
    with pytest.raises(UnsupportedProblemError, match="groups of 32, 64 and 128"):
        quack_products(None, drawn(group_size=256), 1)
    with pytest.raises(UnsupportedProblemError, match="groups of 32, 64, 128 and 256"):
        tinygemm_products(None, drawn(group_size=512), 1)


def test_a_rival_that_is_not_installed_is_an_import_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("humming.layer", "quack.gemm_w4", "lmdeploy.turbomind.linear"):
        monkeypatch.setitem(sys.modules, module, None)
    for prepare in (humming_products, quack_products, turbomind_products):
        with pytest.raises(ImportError):
            prepare(None, drawn(), 1)
