"""Steps of a decoder on the CPU: the parts, the entrants, what is left out, and what the command says."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fakes.devices import H100
from fakes.library import FakeLibrary
from fakes.runner import Runner
from json_shapes import SCHEMAS, STEP, check

from w4a16gen import Epilogue, InvalidValueError, Problem, QuantMode, pack_weight
from w4a16gen.cli.services import Services
from w4a16gen.kernels.spaces import enumerate_space, with_epilogues
from w4a16gen.measure import models
from w4a16gen.measure import step as step_bench
from w4a16gen.measure.decoder import Decoder, Parts, Step
from w4a16gen.measure.kernel_kinds import Shares, kind_of, sum_up
from w4a16gen.measure.models import Model
from w4a16gen.measure.results import Timing
from w4a16gen.measure.rival_products import Product, cublas_products
from w4a16gen.measure.rivals import CUBLAS, Rival
from w4a16gen.measure.step import (
    OWN,
    OWN_AUTO,
    OWN_DEPENDENT,
    OWN_FUSED,
    OWN_FUSED_AUTO,
    OWN_FUSED_AUTO_PDL,
    OWN_FUSED_DEPENDENT_PDL,
    OWN_PDL,
    Machine,
    StepBench,
    StepTiming,
    entrants_of,
    run_step_bench,
    take_turns,
)
from w4a16gen.measure.timing import Contender
from w4a16gen.measure.torch_weight import TorchWeight
from w4a16gen.weights.quantized import QuantizedWeight

torch = pytest.importorskip("torch")
facts_of = pytest.importorskip("w4a16gen.integrations.torch.ops").facts_of
transformers = pytest.importorskip("transformers")

MODE = QuantMode.FINEGRAINED_SCALE_ONLY
TINY = Model(256, 384, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=3, head_dim=64)
DECODING = Step("tiny", TINY, 1, 2, 1, 5)
PREFILL = Step("tiny", TINY, 1, 2, 7, 0)


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.MODELS, "tiny", TINY)


class HostLibrary:
    """Stands in for a build: it multiplies on the host, and can be wrong or fail."""

    def __init__(self) -> None:
        self.factor = 1.0
        self.fails_if_dependent = False
        self.launches: list[bool | str] = []

    def hopper_device(self) -> Any:
        return H100

    def has_epilogue(self, _mode: QuantMode, _epilogue: Epilogue) -> bool:
        return True

    def pack(self, q: Any, scales: Any, zeros: Any, *, group_size: int, gated: bool) -> Any:
        assert zeros is None  # in mode fgs
        packed = pack_weight(QuantizedWeight(q.numpy(), scales.numpy(), None, group_size, MODE), gated=gated)
        return replace(packed, data=torch.from_numpy(packed.data))

    def gemm(
        self, a: Any, w: Any, *, out: Any, dependent_launch: bool | str, activation: str = "none", residual: Any = None
    ) -> None:
        self.launches.append(dependent_launch)
        if dependent_launch is True and self.fails_if_dependent:
            raise RuntimeError("no such launch")
        facts = *facts_of(w), 1.0, str(activation), residual
        out.copy_(torch.ops.w4a16gen.gemm(a, w.data, None, *facts) * self.factor)


def host_machine(shares: Shares | None = None) -> Machine:
    """Return a CPU, on which nothing is compiled, and a step takes as long as it has run before."""

    def record(run: Callable[[], None]) -> Contender:
        def timed() -> float:
            run()
            return 2.0

        return Contender(run, timed, 1)

    return Machine(torch, torch.device("cpu"), lambda function, **_: function, record, lambda _: shares)


def measured(
    library: Any, step: Step = DECODING, rivals: Sequence[Rival] = (), rounds: int = 3, **options: Any
) -> StepBench:
    quiet = Services().show_progress
    machine = options.pop("machine", host_machine())
    return run_step_bench(
        library, step, MODE, rivals, rounds, tell=lambda _: None, show_progress=quiet, machine=machine, **options
    )


def llama(step: Step, weights: dict[str, TorchWeight]) -> Any:
    """Return transformers' Llama of the tiny sizes, with the weights in each layer, in fp32."""
    config = transformers.LlamaConfig(
        hidden_size=TINY.hidden_size,
        intermediate_size=TINY.intermediate_size,
        num_attention_heads=TINY.num_attention_heads,
        num_key_value_heads=TINY.num_key_value_heads,
        head_dim=TINY.head_dim,
        num_hidden_layers=step.depth,
        vocab_size=16,
        rms_norm_eps=1e-5,
        rope_theta=500_000.0,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        attn_implementation="sdpa",
    )
    model = transformers.LlamaModel(config).eval()
    dense = {name: weight.dense().float() for name, weight in weights.items()}
    queries, keys = TINY.num_attention_heads * TINY.head_dim, TINY.num_key_value_heads * TINY.head_dim
    for layer in model.layers:
        parts = dense["qkv"].split((queries, keys, keys))
        for name, part in zip(("q_proj", "k_proj", "v_proj"), parts, strict=True):
            getattr(layer.self_attn, name).weight.data.copy_(part)
        layer.self_attn.o_proj.weight.data.copy_(dense["o"])
        for name, part in zip(("gate_proj", "up_proj"), dense["gate_up"].chunk(2), strict=True):
            getattr(layer.mlp, name).weight.data.copy_(part)
        layer.mlp.down_proj.weight.data.copy_(dense["down"])
    return model


