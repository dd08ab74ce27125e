"""The proofs of grouped kernels and layers of experts: what they run, and that wrong ones are found, without a GPU."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import experts as faked
from fakes.devices import H100, numbered
from fakes.experts import Activating, Combining, Grouped, Routing
from fakes.library import FakeLibrary
from fakes.memory import memory_at

from w4a16gen import Epilogue, KernelConfig
from w4a16gen.kernels.arrangement import MAX_UNSORTED_ROUTES
from w4a16gen.kernels.epilogue import Activation
from w4a16gen.runtime.expert_calls import GATED_ACTIVATIONS
from w4a16gen.verify import (
    epilogues,
    expert_inputs,
    expert_layers,
    experts,
    grouped_products,
    launch_chains,
    numeric,
    report,
    static,
)
from w4a16gen.verify.numeric import NumericProof
from w4a16gen.verify.static import StaticProof

NAMES = [
    "w4a16_sm90_native_fgs_cta64x8x128_cluster1x1x1_warps8_grouped",
    "w4a16_sm90_native_fgs_cta64x8x128_cluster1x1x1_warps8_grouped_gated",
]
OTHERS = [
    "w4a16_sm90_native_cs_cta64x16x128_cluster1x1x1_warps8_grouped",
    "w4a16_sm90_native_fgsz_cta256x64x128_cluster1x1x1_warpgroups2_grouped",
]
KINDS = {grouped_products.ROUTING, grouped_products.PRODUCT}


@pytest.fixture(autouse=True)
def small_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prove layers of one size."""
    monkeypatch.setattr(experts, "LAYER_SIZES", ((64, 96, 32),))
    monkeypatch.setattr(expert_layers, "LAYER_EXPERTS", 8)
    monkeypatch.setattr(expert_layers, "LAYER_TOKENS", (1, 9))


def run(names: list[str] | None = None) -> dict[str, NumericProof]:
    """Prove kernels on small products."""
    library = FakeLibrary(map(KernelConfig.parse, NAMES if names is None else names))
    proofs = {config: NumericProof(config.name) for config in library.grouped_configs()}
    experts.prove_experts(library, proofs, shapes=((48, 64, 32),), experts=(1, 5))
    return {proof.name: proof for proof in proofs.values()}


def test_right_kernels_pass_every_kind_of_check() -> None:
    proofs = run([*NAMES, *OTHERS])
    assert [proof.failures for proof in proofs.values()] == [[]] * 4
    assert all(0 < proof.worst_error_over_bound <= 1 for proof in proofs.values())
    layers = {name: proof.passed.pop(expert_layers.LAYER, 0) for name, proof in proofs.items()}
    assert all(proof.passed == dict.fromkeys(KINDS, 4) for proof in proofs.values())
    cases, few = 2 * len(GATED_ACTIVATIONS), len(expert_layers.FEW_TOKENS)
    plain, gated = NAMES
    counts = dict.fromkeys(OTHERS, 2 * cases) | {plain: cases + 2 * few, gated: cases + few}
    assert layers == counts, "chosen kernels of a gated layer count for the first one, pairs for both"


def test_kernels_are_proven_on_the_gpu_that_is_asked_for() -> None:
    library = FakeLibrary(map(KernelConfig.parse, NAMES), devices=numbered(H100, H100))
    proofs = {config: NumericProof(config.name) for config in library.grouped_configs()}
    experts.prove_experts(library, proofs, device=1, shapes=((48, 64, 32),), experts=(5,))
    experts.prove_random_routings(library, proofs, 4, device=1)
    assert [proof.failures for proof in proofs.values()] == [[]] * 2
    assert sum(proof.passed[grouped_products.PRODUCT] for proof in proofs.values()) == 2 * 2 + 4


def test_each_kernel_finds_the_experts_of_few_tokens_with_a_map_and_without() -> None:
    modes, tiles = ("fgs", "cs"), ("64x8x128", "128x8x128", "64x16x128")
    names = [f"w4a16_sm90_native_{mode}_cta{tile}_cluster1x1x1_warps8_grouped" for mode in modes for tile in tiles]
    proofs = {config: NumericProof(config.name) for config in map(KernelConfig.parse, [*names, NAMES[1]])}
    first, down = KernelConfig.parse(NAMES[1]), names[:2]
    made = list(expert_layers._few_token_cases(proofs, first.mode, Epilogue.GATED))  # noqa: SLF001
    assert {one for _, (one, _) in made} == {first}
    assert {other.name for _, (_, other) in made} == set(down)
    for name in down:
        cases = [case for case, (_, other) in made if other.name == name]
        assert sorted(case.tokens for case in cases) == [1, 3, 8]
        assert {case.mapped for case in cases} == {False, True}
        assert {case.activation for case in cases} == set(GATED_ACTIVATIONS)
    other_mode = KernelConfig.parse(OTHERS[0]).mode
    assert list(expert_layers._few_token_cases(proofs, other_mode, Epilogue.GATED)) == []  # noqa: SLF001


