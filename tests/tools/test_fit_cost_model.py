"""The fit of the cost model: deterministic, right on made-up times, and the origin of the committed rates."""

from __future__ import annotations

import bisect
import json
import math
from dataclasses import replace
from pathlib import Path

import fit_cost_model
import pytest
import recorded
from fakes.devices import H200

from w4a16gen import KernelConfig, Problem
from w4a16gen.choose.cards import card_of
from w4a16gen.choose.cost_model import MODEL_PATH, Constants, CostModel, Rates, default_cost_model
from w4a16gen.kernels.spaces import enumerate_space

START = Constants.from_json(json.loads(fit_cost_model.START.read_text())["constants"])
TRUTH = Rates(4000.0, 1500.0, 1100.0, 0.0, 1.1)
KERNEL = KernelConfig.parse("w4a16_sm90_native_fgs_cta128x128x64_cluster1x1x1_warpgroups2_persistent")
STREAM_K = KernelConfig.parse("w4a16_sm90_native_fgs_cta128x96x128_cluster2x1x1_warpgroups2_streamk")


def recordings_of(kernel: KernelConfig, rates: Rates) -> list[recorded.Recorded]:
    """Return the times that an H200 would take if the rates were right."""
    model, card = CostModel(START, {kernel.shape_name: rates}), card_of(H200)
    problems = [
        Problem(m, n, k, 128)
        for m in (100, 250, 600, 1500, 4000)
        for n, k in ((4096, 4096), (1024, 8192), (14336, 1024), (28672, 8192), (20480, 2048))
    ]
    return [
        recorded.Recorded(
            kernel,
            problem,
            fit_cost_model.MODE,
            model.microseconds(kernel, problem, card),
            H200.name,
            H200.sm_count,
            "2026-11-29",
            "a test",
        )
        for problem in problems
    ]


@pytest.mark.parametrize(
    ("kernel", "truth"),
    [(KERNEL, TRUTH), (STREAM_K, TRUTH._replace(split_cycles=2500.0))],
    ids=["persistent", "streamk"],
)
def test_rates_behind_made_up_times_are_found(kernel: KernelConfig, truth: Rates) -> None:
    sample = fit_cost_model.sample_of(recordings_of(kernel, truth))
    rates = fit_cost_model.fit_rates(kernel, sample.kernels[kernel], CostModel(START, {}), sample.card)
    for name, value in truth._asdict().items():
        assert getattr(rates, name) == pytest.approx(value, rel=0.1), name


def test_a_kernel_without_times_has_the_rates_that_its_shape_suggests() -> None:
    card = card_of(H200)
    assert fit_cost_model.fit_rates(KERNEL, {}, CostModel(START, {}), card) == pytest.approx(
        fit_cost_model.prior_of(KERNEL, START), rel=1e-3
    )


def like(tokens: int) -> KernelConfig:
    """Return the kernel with another number of tokens."""
    return replace(KERNEL, cta=replace(KERNEL.cta, tokens=tokens))


def test_a_kernel_without_times_has_rates_between_those_of_its_neighbours() -> None:
    def off_by(tokens: int, factor: float) -> tuple[KernelConfig, Rates]:
        return like(tokens), Rates(*(factor * rate for rate in fit_cost_model.prior_of(like(tokens), START)))

    below, above = off_by(112, 0.729), off_by(136, 1.331)
    further = off_by(64, 9.0), off_by(256, 9.0)
    other = replace(KERNEL, cluster=replace(KERNEL.cluster, channels=2)), off_by(120, 5.0)[1]
    prior = fit_cost_model.prior_of(like(120), START)
    for fitted, factor in (
        ([*further, below, above, other], 0.891),
        ([below, other], 0.729),
        ([above, other], 1.331),
        ([other], 1.0),
    ):
        rates = fit_cost_model.rates_between(like(120), dict(fitted), START)
        assert rates == pytest.approx([factor * rate for rate in prior], rel=1e-3)
    assert prior.split_cycles == 0