def test_a_prefill_is_what_transformers_llama_computes() -> None:
    weights = {
        name: TorchWeight.drawn(torch, problem, MODE, 1, torch.device("cpu"))
        for name, problem in PREFILL.problems().items()
    }
    decoder = Decoder(torch, PREFILL, torch.float32, torch.device("cpu"))
    parts = Parts(torch, PREFILL, lambda function: function)

    def dense(name: str) -> Sequence[Product]:
        weight = weights[name].dense().float()
        return [lambda x: x @ weight.T] * PREFILL.depth

    with torch.inference_mode():
        decoder.run(parts, {name: dense(name) for name in weights})
        given = decoder.hidden.view(PREFILL.sequences, PREFILL.new_tokens, -1)
        captured: list[Any] = []
        model = llama(PREFILL, weights)
        model.norm.register_forward_pre_hook(lambda _module, inputs: captured.append(inputs[0]))
        model(inputs_embeds=given)
    torch.testing.assert_close(decoder.residual, captured[0].view(decoder.residual.shape), rtol=1e-4, atol=1e-3)


def test_decoding_a_token_continues_the_prefill_of_those_before() -> None:
    together, after = Step("tiny", TINY, 1, 2, 6, 0), Step("tiny", TINY, 1, 2, 1, 5)
    parts = {step: Parts(torch, step, lambda function: function) for step in (together, after)}
    decoders = {step: Decoder(torch, step, torch.float32, torch.device("cpu")) for step in (together, after)}
    matrices = {name: 0.05 * torch.randn(problem.n, problem.k) for name, problem in after.problems().items()}

    def run(step: Step) -> Any:
        def product(name: str) -> Product:
            return lambda x: x @ matrices[name].T

        decoders[step].run(parts[step], {name: [product(name)] * step.depth for name in matrices})
        return decoders[step].residual

    with torch.inference_mode():
        expected = run(together).view(2, 6, -1)[:, -1]
        for mine, given in zip(decoders[after].caches, decoders[together].caches, strict=True):
            for cache, whole in zip(mine, given, strict=True):
                cache[:, :, :5] = whole[:, :, :5]
        decoders[after].hidden.copy_(decoders[together].hidden.view(2, 6, -1)[:, -1])
        torch.testing.assert_close(run(after), expected, rtol=1e-4, atol=1e-4)


def test_all_entrants_compute_the_same_and_are_timed() -> None:
    library = HostLibrary()
    found = measured(library)
    plain = ["", "_dependent", "_auto", "_pdl", "_dependent_pdl", "_auto_pdl"]
    fused = ["_fused", "_fused_auto", "_fused_dependent_pdl", "_fused_auto_pdl"]
    assert [timing.name for timing in found.timings] == [CUBLAS, *(f"w4a16gen{rest}" for rest in plain + fused)]
    assert all(len(timing.microseconds.isolated) == 3 for timing in found.timings)
    assert all(timing.difference < 0.01 for timing in found.timings)
    assert set(library.launches) == {False, True, "auto"}
    assert not found.left_out
    assert not found.wrong
    assert found.floor is None  # of a GPU only


def test_many_layers_stay_within_fp16() -> None:
    found = measured(HostLibrary(), replace(DECODING, layers=40), rounds=1)
    assert all(timing.difference < 0.01 for timing in found.timings)
    assert not found.left_out


def test_a_wrong_result_of_ours_is_an_error_and_a_rivals_is_left_out() -> None:
    library = HostLibrary()
    library.factor = 1.5

    def wrong(a: Any, weight: TorchWeight, copies: int) -> Sequence[Product]:
        return [lambda _: torch.zeros((a.shape[0], weight.n), dtype=a.dtype)] * copies

    found = measured(library, rivals=[Rival("bad", "bad-package", "float16", 0.01, wrong)])
    assert [timing.name for timing in found.timings] == [CUBLAS]
    assert "what rounding explains" in found.left_out["bad"]
    assert set(found.wrong) == {OWN, OWN_DEPENDENT, OWN_AUTO, OWN_FUSED, OWN_FUSED_AUTO}


