"""Fit the cost model to recorded times, and write it as the package's data.

    python tools/fit_cost_model.py                     # writes w4a16gen/choose/data/cost_model.json
    python tools/fit_cost_model.py --times more.csv    # with more recordings (tools/record_times.py writes them)
    python tools/fit_cost_model.py --dry-run           # only prints errors and losses

Each kernel's rates are fitted to its own times by robust least squares on the logarithm of estimated over recorded
time. A weak prior keeps rates that few times determine near what the kernel's shape suggests. A kernel without times
gets rates between those of tiles with fewer and with more tokens. The result depends on the inputs only. Losses are of
choices for layers that had no part in the rates: the layers are divided into three parts, and each is left out in turn.
Needs scipy: pip install 'w4a16gen[tools]'.
"""

from __future__ import annotations

import argparse
import bisect
import itertools
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from recorded import DATA_FOLDER, Recorded, read
from scipy.optimize import least_squares  # type: ignore[import-untyped]

from w4a16gen.choose.cards import H100, Card, card_of
from w4a16gen.choose.cost_model import MODEL_PATH, SCHEMA, Constants, CostModel, Rates, in_preference
from w4a16gen.files import write_if_changed
from w4a16gen.kernels.arrangement import native_arrangement
from w4a16gen.kernels.config import KernelConfig, QuantMode, Scheduler
from w4a16gen.kernels.device import HOPPER, Device
from w4a16gen.kernels.problem import Problem
from w4a16gen.kernels.spaces import enumerate_space

SAMPLE = DATA_FOLDER / "h200_sample.csv.xz"
"""All kernels that may be fastest somewhere, and cuBLAS, on random problems; the rates are fitted to it."""
SAMPLE_BEFORE = DATA_FOLDER / "h200_sample_before.csv.xz"
"""Times of kernels before their code changed. They count where `SAMPLE` has fewer than `FEWEST_TIMES` of a kernel."""
OTHER_CARDS = tuple(
    DATA_FOLDER / f"h200_{name}.csv.xz" for name in ("more_tiles", "candidates", "graph_sizes", "wider_set")
)
"""Times by other H200s: of tiles of sixteen more numbers of tokens, and of the kernels that space `default` was chosen
among, on random problems and on those with the token counts of CUDA graphs. Each file has kernels that `SAMPLE` has
too."""
H100_TIMES = DATA_FOLDER / "h100_times.csv.xz"
"""Older kernels and cuBLAS on an H100, for seconds at the power limit."""
START = DATA_FOLDER / "start.json"
MODE = QuantMode.FINEGRAINED_SCALE_ONLY
FEWEST_TIMES = 10
FLOPS_OF_CARDS = (2e10, 1e11, 4e11)
"""Between these numbers of operations, two cards of a kind differ by one factor: power limits long problems only."""
PRIOR_WEIGHTS = Rates(0.1, 0.1, 0.2, 0.1, 0.8)
"""What a rate that is off by a factor e costs, beside an error of 1 in a time."""
ROBUST_WITHIN = 0.05
"""Errors beyond this count less than their square."""
FOLDS = 3
DIGITS = 4
BANDS = ((1, 64), (65, 256), (257, 1024), (1025, 1 << 30))
"""Tokens, from and to, for which errors and losses are reported."""

Vector = npt.NDArray[np.float64]
Times = Mapping[Problem, float]


class Sample(NamedTuple):
    """The recorded times of one card: of each kernel, and of cuBLAS."""

    card: Card
    kernels: Mapping[KernelConfig, Times]
    cublas: Times


def sample_of(records: Iterable[Recorded]) -> Sample:
    """Return the times of one card; several times of a kernel in a problem count as their geometric mean."""
    logs: dict[tuple[KernelConfig | None, Problem], list[float]] = {}
    card = H100
    for record in records:
        if record.mode is MODE:
            logs.setdefault((record.kernel, record.problem), []).append(math.log(record.microseconds))
            card = card_of(Device(0, record.gpu, HOPPER, record.sm_count))
    kernels: dict[KernelConfig, dict[Problem, float]] = {}
    cublas: dict[Problem, float] = {}
    for (kernel, problem), of in logs.items():
        times = cublas if kernel is None else kernels.setdefault(kernel, {})
        times[problem] = math.exp(sum(of) / len(of))
    return Sample(card, kernels, cublas)


def with_older(sample: Sample, older: Sample) -> Sample:
    """Return a sample in which kernels with too few times have their older ones too."""
    few = {
        kernel: {**times, **sample.kernels.get(kernel, {})}
        for kernel, times in older.kernels.items()
        if len(sample.kernels.get(kernel, {})) < FEWEST_TIMES
    }
    return Sample(sample.card, {**sample.kernels, **few}, sample.cublas)


