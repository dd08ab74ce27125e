"""What the plug-ins share: the order of K, the words, the store, the reasons against a layer."""

from __future__ import annotations

import doctest
import importlib
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from fakes.checkpoints import packers  # noqa: E402
from fakes.engine_layers import StoredWeight, activations, assert_is_product  # noqa: E402
from fakes.library import FakeLibrary, record  # noqa: E402

from w4a16gen import Epilogue, InvalidValueError, KernelConfig, QuantMode, UnsupportedProblemError  # noqa: E402
from w4a16gen.integrations.engines import limits, words  # noqa: E402
from w4a16gen.integrations.engines.experts import pack_projection  # noqa: E402
from w4a16gen.integrations.engines.layer import RawLayer, pack_layer, product  # noqa: E402
from w4a16gen.integrations.engines.limits import (  # noqa: E402
    ExpertsRequest,
    LayerRequest,
    why_experts_not_served,
    why_not_served,
)
from w4a16gen.integrations.engines.order import Order, plan_act_order, plan_order  # noqa: E402
from w4a16gen.integrations.engines.parameters import matrix_of  # noqa: E402
from w4a16gen.integrations.engines.store import LayerStore  # noqa: E402
from w4a16gen.integrations.engines.switch import register_safely  # noqa: E402
from w4a16gen.integrations.torch import nibbles  # noqa: E402
from w4a16gen.kernels.spaces import enumerate_space, with_epilogues  # noqa: E402
from w4a16gen.runtime.folders import BUILD_FOLDER_VARIABLE  # noqa: E402
from w4a16gen.weights.experts import pack_experts  # noqa: E402


def groups_of(order: Order, groups: Any) -> None:
    """Fail unless each group of the packed K holds values of one row of scales, and each value of K is there once."""
    k = len(groups)
    index = torch.arange(order.k) if order.index is None else order.index
    assert len(index) == order.k
    assert sorted(index[index < k].tolist()) == list(range(k))
    for row, places in zip(order.rows.tolist(), index.view(-1, order.group_size), strict=True):
        assert set(groups[places[places < k]].tolist()) <= {row}