def test_few_tokens_have_as_many_routes_as_may_be_unsorted(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    _in(Combining, lambda call: found.append(0 if call.rows_of_routes else call.tokens * call.slots))(monkeypatch)
    run()
    assert max(found) == MAX_UNSORTED_ROUTES


def test_weights_for_the_gate_are_proven_without_gated_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    (proof,) = run(NAMES[:1]).values()
    assert proof.failures == []
    assert proof.passed[expert_layers.LAYER] == 2 * (2 * len(GATED_ACTIVATIONS) + len(expert_layers.FEW_TOKENS))
    _another_gate(monkeypatch)
    (proof,) = run(NAMES[:1]).values()
    assert any("gated=True" in failure for failure in proof.failures)


def test_gated_layers_need_kernels_of_both_kinds() -> None:
    (proof,) = run(NAMES[1:]).values()
    assert proof.failures == []
    assert expert_layers.LAYER not in proof.passed


Fault = Callable[[pytest.MonkeyPatch], None]


def _in(kind: type[Any], change: Callable[[Any], None]) -> Fault:
    """Return what makes a call do something else after its work."""

    def install(patch: pytest.MonkeyPatch) -> None:
        right = kind.run

        def run(call: Any) -> None:
            right(call)
            change(call)

        patch.setattr(kind, "run", run)

    return install


def _products(call: Grouped) -> Any:
    n = call.problem.n // 2 if call.activation.is_gated else call.problem.n
    return memory_at(call.output, (call.rows, n), "<f2")


def _halve_last_expert(call: Grouped) -> None:
    rows = call.rows_of_experts()
    if rows:
        _products(call)[rows[max(rows)]] *= np.float16(0.5)


def _write_rows_of_nobody(call: Grouped) -> None:
    out = _products(call)
    out[np.isnan(out)] = 0


def _write_behind(call: Grouped) -> None:
    memory_at(call.output + _products(call).nbytes, (1,), "|u1")[0] = 0


class _Alternating:
    """Changes the result of every other launch by the last bit."""

    def __init__(self) -> None:
        self.launches = 0

    def __call__(self, call: Grouped) -> None:
        self.launches += 1
        if self.launches % 2:
            out = _products(call)
            out.view("<u2")[...] ^= np.isfinite(out).astype(np.uint16)


def _swap_routes(call: Routing) -> None:
    rows = memory_at(call.routes_of_rows, (call.tokens * call.slots,), "<i4")
    rows[:2] = rows[:2][::-1].copy()


def _shift_offsets(call: Routing) -> None:
    memory_at(call.offsets, (1,), "<i4")[0] += 1


def _another_gate(patch: pytest.MonkeyPatch) -> None:
    right = Activating.run
    numbers = [Activation.GEGLU_TANH.number, Activation.SWIGLU.number]

    def run(call: Activating) -> None:
        right(replace(call, activation_number=numbers[call.activation_number != numbers[1]]))

    patch.setattr(Activating, "run", run)


def _take_another_expert(patch: pytest.MonkeyPatch) -> None:
    right = faked.numbers_of_experts

    def numbers_of_experts(call: Any, tokens: int, slots: int) -> dict[int, int]:
        found = list(right(call, tokens, slots))
        return {
            expert: number
            for number, expert in enumerate(
                reversed(found) if isinstance(call, Grouped) and call.rows_are_shared else found
            )
        }

    patch.setattr(faked, "numbers_of_experts", numbers_of_experts)


def _write_before_workspace(call: Routing) -> None:
    if call.hidden:  # of a layer, whose offsets begin the workspace
        memory_at(call.offsets - 1, (1,), "|u1")[0] ^= 0xFF


def _leave_out_tokens_of_nobody(patch: pytest.MonkeyPatch) -> None:
    right = Combining.run

    def run(call: Combining) -> None:
        out = memory_at(call.output, (call.tokens, call.columns), "<f2")
        before = out.copy()
        right(call)
        unused = ~out.any(axis=1)
        out[unused] = before[unused]

    patch.setattr(Combining, "run", run)


def _add_twice(call: Combining) -> None:
    memory_at(call.output, (call.tokens, call.columns), "<f2")[...] *= np.float16(2)


def _add_zero_times_every_row(call: Combining) -> None:
    if call.rows_of_routes:
        rows = memory_at(call.rows, (call.tokens * call.slots, call.columns), "<f2")
        with np.errstate(invalid="ignore"):
            memory_at(call.output, (call.tokens, call.columns), "<f2")[...] += 0 * rows.max()


FAULTS: dict[str, tuple[Fault, str, str]] = {
    "one expert": (_in(Grouped, _halve_last_expert), NAMES[0], "grouped .*: error is .* times the bound"),
    "rows of nobody": (_in(Grouped, _write_rows_of_nobody), NAMES[0], "grouped .*: rows of no expert were written"),
    "behind the output": (_in(Grouped, _write_behind), NAMES[1], "grouped .*: wrote beyond the output"),
    "bits": (_in(Grouped, _Alternating()), NAMES[0], "grouped .*: (the bits differ when it runs again|error is)"),
    "order": (_in(Routing, _swap_routes), NAMES[1], "routing .*: rows are not in the order of their routes"),
    "offsets": (_in(Routing, _shift_offsets), NAMES[1], "routing .*: offsets are wrong"),
    "gate": (_another_gate, NAMES[0], "layer .* gated=False .*: error is .* times the bound"),
    "experts of few": (
        _take_another_expert,
        NAMES[0],
        "layer .* gated=True tokens=[13] .*: error is .* times the bound",
    ),
    "before the workspace": (_in(Routing, _write_before_workspace), NAMES[0], "layer .*: wrote beyond the workspace"),
    "tokens of nobody": (_leave_out_tokens_of_nobody, NAMES[0], "layer .*: error is .* times the bound"),
    "what the workspace held": (_in(Combining, _add_zero_times_every_row), NAMES[0], "layer .*: error is inf times"),
    "sum": (_in(Combining, _add_twice), NAMES[1], "layer .* gated=True .*: error is .* times the bound"),
}


@pytest.mark.parametrize(("fault", "name", "text"), FAULTS.values(), ids=FAULTS.keys())
def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch, fault: Fault, name: str, text: str) -> None:
    fault(monkeypatch)
    failures = run()[name].failures
    assert any(re.match(text, failure) for failure in failures), failures