def as_on_the_same_card(other: Sample, sample: Sample, constants: Constants) -> Sample:
    """Return times of another card of the kind as if the sample's card had taken them.

    Kernels that both have are compared by their rates in the sample, for problems with like numbers of operations.
    The medians of the errors differ by the factor between the cards. Where no such kernel was timed, times stay, as do
    those of cuBLAS.
    """
    model = model_without_heads(constants)
    shared = {
        kernel: fit_rates(kernel, times, model, sample.card)
        for kernel, times in sample.kernels.items()
        if len(times) >= FEWEST_TIMES and kernel in other.kernels
    }

    def errors(of: Sample) -> dict[int, list[float]]:
        logs: dict[int, list[float]] = {}
        for kernel, rates in shared.items():
            for problem, time in of.kernels[kernel].items():
                cycles = model.cycles(rates, model.work(kernel, problem, sample.card), sample.card)
                log = math.log(cycles / constants.cycles_per_microsecond / time)
                logs.setdefault(_flops_band(problem), []).append(log)
        return logs

    here, there = errors(sample), errors(other)
    factors = {at: math.exp(statistics.median(there[at]) - statistics.median(here[at])) for at in here if at in there}
    kernels = {
        kernel: {problem: time * factors.get(_flops_band(problem), 1.0) for problem, time in times.items()}
        for kernel, times in other.kernels.items()
    }
    return Sample(sample.card, kernels, other.cublas)


def _flops_band(problem: Problem) -> int:
    return bisect.bisect(FLOPS_OF_CARDS, problem.flops)


def together(first: Sample, second: Sample) -> Sample:
    """Return the times of two samples of a card; the second one's where both have a problem."""
    kernels = {
        kernel: {**first.kernels.get(kernel, {}), **second.kernels.get(kernel, {})}
        for kernel in first.kernels.keys() | second.kernels.keys()
    }
    return Sample(first.card, kernels, {**first.cublas, **second.cublas})


def with_other_cards(first: Sample, constants: Constants) -> Sample:
    """Return a sample with the times of `OTHER_CARDS`, as if its card had taken all of them."""
    sample = first
    for path in OTHER_CARDS:
        sample = together(sample, as_on_the_same_card(sample_of(read([path])), first, constants))
    return sample


def model_without_heads(constants: Constants, rates: Mapping[str, Rates] | None = None) -> CostModel:
    """Return the model of the recorded kernels, whose stream-K gives tiles no heads."""
    return CostModel(constants, rates or {}, stream_k_has_heads=False)


def prior_of(kernel: KernelConfig, constants: Constants) -> Rates:
    """Return the rates that a kernel's shape suggests."""
    clock = constants.cycles_per_microsecond
    blocks = kernel.cta.channels // 64
    return Rates(
        launch_cycles=2.0 * clock,
        tile_cycles=(0.6 + 0.012 * native_arrangement(kernel).accumulators) * clock,
        block_cycles=max(4.2 * kernel.cta.tokens * blocks, 130.0 * blocks),
        split_cycles=1.0 * clock if kernel.scheduler is Scheduler.STREAM_K else 0.0,
        long_factor=1.05,
    )


def fit_rates(kernel: KernelConfig, times: Times, model: CostModel, card: Card) -> Rates:
    """Return a kernel's rates by its times; without any, the prior."""
    prior = prior_of(kernel, model.constants)
    free = [place for place, value in enumerate(prior) if value > 0]
    works = [model.work(kernel, problem, card) for problem in times]
    logs = np.log(list(times.values()))
    clock = model.constants.cycles_per_microsecond

    def rates_at(place: Vector) -> Rates:
        values = list(prior)
        for index, log in zip(free, place, strict=True):
            values[index] = prior[index] * math.exp(log)
        return Rates(*values)

    def residuals(place: Vector) -> Vector:
        rates = rates_at(place)
        estimated = np.log([model.cycles(rates, work, card) / clock for work in works]) if works else np.empty(0)
        return np.concatenate(
            [estimated - logs, [PRIOR_WEIGHTS[index] * at for index, at in zip(free, place, strict=True)]]
        )

    found = least_squares(residuals, np.zeros(len(free)), loss="soft_l1", f_scale=ROBUST_WITHIN, diff_step=1e-4).x
    return rounded(rates_at(found))


def fit_all(sample: Sample, kernels: Sequence[KernelConfig], constants: Constants) -> CostModel:
    """Return a model with the rates of all kernels of a space, by their times or those of their neighbours."""
    plain = model_without_heads(constants)
    fitted = {
        kernel: fit_rates(kernel, sample.kernels[kernel], plain, sample.card)
        for kernel in kernels
        if kernel in sample.kernels
    }
    rates = {kernel.shape_name: fitted.get(kernel) or rates_between(kernel, fitted, constants) for kernel in kernels}
    return model_without_heads(constants, dict(sorted(rates.items())))