def test_every_kernel_of_a_space_gets_rates_by_its_times_or_by_those_of_others() -> None:
    sample = fit_cost_model.sample_of(recordings_of(KERNEL, TRUTH))
    model = fit_cost_model.fit_all(sample, [like(120), KERNEL], START)
    assert list(model.rates) == sorted(model.rates)
    fitted = fit_cost_model.fit_rates(KERNEL, sample.kernels[KERNEL], CostModel(START, {}), sample.card)
    assert model.rates_of(KERNEL) == fitted
    assert model.rates_of(like(120)) == fit_cost_model.rates_between(like(120), {KERNEL: fitted}, START)


def test_rates_are_fitted_to_stream_k_without_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    models = []

    def fitted(_kernel: KernelConfig, _times: object, model: CostModel, _card: object) -> Rates:
        models.append(model)
        return TRUTH

    monkeypatch.setattr(fit_cost_model, "fit_rates", fitted)
    sample = fit_cost_model.sample_of(recordings_of(STREAM_K, TRUTH))
    models.append(fit_cost_model.fit_all(sample, [STREAM_K], START))
    assert fit_cost_model.as_on_the_same_card(sample, sample, START).kernels == sample.kernels
    fit_cost_model.losses_of_left_out_layers(sample, START)
    assert len(models) > 4
    assert not any(model.stream_k_has_heads for model in models)


def test_several_times_count_as_their_geometric_mean_whatever_their_order() -> None:
    row = recordings_of(KERNEL, TRUTH)[0]
    pair = [row, recorded.Recorded(**{**vars(row), "microseconds": 4 * row.microseconds})]
    for rows in (pair, pair[::-1]):
        sample = fit_cost_model.sample_of(rows)
        assert sample.kernels[KERNEL][row.problem] == pytest.approx(2 * row.microseconds)


def test_older_times_count_where_there_are_few() -> None:
    rows = recordings_of(KERNEL, TRUTH)
    few, many = (fit_cost_model.sample_of(rows[:count]) for count in (5, fit_cost_model.FEWEST_TIMES))
    older = fit_cost_model.sample_of(rows)
    assert len(fit_cost_model.with_older(few, older).kernels[KERNEL]) == len(rows)
    assert len(fit_cost_model.with_older(many, older).kernels[KERNEL]) == fit_cost_model.FEWEST_TIMES


def test_the_committed_rates_are_the_best_for_the_committed_times() -> None:
    committed = default_cost_model()
    first = fit_cost_model.sample_of(recorded.read([fit_cost_model.SAMPLE]))
    current = fit_cost_model.with_other_cards(first, START)
    older = fit_cost_model.sample_of(recorded.read([fit_cost_model.SAMPLE_BEFORE]))
    sample = fit_cost_model.with_older(current, older)
    plain = fit_cost_model.model_without_heads(replace(committed.constants, sustained_factor=1.0))
    for kernel in sorted(sample.kernels)[::60]:
        fitted = fit_cost_model.fit_rates(kernel, sample.kernels[kernel], plain, sample.card)
        assert tuple(committed.rates_of(kernel)) == pytest.approx(tuple(fitted), rel=0.02), (
            "run tools/fit_cost_model.py"
        )


def test_every_native_kernel_has_rates_and_none_is_left_over() -> None:
    assert default_cost_model().rates.keys() == {config.shape_name for config in enumerate_space("native")}


def test_choices_for_layers_without_a_part_in_the_rates_are_near_the_fastest() -> None:
    residuals = json.loads(MODEL_PATH.read_text())["residuals"]
    losses = residuals["choice_loss_in_left_out_layers"]
    assert sum(band["problems"] for band in losses.values()) > 300
    assert all(band["geometric_mean"] < 0.02 and band["worst"] < 0.15 for band in losses.values())
    errors = residuals["errors"]
    assert all(abs(band["mean"]) < 0.02 and band["deviation"] < 0.07 for band in errors.values())
    # Long problems were timed once each there, at a clock that the power limit moved: largest losses say little.
    on_all_cards = residuals["choice_loss_in_left_out_layers_on_all_cards"]
    assert sum(band["problems"] for band in on_all_cards.values()) > 1000
    assert all(band["geometric_mean"] < 0.03 for band in on_all_cards.values())