@pytest.mark.parametrize("k", [64, 128, 104, 1712, 344])
@pytest.mark.parametrize("group_size", [16, 32, 48, 128, 4096])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_every_group_of_the_packed_order_has_one_scale(k: int, group_size: int, rank: int) -> None:
    order = plan_order(k, group_size, start=rank * k)
    groups_of(order, (torch.arange(k) + rank * k) // group_size)
    assert order.group_size % 32 == 0 or order.group_size == order.k


@pytest.mark.parametrize("group_size", [16, 32, 128])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_act_order_is_sorted_or_padded(group_size: int, ranks: int, rng: np.random.Generator) -> None:
    groups = torch.from_numpy(rng.permutation(np.repeat(np.arange(8), group_size)).astype(np.int32))
    for part in groups.chunk(ranks):
        order = plan_act_order(part, group_size)
        groups_of(order, part)
        assert (order.k == len(part)) or ranks > 1 or group_size == 16


def test_groups_in_order_need_no_gather() -> None:
    assert plan_act_order(torch.arange(256) // 64, 64).index is None


def test_negative_groups_are_refused() -> None:
    with pytest.raises(UnsupportedProblemError, match="negative"):
        plan_act_order(torch.full((64,), -1), 32)


def test_words_are_read_as_their_writers_wrote_them(rng: np.random.Generator) -> None:
    for rows in (1, 8, 24):
        values = rng.integers(0, 16, (rows, 32)).astype(np.uint8)
        plain, awq = torch.from_numpy(packers.along_columns(values)), torch.from_numpy(packers.awq_gemm_words(values))
        assert torch.equal(nibbles.expand(plain), torch.from_numpy(values))
        assert torch.equal(words.awq_points(awq), torch.from_numpy(values))
        if rows > 1:
            assert torch.equal(nibbles.expand_awq(awq), torch.from_numpy(values).t())
    column = torch.from_numpy(packers.along_rows(values[:8]))  # one row of words, whose transpose has one column
    assert torch.equal(nibbles.expand(column.t()), torch.from_numpy(values[:8].T.copy()))


@pytest.mark.parametrize("exponent", [-20, 0, 20])
def test_scales_out_of_range_become_alpha(exponent: int, rng: np.random.Generator) -> None:
    stored = StoredWeight.random(rng, 16, 64, 32, is_symmetric=False)
    scales = torch.from_numpy(stored.scales).float() * 2.0**exponent
    raw = RawLayer(torch.from_numpy(stored.q), scales, torch.from_numpy(stored.points))
    layer = pack_layer(raw, plan_order(64, 32))
    x = activations(rng, 2, 64) * 2.0 ** (-exponent // 2)
    assert (layer.call.alpha == 1) is (exponent == 0)
    assert_is_product(product(layer.packed, x, None, layer.call), x, stored.dequantized() * 2.0**exponent)


def test_layers_that_cannot_be_packed_name_the_way_out() -> None:
    raw = RawLayer(torch.zeros(16, 64, dtype=torch.uint8), torch.full((2, 16), torch.inf))
    with pytest.raises(InvalidValueError, match=r"model\.up cannot be packed: .* set W4A16GEN_PLUGINS=off"):
        pack_layer(raw, plan_order(64, 32), name="model.up")
    for scales, part in ((torch.ones(2, 8), "must be [rows, 16]"), (torch.ones(1, 16), "too few")):
        with pytest.raises(InvalidValueError) as caught:
            pack_layer(RawLayer(raw.q, scales), plan_order(64, 32))
        assert part in str(caught.value)


def test_a_reload_of_another_shape_is_refused(rng: np.random.Generator) -> None:
    store, module = LayerStore("qweight"), torch.nn.Module()
    module.register_buffer("qweight", torch.zeros(1))
    for group, alpha in ((32, 1.0), (64, 1.0), (32, 2.0**-24)):
        stored = StoredWeight.random(rng, 16, 64, group)
        raw = RawLayer(torch.from_numpy(stored.q), torch.from_numpy(stored.scales).float() / alpha)
        layer = pack_layer(raw, plan_order(64, group))
        if group == 32 and alpha == 1:
            store.fill(module, layer)
        else:
            with pytest.raises(InvalidValueError, match="captured graphs hold those: restart the engine"):
                store.fill(module, layer)


def test_parameters_of_unknown_releases_are_refused() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2, 2), requires_grad=False)
    with pytest.raises(InvalidValueError, match="neither input_dim nor output_dim"):
        matrix_of("scales", parameter)
    with pytest.raises(InvalidValueError, match="must have two dimensions"):
        matrix_of("scales", torch.nn.Parameter(torch.zeros(2), requires_grad=False))
    parameter.input_dim, parameter.packed_dim = 0, 0
    with pytest.raises(InvalidValueError, match="must be packed along the output dimension"):
        matrix_of("qzeros", parameter, packed="output")
    assert matrix_of("qweight", parameter, packed="input").shape == (2, 2)


def request(**changes: Any) -> LayerRequest:
    values: dict[str, Any] = {
        "n": 64,
        "k": 256,
        "group_size": 64,
        "has_zeros": False,
        "dtype": "torch.float16",
        "capability": (9, 0),
    }
    return LayerRequest(**(values | changes))


def use(monkeypatch: pytest.MonkeyPatch, kernels: list[KernelConfig]) -> None:
    library = FakeLibrary(kernels, compute=record)
    monkeypatch.setattr(limits, "library_in_use", lambda: library)


def test_a_build_with_the_mode_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = list(enumerate_space("trtllm-native"))
    use(monkeypatch, [kernel for kernel in kernels if str(kernel.mode) == "fgs"][:3])
    assert why_not_served(request()) is None
    assert why_not_served(request(group_size=96, k=104, regroups=True)) is None
    assert "the build holds no native kernel of mode fgsz: build one" in str(why_not_served(request(has_zeros=True)))
    assert "of mode cs" in str(why_not_served(request(group_size=-1)))


def test_kernels_with_epilogues_serve_no_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, with_epilogues(enumerate_space("default"), [Epilogue.ELEMENTWISE, Epilogue.GATED]))
    assert "the build holds no native kernel of mode fgs: build one" in str(why_not_served(request()))


def test_without_a_build_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("w4a16gen.runtime.default._InUse.library", None)
    monkeypatch.setenv(BUILD_FOLDER_VARIABLE, str(tmp_path))
    reason = why_not_served(request())
    assert reason is not None
    assert reason.startswith("no build can be used: ")
    assert "w4a16gen build" in reason
    assert list(tmp_path.iterdir()) == []