def rates_between(kernel: KernelConfig, fitted: Mapping[KernelConfig, Rates], constants: Constants) -> Rates:
    """Return the rates of a kernel without times: those that its shape suggests, off by as much as its neighbours'.

    Neighbours differ in the tokens of the tile only, and are the next ones with fewer and with more. Between them the
    logarithm of the ratio is linear in the tokens; a single neighbour's ratio counts alone.
    """
    alike = {
        other.cta.tokens: other
        for other in fitted
        if replace(other, cta=replace(other.cta, tokens=kernel.cta.tokens)) == kernel
    }
    below = max((tokens for tokens in alike if tokens < kernel.cta.tokens), default=None)
    above = min((tokens for tokens in alike if tokens > kernel.cta.tokens), default=below)
    below = above if below is None else below
    prior = prior_of(kernel, constants)
    if below is None or above is None:
        return rounded(prior)
    share = (kernel.cta.tokens - below) / (above - below) if above > below else 0.0
    low, high = (off_of(fitted[alike[tokens]], prior_of(alike[tokens], constants)) for tokens in (below, above))
    off = [(1 - share) * first + share * second for first, second in zip(low, high, strict=True)]
    return rounded(Rates(*(value * math.exp(log) for value, log in zip(prior, off, strict=True))))


def off_of(rates: Rates, prior: Rates) -> list[float]:
    """Return the logarithms of rates over those that the shape suggests; 0 for a rate that the kernel does not have."""
    return [math.log(value / expected) if expected > 0 else 0.0 for value, expected in zip(rates, prior, strict=True)]


def rounded(rates: Rates) -> Rates:
    """Return rates with the digits that are written."""
    return Rates(*(float(f"{value:.{DIGITS}g}") for value in rates))


def fit_dense(times: Times, start: Constants, card: Card) -> Constants:
    """Return the constants with those of dense FP16 fitted to cuBLAS's times."""
    names = [name for name in vars(start) if name.startswith("dense_")]
    centre = np.array([getattr(start, name) for name in names])

    def constants_at(place: Vector) -> Constants:
        values = dict(zip(names, (centre * np.exp(place)).tolist(), strict=True))
        return Constants.from_json(asdict(start) | values)

    def residuals(place: Vector) -> Vector:
        model = CostModel(constants_at(place), {})
        logs = [math.log(model.dense_microseconds(problem, card) / time) for problem, time in times.items()]
        return np.concatenate([logs, 0.5 * place])

    found = constants_at(least_squares(residuals, np.zeros(len(names)), diff_step=1e-4).x)
    digits = {name: float(f"{getattr(found, name):.{DIGITS}g}") for name in names}
    return Constants.from_json(asdict(found) | digits)


def sustained_factor(model: CostModel, sample: Sample) -> float:
    """Return by how much long problems took longer in seconds at the power limit than a model says."""
    logs = [
        math.log(time / model.microseconds(kernel, problem, sample.card))
        for kernel, times in sample.kernels.items()
        for problem, time in times.items()
        if model.is_long(problem) and kernel.shape_name in model.rates
    ]
    return round(math.exp(sum(logs) / len(logs)), 3)


def errors_by_band(model: CostModel, sample: Sample) -> dict[str, dict[str, float]]:
    """Return mean and standard deviation of the logarithm of estimated over recorded time, by tokens."""
    of: dict[str, list[float]] = {}
    for kernel, times in sample.kernels.items():
        for problem, time in times.items():
            if kernel.shape_name in model.rates:
                log = math.log(model.microseconds(kernel, problem, sample.card) / time)
                of.setdefault(band_of(problem), []).append(log)
    return {
        band: {"mean": round(float(np.mean(logs)), 4), "deviation": round(float(np.std(logs)), 4)}
        for band, logs in in_order(of)
    }


def band_of(problem: Problem) -> str:
    """Return the name of a problem's band of tokens."""
    return name_of(*next((low, high) for low, high in BANDS if low <= problem.m <= high))


def name_of(low: int, high: int) -> str:
    """Return the name of a band."""
    return f"{low} to {high}" if high < BANDS[-1][1] else f"{low} and more"


def in_order(of: Mapping[str, list[float]]) -> list[tuple[str, list[float]]]:
    """Return the values of bands, fewest tokens first."""
    return [(name, of[name]) for name in itertools.starmap(name_of, BANDS) if name in of]