def test_the_committed_errors_are_those_of_the_committed_rates() -> None:
    committed = default_cost_model()
    unsustained = fit_cost_model.model_without_heads(
        replace(committed.constants, sustained_factor=1.0), committed.rates
    )
    sample = fit_cost_model.sample_of(recorded.read([fit_cost_model.SAMPLE]))
    residuals = json.loads(MODEL_PATH.read_text())["residuals"]
    assert residuals["errors"] == fit_cost_model.errors_by_band(unsustained, sample)


def test_choices_on_an_h100_for_layers_that_no_constant_knows_are_near_the_fastest() -> None:
    sample = fit_cost_model.sample_of(recorded.read([recorded.DATA_FOLDER / "h100_held_out.csv.xz"]))
    losses = fit_cost_model.losses(fit_cost_model.estimates_of(default_cost_model(), sample), sample)
    assert sum(band["problems"] for band in losses.values()) == 100
    for tokens, most in (("1 to 64", 0.003), ("65 to 256", 0.003), ("257 to 1024", 0.01), ("1025 and more", 0.02)):
        assert losses[tokens]["geometric_mean"] < most, tokens


def test_the_loss_of_a_choice_is_beside_the_fastest() -> None:
    problem = Problem(300, 4096, 4096, 128)
    sample = fit_cost_model.Sample(card_of(H200), {KERNEL: {problem: 12.0}, STREAM_K: {problem: 10.0}}, {})
    right = fit_cost_model.losses({problem: {KERNEL: 3.0, STREAM_K: 2.0}}, sample)
    wrong = fit_cost_model.losses({problem: {KERNEL: 2.0, STREAM_K: 3.0}}, sample)
    assert right == {"257 to 1024": {"problems": 1, "geometric_mean": 0.0, "worst": 0.0}}
    assert wrong == {"257 to 1024": {"problems": 1, "geometric_mean": 0.2, "worst": 0.2}}


def test_the_document_comes_back_as_a_model(tmp_path: Path) -> None:
    model = CostModel(START, {KERNEL.shape_name: TRUTH})
    path = tmp_path / "model.json"
    path.write_text(fit_cost_model.document(model, "a test", {}))
    assert CostModel.read(path) == model


def test_a_recording_with_a_wrong_line_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "times.csv"
    for line in ("cublas_fp16,1,2", "a kernel,1,512,1024,128,fgs,1.0,a GPU,132,2026-11-28,a test"):
        path.write_text(",".join(recorded.COLUMNS) + f"\n{line}\n")
        with pytest.raises(ValueError, match=r"times\.csv, line 2 is not a measurement"):
            recorded.read([path])


def test_the_factor_of_sustained_work_is_of_long_problems_only() -> None:
    model = CostModel(START, {KERNEL.shape_name: TRUTH})
    short, long = Problem(64, 4096, 4096, 128), Problem(8192, 8192, 8192, 128)
    card = card_of(H200)
    times = {short: 9.0, long: 1.2 * model.microseconds(KERNEL, long, card)}
    factor = fit_cost_model.sustained_factor(model, fit_cost_model.Sample(card, {KERNEL: times}, {}))
    assert factor == pytest.approx(1.2, abs=0.001)
    assert math.isfinite(factor)