def test_what_is_not_installed_or_fails_is_left_out_with_its_reason() -> None:
    library = HostLibrary()
    library.fails_if_dependent = True

    def absent(_a: Any, _weight: TorchWeight, _copies: int) -> Sequence[Product]:
        raise ImportError("no module named other")

    found = measured(library, rivals=[Rival("other", "other-kernels", "float16", 0.01, absent)])
    assert found.left_out["other"] == "no module named other: pip install other-kernels"
    assert found.left_out[OWN_DEPENDENT] == "RuntimeError: no such launch"
    assert set(found.wrong) == {OWN_DEPENDENT}
    assert found.timing(OWN) is not None
    assert found.timing(OWN_PDL) is not None


def test_rivals_compile_for_all_layers_before_they_are_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[Any] = []

    def compile_ahead(problems: Sequence[Problem], mode: QuantMode, rivals: Any, device: int, **_: Any) -> int:
        order.append((list(problems), mode, list(rivals), device))
        return len(problems)

    def prepare(a: Any, weight: TorchWeight, copies: int) -> Sequence[Product]:
        order.append(weight.n)
        return cublas_products(a, weight, copies)

    monkeypatch.setattr(step_bench, "compile_ahead", compile_ahead)
    monkeypatch.setattr(step_bench, "gpu_machine", lambda _torch, _index: host_machine())
    monkeypatch.setattr(HostLibrary, "hopper_device", lambda _: replace(H100, index=2))
    rival = Rival("other", "other-kernels", "float16", 0.01, prepare)
    found = measured(HostLibrary(), rivals=[rival], machine=None)
    assert found.timing("other") is not None
    problems = list(DECODING.problems().values())
    assert order == [(problems, MODE, [rival], 2), *(problem.n for problem in problems)]


def test_a_rival_in_bf16_has_tensors_of_its_own() -> None:
    seen: list[Any] = []

    def in_bf16(a: Any, weight: TorchWeight, copies: int) -> Sequence[Product]:
        seen.append(a.dtype)
        dense = weight.dense().to(a.dtype)
        return [lambda given: given @ dense.T] * copies

    found = measured(HostLibrary(), rivals=[Rival("b_bf16", "b", "bfloat16", 0.03, in_bf16)])
    assert set(seen) == {torch.bfloat16}
    timing = found.timing("b_bf16")
    assert timing is not None
    assert 0 < timing.difference < 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequences": 0}, "sequences of 0 must be at least 1"),
        ({"new_tokens": 0}, "new_tokens of 0"),
        ({"layers": 0}, "depth of 0"),
        ({"context": -1}, "context of -1"),
        ({"new_tokens": 2}, "0 for a step of 2 tokens"),
    ],
)
def test_steps_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        replace(DECODING, **changes)