def losses(estimated: Mapping[Problem, Mapping[KernelConfig, float]], sample: Sample) -> dict[str, dict[str, float]]:
    """Return by how much the kernel of the least estimate took longer than the fastest, by tokens."""
    of: dict[str, list[float]] = {}
    for problem, estimates in estimated.items():
        times = {kernel: sample.kernels[kernel][problem] for kernel in estimates}
        chosen = in_preference(estimates.items(), problem)[0][0]
        of.setdefault(band_of(problem), []).append(times[chosen] / min(times.values()))
    return {
        band: {
            "problems": len(ratios),
            "geometric_mean": round(math.exp(float(np.mean(np.log(ratios)))) - 1, 4),
            "worst": round(max(ratios) - 1, 4),
        }
        for band, ratios in in_order(of)
    }


def losses_of_left_out_layers(sample: Sample, constants: Constants) -> dict[str, dict[str, float]]:
    """Return the losses of choices by rates that do not know the layer; see the module's docstring."""
    layers = sorted({(problem.n, problem.k) for times in sample.kernels.values() for problem in times})
    np.random.default_rng(0).shuffle(layers)
    estimated: dict[Problem, dict[KernelConfig, float]] = {}
    plain = model_without_heads(constants)
    for fold in range(FOLDS):
        left_out = set(map(tuple, layers[fold::FOLDS]))
        for kernel, times in sample.kernels.items():
            known = {problem: time for problem, time in times.items() if (problem.n, problem.k) not in left_out}
            if len(known) == len(times):
                continue
            rates = fit_rates(kernel, known, plain, sample.card)
            for problem in times.keys() - known.keys():
                cycles = plain.cycles(rates, plain.work(kernel, problem, sample.card), sample.card)
                estimated.setdefault(problem, {})[kernel] = cycles / constants.cycles_per_microsecond
    return losses(estimated, sample)


def estimates_of(model: CostModel, sample: Sample) -> dict[Problem, dict[KernelConfig, float]]:
    """Return a model's estimates for everything that was recorded."""
    estimated: dict[Problem, dict[KernelConfig, float]] = {}
    for kernel, times in sample.kernels.items():
        for problem in times:
            if kernel.shape_name in model.rates:
                estimate = model.microseconds(kernel, problem, sample.card)
                estimated.setdefault(problem, {})[kernel] = estimate
    return estimated


def document(model: CostModel, source: str, reports: Mapping[str, object]) -> str:
    """Return the content of the package's data file: JSON with the rates of one kernel a line."""
    head = {
        "schema": SCHEMA,
        "gpu": "NVIDIA H200",
        "source": source,
        "constants": asdict(model.constants),
        "residuals": dict(reports),
    }
    lines = (f"{json.dumps(name)}: {json.dumps(list(rates))}" for name, rates in model.rates.items())
    return json.dumps(head, indent=2).removesuffix("\n}") + ',\n  "rates": {\n' + ",\n".join(lines) + "\n}}\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit, report and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--times", type=Path, action="append", default=[], help="another file to fit to (repeatable)")
    parser.add_argument("--output", type=Path, default=MODEL_PATH, help="the file to write")
    parser.add_argument("--dry-run", action="store_true", help="print errors and losses, and write nothing")
    options = parser.parse_args(arguments)
    start = Constants.from_json(json.loads(START.read_text())["constants"])
    first = sample_of(read([SAMPLE, *options.times]))
    current = with_other_cards(first, start)
    sample = with_older(current, sample_of(read([SAMPLE_BEFORE])))
    on_h100 = sample_of(read([H100_TIMES]))
    constants = fit_dense(on_h100.cublas, start, on_h100.card)
    kernels = {config.shape_name: replace(config, mode=MODE) for config in enumerate_space("native")}
    model = fit_all(sample, list(kernels.values()), constants)
    reports = {
        "errors": errors_by_band(model, first),
        "choice_loss_in_left_out_layers": losses_of_left_out_layers(first, constants),
        "errors_on_all_cards": errors_by_band(model, current),
        "choice_loss_in_left_out_layers_on_all_cards": losses_of_left_out_layers(current, constants),
        "errors_on_h100": errors_by_band(model, on_h100),
        "choice_loss_on_h100": losses(estimates_of(model, on_h100), on_h100),
    }
    sustained = {"sustained_factor": sustained_factor(model, on_h100)}
    model = CostModel(Constants.from_json(asdict(constants) | sustained), model.rates)
    print(json.dumps(reports, indent=2))
    times = sum(map(len, sample.kernels.values()))
    source = (
        f"Written by tools/fit_cost_model.py from {times} times of {len(sample.kernels)} kernels on NVIDIA H200s. "
        f"Dense FP16 and sustained_factor: from {H100_TIMES.name}. {json.loads(START.read_text())['source']}"
    )
    if not options.dry_run:
        write_if_changed(options.output, document(model, source, reports))


if __name__ == "__main__":
    main()
