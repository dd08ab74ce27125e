"""humming's layers of experts, with a stand-in that reads the routes and the weights as humming describes them."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from fakes.humming import kernel_taken
from fakes.mixtures import DIVIDED, MODE, TINY, WITH_ZEROS, HostLibrary, few_layers, measured
from fakes.words import unpacked

from w4a16gen.measure import stage
from w4a16gen.measure.models import Mixture
from w4a16gen.measure.moe_entrants import Drawn, Routing, Work, copies_of
from w4a16gen.measure.moe_humming import NAME, HummingLayers, humming_entrant, sort_routes

torch: Any = pytest.importorskip("torch")

BLOCK, LARGE_BLOCK = 16, 32
"""Rows of a block of humming's kernels for at most FEW rows, and of those for more."""
FEW = 6
CPU = torch.device("cpu")


class HummingLayer:
    """Multiplies rows of blocks by the weight of the block's expert, and writes a row for each route."""

    made = 0
    """Layers that were prepared, by any test."""
    calls: ClassVar[list[tuple[int, int, str]]] = []
    """The rows that calls were estimated to have, those of their blocks, and what they chose their kernel by."""

    def __init__(
        self, *, shape_n: int, shape_k: int, weight_config: dict[str, Any], num_experts: int, torch_dtype: Any
    ) -> None:
        assert torch_dtype is torch.float16
        assert weight_config == {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}
        self.humming_config = SimpleNamespace(shape=(num_experts, shape_n, shape_k))
        self.dense: list[Any] = []
        self.factor = 1.0
        HummingLayer.made += 1

    def to(self, _device: Any) -> HummingLayer:
        return self

    def load_from_tensors(self, tensors: dict[str, Any]) -> None:
        for words, scales, zeros, index in zip(
            *(tensors[name] for name in ("qweight", "scales", "qzeros", "g_idx")), strict=True
        ):
            points = unpacked(zeros.T.contiguous()).T + 1
            self.dense.append((unpacked(words) - points[index.long()]) * scales.float()[index.long()])

    def transform(self) -> None:
        experts, n, k = self.humming_config.shape
        assert len(self.dense) == experts
        assert self.dense[0].shape == (k, n)

    def __call__(self, a: Any, **given: Any) -> None:
        assert json.loads(given["compute_config"]) == {"gemm_type": "indexed"}
        rows = kernel_taken(given["tuning_config"], given["valid_shape_m"])["block_shape"][0]
        self.calls.append((given["valid_shape_m"], rows, given["tuning_config"]))
        outputs, ids = given["outputs"], given["sorted_ids"]
        assert given["num_tokens_padded"].tolist() == [len(ids)]
        outputs.fill_(float("nan"))  # rows without a route hold anything
        for block, expert in zip(ids.view(-1, rows), given["expert_ids"].tolist(), strict=True):
            routes = block[block < a.shape[0] * given["top_k"]].long()
            product = a[routes // given["top_k"]].float() @ self.dense[expert]
            outputs[routes] = (product * self.factor).half()


@pytest.fixture(autouse=True)
def blocks(monkeypatch: pytest.MonkeyPatch) -> dict[Any, int]:
    """Install a stand-in; return the rows of a block of few rows by the size of the layer, 16 unless they are set."""
    few_layers(monkeypatch)
    sizes: dict[Any, int] = {}

    def table(config: Any, *, gemm_type: str, device: Any) -> list[list[Any]]:
        assert (gemm_type, device) == ("indexed", CPU)
        blocks = sizes.get(config.shape[1], BLOCK), LARGE_BLOCK, 2 * LARGE_BLOCK
        kernels = [{"block_shape": [rows, 128, 64]} for rows in blocks]
        return [[0, FEW, kernels[0]], [FEW, 4 * FEW, kernels[1]], [4 * FEW, 1 << 30, kernels[2]]]

    HummingLayer.calls.clear()

    monkeypatch.setitem(sys.modules, "humming.layer", SimpleNamespace(HummingLayer=HummingLayer))
    monkeypatch.setitem(sys.modules, "humming.tune", SimpleNamespace(get_heuristics_config=table))
    return sizes


@pytest.mark.parametrize("mixture", [TINY, DIVIDED], ids=["whole", "divided"])
def test_it_computes_the_layer_and_is_timed(mixture: Mixture) -> None:
    for point in measured(HostLibrary(), mixture, (1, 40), humming=True).points:
        assert not point.left_out
        timing = point.timing(NAME)
        assert timing is not None
        assert 0 < timing.error < 0.003


def test_each_copy_of_the_weights_is_read() -> None:
    drawn = Drawn(torch, TINY, MODE, CPU)
    work = Work(drawn, 3, 6, 2)
    launches = humming_entrant(drawn, lambda function, **_: function, [3]).prepare(work)
    assert len(launches) == 6
    expected = [launch().clone() for launch in launches[:2]]
    assert not torch.equal(*expected), "two routings take turns"
    layers = launches[0].func.__closure__  # type: ignore[attr-defined]
    copies = next(cell.cell_contents for cell in layers if hasattr(cell.cell_contents, "_copies"))._copies  # noqa: SLF001
    assert len(copies) > 1
    copies[1][1].factor = 2.0
    assert not torch.equal(launches[1](), expected[1])
    assert torch.equal(launches[0](), expected[0])


def test_weights_are_prepared_once_and_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "COLD_BYTES", 2e6)
    drawn, made = Drawn(torch, TINY, MODE, CPU), HummingLayer.made
    layers = HummingLayers(drawn, lambda function, **_: function, [3])
    for _ in range(2):
        layers.prepare(Work(drawn, 3, 6, 2))
        copies = layers._copies  # noqa: SLF001
        assert len(copies) == copies_of(TINY, 3, (256 * 256 + 256 * 128) // 2) > 2
    assert HummingLayer.made == made + 2, "one for each product"
    assert len({id(layer) for copy in copies for layer in copy}) == 2 * len(copies)


def test_rows_are_estimated_for_the_experts_here() -> None:
    drawn = Drawn(torch, DIVIDED, MODE, CPU)
    HummingLayers(drawn, lambda function, **_: function, [3]).prepare(Work(drawn, 3, 1, 1))[0]()
    assert [rows for rows, *_ in HummingLayer.calls] == [3] * 2, "half of the experts, for 3 tokens with 2 routes each"


@pytest.mark.parametrize("mixture", [TINY, DIVIDED], ids=["whole", "divided"])
def test_kernels_of_all_numbers_of_tokens_are_compiled_at_once_and_each_takes_its_own(mixture: Mixture) -> None:
    few, more = FEW // 2, FEW // 2 + 1  # tokens, which have two routes each
    measured(HostLibrary(), mixture, (few, more), humming=True)
    first, *others = HummingLayer.calls
    assert {(rows, block) for rows, block, _ in HummingLayer.calls} == {(FEW, BLOCK), (FEW + 2, LARGE_BLOCK)}
    assert {tuning for *_, tuning in others} == {first[-1]}
    assert len(json.loads(first[-1])) == 2, "none of more rows"


def test_routes_are_sorted_for_the_blocks_of_each_product(blocks: dict[Any, int]) -> None:
    blocks[TINY.hidden_size] = 8  # of the down projection: gate and up have 512 channels
    (point,) = measured(HostLibrary(), replace(TINY, intermediate_size=256), humming=True).points
    assert NAME not in point.left_out
    assert {block for _, block, _ in HummingLayer.calls} == {8, BLOCK}


def test_a_number_of_tokens_that_nobody_announced_takes_its_own_kernel_too() -> None:
    drawn = Drawn(torch, TINY, MODE, CPU)
    HummingLayers(drawn, lambda function, **_: function, [1]).prepare(Work(drawn, FEW, 1, 1))[0]()
    assert {(rows, block) for rows, block, _ in HummingLayer.calls} == {(2 * FEW, LARGE_BLOCK)}


def test_the_routes_of_an_expert_follow_one_another_and_blocks_belong_to_one() -> None:
    ids = torch.tensor([[3, 1], [0, 3], [3, 2], [1, 3]], dtype=torch.int32)
    found = sort_routes(torch, Routing(ids, None), None, 4, 3)
    assert found.routes.view(-1, 3).tolist() == [[2, 8, 8], [1, 6, 8], [5, 8, 8], [0, 3, 4], [7, 8, 8]]
    assert found.experts.tolist() == [0, 1, 2, 3, 3]
    assert found.rows.tolist() == [15]
    assert {tensor.dtype for tensor in vars(found).values()} == {torch.int32}
    here = torch.tensor([-1, 1, -1, 0], dtype=torch.int32)
    found = sort_routes(torch, Routing(ids, None), here, 2, 4)
    assert found.routes.view(-1, 4).tolist() == [[0, 3, 4, 7], [1, 6, 8, 8]]
    assert found.experts.tolist() == [0, 1]
    nowhere = sort_routes(torch, Routing(ids[:1], None), torch.full((4,), -1, dtype=torch.int32), 2, 4)
    assert nowhere.rows.tolist() == [0]


@pytest.mark.parametrize("is_installed", [False, True])
def test_it_takes_part_where_it_is_installed(is_installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if is_installed and name == "humming" else None)
    (point,) = measured(HostLibrary(), humming=None).points
    assert not point.left_out
    assert (point.timing(NAME) is not None) is is_installed


def test_a_wrong_product_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HummingLayer, "transform", lambda layer: setattr(layer, "factor", 1.1))
    (point,) = measured(HostLibrary(), humming=True).points
    assert "what rounding explains" in point.left_out[NAME]


def test_what_it_cannot_do_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    (point,) = measured(HostLibrary(), mode=WITH_ZEROS, humming=True).points
    assert "no form of integers" in point.left_out[NAME]
    for module in ("humming", "humming.layer", "humming.tune"):
        monkeypatch.setitem(sys.modules, module, None)
    (point,) = measured(HostLibrary(), humming=True).points
    assert point.left_out[NAME].endswith("pip install humming-kernels")