def test_a_plug_in_that_breaks_says_so(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("w4a16gen.test")

    def broken() -> str:
        raise RuntimeError("the engine has changed")

    with caplog.at_level("INFO", logger="w4a16gen.test"):
        register_safely(logger, "an engine", broken)
    assert [record.message for record in caplog.records] == [
        "w4a16gen leaves an engine alone: RuntimeError: the engine has changed"
    ]


def experts_request(**changes: Any) -> ExpertsRequest:
    values: dict[str, Any] = {
        "experts": 8,
        "hidden": 256,
        "intermediate": 128,
        "group_size": 64,
        "has_zeros": False,
        "activation": "silu",
        "dtype": "torch.bfloat16",
        "capability": (9, 0),
    }
    return ExpertsRequest(**(values | changes))


def experts_kernels(mode: str = "fgs", *epilogues: Epilogue) -> list[KernelConfig]:
    kernels = with_epilogues(enumerate_space("experts"), epilogues or (Epilogue.NONE, Epilogue.GATED))
    return [kernel for kernel in kernels if str(kernel.mode) == mode]


def test_a_build_with_grouped_kernels_is_asked_and_need_not_apply_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, experts_kernels())
    assert why_experts_not_served(experts_request()) is None
    assert why_experts_not_served(experts_request(group_size=128)) is None, "all of k in the down projection"
    use(monkeypatch, experts_kernels("cs"))
    assert why_experts_not_served(experts_request(group_size=-1)) is None
    use(monkeypatch, experts_kernels("fgs", Epilogue.NONE))
    assert why_experts_not_served(experts_request()) is None
    for mode, epilogues, wanted in (
        ("fgs", [Epilogue.GATED], "mode fgs with epilogue none"),
        ("fgsz", [], "mode fgs with epilogue gated"),
    ):
        use(monkeypatch, experts_kernels(mode, *epilogues))
        reason = str(why_experts_not_served(experts_request()))
        assert f"the build has no grouped kernel of {wanted}: run `w4a16gen build --space default" in reason


def test_without_a_build_experts_are_left_to_the_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("w4a16gen.runtime.default._InUse.library", None)
    monkeypatch.setenv(BUILD_FOLDER_VARIABLE, str(tmp_path))
    assert str(why_experts_not_served(experts_request())).startswith("no build can be used: ")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"experts": 1025}, "experts of 1025 on one GPU must be 1 to 1024: use more GPUs"),
        ({"activation": "relu2"}, "experts with activation relu2 must have one of silu, gelu, gelu_tanh"),
        ({"intermediate": 132}, "k of 132 must be a positive multiple of 8"),
        ({"group_size": 48}, "group size 48 must be 256 (= k) or a multiple of 32 that divides k"),
        ({"intermediate": 96, "group_size": 64}, "group size 64 must be 96 (= k) or a multiple of 32 that divides k"),
        ({"capability": (10, 0)}, "compute capability 10.0 must be 9.0"),
        ({"dtype": "float32"}, "activations of dtype float32 must be float16 or bfloat16"),
    ],
    ids=str,
)
def test_experts_that_no_kernel_takes_have_a_reason(
    changes: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, experts_kernels())
    assert str(why_experts_not_served(experts_request(**changes))).startswith(reason)


@pytest.mark.parametrize("is_symmetric", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_packed_projections_have_the_bytes_of_pack_experts(
    gated: bool, is_symmetric: bool, rng: np.random.Generator
) -> None:
    stored = [StoredWeight.random(rng, 64, 128, 32, is_symmetric=is_symmetric) for _ in range(3)]
    raw = [
        RawLayer(*(None if part is None else torch.from_numpy(part) for part in (one.q, one.scales, one.points)))
        for one in stored
    ]
    weights = [one.quantized() for one in stored]
    made = pack_projection(raw.__getitem__, 3, weights[0].mode, gated=gated, name="w13")
    expected = pack_experts(weights, gate_up=True, gated=gated)
    np.testing.assert_array_equal(made.packed.numpy(), expected.data)
    assert (made.call.layout, made.call.mode) == (expected.layout, str(expected.mode))


def test_projections_without_experts_are_refused() -> None:
    with pytest.raises(InvalidValueError, match="w13 must have one expert or more"):
        pack_projection(lambda _: pytest.fail("asked"), 0, QuantMode.FINEGRAINED_SCALE_ONLY, gated=True, name="w13")


@pytest.mark.parametrize("name", [f"engines.{part}" for part in ("count", "layer", "order", "switch", "words")])
def test_examples_print_what_they_show(name: str) -> None:
    results = doctest.testmod(importlib.import_module(f"w4a16gen.integrations.{name}"))
    assert results.attempted > 0
    assert results.failed == 0
