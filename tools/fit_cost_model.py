"""Fit the cost model's constants to recorded times, and write them as the package's data.

    python tools/fit_cost_model.py                     # writes w4a16gen/choose/data/h100_cost_model.json
    python tools/fit_cost_model.py --times more.csv    # with more recordings (tools/record_times.py writes them)
    python tools/fit_cost_model.py --dry-run           # only prints errors before and after

Least squares on the logarithm of estimated over recorded time. Several times of one kernel in one problem count as
their geometric mean. The start values are in tools/data/h100_start.json. A weak penalty keeps constants near them that
the recordings do not determine. The result depends on the inputs only. Needs scipy: pip install 'w4a16gen[tools]'.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from choice_loss import loss_of, losses_by_layer, summary
from recorded import DATA_FOLDER, Recorded, read
from scipy.optimize import least_squares  # type: ignore[import-untyped]

from w4a16gen.choose.cards import H100, Card, card_of
from w4a16gen.choose.cost_model import MODEL_PATH, SCHEMA, CostModel, Work
from w4a16gen.choose.packaged_times import MEASURED_MODE, Neighbours, default_reach, table
from w4a16gen.files import write_json
from w4a16gen.kernels.config import KernelConfig
from w4a16gen.kernels.device import HOPPER, Device
from w4a16gen.kernels.problem import Problem

TIMES = DATA_FOLDER / "h100_times.csv.xz"
HELD_OUT = DATA_FOLDER / "h100_held_out.csv.xz"
"""Times of ten layers that no constant is fitted to."""
START = DATA_FOLDER / "h100_start.json"
FIXED = ("cycles_per_microsecond", "clusters_of_4", "paired_share", "long_flops")
"""A unit, a count, a share chosen by the loss of the choice, and a limit that `bench` times by: not fitted."""
PENALTY = 0.5
"""A constant that moves by a factor e costs as much as `PENALTY`**2 of squared error, summed over all times."""
DIGITS = 4
"""Significant digits of a fitted constant."""
BANDS = ((1, 64), (65, 512), (513, 1 << 30))
"""Tokens, from and to, for which errors are reported."""

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Sample:
    """One kernel, or cuBLAS, in one problem on one card."""

    kernel: KernelConfig | None
    problem: Problem
    card: Card
    log_microseconds: float
    """Mean natural logarithm of its recorded times."""
    work: Work | None
    """The kernel's work, which depends on `FIXED` constants only; None for cuBLAS."""

    def estimate(self, model: CostModel) -> float:
        """Return the estimated microseconds."""
        if self.work is None:
            return model.dense_microseconds(self.problem, self.card)
        return model.cycles(self.work, self.card) / model.cycles_per_microsecond


def samples_of(records: Sequence[Recorded], start: CostModel) -> list[Sample]:
    """Return one sample for each kernel, problem and card, in a fixed order."""
    pooled: dict[tuple[str, KernelConfig | None, Problem, Card], list[float]] = {}
    for record in records:
        if record.mode is not MEASURED_MODE:
            continue
        card = card_of(Device(0, record.gpu, HOPPER, record.sm_count))
        name = "" if record.kernel is None else record.kernel.name
        pooled.setdefault((name, record.kernel, record.problem, card), []).append(math.log(record.microseconds))
    samples = []
    for (_, kernel, problem, card), logs in pooled.items():
        work = None if kernel is None else start.work(kernel, problem, card)
        samples.append(Sample(kernel, problem, card, sum(logs) / len(logs), work))
    return sorted(samples, key=lambda sample: (sample.card.name, *vars(sample.problem).values(), str(sample.kernel)))


def errors(model: CostModel, samples: Sequence[Sample]) -> Vector:
    """Return the logarithm of estimated over recorded time."""
    return np.array([math.log(sample.estimate(model)) - sample.log_microseconds for sample in samples])


def fit(names: Sequence[str], samples: Sequence[Sample], start: CostModel, first: CostModel | None = None) -> CostModel:
    """Return a model whose named constants fit the samples.

    Args:
        names: the constants that may change.
        samples: recorded times; at least as many as constants.
        start: the values that the penalty keeps constants near.
        first: where the search begins; None begins at `start`.
    """
    centre = np.array([getattr(start, name) for name in names])

    def model_at(place: Vector) -> CostModel:
        return with_constants(start, dict(zip(names, (centre * np.exp(place)).tolist(), strict=True)))

    def residuals(place: Vector) -> Vector:
        return np.concatenate([errors(model_at(place), samples), PENALTY * place])

    begin = np.log([getattr(first or start, name) for name in names]) - np.log(centre)
    return rounded(model_at(least_squares(residuals, begin, diff_step=1e-4).x), names)


def with_constants(model: CostModel, constants: Mapping[str, float]) -> CostModel:
    """Return the model with some constants replaced."""
    return CostModel.from_json(asdict(model) | dict(constants))


def rounded(model: CostModel, names: Sequence[str]) -> CostModel:
    """Return the model with the named constants at `DIGITS` significant digits."""
    return with_constants(model, {name: float(f"{getattr(model, name):.{DIGITS}g}") for name in names})