def test_groups_that_do_not_divide_a_layer_are_refused() -> None:
    with pytest.raises(InvalidValueError, match="layer down of tiny has k of 384, which 256 does not divide"):
        replace(DECODING, group_size=256).problems()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("w4a16_sm90_native_fgs_cta64x8x128_cluster1x1x1_warps8_persistent", "products"),
        ("nvjet_hsh_64x8_64x16_4x1_v_bz_TNT", "products"),
        ("void cutlass::device_kernel<flash::FlashAttnFwdSm90>", "attention"),
        ("fmha_cutlassF_f16_aligned_64x64_rf_sm80(PyTorchMemEffAttention)", "attention"),
        ("void pytorch_flash::flash_fwd_splitkv_kernel", "attention"),
        ("triton_poi_fused__scaled_dot_product_flash_attention_add_cat_0", "elementwise"),
        ("triton_red_fused_add_copy_mul_rms_norm_0", "elementwise"),
        ("void at::native::vectorized_elementwise_kernel", "elementwise"),
    ],
)
def test_kernels_are_told_apart_by_their_names(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_shares_and_gaps_make_up_the_step() -> None:
    found = sum_up([("w4a16_a", 5.0), ("w4a16_b", 2.0), ("flash", 3.0), ("triton_", 1.0)], 15.0)
    assert found == Shares(7.0, 3.0, 1.0, 4.0)


class Command:
    """Runs `bench --step` with times that are given."""

    def __init__(self, cli: Runner, left_out: dict[str, str]) -> None:
        self.steps: list[Step] = []
        self.rivals: list[str] = []
        self.cli = cli

        def run(_library: Any, step: Step, mode: QuantMode, rivals: Any, rounds: int, **_: Any) -> StepBench:
            self.steps.append(step)
            self.rivals = [rival.name for rival in rivals]
            timings = [
                StepTiming(OWN, Timing(OWN, [1000.0] * rounds), 0.001, Shares(600, 200, 150, 50)),
                StepTiming(CUBLAS, Timing(CUBLAS, [3000.0] * rounds), 0.0, None),
            ]
            return StepBench(step, H100, mode, timings, left_out, 500.0)

        library = FakeLibrary(enumerate_space("default"))
        cli.services = Services(load=lambda _folder: library, step_bench=run)


def test_the_command_shows_a_table_for_each_step(cli: Runner) -> None:
    command = Command(cli, {})
    done = cli.run("bench --step tiny --step llama-3-70b/8 --sequences 1 --sequences 8 --context 64 --layers 2 --wide")
    assert done.exit_code == 0, done.output
    assert command.steps == [
        Step(name, models.MODELS[name], gpus, count, 1, 64, 128, 2)
        for name, gpus in (("tiny", 1), ("llama-3-70b", 8))
        for count in (1, 8)
    ]  # fmt: skip
    assert command.rivals == []
    assert "llama-3-70b on one of 8 GPUs, 2 layers, 8 sequences, context 64" in done.output
    row = next(line.split() for line in done.output.splitlines() if line.startswith(OWN))
    assert row == [OWN, "1000", "1000", "3.00", "0.50", "600", "200", "150", "50"]


def test_the_command_prints_an_object(cli: Runner) -> None:
    Command(cli, {"humming": "not there"})
    done = cli.run("bench --step tiny --prefill 16 --rivals --json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    del found["schema"]
    check(found["steps"], [STEP], "steps")
    assert found.keys() == SCHEMAS["bench"].keys()
    assert found["steps"][0]["step"]["new_tokens"] == 16
    assert found["steps"][0]["step"]["context"] == 0
    assert found["steps"][0]["timings"][0]["tokens_per_second"] == pytest.approx(16000)
    assert found["steps"][0]["left_out"] == {"humming": "not there"}


def test_a_wrong_result_ends_the_command_with_an_error(cli: Runner) -> None:
    Command(cli, {OWN: "its error is 3 times what rounding explains"})
    done = cli.run("bench --step tiny --sequences 1 --sequences 8")
    assert done.exit_code == 1
    errors = " ".join(done.stderr.split())
    for count in ("1 sequence,", "8 sequences,"):
        assert f"{count} context 512, w4a16gen: its error is 3 times" in errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--step tiny --random 3", "--step times a whole model: drop --random"),
        ("--step tiny --problem 1x64x128 --report out", "drop --problem and --report"),
        ("--step tiny --step tiny,256", "layer down of tiny has k of 384"),
        ("--step tiny/3", "cannot be divided among 3 GPUs"),
        ("--problem 1x64x128 --prefill 3", "only --step takes them: drop --prefill"),
        ("--random 3 --sequences 4", "only --step takes them: drop --sequences"),
    ],
)
def test_options_that_do_not_go_together_are_refused(cli: Runner, options: str, message: str) -> None:
    command = Command(cli, {})
    done = cli.run(f"bench {options}")
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert command.steps == []


def test_the_dense_product_is_the_first_entrant() -> None:
    first = entrants_of(FakeLibrary(enumerate_space("default")), [], MODE)[0]
    assert (first.name, first.prepare) == (CUBLAS, cublas_products)


@pytest.mark.parametrize("left_out", Epilogue, ids=str)
def test_fused_entrants_need_kernels_with_both_epilogues(left_out: Epilogue) -> None:
    epilogues = [epilogue for epilogue in Epilogue if epilogue is not left_out]
    library = FakeLibrary(with_epilogues(enumerate_space("default"), epilogues))
    fused = {entrant.name for entrant in entrants_of(library, [], MODE) if entrant.is_fused}
    names = {OWN_FUSED, OWN_FUSED_AUTO, OWN_FUSED_DEPENDENT_PDL, OWN_FUSED_AUTO_PDL}
    assert fused == (names if left_out is Epilogue.NONE else set())


def test_long_steps_are_timed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks: list[str] = []
    monkeypatch.setattr(Contender, "time_block", lambda self: blocks.append(self.kept))
    long = Contender(lambda: None, lambda: 30.0, 1, "long")
    short = Contender(lambda: None, lambda: 1.0, 1, "short")
    order = SimpleNamespace(shuffle=lambda _: None)
    take_turns({"long": long, "short": short}, 3, order)  # type: ignore[arg-type]
    assert blocks == ["long", "long"]
    assert len(short.microseconds) == 3
    assert np.isclose(long.microseconds[0], 30_000)