def test_products_are_launched_by_themselves_and_behind_others(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Grouped] = []
    _in(Grouped, made.append)(monkeypatch)
    run(NAMES[1:])  # without layers, whose products are dependent too
    assert {bool(call.dependent) for call in made} == {False, True}


def test_layers_are_launched_with_every_option(monkeypatch: pytest.MonkeyPatch) -> None:
    sums, routings = list[Combining](), list[Routing]()
    _in(Combining, sums.append)(monkeypatch)
    _in(Routing, lambda call: routings.append(call) if call.hidden else None)(monkeypatch)
    run()
    assert {bool(call.weights) for call in sums} == {False, True}, "weights on the input, and on the results"
    assert {bool(call.expert_map) for call in routings} == {False, True}


def test_channels_that_hold_no_pairs_of_runs_are_proven_without_gates() -> None:
    library = FakeLibrary(map(KernelConfig.parse, NAMES))
    proofs = {config: NumericProof(config.name) for config in library.grouped_configs()}
    experts.prove_experts(library, proofs, shapes=((40, 64, 32),), experts=(5,))
    plain, gated = proofs.values()
    assert plain.failures == gated.failures == []
    assert plain.passed[grouped_products.PRODUCT] == 2
    assert grouped_products.PRODUCT not in gated.passed


def test_launches_that_fail_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_out(_call: Any) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(Combining, "run", run_out)
    proof = run()[NAMES[0]]
    assert proof.passed == dict.fromkeys(KINDS, 4)
    assert all(failure.startswith("layer ") and failure.endswith("out of luck") for failure in proof.failures)
    assert len(proof.failures) == 2 * len(GATED_ACTIVATIONS) + len(expert_layers.FEW_TOKENS)