def refit(samples: Sequence[Sample], start: CostModel, first: CostModel | None = None) -> CostModel:
    """Return a model with all constants fitted: those of kernels to kernels, those of dense FP16 to cuBLAS."""
    fitted = start
    free = [name for name in vars(start) if name not in FIXED]
    dense = [name for name in free if name.startswith("dense_")]
    native = [name for name in free if name not in dense]
    for names, of_cublas in ((native, False), (dense, True)):
        chosen = [sample for sample in samples if (sample.kernel is None) is of_cublas]
        if len(chosen) >= len(names):
            part = fit(names, chosen, start, first)
            fitted = with_constants(fitted, {name: getattr(part, name) for name in names})
    return fitted


def root_mean_square(values: Vector) -> float:
    """Return the root mean square, at four decimals."""
    return round(float(np.sqrt(np.mean(values**2))), 4)


def errors_by_band(model: CostModel, samples: Sequence[Sample]) -> dict[str, object]:
    """Return the root-mean-square errors of kernels and of cuBLAS, for all samples and by tokens."""
    report: dict[str, object] = {}
    for label, of_cublas in (("kernels", False), ("cublas", True)):
        chosen = [sample for sample in samples if (sample.kernel is None) is of_cublas]
        bands = {"all": chosen}
        for low, high in BANDS:
            bands[f"{low} to {high}" if high < BANDS[-1][1] else f"{low} and more"] = [
                sample for sample in chosen if low <= sample.problem.m <= high
            ]
        report[label] = {name: root_mean_square(errors(model, part)) for name, part in bands.items() if part}
    return report


def report_on(model: CostModel, fitted_to: Sequence[Sample], held_out: Sequence[Sample]) -> dict[str, object]:
    """Return errors of the estimates, and losses of the choices that follow from them."""
    reach = default_reach()
    times: dict[Problem, dict[KernelConfig, float]] = {}
    for sample in held_out:
        if sample.kernel is not None:
            times.setdefault(sample.problem, {})[sample.kernel] = math.exp(sample.log_microseconds)
    neighbours = Neighbours(table(), model, reach)
    return {
        "rms_log_error": errors_by_band(model, fitted_to),
        "rms_log_error_held_out": errors_by_band(model, held_out),
        "choice_loss_leave_one_layer_out": summary(losses_by_layer(table(), model, reach).values()),
        "choice_loss_held_out": summary(loss_of(neighbours, problem, of) for problem, of in times.items()),
    }


def of_h100(samples: Sequence[Sample]) -> list[Sample]:
    """Return the samples of cards that share an H100's times, which constants are fitted to."""
    return [sample for sample in samples if sample.card.shares_times_with(H100)]


def errors_on_other_cards(model: CostModel, samples: Sequence[Sample]) -> dict[str, object]:
    """Return the root-mean-square errors on cards that no constant is fitted to."""
    by_card: dict[str, list[Sample]] = {}
    for sample in samples:
        if not sample.card.shares_times_with(H100):
            by_card.setdefault(f"{sample.card.name}, {sample.card.sm_count} SMs", []).append(sample)
    return {name: errors_by_band(model, part) for name, part in sorted(by_card.items())}


def source_of(files: Sequence[Path], records: Sequence[Recorded], fitted_to: Sequence[Sample]) -> str:
    """Return where the constants come from."""
    kernels = sum(sample.kernel is not None for sample in fitted_to)
    dates = sorted({record.date for record in records})
    names = ", ".join(path.name for path in files)
    return (
        f"Written by tools/fit_cost_model.py from {names}: {kernels} kernels in problems and "
        f"{len(fitted_to) - kernels} problems of cuBLAS, recorded from {dates[0]} to {dates[-1]}. Nearly all "
        f"kernels are those of space default. Not fitted: {', '.join(FIXED)}."
    )


def document(model: CostModel, source: str, reports: Mapping[str, object]) -> dict[str, object]:
    """Return the content of the package's data file."""
    return {
        "schema": SCHEMA,
        "gpu": "NVIDIA H100 80GB HBM3",
        "source": source,
        "constants": asdict(model),
        "residuals": dict(reports),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit, report and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--times", type=Path, action="append", default=[], help="another file to fit to (repeatable)")
    parser.add_argument("--output", type=Path, default=MODEL_PATH, help="the file to write")
    parser.add_argument("--dry-run", action="store_true", help="print errors and write nothing")
    options = parser.parse_args(arguments)
    files = [TIMES, *options.times]
    records = read(files)
    start = CostModel.read(START)
    samples = samples_of(records, start)
    known = of_h100(samples)
    model = refit(known, start)
    held_out = samples_of(read([HELD_OUT]), start)
    reports = {"start": report_on(start, known, held_out), "fitted": report_on(model, known, held_out)}
    if other_cards := errors_on_other_cards(model, samples):
        reports["other_cards"] = other_cards
    print(json.dumps(reports, indent=2))
    if not options.dry_run:
        write_json(options.output, document(model, source_of(files, records, known), reports))


if __name__ == "__main__":
    main()
