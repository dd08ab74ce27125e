"""`W4A16Experts`: its results against float64, every routing, and what a torch module is expected to do."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fakes.library import FakeLibrary

from w4a16gen import InvalidValueError, QuantizedWeight, QuantMode
from w4a16gen.kernels.spaces import enumerate_space
from w4a16gen.runtime.expert_calls import MAX_EXPERTS
from w4a16gen.weights.experts import PackedExperts, pack_experts
from w4a16gen.weights.moe_reference import MoeExpectation
from w4a16gen.weights.reference import random_weight

torch = pytest.importorskip("torch")
from w4a16gen.integrations.torch import W4A16Experts, calibrate, check_overflow, experts_op, first_overflow  # noqa: E402
from w4a16gen.integrations.torch.expert_projection import ExpertProjection  # noqa: E402

HIDDEN, INTERMEDIATE, EXPERTS = 96, 64, 5


Weights = list[QuantizedWeight]


def weights_of(rng: np.random.Generator, size: float = 0.04) -> tuple[Weights, Weights, Weights]:
    mode = QuantMode.FINEGRAINED_SCALE_AND_ZEROS

    def made(n: int, k: int) -> Weights:
        return [random_weight(rng, n, k, 32, mode, size=size) for _ in range(EXPERTS)]

    return made(INTERMEDIATE, HIDDEN), made(INTERMEDIATE, HIDDEN), made(HIDDEN, INTERMEDIATE)


def experts_of(weights: Any, activation: Any = "silu", *, gated: bool = True) -> Any:
    gate, up, down = weights
    return W4A16Experts.from_packed(pack_experts(gate, up, gated=gated), pack_experts(down), activation)


def routing(rng: np.random.Generator, tokens: int = 17, slots: int = 3) -> tuple[Any, Any, Any]:
    hidden = rng.standard_normal((tokens, HIDDEN)).astype(np.float16)
    ids = rng.integers(-1, EXPERTS + 1, (tokens, slots))
    weights = rng.random((tokens, slots)).astype(np.float32)
    weights[(ids < 0) | (ids >= EXPERTS)] = np.nan
    return hidden, ids, weights


def tensors(*arrays: Any) -> list[Any]:
    return [torch.from_numpy(array) for array in arrays]


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_results_lie_within_the_bound(activation: str, rng: np.random.Generator) -> None:
    weights = weights_of(rng)
    hidden, ids, factors = routing(rng)
    got = experts_of(weights, activation)(*tensors(hidden, ids, factors))
    assert got.dtype == torch.float16
    expectation = MoeExpectation(hidden, *weights, ids, factors, activation=activation)
    assert 0 < expectation.error_over_bound(got.numpy()) <= 1


@pytest.mark.parametrize("case", ["no tokens", "no experts", "all to one", "one twice", "int32"])
def test_every_routing_is_served(case: str, rng: np.random.Generator) -> None:
    weights = weights_of(rng)
    hidden, ids, factors = routing(rng, 0 if case == "no tokens" else 9)
    factors = rng.random(factors.shape).astype(np.float32)
    ids = {
        "no experts": np.full_like(ids, EXPERTS),
        "all to one": np.full_like(ids, 3),
        "one twice": np.stack([ids[:, 0], ids[:, 0], ids[:, 1]], 1),
        "int32": ids.astype(np.int32),
    }.get(case, ids)
    got = experts_of(weights)(*tensors(hidden, ids, factors)).numpy()
    expectation = MoeExpectation(hidden, *weights, ids, factors)
    assert got.shape == hidden.shape
    assert expectation.error_over_bound(got) <= 1


def test_bits_repeat_and_a_token_does_not_depend_on_others(rng: np.random.Generator) -> None:
    experts = experts_of(weights_of(rng))
    hidden, ids, factors = tensors(*routing(rng))
    whole = experts(hidden, ids, factors)
    assert torch.equal(experts(hidden, ids, factors), whole)
    backwards = torch.arange(len(hidden)).flip(0)
    assert torch.equal(experts(hidden[backwards], ids[backwards], factors[backwards])[backwards], whole)
    hidden[3] = torch.nan
    others = torch.arange(len(hidden)) != 3
    assert torch.equal(experts(hidden, ids, factors)[others], whole[others])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_dtypes_are_cast_outside(dtype: Any, rng: np.random.Generator) -> None:
    experts = experts_of(weights_of(rng))
    hidden, ids, factors = tensors(*routing(rng))
    given = hidden.to(dtype)
    got = experts(given, ids, factors)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), experts(given.half(), ids, factors).float(), rtol=2.0**-8, atol=2.0**-20)


def projection(weights: Weights, **parts: Any) -> Any:
    packed = pack_experts(weights)
    return ExpertProjection(on_torch(packed), **parts)


def on_torch(packed: PackedExperts) -> PackedExperts:
    return PackedExperts(
        torch.from_numpy(packed.data), packed.layout, packed.n, packed.k, packed.group_size, packed.mode, packed.order
    )


def test_orders_scales_and_alphas_belong_to_their_experts(rng: np.random.Generator) -> None:
    weights = weights_of(rng)[0]
    order = np.stack([rng.permutation(HIDDEN) for _ in range(EXPERTS)])
    scale = rng.uniform(0.5, 2, (EXPERTS, HIDDEN)).astype(np.float16)
    alphas = [2.0**power for power in range(EXPERTS)]
    made = projection(weights, permutation=order, input_scale=torch.from_numpy(scale), alphas=alphas)
    plain = projection(weights)
    x = torch.from_numpy(rng.standard_normal((3, HIDDEN)).astype(np.float32))
    dense = made.dequantize(torch.float64)
    for expert in range(EXPERTS):
        moved = (x * torch.from_numpy(scale[expert]))[:, order[expert]]
        got = made(x, expert)
        assert torch.equal(got, (plain(moved, expert).half() * 1.0).float() * alphas[expert])
        torch.testing.assert_close(got.double(), x.double() @ dense[expert].T, rtol=4e-3, atol=4e-3 * alphas[expert])


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu"])
@pytest.mark.parametrize("change", ["none", "alphas", "order", "hook", "overflow"])
def test_both_packings_have_the_same_bits(activation: str, change: str, rng: np.random.Generator) -> None:
    weights = weights_of(rng)
    layers = [experts_of(weights, activation, gated=gated) for gated in (True, False)]
    order = torch.from_numpy(np.stack([rng.permutation(HIDDEN) for _ in range(EXPERTS)]))
    seen: tuple[list[Any], list[Any]] = ([], [])
    for layer, outputs in zip(layers, seen, strict=True):
        assert layer.is_grouped is (activation != "relu")
        if change == "alphas":
            layer.gate_up.alphas = tuple(2.0**expert for expert in range(EXPERTS))
        elif change == "order":
            layer.gate_up.permutation = order
        elif change == "hook":
            layer.gate_up.register_forward_hook(lambda _module, _given, out, outputs=outputs: outputs.append(out))
        elif change == "overflow":
            layer.gate_up.overflow = "check"
        assert layer.is_grouped is (activation != "relu" and change == "none")
    gated, plain = layers
    assert [layer.gate_up.layout for layer in layers] == ["fragment_blocks_v2_gated", "fragment_blocks_v2"]
    call = tensors(*routing(rng))
    assert torch.equal(gated(*call), plain(*call))
    assert torch.equal(gated.gate_up.dequantize(torch.float64), plain.gate_up.dequantize(torch.float64))
    for expert in range(EXPERTS):
        assert torch.equal(gated.gate_up(call[0], expert), plain.gate_up(call[0], expert))
    assert bool(seen[0]) is (change == "hook")
    assert all(torch.equal(one, other) for one, other in zip(*seen, strict=True))
    assert not torch.equal(gated.gate_up.packed, plain.gate_up.packed), "their bytes differ"


@pytest.mark.parametrize("gated", [True, False], ids=["to gated", "to plain"])
def test_a_state_brings_its_packing(gated: bool, rng: np.random.Generator) -> None:
    made, others = weights_of(rng), weights_of(rng)
    source, target = experts_of(made, gated=not gated), experts_of(others, gated=gated)
    call = tensors(*routing(rng))
    wanted = source(*call)
    compiled = torch.compile(target, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*call), target(*call))
    target.load_state_dict(source.state_dict())
    assert torch.equal(compiled(*call), wanted), "it is compiled again"
    assert target.gate_up.layout == source.gate_up.layout != experts_of(others, gated=gated).gate_up.layout
    assert target.is_grouped
    assert torch.equal(target(*call), wanted)
    target.down.overflow = "check"
    assert torch.equal(target(*call), wanted), "one by one"
    again = experts_of(others, gated=gated)
    again.load_state_dict(target.state_dict())
    assert torch.equal(again(*call), wanted)


def test_no_other_layout_is_taken_from_a_state(rng: np.random.Generator) -> None:
    gate, up, down = weights_of(rng)
    gated, cutlass = experts_of((gate, up, down)), on_torch(pack_experts(gate, up, target="cutlass"))
    state = ExpertProjection(cutlass).state_dict()
    before = gated.gate_up.packed.clone()
    with pytest.raises(InvalidValueError, match=r"layout = kmajor.*this layer has fragment_blocks_v2_gated: make"):
        gated.gate_up.load_state_dict(state)
    with pytest.raises(InvalidValueError, match="layout = fragment_blocks_v2_gated, but this layer has kmajor"):
        ExpertProjection(cutlass).load_state_dict(gated.gate_up.state_dict())
    for part, layout, message in (
        (gated.gate_up, ["fragment_blocks_v2"], r"layout = \['fragment_blocks_v2'\], but"),
        (gated.gate_up, None, "layout = None, but"),
        (gated.down, "fragment_blocks_v2_gated", "layout = fragment_blocks_v2_gated, but this layer has frag"),
    ):
        own = part.state_dict()
        members = {**json.loads(bytes(own["_extra_state"].tolist())), "layout": layout}
        own["_extra_state"] = torch.frombuffer(bytearray(json.dumps(members).encode()), dtype=torch.uint8)
        with pytest.raises(InvalidValueError, match=message):
            part.load_state_dict(own)
    assert torch.equal(gated.gate_up.packed, before), "nothing was copied"


def test_a_state_moves_between_equal_experts_and_no_others(rng: np.random.Generator) -> None:
    one, other = experts_of(weights_of(rng)), experts_of(weights_of(rng))
    one.down.alphas = (0.5,) * EXPERTS
    one.gate_up.output_scale = 4.0
    call = tensors(*routing(rng))
    assert not torch.equal(other(*call), one(*call))
    other.load_state_dict(one.state_dict())
    assert torch.equal(other(*call), one(*call))
    assert other.down.alphas == one.down.alphas
    assert torch.equal(copy.deepcopy(one)(*call), one(*call))
    assert torch.equal(pickle.loads(pickle.dumps(one))(*call), one(*call))  # noqa: S301  (our own bytes)
    fewer = experts_of([part[:4] for part in weights_of(rng)])
    with pytest.raises(InvalidValueError, match="weight with experts = 5, but this layer has 4"):
        fewer.load_state_dict(one.state_dict())
    third = experts_of(weights_of(rng))
    before = third.down.packed.clone()
    state = one.state_dict()
    state["down._extra_state"] = state["gate_up._extra_state"]
    with pytest.raises(InvalidValueError, match="this layer has"):
        third.load_state_dict(state)
    assert torch.equal(third.down.packed, before), "nothing was copied"


def test_casts_change_nothing(rng: np.random.Generator) -> None:
    experts = experts_of(weights_of(rng))
    call = tensors(*routing(rng))
    before = experts(*call)
    assert torch.equal(experts.bfloat16().half().to(torch.float64)(*call), before)
    assert experts.gate_up.packed.dtype == torch.uint8


def test_compilers_leave_experts_that_are_computed_one_by_one_as_they_are(rng: np.random.Generator) -> None:
    experts = experts_of(weights_of(rng), "relu")
    call = tensors(*routing(rng))
    graphs: list[Any] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda *given: experts(*given) + 1, backend=backend)
    assert torch.equal(compiled(*call), experts(*call) + 1)
    assert not any("topk" in str(graph.code) or "sum_of" in str(graph.code) for graph in graphs)


def test_overflow_is_counted_and_scaled_away(rng: np.random.Generator) -> None:
    experts = torch.nn.Sequential(experts_of(weights_of(rng, size=0.1)))
    hidden, ids, factors = tensors(*routing(rng))
    large = hidden.float() * 4096
    check_overflow(experts)
    assert not torch.isfinite(experts[0](large, ids, factors)).all()
    found = first_overflow(experts)
    assert found is not None
    assert found.name in {"0.gate_up", "0.down"}
    scales = calibrate(experts, lambda: experts[0](large, ids, factors))
    assert set(scales) == {"0.gate_up", "0.down"}
    check_overflow(experts)
    got = experts[0](large, ids, factors)
    assert first_overflow(experts) is None
    weights = [experts[0].gate_up.dequantize(torch.float64), experts[0].down.dequantize(torch.float64)]
    wanted = torch.zeros(large.shape, dtype=torch.float64)
    for token in range(len(large)):
        for slot in range(ids.shape[1]):
            if 0 <= (expert := int(ids[token, slot])) < EXPERTS:
                gate, up = (weights[0][expert] @ large[token].double()).chunk(2)
                wanted[token] += factors[token, slot] * (weights[1][expert] @ (torch.nn.functional.silu(gate) * up))
    assert ((got - wanted).abs().amax() / wanted.abs().amax()).item() < 0.01


def test_calibration_knows_the_scales_of_each_expert(rng: np.random.Generator) -> None:
    scale = torch.ones((EXPERTS, HIDDEN), dtype=torch.float16)
    scale[1] = 4096
    made = projection(weights_of(rng)[0], input_scale=scale)
    x = torch.full((1, HIDDEN), 64.0)
    assert calibrate(made, lambda: made(x, 0)) == {}
    assert calibrate(made, lambda: made(x, expert=1))[""].activation_scale == 2.0 ** (18 + 2 - 15)


def test_wrong_calls_are_refused(rng: np.random.Generator) -> None:
    experts = experts_of(weights_of(rng))
    hidden, ids, factors = tensors(*routing(rng, 4, 2))
    for arguments, message in (
        ((ids, ids, factors), "hidden_states of dtype int64 must be a floating point tensor"),
        ((hidden[None], ids, factors), r"hidden_states of shape \[1, 4, 96\] must be \[tokens, 96\]"),
        ((hidden, factors, factors), "top_k_index of dtype float32 must be a tensor of integers"),
        ((hidden, ids, ids), "top_k_weights of dtype int64 must be a floating point tensor"),
        ((hidden, ids[:3], factors), r"top_k_index of shape \[3, 2\] must be \[4, slots\]"),
        ((hidden, ids, factors[:, :1]), r"top_k_weights of shape \[4, 1\] must be \[4, slots\], both alike"),
    ):
        with pytest.raises(InvalidValueError, match=message):
            experts(*arguments)


def test_projections_that_do_not_fit_together_are_refused(rng: np.random.Generator) -> None:
    gate, up, down = weights_of(rng)
    joint = pack_experts(gate, up)
    half_down = [random_weight(rng, HIDDEN, INTERMEDIATE // 2, 32, QuantMode.FINEGRAINED_SCALE_AND_ZEROS)] * EXPERTS
    cases: tuple[tuple[tuple[Any, ...], str], ...] = (
        ((joint, pack_experts(down[:2])), "gate_up of 5 experts"),
        ((pack_experts(down), joint), "must be joined"),
        ((pack_experts([*gate]), pack_experts(half_down)), "must be joined"),
        ((joint, pack_experts(down), "tanh"), "activation 'tanh' must be a function, or one of silu"),
        ((joint, down), "experts of type list must be PackedExperts"),
    )
    for arguments, message in cases:
        with pytest.raises(InvalidValueError, match=message):
            W4A16Experts.from_packed(*arguments)
    for parts, message in (
        ({"alphas": [1.0]}, "alphas of 1 experts must be of 5"),
        ({"alphas": 2.0}, "alphas of type float must be a sequence with a factor for each of 5 experts"),
        ({"input_scale": "x"}, "input_scale of type str must be a tensor or an array of numbers"),
        ({"permutation": np.arange(HIDDEN)}, r"permutation of int64 \[96\] must be int64 \[5, 96\]"),
        ({"permutation": np.zeros((EXPERTS, HIDDEN), np.int64)}, "permutation must hold each of 0 to 95 once"),
        ({"input_scale": torch.ones(HIDDEN)}, r"input_scale of float16 \[96\] must be float16 \[5, 96\]"),
    ):
        with pytest.raises(InvalidValueError, match=message):
            projection(gate, **parts)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "int64"])
def test_numbers_of_experts_may_be_of_any_integer_dtype(dtype: str, rng: np.random.Generator) -> None:
    experts = experts_of(weights_of(rng))
    hidden, ids, factors = tensors(*routing(rng))
    wanted = experts(hidden, ids, factors)
    assert torch.equal(experts(hidden, ids.to(getattr(torch, dtype)), factors), wanted), "-1 becomes 255, which is none"
    for number in (-(2**63), 2**63 - 1, 2**32, EXPERTS):
        assert not experts(hidden, torch.full_like(ids, number), factors).any()


def test_a_state_that_is_damaged_is_refused(rng: np.random.Generator) -> None:
    weights = weights_of(rng)
    order = np.stack([rng.permutation(HIDDEN) for _ in range(EXPERTS)])
    made = projection(weights[0], permutation=order)
    state = made.state_dict()

    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(InvalidValueError, match=message):
            copy.deepcopy(made).load_state_dict({**state, **changes})

    def facts(**changes: Any) -> Any:
        members = {**json.loads(bytes(state["_extra_state"].tolist())), **changes}
        return torch.frombuffer(bytearray(json.dumps(members).encode()), dtype=torch.uint8)

    for number in (0, HIDDEN, -1):
        wrong = state["permutation"].clone()
        wrong[3, 5] = number if number or wrong[3, 5] else 1
        refused("permutation of the state dict must hold each of 0 to 95 once", permutation=wrong)
    refused("its facts are damaged", _extra_state=torch.frombuffer(bytearray(b"[" * 100_000), dtype=torch.uint8))
    refused("its facts are damaged", _extra_state=state["_extra_state"].to("meta"))
    refused("activation_scale of 1148.{36} must be a power of two", _extra_state=facts(activation_scale=2**2000))
    refused("must hold an alpha for each of 5 experts", _extra_state=facts(alphas=[1.0]))
    copy.deepcopy(made).load_state_dict({**state, "permutation": state["permutation"].flip(1)})


def test_no_expert_but_those_that_are_there_is_called(rng: np.random.Generator) -> None:
    made = projection(weights_of(rng)[0])
    x = torch.ones(2, HIDDEN)
    cases: tuple[tuple[Any, Any, str], ...] = (
        (x, -1, "expert -1 must be 0 to 4"),
        (x, EXPERTS, "expert 5 must be 0 to 4"),
        (x, 1.0, "expert of type float must be an integer"),
        (x, True, "expert of type bool must be an integer"),
        (x.int(), 0, r"x of dtype int32 must be a floating point tensor, \[m, 96\]"),
        (None, 0, "x of type NoneType must be"),
        (x[:, 1:], 0, r"x of shape \[2, 95\] must be"),
    )
    for given, expert, message in cases:
        with pytest.raises(InvalidValueError, match=message):
            made(given, expert)


def test_experts_on_the_meta_device_tell_the_shape(rng: np.random.Generator) -> None:
    experts = experts_of(weights_of(rng)).to("meta")
    hidden, ids, factors = tensors(*routing(rng))
    got = experts(*(tensor.to("meta") for tensor in (hidden.float(), ids, factors)))
    assert (got.shape, got.dtype, got.is_meta) == (hidden.shape, torch.float32, True)
    with pytest.raises(InvalidValueError, match="hidden_states is on cpu, but the experts on meta: move them"):
        experts(hidden, ids, factors)
    with pytest.raises(InvalidValueError, match="top_k_index is on meta, but the experts on cpu"):
        experts_of(weights_of(rng))(hidden, ids.to("meta"), factors)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_program_that_would_keep_the_routing_of_one_call_is_refused(rng: np.random.Generator) -> None:
    experts = experts_of(weights_of(rng), "relu")
    call = tuple(tensors(*routing(rng)))
    assert not experts.is_grouped
    with pytest.raises(InvalidValueError, match=r"one by one cannot be traced or exported.* use torch\.compile"):
        torch.jit.trace(experts, call)
    with pytest.raises(InvalidValueError, match="one by one cannot be traced or exported"):
        torch.export.export(experts, call)


def test_what_grouped_kernels_cannot_do_is_computed_one_by_one(rng: np.random.Generator) -> None:
    weights = weights_of(rng)
    experts = experts_of(weights)
    assert experts.is_grouped
    assert not experts_of(weights, "relu").is_grouped
    assert experts_of(weights, torch.nn.SiLU()).is_grouped
    assert not experts_of(weights, torch.nn.functional.tanh).is_grouped
    for change in ({"alphas": [2.0] * EXPERTS}, {"permutation": torch.stack([torch.arange(INTERMEDIATE)] * EXPERTS)}):
        assert not W4A16Experts(experts.gate_up, projection(weights[2], **change)).is_grouped
    gated_down = ExpertProjection(on_torch(pack_experts(weights[2], gate_up=True, gated=True)))
    assert not W4A16Experts(experts.gate_up, gated_down).is_grouped
    experts.down.overflow = "check"
    assert not experts.is_grouped
    many = [random_weight(rng, 32, 32, 32, QuantMode.FINEGRAINED_SCALE_ONLY)]
    for count in (MAX_EXPERTS, MAX_EXPERTS + 1):
        assert experts_of([many * count] * 3).is_grouped == (count == MAX_EXPERTS)


def test_projections_of_different_modes_or_for_other_kernels_are_computed_one_by_one(rng: np.random.Generator) -> None:
    gate, up, down = weights_of(rng)
    other = [random_weight(rng, HIDDEN, INTERMEDIATE, 32, QuantMode.FINEGRAINED_SCALE_ONLY) for _ in range(EXPERTS)]
    call = routing(rng)
    for gate_up, second in (
        (pack_experts(gate, up, gated=True), other),
        (pack_experts(gate, up, target="cutlass"), down),
    ):
        experts = W4A16Experts.from_packed(gate_up, pack_experts(second))
        assert not experts.is_grouped
        expectation = MoeExpectation(call[0], gate, up, second, *call[1:])
        assert 0 < expectation.error_over_bound(experts(*tensors(*call)).numpy()) <= 1


def test_gradients_do_not_change_the_result(rng: np.random.Generator) -> None:
    experts = experts_of(weights_of(rng))
    hidden, ids, factors = tensors(*routing(rng))
    given = hidden.float()
    wanted = experts(given, ids, factors)
    recorded = experts(given.clone().requires_grad_(), ids, factors)
    assert torch.equal(recorded.detach(), wanted), "both round the sum to fp16"
    assert torch.equal(wanted, wanted.half().float())


def test_calls_wait_unless_grouped_kernels_serve_them(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = experts_of(weights_of(rng))
    assert not experts.waits, "on the CPU"
    assert experts_of(weights_of(rng), "relu").waits

    class OnGpu(torch.Tensor):  # type: ignore[misc, name-defined]
        is_cuda = True

    experts.down.packed = experts.down.packed.as_subclass(OnGpu)
    grouped = [config for config in enumerate_space("experts") if str(config.mode) == experts.down.mode]
    others = [config for config in enumerate_space("experts") if str(config.mode) != experts.down.mode]
    for configs, waits in ((grouped, False), (others, True), (enumerate_space("default"), True)):
        library = FakeLibrary(configs)
        monkeypatch.setattr(experts_op, "library_in_use", lambda library=library: library)
        assert experts.waits is waits


def test_experts_can_be_compiled_whole_and_exported(rng: np.random.Generator) -> None:
    weights = weights_of(rng)
    experts = experts_of(weights)
    call = tuple(tensors(*routing(rng)))
    wanted = experts(*call)
    compiled = torch.compile(lambda *given: experts(*given) + 1, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*call), wanted + 1)
    exported = torch.export.export(experts, call)
    assert torch.equal(exported.module()(*call), wanted)
    hidden, ids, factors = call
    ids = ids.clamp(0, EXPERTS - 1)
    for layer in (experts, experts_of(weights, gated=False)):
        facts = (HIDDEN, INTERMEDIATE, 32, 32, layer.down.mode, layer.gate_up.layout, "silu")
        operands = (hidden, ids, torch.nan_to_num(factors), layer.gate_up.packed, layer.down.packed, *facts)
        torch.library.opcheck(torch.ops.w4a16gen.moe.default, operands)
        assert torch.equal(torch.ops.w4a16gen.moe(*operands), experts(hidden, ids, operands[2]))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"ids": lambda ids: ids[:3]}, r"topk_ids of shape \[3, \d\] must be \[\d+, slots\], both alike"),
        ({"ids": lambda ids: ids[:, 0].contiguous()}, r"topk_ids of shape \[\d+\] must be"),
        ({"factors": lambda factors: factors[:, :1].contiguous()}, r"topk_weights of shape \[\d+, 1\] must be"),
        ({"w13": lambda packed: packed[:2]}, r"w13 of 2 experts of .* must be of \d experts of .*, for w2"),
        ({"w2": lambda packed: packed[:2]}, r"w13 of \d experts of .* must be of 2 experts of .*, for w2"),
        ({"mode": lambda _: "fast"}, "'fast' is not one of cs, fgs, fgsz"),
        ({"layout": lambda _: "rows"}, "layout 'rows' must be one of kmajor"),
        ({"activation": lambda _: "relu"}, "activation 'relu' must be one of silu, gelu, gelu_tanh"),
    ],
    ids=["tokens of ids", "ids of one dimension", "slots of weights", "w13", "w2", "mode", "layout", "activation"],
)
def test_a_wrong_call_of_the_operator_is_refused(
    rng: np.random.Generator, change: dict[str, Callable[[Any], Any]], text: str
) -> None:
    layer = experts_of(weights_of(rng))
    hidden, ids, factors = tensors(*routing(rng))
    names = (
        "hidden",
        "ids",
        "factors",
        "w13",
        "w2",
        "size",
        "inner",
        "group",
        "group2",
        "mode",
        "layout",
        "activation",
    )
    facts = (HIDDEN, INTERMEDIATE, 32, 32, layer.down.mode, layer.gate_up.layout, "silu")
    right = dict(zip(names, (hidden, ids, factors, layer.gate_up.packed, layer.down.packed, *facts), strict=True))
    operands = [change.get(name, lambda same: same)(value) for name, value in right.items()]
    with pytest.raises(InvalidValueError, match=text):
        torch.ops.w4a16gen.moe(*operands)


def test_gradients_reach_the_weights_of_routes_and_no_activations(rng: np.random.Generator) -> None:
    experts = experts_of(weights_of(rng))
    hidden, ids, factors = tensors(*routing(rng))
    hidden = hidden.float()
    factors.requires_grad_()
    experts(hidden, ids, factors).sum().backward()
    with torch.no_grad():
        for slot in range(ids.shape[1]):
            alone = torch.zeros_like(factors)
            alone[:, slot] = 1
            torch.testing.assert_close(factors.grad[:, slot], experts(hidden, ids, alone).sum(1))
    hidden.requires_grad_()
    with pytest.raises(InvalidValueError, match="the kernels compute no gradients"):
        experts(hidden, ids, factors.detach()).sum().backward()


def test_packed_experts_that_are_read_only_are_copied(rng: np.random.Generator) -> None:
    gate, up, down = weights_of(rng)
    joint, packed = pack_experts(gate, up), pack_experts(down)
    packed.data.flags.writeable = False
    made = W4A16Experts.from_packed(joint, packed)
    assert np.array_equal(made.down.packed.numpy(), packed.data)
    with pytest.raises(InvalidValueError, match="device 'nowhere' must be a device of torch"):
        W4A16Experts.from_packed(joint, packed, device="nowhere")
    wrong: Any
    for wrong, message in ((["silu"], r"activation \['silu'\] must be a function"), (None, "activation None must be")):
        with pytest.raises(InvalidValueError, match=message):
            W4A16Experts.from_packed(joint, packed, wrong)
    wrong = joint
    with pytest.raises(InvalidValueError, match="gate_up of type PackedExperts must be an ExpertProjection"):
        W4A16Experts(wrong, made.down)


def test_activations_beyond_fp16_are_scaled_before_they_are_cast(rng: np.random.Generator) -> None:
    experts = experts_of(weights_of(rng, size=0.01))
    hidden, ids, factors = tensors(*routing(rng))
    large = hidden.float() * 2**18
    assert large.abs().max() > 65504
    scales = calibrate(experts, lambda: experts(large, ids, factors))
    assert scales["gate_up"].activation_scale > 1
    assert torch.isfinite(experts(large, ids, factors)).all()