def test_times_of_another_card_count_as_those_of_the_first() -> None:
    rows = recordings_of(KERNEL, TRUTH)
    first = fit_cost_model.sample_of(rows)
    factors = {0: 0.5, 1: 0.8, 2: 0.9, 3: 1.1}

    def there(row: recorded.Recorded) -> float:
        return row.microseconds * factors[bisect.bisect(fit_cost_model.FLOPS_OF_CARDS, row.problem.flops)]

    slower = [recorded.Recorded(**{**vars(row), "microseconds": there(row)}) for row in rows]
    unknown = [recorded.Recorded(**{**vars(row), "kernel": STREAM_K}) for row in slower]
    scaled = fit_cost_model.as_on_the_same_card(fit_cost_model.sample_of(slower + unknown), first, START)
    for row in rows:
        assert scaled.kernels[KERNEL][row.problem] == pytest.approx(row.microseconds)
        assert scaled.kernels[STREAM_K][row.problem] == pytest.approx(row.microseconds)


def test_times_of_another_card_stay_where_no_kernel_is_shared() -> None:
    first = fit_cost_model.sample_of(recordings_of(KERNEL, TRUTH))
    other = fit_cost_model.sample_of(recordings_of(STREAM_K, TRUTH._replace(split_cycles=2500.0)))
    assert fit_cost_model.as_on_the_same_card(other, first, START).kernels == other.kernels


def test_of_two_samples_the_second_counts_where_both_have_a_time() -> None:
    a, b, c = (Problem(m, 512, 1024, 128) for m in (16, 32, 64))
    first = fit_cost_model.Sample(card_of(H200), {KERNEL: {a: 1.0, b: 2.0}}, {a: 5.0, c: 8.0})
    second = fit_cost_model.Sample(card_of(H200), {KERNEL: {b: 3.0}, STREAM_K: {a: 4.0}}, {a: 6.0, b: 7.0})
    both = fit_cost_model.together(first, second)
    assert both.kernels == {KERNEL: {a: 1.0, b: 3.0}, STREAM_K: {a: 4.0}}
    assert both.cublas == {a: 6.0, b: 7.0, c: 8.0}


def times_factor(rows: list[recorded.Recorded], factor: float) -> list[recorded.Recorded]:
    return [recorded.Recorded(**{**vars(row), "microseconds": row.microseconds * factor}) for row in rows]


def test_times_of_another_card_stay_where_shared_kernels_have_few_times() -> None:
    rows = recordings_of(KERNEL, TRUTH)
    few = fit_cost_model.sample_of(rows[: fit_cost_model.FEWEST_TIMES - 1])
    other = fit_cost_model.sample_of(times_factor(rows, 0.5))
    assert fit_cost_model.as_on_the_same_card(other, few, START).kernels == other.kernels


def test_a_wrong_time_of_another_card_does_not_move_the_others() -> None:
    rows = recordings_of(KERNEL, TRUTH)
    there = times_factor(rows[:1], 50.0) + times_factor(rows[1:], 0.5)
    scaled = fit_cost_model.as_on_the_same_card(fit_cost_model.sample_of(there), fit_cost_model.sample_of(rows), START)
    for row in rows[1:]:
        assert scaled.kernels[KERNEL][row.problem] == pytest.approx(row.microseconds, rel=0.01)


def test_every_other_card_is_compared_with_the_first_one(monkeypatch: pytest.MonkeyPatch) -> None:
    first = recordings_of(KERNEL, TRUTH)
    unknown = recordings_of(STREAM_K, TRUTH._replace(split_cycles=2500.0))
    cards = {"second": times_factor(first + unknown, 0.5), "third": times_factor(unknown[:5], 2.0)}
    monkeypatch.setattr(fit_cost_model, "OTHER_CARDS", tuple(cards))
    monkeypatch.setattr(fit_cost_model, "read", lambda paths: [row for path in paths for row in cards[path]])
    found = fit_cost_model.with_other_cards(fit_cost_model.sample_of(first), START).kernels
    for row in first:
        assert found[KERNEL][row.problem] == pytest.approx(row.microseconds)
    for row in unknown[:5]:
        assert found[STREAM_K][row.problem] == pytest.approx(2.0 * row.microseconds), "the first card has no time of it"
    for row in unknown[5:]:
        assert found[STREAM_K][row.problem] == pytest.approx(row.microseconds), "the second card's"
