"""The fit of the cost model: deterministic, right on made-up times, and the origin of the committed constants."""

from __future__ import annotations

import json
import math
from pathlib import Path

import fit_cost_model
import pytest
import recorded
from fakes.devices import H100, H200

from w4a16gen import Problem
from w4a16gen.choose.cost_model import MODEL_PATH, CostModel, default_cost_model
from w4a16gen.choose.packaged_times import MEASURED_MODE
from w4a16gen.kernels.device import Device
from w4a16gen.kernels.spaces import enumerate_space

START = CostModel.read(fit_cost_model.START)
KERNELS = [config for config in enumerate_space("default") if config.mode is MEASURED_MODE]


def recordings_of(model: CostModel, device: Device = H100) -> list[recorded.Recorded]:
    """Return the times that a GPU would take if a model were right."""
    rows = []
    for m in (1, 8, 16, 64, 128, 300, 1024, 5000):
        for n, k in ((4096, 4096), (1024, 8192), (14336, 4096), (28672, 8192)):
            problem = Problem(m, n, k, 128)
            for kernel in (*KERNELS, None):
                cycles = 0.0 if kernel is None else model.native_cycles(kernel, problem)
                time = cycles / model.cycles_per_microsecond if kernel else model.dense_microseconds(problem)
                row = (kernel, problem, MEASURED_MODE, time, device.name, device.sm_count, "2026-11-28", "a test")
                rows.append(recorded.Recorded(*row))
    return rows


def test_constants_behind_made_up_times_are_found() -> None:
    changes = {"launch_cycles": 3000.0, "packed_bytes_per_cycle": 1500.0, "tensor_cycles": 5.0, "product_cycles": 220.0}
    truth = fit_cost_model.with_constants(START, {**changes, "dense_flops_per_microsecond": 7e8})
    samples = fit_cost_model.samples_of(recordings_of(truth), START)
    fitted = fit_cost_model.refit(samples, START)
    assert fitted.dense_flops_per_microsecond == pytest.approx(7e8, rel=0.02)
    for name, value in changes.items():
        assert getattr(fitted, name) == pytest.approx(value, rel=0.1), name
    for name in fit_cost_model.FIXED:
        assert getattr(fitted, name) == getattr(START, name)
    off = fit_cost_model.errors(fitted, samples)
    assert fit_cost_model.root_mean_square(off) < 0.005


def test_several_times_count_as_their_geometric_mean_whatever_their_order() -> None:
    row = recordings_of(START)[0]
    pair = [row, recorded.Recorded(**{**vars(row), "microseconds": 4 * row.microseconds})]
    for rows in (pair, pair[::-1]):
        (sample,) = fit_cost_model.samples_of(rows, START)
        assert sample.log_microseconds == pytest.approx(math.log(2 * row.microseconds))


def test_the_committed_constants_are_the_best_for_the_committed_times() -> None:
    committed = default_cost_model()
    samples = fit_cost_model.samples_of(recorded.read([fit_cost_model.TIMES]), START)
    fitted = fit_cost_model.refit(samples, START, committed)
    for name, value in vars(committed).items():
        assert getattr(fitted, name) == pytest.approx(value, rel=0.01), f"{name}: run tools/fit_cost_model.py"


def test_the_committed_residuals_are_those_of_the_committed_constants() -> None:
    committed = default_cost_model()
    residuals = json.loads(MODEL_PATH.read_text())["residuals"]
    samples = fit_cost_model.samples_of(recorded.read([fit_cost_model.TIMES]), START)
    for name, model in (("start", START), ("fitted", committed)):
        assert residuals[name]["rms_log_error"] == fit_cost_model.errors_by_band(model, samples)


def test_other_cards_are_reported_and_not_fitted() -> None:
    samples = fit_cost_model.samples_of([*recordings_of(START), *recordings_of(START, H200)], START)
    known = fit_cost_model.of_h100(samples)
    assert 2 * len(known) == len(samples)
    other = fit_cost_model.errors_on_other_cards(START, samples)
    assert other.keys() == {"NVIDIA H200, 132 SMs"}
    assert fit_cost_model.errors_on_other_cards(START, known) == {}
    source = fit_cost_model.source_of([Path("a.csv")], recordings_of(START), known)
    assert source.startswith("Written by tools/fit_cost_model.py from a.csv: 640 kernels in problems and 32 problems")


def test_a_recording_with_a_wrong_line_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "times.csv"
    for line in ("cublas_fp16,1,2", "a kernel,1,512,1024,128,fgs,1.0,a GPU,132,2026-11-28,a test"):
        path.write_text(",".join(recorded.COLUMNS) + f"\n{line}\n")
        with pytest.raises(ValueError, match=r"times\.csv, line 2 is not a measurement"):
            recorded.read([path])