def test_random_routings_run_on_some_of_the_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "RANDOM_EXPERTS", (1, 9))
    monkeypatch.setattr(experts, "MOST_RANDOM_EXPERTS", 9)
    library = FakeLibrary(map(KernelConfig.parse, [*NAMES, *OTHERS]))
    proofs = {config: NumericProof(config.name) for config in library.grouped_configs()}
    experts.prove_random_routings(library, proofs, 40)
    assert [proof.failures for proof in proofs.values()] == [[]] * len(proofs)
    assert sum(proof.passed[grouped_products.PRODUCT] for proof in proofs.values()) == 40
    assert all(
        proof.passed[grouped_products.PRODUCT] == proof.passed[grouped_products.ROUTING] for proof in proofs.values()
    )
    made = [call for call in library.module.expert_calls if isinstance(call, Grouped)]
    assert {call.experts for call in made} > {1, 9}
    assert {bool(call.bias) for call in made} == {False, True}
    assert {call.alpha for call in made} == {1.0, -0.75}
    experts.prove_random_routings(library, {}, 40)
    _in(Grouped, _halve_last_expert)(monkeypatch)
    experts.prove_random_routings(library, proofs, 20)
    assert any(proof.failures for proof in proofs.values())


def drawn(seed: int, experts_here: int) -> Iterator[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    for _ in range(300):
        yield expert_inputs.draw_ids(rng, int(rng.integers(1, 40)), int(rng.integers(1, 9)), experts_here)


@pytest.mark.parametrize("count", [1, 7, 64])
def test_routings_of_every_kind_are_drawn(count: int) -> None:
    found = list(drawn(0, count))
    assert {str(ids.dtype) for ids in found} == {"int32", "int64"}
    assert all(ids.ndim == 2 and ids.flags.c_contiguous for ids in found)
    local = [ids[(ids >= 0) & (ids < count)] for ids in found]
    strangers = [set(ids.ravel().tolist()) - set(range(count)) for ids in found]
    assert set().union(*strangers) == set(expert_inputs.NOBODY)
    assert any(here.size == 0 for here in local), "all to nobody"
    assert any(here.size == ids.size for here, ids in zip(local, found, strict=True)), "none to nobody"
    assert any(
        len(set(here.tolist())) == 1 and here.size == ids.size > 8 for here, ids in zip(local, found, strict=True)
    )
    alone = [len(set(here.tolist())) == 1 and here.size > 8 for here in local]
    assert sum(alone) > 0.08 * len(found), "many routings are to one expert only"
    if count > 1:
        assert any(len(set(here.tolist())) > 1 for here in local)
        assert set(np.concatenate(local).tolist()) == set(range(count))
    assert all(np.array_equal(one, other) for one, other in zip(found, drawn(0, count), strict=True))


@pytest.mark.parametrize(("sampled", "counts"), [(False, (1, 7, 64)), (True, (1, 7))])
def test_verify_counts_grouped_kernels_and_runs_their_proofs(
    monkeypatch: pytest.MonkeyPatch, sampled: bool, counts: tuple[int, ...]
) -> None:
    ordinary = KernelConfig.parse("w4a16_sm90_native_cs_cta64x8x128_cluster1x1x2_warps8_persistent")
    grouped = [KernelConfig.parse(name) for name in NAMES]
    asked: list[Any] = []

    def prove_experts(_library: object, proofs: dict[KernelConfig, NumericProof], **given: Any) -> None:
        asked.append(given["experts"])
        for proof in proofs.values():
            proof.record(grouped_products.PRODUCT, "a product", None)
        proofs[grouped[1]].record(expert_layers.LAYER, "a layer", "wrong")

    library = FakeLibrary([ordinary, *grouped])
    every = [config.as_json() for config in (ordinary, *grouped)]
    monkeypatch.setattr(static, "prove", lambda _library, _folder: StaticProof(every, []))
    monkeypatch.setattr(numeric, "prove", lambda _library, **_given: [NumericProof(ordinary.name)])
    monkeypatch.setattr(launch_chains, "prove_chains", lambda *_, **_given: None)
    monkeypatch.setattr(epilogues, "prove_epilogues", lambda *_, **_given: None)
    monkeypatch.setattr(experts, "prove_experts", prove_experts)
    found = report.verify(library, Path("nowhere"), sampled=sampled)
    assert asked == [counts]
    assert not found.ok
    assert found.violations() == [f"{NAMES[1]}: a layer: wrong"]
    assert found.summary() == (
        "Static proofs hold for 3 kernels. Numerics of 2 of them on NVIDIA H100 80GB HBM3: 2 checks passed, 1 failed."
    )


def test_static_proofs_compare_packed_sizes_of_grouped_kernels() -> None:
    library = FakeLibrary(map(KernelConfig.parse, NAMES))
    kernels: Any = library.bindings.library
    assert static._packing_violations(library) == []  # noqa: SLF001
    right = kernels.packed_bytes
    kernels.packed_bytes = lambda *arguments: (0, "", right(*arguments)[2] + 128)
    assert [text.split(" ", 1)[0] for text in static._packing_violations(library)] == NAMES  # noqa: SLF001
