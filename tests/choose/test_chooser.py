"""The order in which a choice asks overrides, tables and estimates, and which of them apply to a call."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from fakes.devices import H100, H100_PCIE, H200, H800
from fakes.library import FakeLibrary, build_of, chooser_of

from w4a16gen import KernelConfig, Problem, QuantMode, use_kernels
from w4a16gen.choose.chooser import ChoiceSource, Chooser
from w4a16gen.choose.timing_table import SCHEMA, TABLE, Measured, add_times, one_time
from w4a16gen.errors import NotBuiltError, UnsupportedProblemError
from w4a16gen.kernels.config import Target
from w4a16gen.kernels.device import Device
from w4a16gen.kernels.spaces import enumerate_space
from w4a16gen.weights.packed import TARGET_LAYOUTS, PackedWeight

MODE = QuantMode.FINEGRAINED_SCALE_ONLY
NATIVE = [config for config in enumerate_space("default") if config.mode is MODE]
CUTLASS = [config for config in enumerate_space("trtllm") if config.mode is MODE]
MEASURED = Problem(16, 4096, 4096, 128)
"""A problem that tests tune."""
UNKNOWN = Problem(16, 4096, 4352, 128)
"""A problem of a layer that no test tunes."""


def slow_kernel() -> KernelConfig:
    """Return a kernel that the estimate does not choose for `MEASURED`."""
    return chooser_of(NATIVE).estimates(MEASURED, MODE)[-1][0]


def tune(
    folder: Path, times: Mapping[KernelConfig, float], device: Device = H100, problem: Problem = MEASURED
) -> Chooser:
    """Return a chooser among all kernels of mode fgs, with a tuning table."""
    chooser = chooser_of([*NATIVE, *CUTLASS], folder)
    hashes = build_of([*NATIVE, *CUTLASS]).content_hashes
    for config, microseconds in times.items():
        add_times(folder / TABLE, one_time(device, problem, config, Measured(microseconds, hashes[config])))
    return chooser


def test_every_source_gives_way_to_the_one_before(tmp_path: Path) -> None:
    slow = slow_kernel()
    assert chooser_of(CUTLASS).choose(MEASURED, MODE, device=H100).source is ChoiceSource.RULE_OF_THUMB
    both = chooser_of([*NATIVE, *CUTLASS])
    assert both.choose(UNKNOWN, MODE, device=H100).source is ChoiceSource.ESTIMATE
    known = both.choose(MEASURED, MODE, device=H100)
    assert known.source is ChoiceSource.ESTIMATE
    tuned = tune(tmp_path, {slow: 1.0})
    choice = tuned.choose(MEASURED, MODE, device=H100)
    assert (choice.kernel, choice.microseconds, choice.source) == (slow, 1.0, ChoiceSource.TUNING_TABLE)
    with use_kernels(known.kernel):
        override = tuned.choose(MEASURED, MODE, device=H100)
    assert (override.kernel, override.microseconds, override.source) == (known.kernel, None, ChoiceSource.OVERRIDE)
    passed = tuned.choose(MEASURED, MODE, device=H100, overrides=[slow, known.kernel])
    assert (passed.kernel, passed.source) == (slow, ChoiceSource.OVERRIDE), "the first of several"


def test_a_tuning_table_applies_to_like_token_counts_only(tmp_path: Path) -> None:
    slow = slow_kernel()
    chooser = tune(tmp_path, {slow: 1.0}, problem=replace(MEASURED, m=64))
    for m in (57, 64):
        assert chooser.choose(replace(MEASURED, m=m), MODE, device=H100).kernel == slow
    for m in (33, 56, 65, 128):
        choice = chooser.choose(replace(MEASURED, m=m), MODE, device=H100)
        assert choice.source is ChoiceSource.ESTIMATE


def test_of_cutlass_alone_a_tuning_table_applies_up_to_the_next_more_tokens(tmp_path: Path) -> None:
    hashes = build_of(CUTLASS).content_hashes
    add_times(tmp_path / TABLE, one_time(H100, MEASURED, CUTLASS[-1], Measured(1.0, hashes[CUTLASS[-1]])))
    chooser = chooser_of(CUTLASS, tmp_path)
    sources = {m: chooser.choose(replace(MEASURED, m=m), MODE, device=H100).source for m in (8, 9, 16, 17)}
    tuned, guessed = ChoiceSource.TUNING_TABLE, ChoiceSource.RULE_OF_THUMB
    assert sources == {8: guessed, 9: tuned, 16: tuned, 17: guessed}


def test_only_kernels_that_read_the_weight_are_chosen(tmp_path: Path) -> None:
    chooser = tune(tmp_path, {CUTLASS[0]: 1.0, NATIVE[0]: 2.0})
    assert chooser.choose(MEASURED, MODE, device=H100).kernel == CUTLASS[0]
    assert chooser.choose(MEASURED, MODE, device=H100, target=Target.NATIVE).kernel == NATIVE[0]
    cutlass = chooser.choose(UNKNOWN, MODE, device=H100, target=Target.CUTLASS)
    assert (cutlass.kernel.target, cutlass.source) == (Target.CUTLASS, ChoiceSource.RULE_OF_THUMB)
    overridden = chooser.choose(UNKNOWN, MODE, device=H100, target=Target.NATIVE, overrides=[CUTLASS[0], NATIVE[0]])
    assert overridden.kernel == NATIVE[0], "an override for another weight does not apply"
    with pytest.raises(UnsupportedProblemError, match="no kernel of mode fgs that reads this weight's layout"):
        chooser_of(CUTLASS).choose(MEASURED, MODE, device=H100, target=Target.NATIVE)


def test_an_override_must_be_built_and_able() -> None:
    missing = next(config for config in enumerate_space("native") if config.mode is MODE and config not in NATIVE)
    chooser = chooser_of(NATIVE)
    with pytest.raises(NotBuiltError, match=f"{missing.name}.*is not in the build"):
        chooser.choose(MEASURED, MODE, device=H100, overrides=[missing])
    with pytest.raises(UnsupportedProblemError, match=f"{NATIVE[0].name} cannot run .*group size 48"):
        chooser.choose(Problem(1, 512, 1024, 48), MODE, device=H100, overrides=[NATIVE[0]])
    other = replace(missing, mode=QuantMode.PER_COLUMN_SCALE_ONLY)
    assert chooser.choose(MEASURED, MODE, device=H100, overrides=[other]).source is ChoiceSource.ESTIMATE


def test_a_problem_that_no_kernel_can_run_is_refused() -> None:
    with pytest.raises(UnsupportedProblemError, match=r"no built kernel can run .*group size 48"):
        chooser_of(NATIVE).choose(Problem(1, 512, 1024, 48), MODE, device=H100)
    with pytest.raises(UnsupportedProblemError, match="no kernel of mode fgsz"):
        chooser_of(NATIVE).choose(MEASURED, QuantMode.FINEGRAINED_SCALE_AND_ZEROS, device=H100)


@pytest.mark.parametrize("kernels", [NATIVE, CUTLASS], ids=["native", "cutlass"])
def test_no_tokens_get_a_kernel(kernels: list[KernelConfig], tmp_path: Path) -> None:
    chooser = chooser_of(kernels, tmp_path)
    add_times(tmp_path / TABLE, one_time(H100, MEASURED, kernels[0], Measured(1.0, f"hash of {kernels[0].name}")))
    empty = replace(MEASURED, m=0)
    choice = chooser.choose(empty, MODE, device=H100)
    assert choice.kernel in kernels
    assert choice.source in {ChoiceSource.ESTIMATE, ChoiceSource.RULE_OF_THUMB}
    assert chooser.choose(empty, MODE, device=H100) == choice


def test_cards_with_like_memory_and_sms_get_the_same_choice() -> None:
    chooser = chooser_of(NATIVE)
    h100, h800 = (chooser.choose(MEASURED, MODE, device=card) for card in (H100, H800))
    assert h800 == h100
    assert chooser.choose(MEASURED, MODE, device=None) == h100


def test_estimates_are_for_the_gpu_that_is_there() -> None:
    problem = Problem(4096, 8192, 8192, 128)
    chooser = chooser_of(NATIVE)
    microseconds = {}
    for device in (H100, H100_PCIE, replace(H100, sm_count=60), replace(H100, sm_count=16)):
        best = chooser.estimates(problem, MODE, device)[0]
        microseconds[device.sm_count] = best[1]
    assert microseconds[132] < microseconds[114] < microseconds[60] < microseconds[16]
    reading = Problem(1, 28672, 8192, 128)
    assert chooser.estimates(reading, MODE, H200)[0][1] < 0.9 * chooser.estimates(reading, MODE, H100)[0][1]


def test_the_first_estimate_is_the_choice() -> None:
    chooser = chooser_of(NATIVE)
    for device in (H100, H100_PCIE, H200):
        for m in (0, 1, 12, 100, 1000, 8192):
            problem = replace(UNKNOWN, m=m)
            choice = chooser.choose(problem, MODE, device=device)
            assert (choice.kernel, choice.microseconds) == chooser.estimates(problem, MODE, device)[0]


def test_oversized_tiles_are_chosen_only_where_nothing_else_is_built() -> None:
    small, large = (config for config in NATIVE if str(config.cta) in {"256x8x128", "256x72x128"})
    for m in (1, 8, 15):
        problem = replace(UNKNOWN, m=m)
        assert chooser_of([small, large]).choose(problem, MODE, device=H100).kernel == small
        assert chooser_of([large]).choose(problem, MODE, device=H100).kernel == large


def test_a_table_of_another_gpu_is_ignored_with_one_warning(tmp_path: Path) -> None:
    text = json.dumps({"schema": SCHEMA, "gpu": "a GPU", "sm_count": 132, "times": []})
    (tmp_path / TABLE).write_text(text)
    chooser = chooser_of(NATIVE, tmp_path)
    with pytest.warns(RuntimeWarning, match="is of a GPU with 132 SMs, not of NVIDIA H100 80GB HBM3 with 132") as told:
        choices = {chooser.choose(MEASURED, MODE, device=H100) for _ in range(3)}
    assert len(told) == 1
    assert choices == {chooser_of(NATIVE).choose(MEASURED, MODE, device=H100)}


def test_each_gpu_of_a_machine_gets_its_own_table(tmp_path: Path) -> None:
    slow = slow_kernel()
    chooser = tune(tmp_path, {slow: 1.0}, device=H200)
    with pytest.warns(RuntimeWarning, match="is of NVIDIA H200"):
        assert chooser.choose(MEASURED, MODE, device=H100).source is ChoiceSource.ESTIMATE
    assert chooser.choose(MEASURED, MODE, device=H200).kernel == slow


def test_times_of_other_machine_code_do_not_count(tmp_path: Path) -> None:
    slow = slow_kernel()
    add_times(tmp_path / TABLE, one_time(H100, MEASURED, slow, Measured(1.0, "hash of other code")))
    assert chooser_of(NATIVE, tmp_path).choose(MEASURED, MODE, device=H100).source is ChoiceSource.ESTIMATE


def test_gemm_launches_what_the_chooser_returns(tmp_path: Path) -> None:
    library = FakeLibrary([*NATIVE, *CUTLASS], folder=tmp_path)
    weight = PackedWeight(None, TARGET_LAYOUTS[Target.NATIVE], MEASURED.n, MEASURED.k, 128, MODE)
    chosen = library.choose(MEASURED, MODE, target=Target.NATIVE).kernel
    assert library.kernel_for(weight, MEASURED) == chosen
    other = next(config for config in NATIVE if config != chosen)
    assert library.kernel_for(weight, MEASURED, other) == other, "a call that names a kernel gets it"
